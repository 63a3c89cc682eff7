"""What a migration does to the tables that are there: which lock it takes, and for how long.

Read from the text, without a database, so it says what a statement of that kind does at worst.
The body of a function and of a `do` block is not looked into.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass


class Work(enum.StrEnum):
    """What is done while the lock is held; all but the first take longer with more rows."""

    BRIEF = "brief"
    SCANS = "reads every row"
    INDEXES = "builds an index"
    REWRITES = "rewrites every row"
    CHANGES_ROWS = "changes rows"
    UNKNOWN = "runs code that is not looked into"


@dataclass(frozen=True, slots=True)
class Effect:
    """One lock on one table, or `UNKNOWN` work on who knows which.

    `lock` is PostgreSQL's word for it; `refused_with_rows` tells that the statement fails where
    the table has rows.
    """

    table: str
    lock: str
    work: Work
    refused_with_rows: bool = False

    def __str__(self) -> str:
        note = ", refused where there are rows" if self.refused_with_rows else ""
        return f"{self.table}: {self.lock}, {self.work}{note}"


_NAME = r'(?P<table>(?:[\w"]+\.)?[\w"]+)'
_NOT_CODE = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|(\$\w*\$).*?\1", re.DOTALL)
_CREATED = re.compile(rf"create table (?:if not exists )?{_NAME}")
_ALTERED = re.compile(rf"alter table (?:if exists )?(?:only )?{_NAME} (?P<actions>.*)")
_REFERENCED = re.compile(rf"\breferences {_NAME}")
_VOLATILE = re.compile(
    r"\b(?:gen_random_uuid|uuidv[47]|random|clock_timestamp|nextval)\s?\(|"
    r"\bgenerated always as \((?!.*\bvirtual\b)|\bas identity\b|\bserial\b|\bbigserial\b"
)

# The first that matches tells; the table is the one of the match.
_STATEMENTS = (
    (rf"create (?:unique )?index concurrently .*?\bon (?:only )?{_NAME}",
     "SHARE UPDATE EXCLUSIVE", Work.INDEXES),
    (rf"create (?:unique )?index .*?\bon (?:only )?{_NAME}", "SHARE", Work.INDEXES),
    (rf"create (?:or replace )?(?:constraint )?trigger .*?\bon {_NAME}",
     "SHARE ROW EXCLUSIVE", Work.BRIEF),
    (rf"create table .* partition of {_NAME}", "ACCESS EXCLUSIVE", Work.SCANS),
    (rf"(?:drop table|truncate|truncate table) (?:if exists )?(?:only )?{_NAME}",
     "ACCESS EXCLUSIVE", Work.BRIEF),
    # Named is the index; the lock is on its table, too, which the text does not say.
    (rf"drop index (?:if exists )?{_NAME}", "ACCESS EXCLUSIVE", Work.BRIEF),
    (rf"drop trigger .*?\bon {_NAME}", "ACCESS EXCLUSIVE", Work.BRIEF),
    (rf"(?:create or replace|drop) view (?:if exists )?{_NAME}", "ACCESS EXCLUSIVE", Work.BRIEF),
    (rf"lock table (?:only )?{_NAME}", "ACCESS EXCLUSIVE", Work.BRIEF),
    (rf"(?:with .*)?\binsert into {_NAME}", "ROW EXCLUSIVE", Work.CHANGES_ROWS),
    (rf"(?:with .*)?\bupdate (?:only )?{_NAME} .*?\bset\b", "ROW EXCLUSIVE", Work.CHANGES_ROWS),
    (rf"(?:with .*)?\bdelete from (?:only )?{_NAME}", "ROW EXCLUSIVE", Work.CHANGES_ROWS),
    (r"(?P<table>do|select|perform|call)\b", "any", Work.UNKNOWN),
)  # fmt: skip

# The same for one action of an `alter table`.
_ACTIONS = (
    (r"alter (?:column )?\S+ (?:set data )?type\b", "ACCESS EXCLUSIVE", Work.REWRITES),
    (r"set (?:logged|unlogged|tablespace|access method)\b", "ACCESS EXCLUSIVE", Work.REWRITES),
    (r"alter (?:column )?\S+ set not null", "ACCESS EXCLUSIVE", Work.SCANS),
    (r"validate constraint", "SHARE UPDATE EXCLUSIVE", Work.SCANS),
    (r"attach partition", "SHARE UPDATE EXCLUSIVE", Work.SCANS),
    (r"add (?:constraint|check|foreign|unique|primary|exclude)\b.*\bnot valid$",
     "ACCESS EXCLUSIVE", Work.BRIEF),
    (r"add (?:constraint \S+ )?(?:unique|primary key) using index", "ACCESS EXCLUSIVE", Work.BRIEF),
    (r"add (?:constraint \S+ )?(?:unique|primary key|exclude)\b",
     "ACCESS EXCLUSIVE", Work.INDEXES),
    (r"add (?:constraint \S+ )?foreign key", "SHARE ROW EXCLUSIVE", Work.SCANS),
    (r"add (?:constraint \S+ )?check", "ACCESS EXCLUSIVE", Work.SCANS),
    (r"(?:enable|disable) (?:always |replica )?trigger", "SHARE ROW EXCLUSIVE", Work.BRIEF),
    (r"set \(|alter (?:column )?\S+ set statistics", "SHARE UPDATE EXCLUSIVE", Work.BRIEF),
)  # fmt: skip


def effects(sql: str) -> list[Effect]:
    """Return what `sql` does to tables that it does not make itself, each once."""
    made = set()
    found: dict[Effect, None] = {}
    for statement in _statements(sql):
        if match := _CREATED.match(statement):
            made.add(match["table"])
        for effect in _of_statement(statement):
            if effect.table not in made:
                found[effect] = None
    return list(found)


def _statements(sql: str) -> Iterator[str]:
    """Yield statements in lower case and on one line, without comments, texts and bodies."""
    code = _NOT_CODE.sub(lambda match: "''" if match[0][0] in "'$" else " ", sql)
    for statement in code.split(";"):
        line = " ".join(statement.lower().split())
        if line:
            yield line


def _of_statement(statement: str) -> Iterator[Effect]:
    for match in _REFERENCED.finditer(statement):
        yield Effect(match["table"], "SHARE ROW EXCLUSIVE", Work.BRIEF)
    if altered := _ALTERED.match(statement):
        for action in _top_level(altered["actions"]):
            yield _of_action(altered["table"], action)
        return
    for pattern, lock, work in _STATEMENTS:
        if found := re.match(pattern, statement):
            yield Effect(found["table"], lock, work)
            return


def _of_action(table: str, action: str) -> Effect:
    for pattern, lock, work in _ACTIONS:
        if re.match(pattern, action):
            return Effect(table, lock, work)
    if re.match(r"add (?:column )?", action):
        return _of_new_column(table, action)
    return Effect(table, "ACCESS EXCLUSIVE", Work.BRIEF)


def _of_new_column(table: str, action: str) -> Effect:
    work = Work.BRIEF
    if _VOLATILE.search(action):
        work = Work.REWRITES
    elif re.search(r"\b(?:unique|primary key)\b", action):
        work = Work.INDEXES
    elif re.search(r"\bcheck \(", action):
        work = Work.SCANS
    must_be_given = "not null" in action and " default " not in action
    return Effect(
        table, "ACCESS EXCLUSIVE", work, refused_with_rows=must_be_given and work is Work.BRIEF
    )


def _top_level(text: str) -> Iterator[str]:
    """Yield the parts between commas that stand in no brackets."""
    depth, start = 0, 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()
