"""The log line of a request: its numbers, and nothing that anybody wrote."""

from __future__ import annotations

import io
import uuid
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import orjson

from serve_app.records import Outcome, PrincipalKind, RequestRecord
from serve_app.request_line import RequestLines, request_line

TEXT = {"request_body": "PROMPT-TEXT", "response_text": "ANSWER-TEXT", "model": "MODEL-AS-SENT"}


def record(**more: Any) -> RequestRecord:
    return RequestRecord(
        id=uuid.UUID(int=7),
        request_id="from-client",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        route="completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_id="u",
        principal_kind=PrincipalKind.API_KEY,
        api_key_id=uuid.UUID(int=9),
        prompt_tokens=3,
        **more,
    )


def test_line_is_json_with_a_stable_action() -> None:
    line = orjson.loads(request_line(record(), "small"))
    assert line["action"] == "request"
    assert line["time"] == "2026-01-02T00:00:00+00:00"
    assert (line["id"], line["request_id"]) == (str(uuid.UUID(int=7)), "from-client")
    assert (line["model"], line["outcome"], line["principal_kind"]) == (
        "small",
        "completed",
        "api_key",
    )
    assert line["prompt_tokens"] == 3


def test_line_holds_no_text_and_no_name_that_a_client_made_up() -> None:
    line = request_line(record(**TEXT), "(other)")
    assert not [text for text in TEXT.values() if text in line]


def test_line_holds_every_other_field() -> None:
    # Told as the time, and as the trace's id alone.
    otherwise = {"created_at", "traceparent"}
    names = {field.name for field in fields(RequestRecord)} - TEXT.keys() - otherwise
    assert names <= orjson.loads(request_line(record(), "small")).keys()


def test_a_line_is_one_line() -> None:
    stream = io.StringIO()
    lines = RequestLines(stream)
    for _ in range(2):
        lines.write(record(finish_reason="a\nb"), "small")
    written = stream.getvalue()
    assert written.endswith("\n")
    assert [orjson.loads(line)["status"] for line in written.splitlines()] == [200, 200]
