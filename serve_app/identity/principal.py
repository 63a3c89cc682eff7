"""Who asks, once it has been checked."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Protocol

from serve_app.config import Bodies, LimitPolicy, ModelEntry
from serve_app.errors import PermissionDenied
from serve_app.identity.permission import Permission as Permission
from serve_app.records import PrincipalKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A caller whose credential was verified.

    `id` is the token's `sub`, or the owner of the API key. `models` are the names of those that
    it may use; None allows every model that is not restricted. `roles` are all that the token
    names, those of the permissions among them; `groups` its groups, without a leading slash.
    `client_id` is the client that the token was given to (`azp`). `limits` and `bodies`
    are those of the API key itself.

    Of a token it holds no permission before `serve_app.identity.access` has mapped its roles.
    """

    id: str
    kind: PrincipalKind
    permissions: frozenset[Permission] = frozenset()
    models: frozenset[str] | None = None
    api_key_id: uuid.UUID | None = None
    roles: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    client_id: str | None = None
    limits: LimitPolicy | None = None
    bodies: Bodies | None = None

    def may_use(self, model: ModelEntry) -> bool:
        """Tell whether this principal may use `model`, under whichever of its names."""
        if self.models is not None:
            return model.name in self.models
        return not model.restricted or Permission.ADMIN in self.permissions

    def holds(self, permission: Permission) -> bool:
        """Tell whether this principal holds `permission`; admins hold all."""
        return permission in self.permissions or Permission.ADMIN in self.permissions

    def require(self, permission: Permission) -> None:
        """Raise PermissionDenied unless this principal holds `permission`."""
        if not self.holds(permission):
            raise PermissionDenied(
                f"This needs the permission {permission}. Ask your administrator for that role.",
                denied=permission.value,
            )


class Authenticator(Protocol):
    """Checks the credential of a request."""

    async def authenticate(self, authorization: str | None) -> Principal:
        """Return the principal that an Authorization header value names.

        Raises:
            AuthenticationFailed: no, an unknown, an expired or a revoked credential.
            IdentityUnavailable: it cannot be checked now.
        """
        ...
