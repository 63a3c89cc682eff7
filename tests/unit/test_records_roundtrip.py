"""Records survive the form in which the spool keeps them."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.accounts import writer
from serve_app.records import Outcome, PrincipalKind, RequestRecord, new_id, utc_now
from tests.sealing import FORM

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
_ms = st.none() | st.floats(allow_nan=False, allow_infinity=False)
_tokens = st.integers(0, 2**53)

records = st.builds(
    RequestRecord,
    id=st.uuids(),
    request_id=_text,
    created_at=st.datetimes(timezones=st.just(UTC)),
    route=_text,
    status=st.integers(100, 599),
    outcome=st.sampled_from(Outcome),
    error_code=st.none() | _text,
    principal_id=st.none() | _text,
    principal_kind=st.none() | st.sampled_from(PrincipalKind),
    api_key_id=st.none() | st.uuids(),
    client_address=st.none() | _text,
    model=st.none() | _text,
    stream=st.booleans(),
    finish_reason=st.none() | _text,
    prompt_tokens=_tokens,
    completion_tokens=_tokens,
    cost_micros=_tokens,
    auth_ms=_ms,
    limits_ms=_ms,
    queue_ms=_ms,
    time_to_first_token_ms=_ms,
    inter_token_mean_ms=_ms,
    duration_ms=st.floats(allow_nan=False, allow_infinity=False),
    replica_id=st.none() | _text,
    denied=st.none() | _text,
    bodies=st.none() | _text,
    request_body=st.none() | _text,
    response_text=st.none() | _text,
)


def _record(**changes: object) -> RequestRecord:
    base: dict[str, object] = {
        "id": new_id(),
        "request_id": "r",
        "created_at": utc_now(),
        "route": "/v1/completions",
        "status": 200,
        "outcome": Outcome.COMPLETED,
    }
    return RequestRecord(**(base | changes))  # type: ignore[arg-type]


@given(records)
def test_record_comes_back_as_it_was(record: RequestRecord) -> None:
    back = RequestRecord.from_json(record.to_json())
    assert back == record
    assert all(type(getattr(back, f.name)) is type(getattr(record, f.name)) for f in fields(record))


@given(records)
def test_record_comes_back_from_the_spool_as_it_was(record: RequestRecord) -> None:
    assert FORM.read(FORM.write(record)) == record


@given(st.text(max_size=50))
def test_any_text_can_be_spooled(text: str) -> None:
    record = _record(request_body=text, model=text)
    back = FORM.read(FORM.write(record))
    assert back.request_body == text.encode("utf-8", "replace").decode()
    assert back.id == record.id


@given(_text)
def test_columns_get_text_that_postgresql_takes(text: str) -> None:
    record = _record(model=text * 100, request_id="\x00" + text * 100)
    values = {column: writer._value(record, column) for column in ("model", "request_id")}
    assert len(values["model"]) <= 100
    assert len(values["request_id"]) <= 128
    assert "\x00" not in values["model"] + values["request_id"]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"id": 1}', b'{"unknown": 1}', b"\xff"])
def test_other_data_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, AttributeError)):
        RequestRecord.from_json(data)
