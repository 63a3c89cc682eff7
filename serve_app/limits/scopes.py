"""Whose limits a request takes from: all of these must grant it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from urllib.parse import quote

from serve_app.config import LimitPolicy, LimitsConfig, Members, MembersPolicy
from serve_app.contracts import MICROS, Scope
from serve_app.identity.principal import Principal


def scopes_of(principal: Principal, config: LimitsConfig) -> tuple[Scope, ...]:
    """Return the scopes of a request of `principal`.

    All, the principal and its key are among them also where they are not limited, so that a
    budget that is set later knows what was used before.
    """
    return tuple(_scopes(principal, config))


def _scopes(principal: Principal, config: LimitsConfig) -> Iterator[Scope]:
    yield _scope("everyone", "everyone together", config.everyone)
    yield _scope(_key("principal", principal.id), "you", config.policy_of(principal.id))
    if principal.api_key_id is not None:
        own = principal.limits or LimitPolicy()
        yield _scope(_key("api_key", str(principal.api_key_id)), "your API key", own)
    yield from _of_members("group", principal.groups, config.groups, principal)
    yield from _of_members("role", principal.roles, config.roles, principal)


def _of_members(
    kind: str,
    held: Collection[str],
    policies: Mapping[str, MembersPolicy],
    principal: Principal,
) -> Iterator[Scope]:
    # In the order of the config, so that the same scopes are always named in the same order.
    for name, policy in policies.items():
        if name not in held:
            continue
        if policy.members is Members.TOGETHER:
            yield _scope(_key(kind, name), f"the {kind} `{name}`", policy)
        else:
            key = _key(f"{kind}-member", name, principal.id)
            yield _scope(key, f"each of the {kind} `{name}`", policy)


def _key(kind: str, *names: str) -> str:
    """Return a key that no other names give, of characters that every store takes."""
    return ":".join((kind, *(quote(name, safe="/", errors="surrogatepass") for name in names)))


def _scope(key: str, label: str, policy: LimitPolicy) -> Scope:
    return Scope(
        key=key,
        label=label,
        requests_per_minute=policy.requests_per_minute,
        tokens_per_minute=policy.tokens_per_minute,
        concurrency=policy.concurrency,
        tokens_per_day=policy.tokens_per_day,
        tokens_per_month=policy.tokens_per_month,
        cost_per_day=_micros(policy.cost_per_day),
        cost_per_month=_micros(policy.cost_per_month),
    )


def _micros(amount: Decimal | None) -> int | None:
    return None if amount is None else int(amount * MICROS)
