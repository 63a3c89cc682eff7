"""What the hunts for odd input share: values of any kind, and what every answer must be."""

from __future__ import annotations

import re
from typing import Any

import httpx
import orjson
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples each time; a longer hunt sets another profile by hand.
FUZZ = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
_LEAK = re.compile(
    r"Traceback|File \"|serve_app|deployments\.|site-packages|\.py\b|/tmp/|/home/|/root/"
    r"|uvicorn|starlette|orjson|pydantic|asyncio|hunter2",
    re.IGNORECASE,
)


def assert_refused(status: int, content_type: str, body: bytes) -> dict[str, Any]:
    """Check one refusal, and return its error object."""
    assert 400 <= status < 500, (status, body[:300])
    assert content_type == "application/json"
    error: dict[str, Any] = orjson.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"]
    assert len(body) < 2000
    assert not _LEAK.search(body.decode()), body
    return error


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abcdef_", min_size=1, max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def answered(http: httpx.Client, path: str, body: bytes) -> None:
    """Send a body; where it is not served, check the refusal."""
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        assert_refused(answer.status_code, answer.headers["content-type"], answer.content)
