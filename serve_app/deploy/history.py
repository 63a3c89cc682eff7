"""What was deployed here, by whom and with what result: <home>/deployments/NNNN.{yaml,json}.

The files are closed to other users: an environment in a config may hold secrets.
"""

from __future__ import annotations

import enum
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from serve_app.deploy.config import ServeConfig
from serve_app.deploy.errors import DeployRefused
from serve_app.errors import ConfigError
from serve_app.records import utc_now
from serve_app.stack.home import Home, held, write_secret

# What ran before the first deployment was made with `comp-ai deploy`.
FOUND = "what ran"


class Outcome(enum.StrEnum):
    """How a deployment ended. One that was killed stays unfinished."""

    UNFINISHED = "unfinished"
    SERVED = "served"
    ROLLED_BACK = "rolled back"
    FAILED = "failed"


class Entry(BaseModel):
    """One deployment.

    Args:
        source: the file that was deployed, or FOUND.
        sha256: see `fingerprint`.
        restores: number of the earlier deployment that this one brought back.
        reason: why it did not serve.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    number: int
    at: datetime
    by: str
    source: str
    sha256: str
    outcome: Outcome = Outcome.UNFINISHED
    reason: str | None = None
    restores: int | None = None

    @property
    def position(self) -> int:
        """Where in the order of configs it stands: a rollback stands where it went to."""
        return self.restores or self.number


class History:
    """The deployments of one installation, oldest first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def entries(self) -> list[Entry]:
        """Return all deployments. Raises ConfigError where a file cannot be read."""
        return [self._read(file) for file in sorted(self._folder.glob("[0-9]*.json"))]

    def config(self, number: int) -> ServeConfig:
        """Return the config of one deployment. Raises ConfigError where there is none."""
        file = self._file(number, "yaml")
        try:
            config: ServeConfig = yaml.safe_load(file.read_text(encoding="ascii"))
        except (OSError, yaml.YAMLError) as error:
            known = ", ".join(str(entry.number) for entry in self.entries()) or "none"
            allowed = f"the number of a deployment ({known}), see `comp-ai deploys`"
            raise ConfigError("--to", number, allowed) from error
        return config

    def begin(
        self,
        config: ServeConfig,
        *,
        by: str,
        source: str,
        sha256: str,
        restores: int | None = None,
    ) -> Entry:
        """Write down what is going to be deployed, before it is."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        last = max((entry.number for entry in self.entries()), default=0)
        entry = Entry(
            number=last + 1,
            at=utc_now(),
            by=by,
            source=source,
            sha256=sha256,
            restores=restores,
        )
        # Pure ASCII; the entry comes last, so none is without its config.
        write_secret(self._file(entry.number, "yaml"), yaml.safe_dump(config, sort_keys=False))
        self._write(entry)
        return entry

    def end(self, entry: Entry, outcome: Outcome, reason: str | None = None) -> Entry:
        """Write down how it ended."""
        ended = entry.model_copy(update={"outcome": outcome, "reason": reason})
        self._write(ended)
        return ended

    def _write(self, entry: Entry) -> None:
        text = entry.model_dump_json(indent=2, ensure_ascii=True)
        write_secret(self._file(entry.number, "json"), text)

    def _file(self, number: int, kind: str) -> Path:
        return self._folder / f"{number:04d}.{kind}"

    @staticmethod
    def _read(file: Path) -> Entry:
        try:
            return Entry.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(str(file), type(error).__name__, "a deployment's record") from error


def served_last(entries: list[Entry], sha256: str | None) -> Entry | None:
    """Return the latest entry that served with these applications; None where none did."""
    return next(
        (e for e in reversed(entries) if e.outcome is Outcome.SERVED and e.sha256 == sha256), None
    )


def to_go_back_to(entries: list[Entry], running: str | None) -> Entry | None:
    """Return the last entry that served before what runs now, and differs from it.

    Going back again goes further back: a rollback stands where it went to.
    """
    now = next((entry for entry in reversed(entries) if entry.sha256 == running), None)
    # What runs may come from a start with another file: then the last that served.
    end = now.position if now is not None else max((e.number for e in entries), default=0) + 1
    served = [
        entry
        for entry in entries
        if entry.outcome is Outcome.SERVED
        and entry.restores is None
        and entry.number < end
        and entry.sha256 != running
    ]
    return served[-1] if served else None


def one_at_a_time(home: Home) -> AbstractContextManager[None]:
    """Hold off every other deployment from this machine, as a context.

    Raises:
        DeployRefused: one is under way; names its process.
    """
    return held(
        home.deploy_lock,
        lambda pid: DeployRefused(f"Another deployment is under way (process {pid})."),
    )
