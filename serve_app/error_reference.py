"""The reference of errors in docs/errors.md, made from the tree in `serve_app.errors`.

python -m serve_app.error_reference docs/errors.md    writes it anew (`make docs`)
"""

from __future__ import annotations

import sys
from pathlib import Path

from serve_app.errors import CompAIError, RequestError, every_error

BEGIN = "<!-- From serve_app/errors.py by `make docs`; a test compares. -->"
END = "<!-- End of what is made from serve_app/errors.py. -->"


def reference() -> str:
    """Return the reference in Markdown: what each error is, and what to do about it."""
    errors = list(every_error())
    return "\n".join(
        (
            "## What the gateway refuses",
            "| error | below | status | `type` | `code` | default message |",
            "| --- | --- | --- | --- | --- | --- |",
            *(_what_it_is(error) for error in errors),
            "",
            "## What to do",
            "| `code` | cause | what helps | `Retry-After`, s |",
            "| --- | --- | --- | --- |",
            *(_what_to_do(error) for error in errors),
        )
    )


def _what_it_is(error: type[RequestError]) -> str:
    parent = error.__mro__[1].__name__
    return (
        f"| `{error.__name__}` | `{parent}` | {error.status} | `{error.type}` | `{error.code}` "
        f"| {error().message} |"
    )


def _what_to_do(error: type[RequestError]) -> str:
    return f"| `{error.code}` | {error.cause} | {error.remedy} | {error.retry_after or '—'} |"


def renewed(page: str) -> str:
    """Return `page` with the reference of now between its marks.

    Raises:
        CompAIError: the page does not have both marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CompAIError(f"the page lacks the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


def main(path: Path) -> None:
    """Write the reference into the page at `path`. Raises CompAIError as `renewed` does."""
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
