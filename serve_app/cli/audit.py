"""`comp-ai audit`: what the commands do and print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from serve_app.audit.chain import Link
from serve_app.audit.reading import AuditFilter, AuditPage, read_page
from serve_app.audit.verify import Verdict, read_checkpoint, verify, write_checkpoint
from serve_app.cli.connection import connected
from serve_app.errors import ConfigError
from serve_app.files import write_whole
from serve_app.settings import PostgresSettings
from serve_app.times import parse_time


async def show(
    settings: PostgresSettings, wanted: AuditFilter, limit: int, *, as_json: bool
) -> None:
    """Print the latest rows, the oldest of them first."""
    async with connected(settings, "comp-ai audit") as connection:
        rows = await read_page(connection, wanted, AuditPage(limit=limit))
    rows.reverse()
    if as_json:
        typer.echo(json.dumps(rows))
        return
    first = [Column(name, no_wrap=True) for name in ("row", "time (UTC)", "action")]
    table = Table(*first, "actor", "target", "from", "what changed")
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


async def check(settings: PostgresSettings, checkpoint: Path | None, *, as_json: bool) -> int:
    """Verify the log, and against `checkpoint` where there is one; return the exit code."""
    against = None if checkpoint is None else _read(checkpoint)
    verdict = await _verify(settings, against)
    if as_json:
        typer.echo(json.dumps(_to_json(verdict, against)))
    else:
        _say(verdict, against)
    return 0 if verdict.intact else 1


async def take_checkpoint(settings: PostgresSettings, file: Path) -> int:
    """Verify the log and write where it ends to `file`; return the exit code."""
    verdict = await _verify(settings, None)
    if not verdict.intact:
        _say(verdict, None)
        return 1
    data = write_checkpoint(verdict.head)
    if str(file) == "-":
        sys.stdout.buffer.write(data)
        return 0
    _replace(file, data)
    typer.echo(f"checkpoint of row {verdict.head.seq} written to {file}", err=True)
    return 0


def read_filter(
    actor: str | None, action: str | None, since: str | None, until: str | None
) -> AuditFilter:
    """Return what the options ask for.

    Raises:
        ConfigError: a time that is none.
    """
    return AuditFilter(
        actor=actor, action=action, since=_time("--since", since), until=_time("--until", until)
    )


def _time(option: str, text: str | None) -> datetime | None:
    try:
        return None if text is None else parse_time(text)
    except (ValueError, OverflowError):
        allowed = "a time in ISO 8601, such as 2026-01-31 or 2026-01-31T12:00:00Z"
        raise ConfigError(option, text, allowed) from None


async def _verify(settings: PostgresSettings, against: Link | None) -> Verdict:
    async with connected(settings, "comp-ai audit") as connection:
        return await verify(connection, against)


def _read(file: Path) -> Link:
    try:
        return read_checkpoint(file.read_bytes())
    except (OSError, ValueError) as error:
        allowed = f"a file that `comp-ai audit checkpoint` wrote ({type(error).__name__})"
        raise ConfigError("--checkpoint", str(file), allowed) from None


def _replace(file: Path, data: bytes) -> None:
    try:
        # Nothing in it is secret, and whoever verifies later may be somebody else.
        write_whole(file, data, mode=0o666)
    except OSError as error:
        raise ConfigError("FILE", str(file), f"a file that can be written ({error})") from None


def _to_json(verdict: Verdict, against: Link | None) -> dict[str, Any]:
    return {
        "intact": verdict.intact,
        "rows": verdict.rows,
        "head": {"seq": verdict.head.seq, "hash": verdict.head.hash.hex()},
        "checkpoint": None if against is None else {"seq": against.seq, "hash": against.hash.hex()},
        "fault_count": verdict.fault_count,
        "faults": [
            {"seq": fault.seq, "kind": fault.kind, "message": fault.message}
            for fault in verdict.faults
        ],
    }


def _say(verdict: Verdict, against: Link | None) -> None:
    for fault in verdict.faults:
        typer.echo(f"row {fault.seq}: {fault.message} ({fault.kind})")
    more = verdict.fault_count - len(verdict.faults)
    if more:
        typer.echo(f"and {more} more")
    if not verdict.intact:
        typer.echo("the audit log was changed", err=True)
        return
    typer.echo(f"the audit log is intact: {verdict.rows} rows")
    if against is None:
        typer.echo("not compared with a checkpoint, see docs/access.md", err=True)
    else:
        typer.echo(f"it continues the checkpoint of row {against.seq}")


def _cells(row: dict[str, Any]) -> list[Text]:
    actor = row["actor"]
    return [
        _cell(row["id"]),
        _cell(row["at"][:19].replace("T", " ")),
        _cell(row["action"]),
        _cell(f"{actor['id']} ({actor['kind']})"),
        _cell(row["target"] or ""),
        _cell(row["client_address"] or ""),
        _cell("; ".join(_changes(row["before"], row["after"]))),
    ]


def _cell(text: str) -> Text:
    # A terminal must not obey what somebody had written into the log.
    return Text("".join(character if character.isprintable() else "?" for character in text))


def _changes(before: Any, after: Any) -> Iterator[str]:
    """Yield what differs between the two, each as `<path>: <old> → <new>`."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    for path in [*old, *(path for path in new if path not in old)]:
        if path not in old:
            yield f"{path}: {new[path]}"
        elif path not in new:
            yield f"{path}: {old[path]} → gone"
        elif old[path] != new[path]:
            yield f"{path}: {old[path]} → {new[path]}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif path:
        yield path, json.dumps(value, ensure_ascii=False)
