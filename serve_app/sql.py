"""SQL that lives in `.sql` files: a `-- name:` line starts each query."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@cache
def named_queries(package: str, file: str) -> dict[str, str]:
    """Return the queries in `file` of `package`, by name."""
    text = resources.files(package).joinpath(file).read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    return dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))
