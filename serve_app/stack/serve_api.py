"""Ray Serve's own deploy API over HTTP: put a config, follow it, take it away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.errors import CompAIError, ConfigError
from serve_app.scaling.targets import check_scaling

_APPLICATIONS = "/api/serve/applications/"
_VERSION = "/api/ray/version"
_POLL_INTERVAL_S = 0.5
_DEPLOY_TIMEOUT_S = 120.0
_MESSAGE_MAX_CHARS = 2000

Say = Callable[[str], None]


class DeployFailed(CompAIError):
    """Serve could not start the applications."""


class NotRunning(DeployFailed):
    """Serve goes on, and not all applications run in time."""


class ServeAway(CompAIError):
    """Serve's deploy API does not answer."""


def read_config(path: Path, *, port: int, host: str = "127.0.0.1") -> dict[str, Any]:
    """Read a Serve config YAML; where the HTTP proxy listens is ours to say, behind nginx.

    Raises:
        ConfigError: the file cannot be read or is not a Serve config, or the targets of its
            autoscaling are wrong.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError("--config", str(path), f"a Serve config YAML ({why})") from error
    if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
        raise ConfigError("--config", str(path), "a Serve config YAML with `applications`")
    check_scaling(config["applications"])
    return listening(config, port=port, host=host)


def listening(config: dict[str, Any], *, port: int, host: str) -> dict[str, Any]:
    """Return `config` with the HTTP proxies at this address."""
    options = config.get("http_options") or {}
    return config | {"http_options": options | {"host": host, "port": port}}


class ServeApi:
    """The deploy API of one cluster.

    Args:
        address: of Ray's dashboard, for example http://127.0.0.1:8265.
        token: of the cluster.
    """

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        # No proxy of the environment: this is our own machine, and it carries the token.
        self._http = httpx.AsyncClient(
            base_url=address,
            headers={"Authorization": f"Bearer {token}"},
            timeout=30.0,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def wait_up(self, timeout_s: float) -> None:
        """Return once the API answers.

        Raises:
            ServeAway: it does not in time, or it refuses the token.
        """
        deadline = time.monotonic() + timeout_s
        reason = "no answer"
        while time.monotonic() < deadline:
            try:
                response = await self._http.get(_VERSION, timeout=5.0)
            except httpx.HTTPError as error:
                reason = type(error).__name__
            else:
                if response.status_code == 200:
                    return
                reason = f"{response.status_code} {response.text[:200]}"
            await asyncio.sleep(_POLL_INTERVAL_S / 2)
        raise ServeAway(f"Ray's dashboard at {self.address} is not ready: {reason}")

    async def deploy(self, config: dict[str, Any]) -> None:
        """Hand the config to Serve, which goes on by itself.

        Raises:
            DeployFailed: Serve refuses it; holds Serve's words.
        """
        response = await self._request("PUT", json=config, timeout=_DEPLOY_TIMEOUT_S)
        if response.status_code != 200:
            raise DeployFailed(f"Serve refuses the config: {_shorten(response.text)}")

    async def status(self) -> dict[str, Any]:
        """Return what Serve says of itself: proxies and applications.

        Raises:
            ServeAway: no answer.
        """
        response = await self._request("GET", timeout=10.0)
        if response.status_code != 200:
            raise ServeAway(f"Serve answers {response.status_code}: {_shorten(response.text)}")
        details: dict[str, Any] = response.json()
        return details

    async def replicas_on(self, address: str | None) -> int:
        """Return how many replicas run on the node at `address`.

        Raises:
            ServeAway: no answer.
        """
        applications = (await self.status())["applications"].values()
        deployments = [one for app in applications for one in app["deployments"].values()]
        replicas = [one for deployment in deployments for one in deployment["replicas"]]
        return sum(replica["node_ip"] == address for replica in replicas)

    async def wait_running(self, names: list[str], timeout_s: float, say: Say) -> None:
        """Return once all these applications run; `say` gets what is waited for.

        Raises:
            DeployFailed: one failed; with Serve's message.
            NotRunning: they did not run in time.
        """
        deadline = time.monotonic() + timeout_s
        waiting = "no answer yet"
        while time.monotonic() < deadline:
            try:
                applications = (await self.status())["applications"]
            except ServeAway as error:
                waiting = str(error)
            else:
                _raise_failed(applications)
                if all(applications.get(n, {}).get("status") == "RUNNING" for n in names):
                    return
                waiting = describe_waiting(applications, names)
            say(waiting)
            await asyncio.sleep(_POLL_INTERVAL_S)
        raise NotRunning(f"not running after {timeout_s:g} s: {waiting}")

    async def delete_all(self, timeout_s: float) -> None:
        """Take all applications away; Serve lets them finish what they do.

        Raises:
            ServeAway: no answer, or not done in time.
        """
        await self._request("DELETE", timeout=timeout_s)

    async def _request(self, method: str, **options: Any) -> httpx.Response:
        try:
            return await self._http.request(method, _APPLICATIONS, **options)
        except httpx.HTTPError as error:
            raise ServeAway(
                f"Serve's deploy API at {self.address} does not answer: {type(error).__name__}"
            ) from error


def _raise_failed(applications: dict[str, Any]) -> None:
    for name, application in applications.items():
        if application.get("status") == "DEPLOY_FAILED":
            message = "\n".join(_messages(application)) or "no message"
            raise DeployFailed(f"the application {name} failed: {_shorten(message)}")


def _messages(application: dict[str, Any]) -> list[str]:
    """Return what Serve says of an application and of its deployments, without repeats."""
    parts = [application, *application.get("deployments", {}).values()]
    return list(dict.fromkeys(part["message"] for part in parts if part.get("message")))


def describe_waiting(applications: dict[str, Any], names: list[str]) -> str:
    """Say which deployments are not healthy yet."""
    waiting = []
    for name in names:
        application = applications.get(name)
        if application is None or not application.get("deployments"):
            waiting.append(name)
            continue
        waiting += [
            deployment
            for deployment, details in application["deployments"].items()
            if details.get("status") != "HEALTHY"
        ]
    return ", ".join(waiting) or "the applications to be called running"


def _shorten(text: str) -> str:
    text = text.strip()
    # What went wrong stands at the end of a traceback.
    return text if len(text) <= _MESSAGE_MAX_CHARS else "… " + text[-_MESSAGE_MAX_CHARS:]
