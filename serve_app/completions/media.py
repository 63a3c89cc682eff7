"""Pictures, sound and film in a body: who may say from where the engine fetches them.

vLLM fetches a URL itself, from inside the network. Unless the policy allows that, only data
that comes along in the body passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve_app.errors import UnsupportedParameter

# Where a body holds what is given to the model. Elsewhere, as in the schema of a tool, a name
# such as `image_url` means nothing to the engine.
_FIELDS = (
    "messages",
    "input",
    "query",
    "queries",
    "documents",
    "items",
    "text_1",
    "text_2",
    "data_1",
    "data_2",
)
_URLS = frozenset({"image_url", "audio_url", "video_url", "file_url"})


def check_media(body: dict[str, Any], *, remote: bool) -> None:
    """Refuse a URL that is not `data:`; where `remote`, `http:` and `https:` pass too.

    Raises:
        UnsupportedParameter: names the place of the URL, never the URL itself.
    """
    allowed = ("data:", "http:", "https:") if remote else ("data:",)
    for place, url in _urls(body):
        if url[:6].lower().startswith(allowed):
            continue
        raise UnsupportedParameter(
            f"`{place}` must begin with {' or '.join(f'`{one}`' for one in allowed)}. "
            "Send the file itself, as a base64 data URL.",
            param=place,
        )


def _urls(body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the place and the value of each URL, however deep, without recursion."""
    rest: list[tuple[str, Any]] = [(name, body.get(name)) for name in _FIELDS]
    while rest:
        place, value = rest.pop()
        if isinstance(value, list):
            rest += [(f"{place}.{i}", v) for i, v in enumerate(value) if isinstance(v, dict | list)]
        elif isinstance(value, dict):
            for name, inner in value.items():
                if name in _URLS and (url := _url(inner)) is not None:
                    yield f"{place}.{name}", url
                elif isinstance(inner, dict | list):
                    rest.append((f"{place}.{name[:100]}", inner))


def _url(value: Any) -> str | None:
    # Both forms that the engine takes: the URL, or an object with it.
    url = value.get("url") if isinstance(value, dict) else value
    return url if isinstance(url, str) else None
