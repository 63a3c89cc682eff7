"""What the audit log keeps of one act: who did what to what, when and from where."""

from __future__ import annotations

import getpass
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from starlette.requests import Request

from serve_app import request_id
from serve_app.client_address import client_address
from serve_app.identity.principal import Principal
from serve_app.records import utc_now
from serve_app.request_id import fit_request_id

# Who acts at the command line; beside them the kinds of a principal.
OPERATOR = "operator"
# The service itself, which takes over a policy that was deployed.
SERVICE_ITSELF = "comp-ai"


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who acts, and from where.

    `kind` is one of PrincipalKind, OPERATOR or SERVICE_ITSELF. `api_key_id` names the key that
    was used. `client_address` and `request_id` are those of the request, where there was one.
    """

    id: str
    kind: str
    api_key_id: uuid.UUID | None = None
    client_address: str | None = None
    request_id: str | None = None

    @classmethod
    def of(cls, principal: Principal, request: Request) -> Actor:
        """Return who makes `request`."""
        return cls(
            id=principal.id,
            kind=principal.kind.value,
            api_key_id=principal.api_key_id,
            client_address=client_address(request),
            request_id=fit_request_id(request.headers.get(request_id.HEADER)),
        )

    @classmethod
    def operator(cls) -> Actor:
        """Return who runs this process at a command line: `<account>@<host>`."""
        try:
            account = getpass.getuser()
        except (KeyError, OSError):  # a container may run under a number without a name
            account = "unknown"
        return cls(id=f"{account}@{socket.gethostname()}", kind=OPERATOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditAct:
    """One administrative act, or one refusal of permission.

    Args:
        action: what was done, as `<thing>.<verb>`: `key.create`, `permission.refuse`.
        target: what it was done to, by id or name.
        before, after: what changed; anything that JSON can hold. Never a secret.
        at: when it was done.
    """

    actor: Actor
    action: str
    target: str | None = None
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    at: datetime = field(default_factory=utc_now)
