"""Each kind of setting, as its table says it."""

from __future__ import annotations

import enum
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import AnyHttpUrl, BaseModel, Field, SecretStr

from serve_app import settings_reference
from serve_app.errors import CompAIError
from serve_app.settings_reference import END, renewed, table


class _Word(enum.StrEnum):
    ONE = "one"
    TWO = "two"


class _Inner(BaseModel):
    share: float = Field(default=1.0, description="A share.")


class _Every(BaseModel):
    """One field of each kind."""

    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=80, alias="EVERY_PORT", description="A port."
    )
    wait_s: float = Field(default=2_592_000.0, gt=0, le=3e6, description="A time.")
    tokens_per_day: int | None = Field(default=None, ge=1, description="Tokens.")
    price: Decimal | None = Field(default=None, ge=0, description="A price.")
    on: bool = Field(default=False, description="A switch.")
    mode: Literal["a", "b"] = Field(description="A mode.")
    word: _Word = Field(default=_Word.TWO, description="A word.")
    code: str = Field(default="x", pattern="^(x|y)$", max_length=9, description="A code.")
    secret: SecretStr | None = Field(default=None, min_length=32, description="A secret.")
    file: Path | None = Field(default=None, description="A file.")
    url: AnyHttpUrl | None = Field(default=None, description="An address.")
    names: tuple[_Word, ...] = Field(default=(_Word.ONE,), description="Names.")
    inner: _Inner = Field(default=_Inner(share=0.25), description="Another class.")
    by_name: dict[str, _Inner] = Field(default_factory=dict, description="Others.")
    anything: dict[str, object] = Field(default_factory=dict, description="Whatever.")


_EXPECTED = r"""
| `EVERY_PORT` | integer | `80` | 1 to 65535 | A port. |
| `wait_s` | number, seconds | `2592000` | above 0 up to 3000000 | A time. |
| `tokens_per_day` | integer, tokens | not set | from 1 | Tokens. |
| `price` | number | not set | from 0 | A price. |
| `on` | boolean | `false` |  | A switch. |
| `mode` | string | required | `a`, `b` | A mode. |
| `word` | string | `two` | `one`, `two` | A word. |
| `code` | string | `x` | 0 to 9 characters, `^(x\|y)$` | A code. |
| `secret` | secret | not set | 32 characters or more | A secret. |
| `file` | path | not set |  | A file. |
| `url` | URL | not set |  | An address. |
| `names` | list of string | `one` | `one`, `two` | Names. |
| `inner` | [_Inner](#_inner) | share 0.25 |  | Another class. |
| `by_name` | map to [_Inner](#_inner) | empty |  | Others. |
| `anything` | map | empty |  | Whatever. |
"""


def test_a_table_says_name_type_unit_default_bounds_and_meaning() -> None:
    assert table(_Every).splitlines()[2:] == _EXPECTED.strip().splitlines()


def test_what_stands_around_the_tables_is_kept() -> None:
    mark = "<!-- Settings of serve_app.config:Caps, by `make docs`. -->"
    page = f"before\n{mark}\nold\n{END}\nbetween\n{mark}\n{END}\nafter\n"
    made = renewed(page)
    assert made.startswith(f"before\n{mark}\n| name |")
    assert "old" not in made
    assert "\nbetween\n" in made
    assert made.endswith(f"{END}\nafter\n")
    assert renewed(made) == made


def test_a_page_without_a_mark_is_refused() -> None:
    with pytest.raises(CompAIError, match="no mark"):
        renewed("# A page\n")


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- Settings of serve_app.config:Caps, by `make docs`. -->\n{END}\n")
    settings_reference.main(page)
    assert "| `max_n` | integer | `16` | 1 to 16384 |" in page.read_text(encoding="utf-8")
