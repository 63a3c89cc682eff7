"""Who may manage API keys, and how much a key may do that its owner makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from serve_app.config import Bodies, LimitPolicy, ModelEntry
from serve_app.errors import PermissionDenied
from serve_app.identity.api_keys import ApiKey, KeyTerms
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind


def require_own_keys(principal: Principal) -> None:
    """Raise PermissionDenied unless `principal` may manage the keys that it owns.

    A key that leaks must not be able to make others that outlive its revocation, so it may do
    this only where it was said of it.
    """
    if principal.kind is PrincipalKind.API_KEY:
        principal.require(Permission.KEYS)


def require_new_keys(principal: Principal) -> None:
    """Raise PermissionDenied unless `principal` may make keys beside those that it has."""
    if principal.limits is not None:
        raise PermissionDenied(
            "An API key with limits of its own makes no keys: each would have them anew."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The most that a key may do. None is no bound.

    `usable` are the models that a list may name: a name that is not on offer is refused like one
    of a model that the owner may not use, so that nobody finds out what there is.
    """

    permissions: frozenset[Permission]
    models: frozenset[str] | None = None
    usable: frozenset[str] | None = None
    limits: LimitPolicy | None = None
    bodies: Bodies | None = None
    expires_at: datetime | None = None

    @classmethod
    def of(
        cls, principal: Principal, own_key: ApiKey | None, models: Iterable[ModelEntry]
    ) -> Bounds:
        """Return what `principal`, who signed in with `own_key` or otherwise, may give away.

        `models` are those on offer.
        """
        permissions = principal.permissions
        if Permission.ADMIN in permissions:
            permissions = frozenset(Permission)
        elif principal.kind is not PrincipalKind.API_KEY:
            permissions |= {Permission.KEYS}
        return cls(
            permissions=permissions,
            models=principal.models,
            usable=frozenset(model.name for model in models if principal.may_use(model)),
            limits=principal.limits,
            bodies=principal.bodies,
            expires_at=None if own_key is None else own_key.terms.expires_at,
        )

    def widest(self) -> dict[str, Any]:
        """Return the terms of a new key that names none: as much as these bounds allow."""
        return {
            "models": self.models,
            "limits": self.limits,
            "bodies": self.bodies,
            "expires_at": self.expires_at,
        }

    def check(self, terms: KeyTerms) -> None:
        """Raise PermissionDenied where `terms` go beyond these bounds; names the field."""
        for name, why in self._beyond(terms):
            raise PermissionDenied(
                f"A key may not do more than you may yourself: {why}.", param=name
            )

    def _beyond(self, terms: KeyTerms) -> Iterator[tuple[str, str]]:
        if more := terms.permissions - self.permissions:
            yield "permissions", f"you do not hold {', '.join(sorted(more))}"
        if self.models is not None and (terms.models is None or not terms.models <= self.models):
            yield "models", f"your models are {', '.join(sorted(self.models))}"
        elif terms.models is not None and self.usable is not None and terms.models - self.usable:
            yield "models", f"the models that you may use are {', '.join(sorted(self.usable))}"
        if (name := looser(terms.limits, self.limits)) is not None:
            yield "limits", f"your own `{name}` is lower"
        if self.bodies is not None and (
            terms.bodies is None or terms.bodies.rank > self.bodies.rank
        ):
            yield "bodies", f"of what you ask no more than {self.bodies} is kept"
        if self.expires_at is not None and (
            terms.expires_at is None or terms.expires_at > self.expires_at
        ):
            yield "expires_at", f"your own key expires at {int(self.expires_at.timestamp())}"


def looser(limits: LimitPolicy | None, bound: LimitPolicy | None) -> str | None:
    """Return the name of a limit that lets through more than `bound` does, if there is one."""
    for name in LimitPolicy.model_fields if bound is not None else ():
        most: Any = getattr(bound, name)
        value: Any = None if limits is None else getattr(limits, name)
        if most is not None and (value is None or value > most):
            return name
    return None
