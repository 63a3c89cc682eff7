"""One change of what runs, with the way back.

put → wait until all runs → smoke test ──▶ done
 └────────────┴───────────────┴── fails, or we are told to stop ──▶ put what ran before
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from serve_app.deploy.config import ServeConfig, offered_models
from serve_app.deploy.door import Door
from serve_app.deploy.errors import NotRolledBack, RolledBack
from serve_app.errors import CompAIError
from serve_app.stack.progress import Parts
from serve_app.stack.serve_api import ServeApi
from serve_app.stack.waiting import unless


class Rollout:
    """Brings configs to Serve, each until it serves.

    Args:
        timeout_s: for all replicas to run; loading a large model takes minutes.
        smoke_timeout_s: for each answer of the smoke test.
    """

    def __init__(
        self,
        api: ServeApi,
        door: Door,
        parts: Parts,
        *,
        timeout_s: float,
        smoke_timeout_s: float,
    ) -> None:
        self._api = api
        self._door = door
        self._parts = parts
        self._timeout_s = timeout_s
        self._smoke_timeout_s = smoke_timeout_s

    async def change(
        self, before: ServeConfig | None, after: ServeConfig, stop: asyncio.Event
    ) -> None:
        """Put `after` and return once it serves; else put `before` and wait until that serves.

        `stop` is taken for a failure. It is not heeded on the way back.

        Raises:
            RolledBack: `before` serves again.
            NotRolledBack: it does not, or nothing ran before.
        """
        if stop.is_set():
            raise RolledBack("told to stop. Nothing was changed.")
        try:
            # Never cut off: nobody could tell then what Serve has.
            await self._api.deploy(after)
            await unless(stop, Underway(self._parts), self._settle(after))
        except CompAIError as error:
            await self._go_back(before, error.message)
        if stop.is_set():
            await self._go_back(before, "told to stop")

    async def _go_back(self, before: ServeConfig | None, reason: str) -> None:
        self._parts.note(f"failed: {reason}")
        if before is None:
            raise NotRolledBack(f"{reason}. Nothing ran before, so it is left as it is.")
        self._parts.note("going back to what ran before (a signal: leave it at that)")
        try:
            await self._api.deploy(before)
            await self._settle(before)
        except CompAIError as error:
            raise NotRolledBack(
                f"{reason}. What ran before was put back, and does not serve: {error.message}"
            ) from error
        raise RolledBack(f"{reason}. What ran before serves again.")

    async def _settle(self, config: ServeConfig) -> None:
        names = [str(app["name"]) for app in config["applications"]]
        with self._parts.part("Serve", "the deploy API") as say:
            await self._api.wait_running(names, self._timeout_s, say)
        models, sleeping = offered_models(config), asleep(await self._api.status())
        with self._parts.part("smoke test", self._door.url) as say:
            await self._door.serves(models, sleeping, self._smoke_timeout_s, say)


class Underway:
    """What a second signal meets: there is no part of ours that could die or be killed."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def failed(self) -> CompAIError:
        """Never return."""
        await asyncio.Event().wait()
        raise AssertionError

    def kill(self) -> None:
        """Say how it is left."""
        self._parts.note(
            "left in the middle: Serve goes on by itself with what it was given last. "
            "`comp-ai status` says what runs, `comp-ai rollback` goes back."
        )


def asleep(status: Mapping[str, Any]) -> set[str]:
    """Return the applications that are scaled to zero."""
    return {
        name
        for name, app in status["applications"].items()
        if app.get("deployments")
        and all(one.get("target_num_replicas") == 0 for one in app["deployments"].values())
    }
