"""What a stack holds now: memory, files and threads by part; spool, reservations, sessions."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import psutil

from load_tests.bench.cost import below, part_of
from tests.chaos.reconcile import spooled
from tests.stack_runner import RunningStack

_DATABASE = """
select
    (select count(*) from pg_stat_activity
     where backend_type = 'client backend' and pid <> pg_backend_pid()) as sessions,
    (select count(*) from pg_class) as relations
"""
_HELD = "select count(*) from reservations where ended_at is null"


def footprint(stack: RunningStack) -> dict[str, dict[str, float]]:
    """Return every figure of a stack, by part.

    Memory is what a part has resident and shares with no file and no other process. Pages that
    PostgreSQL shares among its sessions would count once for each that has touched them. Each of
    these keeps the files of the tables that it has read open, for as long as it lives; whether
    they become more without end is told by how many sessions and relations there are.
    """
    found = of_processes(below(stack.process.pid))
    found.get("postgres", {}).pop("files", None)
    found["spool"] = {
        "bytes": sum(_size_bytes(folder) for folder in stack.spools),
        "records": spooled(stack.spools),
    }
    found["limits"] = {"bytes": _size_bytes(stack.home / "limits"), "held": reservations(stack)}
    # PostgreSQL may refuse just now: the figure is then missing, which tells nothing.
    with contextlib.suppress(OSError, asyncpg.PostgresError):
        [row] = stack.rows(_DATABASE)
        found["database"] = dict(row)
    return found


def of_processes(processes: Sequence[psutil.Process]) -> dict[str, dict[str, float]]:
    """Return memory, files and threads by part; a process that ends meanwhile has none."""
    found: dict[str, Counter[str]] = {}
    for process in processes:
        with contextlib.suppress(psutil.Error), process.oneshot():
            memory = process.memory_info()
            held = {
                "memory_bytes": memory.rss - memory.shared,
                "files": process.num_fds(),
                "threads": process.num_threads(),
            }
            found.setdefault(part_of(process), Counter()).update(held)
    return {part: {**held} for part, held in found.items()}


def reservations(stack: RunningStack) -> int:
    """Return how many reservations the limits hold for requests that have not ended."""
    file = stack.home / "limits" / "limits.sqlite3"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return int(connection.execute(_HELD).fetchone()[0])
    except sqlite3.OperationalError:
        # Locked by its owner: look again.
        return 1


def _size_bytes(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        # The log of a database is removed when the last who has it open closes it.
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size
