"""Redaction replaces secrets and personal data by their kind, and leaves the rest."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.accounts.redaction import Redactor, redact
from serve_app.records import Outcome, RequestRecord, new_id, utc_now

REDACTOR = Redactor()
CAI = "cai-0123456789ab-" + "Ab1" * 14 + "x"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Write to ada@example.org.", "Write to [EMAIL]."),
        ("a.b+c@mail.example.co.uk, b@x.de", "[EMAIL], [EMAIL]"),
        ("jürgen@müller.de", "[EMAIL]"),
        ("Call +49 89 63648018 now", "Call [PHONE] now"),
        ("Call 089 / 636 48018 now", "Call [PHONE] now"),
        ("(415) 555-2671 or +1 415-555-2671", "[PHONE] or [PHONE]"),
        ("+44 20 7946 0958", "[PHONE]"),
        ("card 4111 1111 1111 1111, thanks", "card [CARD], thanks"),
        ("5555-5555-5555-4444", "[CARD]"),
        ("378282246310005", "[CARD]"),
        ("order 12 4111 1111 1111 1111 7", "order 12 [CARD] 7"),
        ("GB82 WEST 1234 5698 7654 32 and more", "[IBAN] and more"),
        ("DE89370400440532013000", "[IBAN]"),
        ("from 192.0.2.7:80 to 2001:db8::1", "from [IP]:80 to [IP]"),
        ("::ffff:192.0.2.7", "[IP]"),
        (f"my key {CAI}!", "my key [API KEY]!"),
        ("sk-proj-abcdefghijklmnopqrstuvwxyz0123", "[API KEY]"),
        ("sk-ant-api03-abcdefghijklmnopqrstuvwxyz", "[API KEY]"),
        ("AKIAIOSFODNN7EXAMPLE", "[AWS KEY]"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", "aws_secret_access_key = [SECRET]"),
        (JWT, "[JWT]"),
        (f"Authorization: Bearer {JWT}", "Authorization: Bearer [JWT]"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer [TOKEN]"),
        (f"key:\n{PEM}\nend", "key:\n[PRIVATE KEY]\nend"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEow", "[PRIVATE KEY]"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "[API KEY]"),
        ("glpat-abcdefghijklmnopqrst", "[API KEY]"),
        ("xoxb-123456789012-abcdefghijkl", "[API KEY]"),
        ("postgres://u:secret-pw@host/db", "postgres://[CREDENTIALS]@host/db"),
        ('password: "hunter2hunter2"', 'password: "[SECRET]"'),
    ],
)
def test_what_is_found_is_replaced_by_its_kind(text: str, redacted: str) -> None:
    assert REDACTOR.text(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The capital of France is Paris.",
        "4111 1111 1111 1112 has a wrong digit at its end",
        "GB82 WEST 1234 5698 7654 33",
        "std::vector<int> and a::b",
        "12:30:45 on 2024-05-06",
        "256.1.2.3",
        "pi is 3.14159265358979",
        "sk-learn is a library",
        "a @ b, @ada, ada@",
        "x = 1234567890123",
        "bearer of news",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert REDACTOR.text(text) == text


def test_texts_in_json_are_redacted_wherever_they_stand() -> None:
    body = {
        "messages": [
            {"role": "user", "content": "line\nada@example.org"},
            {"role": "user", "content": [{"type": "text", "text": "bob@example.org"}]},
            {"role": "user", "content": [{"image_url": {"url": "data:image/png;base64,AAAA"}}]},
        ],
        "metadata": {"eve@example.org": 4111111111111111, "n": 7, "flag": True},
        "prompt": [504, 3575, 282],
        "stop_token_ids": [1, 2],
        "max_tokens": 5,
        "temperature": 0.5,
    }
    assert orjson.loads(REDACTOR.body(orjson.dumps(body).decode())) == {
        "messages": [
            {"role": "user", "content": "line\n[EMAIL]"},
            {"role": "user", "content": [{"type": "text", "text": "[EMAIL]"}]},
            {"role": "user", "content": [{"image_url": {"url": "[DATA]"}}]},
        ],
        "metadata": {"[EMAIL]": "[CARD]", "n": 7, "flag": True},
        "prompt": "[TOKENS]",
        "stop_token_ids": [1, 2],
        "max_tokens": 5,
        "temperature": 0.5,
    }


@given(before=st.text(max_size=30), after=st.text(max_size=30))
def test_an_address_does_not_hide_in_its_surroundings(before: str, after: str) -> None:
    assert "ada@example.org" not in REDACTOR.text(f"{before} ada@example.org {after}")


def record(**changes: Any) -> RequestRecord:
    fields = {"request_body": '{"prompt": "ada@example.org"}', "response_text": "a@example.org"}
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="completions",
        status=200,
        outcome=Outcome.COMPLETED,
        **{"bodies": "redacted", **fields, **changes},
    )


def texts(of: RequestRecord) -> tuple[str | None, str | None, str | None]:
    return of.bodies, of.request_body, of.response_text


def test_records_are_redacted_where_the_policy_says_so() -> None:
    full, none = record(bodies="full"), record(bodies=None)
    done, failed = redact(REDACTOR, [full, record(), none])
    assert [done[0], done[2]] == [full, none]
    assert texts(done[1]) == ("redacted", '{"prompt":"[EMAIL]"}', "[EMAIL]")
    assert failed == []


def test_calls_of_tools_are_redacted_behind_their_escapes() -> None:
    calls = '[{"function":{"name":"f","arguments":"{\\"to\\": \\"x\\\\nada@example.org\\"}"}}]'
    for answer in (f"I ask b@example.org{calls}", calls, calls[:-3]):
        (done,), _ = redact(REDACTOR, [record(response_text=answer)])
        assert "example.org" not in (done.response_text or "")


@pytest.mark.parametrize("body", ['{"prompt": "ada@exa', "[" * 5000, "\ud800"])
def test_of_what_cannot_be_redacted_no_text_is_kept(body: str) -> None:
    done, failed = redact(REDACTOR, [one := record(request_body=body), record()])
    assert texts(done[0]) == ("metadata", None, None)
    assert failed == [one]
    assert texts(done[1])[0] == "redacted"


def test_a_failure_of_a_library_keeps_the_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(text: str) -> str:
        raise RecursionError

    broken = Redactor()
    monkeypatch.setattr(broken, "text", fails)
    (done,), failed = redact(broken, [record()])
    assert texts(done) == ("metadata", '{"prompt":{"characters":15}}', None)
    assert len(failed) == 1
