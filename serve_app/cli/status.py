"""`comp-ai status`: what runs, seen from outside."""

from __future__ import annotations

from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from serve_app.settings import Settings
from serve_app.stack.home import Home
from serve_app.stack.serve_api import ServeApi, ServeAway

_TIMEOUT_S = 10.0


async def collect(settings: Settings) -> dict[str, Any]:
    """Return the state of every part; `ready` tells whether a completion can be served now."""
    service = settings.service
    home = Home(service.home_path)
    gateway = await _ask(f"http://127.0.0.1:{service.port}/ready")
    door = await _ask(f"http://{_reachable(service.http_host)}:{service.http_port}/health")
    found: dict[str, Any] = {
        "home": str(home.path),
        "up_pid": home.running_pid(),
        "nginx": door["status"] == 200,
        "gateway": gateway,
        "applications": await _applications(settings, home),
    }
    found["ready"] = gateway["status"] == 200
    return found


async def _ask(url: str) -> dict[str, Any]:
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as http:
            response = await http.get(url)
    except httpx.HTTPError as error:
        return {"status": None, "body": f"no answer ({type(error).__name__})"}
    try:
        body = response.json()
    except ValueError:
        body = response.text[:200]
    return {"status": response.status_code, "body": body}


async def _applications(settings: Settings, home: Home) -> dict[str, Any] | str:
    try:
        token = home.ray_token.read_text(encoding="ascii").strip()
    except OSError:
        return "no cluster was started on this data folder"
    api = ServeApi(f"http://127.0.0.1:{settings.service.dashboard_port}", token)
    try:
        details = await api.status()
    except ServeAway as error:
        return str(error)
    finally:
        await api.close()
    return {name: _summary(value) for name, value in details["applications"].items()}


def _summary(application: dict[str, Any]) -> dict[str, Any]:
    deployments = {}
    for name, value in application.get("deployments", {}).items():
        running = sum(one.get("state") == "RUNNING" for one in value.get("replicas", []))
        deployments[name] = {
            "status": value.get("status"),
            "running": running,
            "target": value.get("target_num_replicas"),
            "message": value.get("message", ""),
        }
    return {"status": application.get("status"), "deployments": deployments}


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104


def show(found: dict[str, Any]) -> None:
    """Print it for a person."""
    console = Console(highlight=False)
    console.print("[green]ready[/]" if found["ready"] else "[red]not ready[/]")
    console.print(f"data folder  {found['home']}")
    console.print(f"comp-ai up   {found['up_pid'] or 'does not run'}")
    console.print(f"nginx        {'answers' if found['nginx'] else 'does not answer'}")
    console.print(
        f"gateway      {found['gateway']['status'] or 'away'}: {found['gateway']['body']}"
    )
    if isinstance(found["applications"], str):
        console.print(f"Serve        {found['applications']}")
        return
    table = Table("application", "deployment", "status", "replicas", "message")
    for name, application in found["applications"].items():
        for deployment, value in application["deployments"].items():
            replicas = f"{value['running']}/{value['target']}"
            table.add_row(name, deployment, value["status"], replicas, value["message"][:80])
    console.print(table)
