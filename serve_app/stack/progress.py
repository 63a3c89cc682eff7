"""What `up` shows while it starts: each part, what it waits for, how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from serve_app.stack.serve_api import Say

_MAX_CHARS = 90
Row: TypeAlias = tuple[str, str]


class Parts:
    """The parts that are being started, in rows that live while the terminal does."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<16}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[waits]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the rows on the screen."""
        with self._progress:
            yield

    @contextmanager
    def part(self, name: str, waits_for: str) -> Iterator[Say]:
        """Show one part while it starts; call what is given to say what it waits for now."""
        started = time.monotonic()
        row = self._progress.add_task(name, waits=waits_for, total=None)
        try:
            yield self._sayer(row, name, waits_for)
        except BaseException:
            self._progress.remove_task(row)
            raise
        self._progress.remove_task(row)
        took = time.monotonic() - started
        self.console.print(f"[green]✓[/] {escape(name):<16} {took:6.1f} s", highlight=False)

    def note(self, text: str) -> None:
        """Print one line above the rows."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def _sayer(self, row: TaskID, name: str, first: str) -> Say:
        last = first
        if not self.console.is_terminal:
            self.note(f"  {name}: {first}")

        def say(text: str) -> None:
            nonlocal last
            text = text.replace("\n", " ")[:_MAX_CHARS]
            if text == last:
                return
            last = text
            self._progress.update(row, waits=escape(text))
            if not self.console.is_terminal:
                self.note(f"  {name}: {text}")

        return say
