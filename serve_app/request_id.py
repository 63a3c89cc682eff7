"""The X-Request-ID: a client may choose it, if it is harmless in a header, a row and a log line."""

from __future__ import annotations

import re
import uuid

HEADER = "x-request-id"
# The same rule stands in the nginx template, which replaces any other before we see it.
_FIT = re.compile(r"[A-Za-z0-9._-]{1,128}")


def fit_request_id(given: str | None) -> str:
    """Return `given` where it is fit to be kept, else a new id."""
    return given if given is not None and _FIT.fullmatch(given) else uuid.uuid4().hex
