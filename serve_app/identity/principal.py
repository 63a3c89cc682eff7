"""Who asks, once it has been checked."""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass
from typing import Protocol

from serve_app.config import LimitPolicy
from serve_app.errors import PermissionDenied
from serve_app.records import PrincipalKind


class Permission(enum.StrEnum):
    """What a principal may do, in the words of the realm's roles."""

    USER = "comp-ai:user"
    ADMIN = "comp-ai:admin"
    AUDITOR = "comp-ai:auditor"
    # Lets an API key manage the keys of its owner; who signs in otherwise may do so anyway.
    KEYS = "comp-ai:keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A caller whose credential was verified.

    `id` is the token's `sub`, or the owner of the API key. `models` None allows every model.
    `roles` are all that the token names, those of the permissions among them; `groups` its
    groups, without a leading slash. `client_id` is the client that the token was given to
    (`azp`). `limits` are those of the API key itself.
    """

    id: str
    kind: PrincipalKind
    permissions: frozenset[Permission]
    models: frozenset[str] | None = None
    api_key_id: uuid.UUID | None = None
    roles: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    client_id: str | None = None
    limits: LimitPolicy | None = None

    def may_use(self, model: str) -> bool:
        """Tell whether this principal may use `model`."""
        return self.models is None or model in self.models

    def require(self, permission: Permission) -> None:
        """Raise PermissionDenied unless this principal holds `permission`; admins hold all."""
        if permission not in self.permissions and Permission.ADMIN not in self.permissions:
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
