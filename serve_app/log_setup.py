"""Log lines of our own code as JSON on stdout, beside the request lines."""

from __future__ import annotations

import logging
import traceback
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

_OURS = ("serve_app", "deployments")


def log_as_json(stream: TextIO) -> None:
    """Send what our modules log to `stream`, one JSON object a line.

    A line has `action`, a stable name (the logger's where a call gives none), next to the
    sentence, so that people read one and programs the other.
    """
    handler = logging.StreamHandler(stream)
    formatter = JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
    )
    handler.setFormatter(formatter)
    handler.addFilter(_has_action)
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        # Ray's root handler would write the bare sentence once more.
        logger.propagate = False


def _has_action(record: logging.LogRecord) -> bool:
    if not hasattr(record, "action"):
        record.action = record.name
    return True


def log_failure(
    logger: logging.Logger, what: str, error: BaseException, extra: dict[str, str] | None = None
) -> None:
    """Log that `what` failed with an error that nobody foresaw: its type and its place.

    Its message is left out, because it could quote a prompt.
    """
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed: %s\n%s", what, type(error).__name__, place, extra=extra)
