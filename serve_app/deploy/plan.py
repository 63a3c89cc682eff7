"""What a deployment would change: which replicas restart, which are told, and what is away.

Serve's own rules, see `DeploymentVersion` and `get_app_code_version` in Ray: what is hashed into
the code of an application restarts all its deployments, some options restart one of them, and
the rest reaches running replicas in place.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from serve_app.deploy.config import Application, ServeConfig

_CODE = ("import_path", "runtime_env", "args", "autoscaling_policy")
_CODE_OF_DEPLOYMENT = ("request_router_config", "deployment_actors")
_RESTARTING = (
    "ray_actor_options",
    "placement_group_bundles",
    "placement_group_strategy",
    "placement_group_bundle_label_selector",
    "placement_group_fallback_strategy",
    "max_replicas_per_node",
    "gang_scheduling_config",
)
# Gateways hold their calls to these, and the requests behind them, until they are back.
_WAITED_FOR = frozenset({"Limits", "RequestLog"})
# Serve takes these over at its start only.
_AT_START = ("proxy_location", "http_options", "grpc_options", "controller_options")

# Application → deployment that its code makes → its `max_surge_percent` there.
Built: TypeAlias = Mapping[str, Mapping[str, int]]


class Effect(enum.StrEnum):
    """What a change does, the strongest first."""

    RESTARTED = "restarted"
    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed in place"
    SAME = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentChange:
    """What happens to one deployment.

    `away` says why nobody is served by it for a while; None where one replica always is.
    """

    name: str
    effect: Effect
    replicas: int
    surge_percent: int = 0
    away: str | None = None

    @property
    def told(self) -> str:
        """One line for people."""
        words = f"{self.name}: {self.effect}"
        if self.effect is not Effect.RESTARTED:
            return words
        words += f", {self.replicas} replica{'s' if self.replicas != 1 else ''}"
        if self.surge_percent:
            return f"{words}, new ones start before old ones stop"
        if self.name in _WAITED_FOR:
            return f"{words}, requests wait meanwhile"
        return f"{words}, AWAY MEANWHILE" if self.away else f"{words}, one after the other"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplicationChange:
    """What happens to one application, with its config of before and after."""

    name: str
    effect: Effect
    before: Application | None
    after: Application | None
    deployments: tuple[DeploymentChange, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a deployment would change.

    `not_now` names the options that Serve takes over when it starts, and not before.
    """

    applications: tuple[ApplicationChange, ...]
    not_now: tuple[str, ...] = ()

    @property
    def changes(self) -> list[ApplicationChange]:
        """The applications that change."""
        return [app for app in self.applications if app.effect is not Effect.SAME]

    @property
    def away(self) -> list[str]:
        """Why requests would fail meanwhile; empty where none should."""
        return [one.away for app in self.applications for one in app.deployments if one.away]


def make_plan(
    before: ServeConfig | None, after: ServeConfig, built: Built, status: Mapping[str, Any]
) -> Plan:
    """Compare two configs, each with its applications as Serve keeps them.

    Args:
        built: what the code makes of each application of `after`.
        status: what Serve says of itself now.
    """
    running = status["applications"]
    old = {app["name"]: app for app in (before or {}).get("applications", ())}
    new = {app["name"]: app for app in after["applications"]}
    return Plan(
        applications=tuple(
            _application(
                name,
                old.get(name),
                new.get(name),
                built.get(name, {}),
                running.get(name, {}).get("deployments", {}),
            )
            for name in dict.fromkeys([*new, *old])
        ),
        not_now=tuple(_not_now(before, after)),
    )


def _not_now(before: ServeConfig | None, after: ServeConfig) -> Iterator[str]:
    for name in _AT_START:
        was, wanted = (before or {}).get(name), after.get(name)
        if was is None or wanted is None:
            continue
        if not isinstance(wanted, Mapping):
            if was != wanted:
                yield name
            continue
        yield from (f"{name}.{key}" for key, value in wanted.items() if was.get(key) != value)


def _application(
    name: str,
    old: Application | None,
    new: Application | None,
    built: Mapping[str, int],
    running: Mapping[str, Any],
) -> ApplicationChange:
    if old is None or new is None or old == new:
        effect = Effect.SAME if old == new else Effect.ADDED if old is None else Effect.REMOVED
        return ApplicationChange(name=name, effect=effect, before=old, after=new)
    changes = tuple(_deployments(old, new, built, running))
    restarts = any(one.effect not in (Effect.SAME, Effect.CHANGED) for one in changes)
    return ApplicationChange(
        name=name,
        effect=Effect.RESTARTED if restarts else Effect.CHANGED,
        before=old,
        after=new,
        deployments=changes,
    )


def _deployments(
    old: Application, new: Application, built: Mapping[str, int], running: Mapping[str, Any]
) -> Iterator[DeploymentChange]:
    before, after = _by_name(old), _by_name(new)
    other_code = _code(old) != _code(new)
    for name, surge_of_code in built.items():
        was, wanted = before.get(name, {}), after.get(name, {})
        effect = _effect(was, wanted, other_code=other_code)
        if running and name not in running:
            effect = Effect.ADDED
        surge = int(wanted.get("max_surge_percent", surge_of_code))
        yield _change(name, effect, _replicas(was, running.get(name)), surge)
    for name in running:
        if name not in built:
            yield _gone(name, _replicas({}, running[name]))


def _change(name: str, effect: Effect, replicas: int, surge: int) -> DeploymentChange:
    alone = effect is Effect.RESTARTED and replicas == 1 and not surge
    away = None
    if alone and name not in _WAITED_FOR:
        away = f"{name} has one replica, which is stopped before the next is started"
    return DeploymentChange(
        name=name, effect=effect, replicas=replicas, surge_percent=surge, away=away
    )


def _gone(name: str, replicas: int) -> DeploymentChange:
    return DeploymentChange(
        name=name,
        effect=Effect.REMOVED,
        replicas=replicas,
        away=f"{name} is stopped before what takes its place is there",
    )


def _effect(was: Mapping[str, Any], wanted: Mapping[str, Any], *, other_code: bool) -> Effect:
    if other_code or any(was.get(option) != wanted.get(option) for option in _RESTARTING):
        return Effect.RESTARTED
    return Effect.SAME if was == wanted else Effect.CHANGED


def _code(app: Application) -> dict[str, Any]:
    """Return what is hashed into the code of all deployments of an application."""
    deployments = app.get("deployments") or ()
    # What is not said has the same default on both sides.
    code = {name: app.get(name) or None for name in _CODE}
    for name in _CODE_OF_DEPLOYMENT:
        code[name] = [one[name] for one in deployments if name in one]
    scaling = [one.get("autoscaling_config") or {} for one in deployments]
    return code | {"policies": [one.get("policy") for one in scaling]}


def _by_name(app: Application) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in app.get("deployments") or ()}


def _replicas(config: Mapping[str, Any], running: Mapping[str, Any] | None) -> int:
    if running is not None:
        return int(running.get("target_num_replicas", 1))
    scaling = config.get("autoscaling_config") or {}
    count = config.get("num_replicas", scaling.get("min_replicas", 1))
    return count if isinstance(count, int) else 1
