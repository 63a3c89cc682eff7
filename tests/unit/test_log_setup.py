"""Our own log lines are JSON with an action, and come once."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from serve_app.log_setup import log_as_json


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    loggers = [logging.getLogger(name) for name in ("serve_app", "deployments")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    stream = io.StringIO()
    log_as_json(stream)
    log_as_json(stream)  # a deployment may be constructed again in one process
    yield stream
    for logger, (handlers, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate


def test_a_line_holds_sentence_action_and_fields(stream: io.StringIO) -> None:
    logging.getLogger("serve_app.accounts").warning(
        "rows wait", extra={"action": "request_log.drain_failed", "error": "OSError"}
    )
    [line] = stream.getvalue().splitlines()
    found = json.loads(line)
    assert found["action"] == "request_log.drain_failed"
    assert found["error"] == "OSError"
    assert (found["message"], found["level"]) == ("rows wait", "WARNING")
    assert found["logger"] == "serve_app.accounts"
    assert found["time"]


def test_a_line_without_an_action_gets_the_loggers_name(stream: io.StringIO) -> None:
    logging.getLogger("deployments.seams").error("lost")
    assert json.loads(stream.getvalue())["action"] == "deployments.seams"
