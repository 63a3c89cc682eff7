"""One JSON line a request on stdout: who, what, how it ended and how long. Never any text."""

from __future__ import annotations

from typing import TextIO

import orjson

from serve_app.records import RequestRecord

_FIELDS = (
    "request_id route status outcome error_code principal_id principal_kind api_key_id "
    "client_address stream finish_reason prompt_tokens completion_tokens cost_micros "
    "auth_ms limits_ms queue_ms time_to_first_token_ms inter_token_mean_ms duration_ms "
    "replica_id denied bodies trace_id".split()
)


def request_line(record: RequestRecord, model_label: str) -> str:
    """Return the line for `record`, without its end."""
    line = {"action": "request", "time": record.created_at, "id": record.id, "model": model_label}
    line |= {name: getattr(record, name) for name in _FIELDS}
    return orjson.dumps(line).decode()


class RequestLines:
    """Writes the lines to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, record: RequestRecord, model_label: str) -> None:
        """Write the line of `record`, at once."""
        self._stream.write(request_line(record, model_label) + "\n")
        self._stream.flush()
