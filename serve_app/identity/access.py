"""From the roles and groups of a token to permissions and models, as the policy maps them.

Nothing is given but what the policy gives. An API key is no token: what it may do was said when
it was made, and neither roles nor groups add to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

from serve_app.config import AccessConfig, GatewayConfig, Grant
from serve_app.identity.principal import Principal
from serve_app.records import PrincipalKind


def with_access(principal: Principal, config: GatewayConfig) -> Principal:
    """Return `principal` with the permissions and models that `config` gives it."""
    if principal.kind is PrincipalKind.API_KEY:
        return principal
    grants = list(_grants(principal, config.access))
    return replace(
        principal,
        permissions=frozenset(p for grant in grants for p in grant.permissions),
        models=_models(principal, config, grants),
    )


def counted_roles(principal: Principal, config: GatewayConfig) -> frozenset[str]:
    """Return those of the principal's roles that the policy knows, for whatever it may be."""
    known = (
        config.access.by_role.keys()
        | config.standings.roles.keys()
        | config.limits.roles.keys()
        | config.bodies.roles.keys()
    )
    return frozenset(
        role
        for role in principal.roles
        if role in known or config.access.named_model(role) is not None
    )


def _grants(principal: Principal, access: AccessConfig) -> Iterator[Grant]:
    by_role = access.by_role
    yield from (by_role[role] for role in principal.roles if role in by_role)
    yield from (access.groups[group] for group in principal.groups if group in access.groups)


def _models(
    principal: Principal, config: GatewayConfig, grants: list[Grant]
) -> frozenset[str] | None:
    """Return the names of the models that lists allow, or None where there is no list."""
    lists = [grant.models for grant in grants if grant.models is not None]
    named = {config.access.named_model(role) for role in principal.roles} - {None}
    if not lists and not named:
        return None
    patterns = [pattern for patterns in lists for pattern in patterns]
    return frozenset(
        model.name
        for model in config.models
        if model.name in named or any(fnmatchcase(model.name, p) for p in patterns)
    )
