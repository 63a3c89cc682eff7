"""`comp-ai log`: what the commands do and print."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.accounts.queries import queries
from serve_app.accounts.spool_files import (
    PoisonRow,
    SpoolReport,
    drop,
    read_poison,
    read_reports,
    restore,
)
from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.cli.connection import connected
from serve_app.errors import CompAIError, ConfigError, NotFound
from serve_app.settings import PostgresSettings

_DROP = "poison.drop"


async def status(root: Path, postgres: Callable[[], PostgresSettings], *, as_json: bool) -> None:
    """Print how the spools below `root` are, and when PostgreSQL last got a record."""
    found = {**_spools(root), "postgres": await _postgres(postgres)}
    if as_json:
        typer.echo(json.dumps(found, default=str))
    else:
        _show(found)


def show_poison(root: Path, *, as_json: bool) -> None:
    """Print the records that were set aside."""
    rows = read_poison(root)
    if as_json:
        typer.echo(json.dumps([_row(row) for row in rows]))
        return
    table = Table("id", "set aside (UTC)", "reason", "spool")
    for row in rows:
        cells = _row(row)
        table.add_row(cells["id"], cells["set_aside_at"][:19], row.reason, str(row.folder))
    Console().print(table)


def restore_poison(root: Path, ids: Sequence[str]) -> None:
    """Put records back into their queues."""
    typer.echo(f"put back {restore(_wanted(root, ids))}; they are written when the service runs")


async def drop_poison(
    root: Path, postgres: PostgresSettings, ids: Sequence[str], *, sure: bool
) -> None:
    """Delete records for good, and leave an act in the audit log for each spool."""
    rows = _wanted(root, ids)
    if not sure:
        raise ConfigError("--yes", sure, f"True, to delete {len(rows)} records for good")
    # Before the act, as the two cannot be one transaction: none is without its row.
    async with connected(postgres, "comp-ai log") as connection, connection.transaction():
        await AuditLog().append_all(connection, _acts(rows))
    typer.echo(f"deleted {drop(rows)}")


def _spools(root: Path) -> dict[str, Any]:
    reports = read_reports(root)
    return {
        "depth": sum(report.depth for report in reports),
        "lag_s": max((report.oldest_age_s for report in reports), default=0.0),
        "poison": sum(report.poison for report in reports),
        "bytes": sum(report.bytes for report in reports),
        "free_bytes": shutil.disk_usage(root).free if root.exists() else None,
        "spools": [_spool(report) for report in reports],
    }


def _spool(report: SpoolReport) -> dict[str, Any]:
    return {
        "folder": str(report.folder),
        "held": report.held,
        "depth": report.depth,
        "oldest_age_s": report.oldest_age_s,
        "poison": report.poison,
        "bytes": report.bytes,
        "error": report.error,
    }


async def _postgres(settings: Callable[[], PostgresSettings]) -> dict[str, Any]:
    try:
        async with connected(settings(), "comp-ai log") as connection:
            at = await connection.fetchval(queries()["last_recorded_at"])
    except CompAIError as error:
        return {"last_recorded_at": None, "error": error.message}
    return {"last_recorded_at": at and at.isoformat(), "error": None}


def _show(found: dict[str, Any]) -> None:
    table = Table("spool", "held", "rows", "oldest (s)", "poison", "bytes", "error")
    for spool in found["spools"]:
        table.add_row(
            spool["folder"],
            "yes" if spool["held"] else "no",
            str(spool["depth"]),
            f"{spool['oldest_age_s']:.1f}",
            str(spool["poison"]),
            str(spool["bytes"]),
            spool["error"] or "",
        )
    Console().print(table)
    typer.echo(f"waiting: {found['depth']}, for up to {found['lag_s']:.1f} s")
    postgres = found["postgres"]
    last = postgres["error"] or postgres["last_recorded_at"] or "never"
    typer.echo(f"last record in PostgreSQL: {last}")


def _row(row: PoisonRow) -> dict[str, str]:
    return {
        "id": str(row.id),
        "set_aside_at": datetime.fromtimestamp(row.set_aside_at, UTC).isoformat(),
        "reason": row.reason,
        "folder": str(row.folder),
    }


def _wanted(root: Path, texts: Sequence[str]) -> list[PoisonRow]:
    ids = {_id(text) for text in texts}
    rows = read_poison(root, ids)
    if missing := ids - {row.id for row in rows}:
        raise NotFound(f"Not set aside: {', '.join(sorted(map(str, missing)))}.")
    return rows


def _id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise ConfigError("ID", text, "an id that `comp-ai log poison list` shows") from None


def _acts(rows: Sequence[PoisonRow]) -> list[AuditAct]:
    by = Actor.operator()
    return [
        AuditAct(
            actor=by,
            action=_DROP,
            target=str(folder),
            after={"records": {str(row.id): row.reason for row in rows if row.folder == folder}},
        )
        for folder in dict.fromkeys(row.folder for row in rows)
    ]
