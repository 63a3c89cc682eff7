"""Ray with Serve's applications on it: start, deploy, let finish, stop.

`comp-ai up` has it beside the other parts of one machine, `comp-ai head` alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from serve_app.models.fetch import packaged
from serve_app.stack.logs import LogFollower, write_line
from serve_app.stack.processes import Supervisor
from serve_app.stack.progress import Parts
from serve_app.stack.ray_head import RayHead
from serve_app.stack.serve_api import NotRunning, ServeApi, ServeAway
from serve_app.stack.waiting import wait_until

_RAY_TIMEOUT_S = 120.0
_LOOK_S = 0.5
# Loading a large model takes minutes.
_MODEL_TIMEOUT_S = 1800.0


class Cluster:
    """The head, what Serve runs on it, and its log lines on our stdout."""

    def __init__(
        self, ray: RayHead, config: dict[str, Any], supervisor: Supervisor, parts: Parts
    ) -> None:
        self._ray = ray
        self._config = config
        self._supervisor = supervisor
        self._parts = parts
        self._api = ServeApi(ray.dashboard, ray.home.make_ray_token())
        self._follower: asyncio.Task[None] | None = None
        self._deployed = False

    @property
    def packaged_models(self) -> list[str]:
        """Models of the config whose weights come as packages."""
        return packaged(self._config)

    async def start(self, environment: Mapping[str, str]) -> None:
        """Start the head; `environment` goes into every replica.

        Raises:
            CompAIError: it does not start in time.
        """
        follower = LogFollower(self._ray.logs, write_line)
        follower.skip_present()
        with self._parts.part("Ray", "its dashboard") as say:
            await self._supervisor.start(self._ray.spec(environment))
            await self._api.wait_up(_RAY_TIMEOUT_S)
            say("Serve's deploy API")
            await wait_until("Serve's deploy API", self._complaint, _RAY_TIMEOUT_S)
            self._supervisor.called_ready("ray")
        self._follower = asyncio.create_task(follower.run(), name="follow request lines")

    async def deploy(self) -> None:
        """Hand the config to Serve and return once every application runs.

        Raises:
            DeployFailed: Serve refuses it, or an application fails.
        """
        names = [str(application["name"]) for application in self._config["applications"]]
        with self._parts.part("Serve", "the deploy API") as say:
            await self._api.deploy(self._config)
            self._deployed = True
            try:
                await self._api.wait_running(names, _MODEL_TIMEOUT_S, say)
            except NotRunning as error:
                if self._ray.store is None:
                    raise
                # The rest serves, and would lose the head: a host may be away that has the room.
                say(str(error))

    async def stop(self, drain_s: float) -> None:
        """Let requests finish for up to `drain_s`, then stop Ray; safe to repeat.

        Where the applications outlive the head, those of its replicas that are on this node
        finish what they do, and the others go on.
        """
        if self._ray.store is not None:
            await self._leave()
        elif self._deployed:
            await self._delete_all(drain_s)
        self._deployed = False
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._supervisor.stop("ray")
        await self._api.close()

    async def _delete_all(self, drain_s: float) -> None:
        try:
            await self._api.delete_all(drain_s)
        except ServeAway as error:
            self._parts.note(f"  Serve: {error}")

    async def _leave(self) -> None:
        # Told to stop, Ray has this node drained. It would wait for Serve's controller too,
        # which stays, so we look ourselves whether the replicas are gone.
        waits = [asyncio.create_task(self._supervisor.stop("ray"), name="drain this node")]
        if self._deployed:
            waits.append(asyncio.create_task(self._emptied(), name="watch replicas leave"))
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def _emptied(self) -> None:
        address = self._ray.node_address
        while await self._has_replicas(address):  # noqa: ASYNC110  others end them
            await asyncio.sleep(_LOOK_S)

    async def _has_replicas(self, address: str | None) -> bool:
        try:
            return await self._api.replicas_on(address) > 0
        except ServeAway:
            return True

    async def _complaint(self) -> str | None:
        try:
            await self._api.status()
        except ServeAway as error:
            return str(error)
        return None
