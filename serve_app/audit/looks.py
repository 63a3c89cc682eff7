"""A look into what others did is an act too: it stands in the audit log before it is answered."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.identity.principal import Principal
from serve_app.lazy_pool import LazyPool

USAGE = "usage.read"
SEARCH = "requests.search"
ONE = "requests.read"


async def note_look(
    database: LazyPool,
    principal: Principal,
    request: Request,
    action: str,
    *,
    rows: int,
    target: str | None = None,
) -> None:
    """Write down who looked, what was asked and how many rows were found.

    Raises:
        Unavailable: it cannot be written; then nobody gets an answer.
    """
    after: dict[str, Any] = {"query": dict(request.query_params), "rows": rows}
    act = AuditAct(actor=Actor.of(principal, request), action=action, target=target, after=after)
    async with database.connection() as connection, connection.transaction():
        await AuditLog().append(connection, act)
