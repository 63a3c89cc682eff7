"""The audit row of a request that was refused a permission or a model."""

from __future__ import annotations

from serve_app.audit.act import Actor, AuditAct
from serve_app.records import RequestRecord

REFUSE = "permission.refuse"


def refusal_act(record: RequestRecord) -> AuditAct:
    """Return the act of a record whose `denied` says what was refused."""
    return AuditAct(
        actor=Actor(
            id=record.principal_id or "",
            kind=record.principal_kind or "",
            api_key_id=record.api_key_id,
            client_address=record.client_address,
            request_id=record.request_id,
        ),
        action=REFUSE,
        target=record.denied,
        after={
            "route": record.route,
            "status": record.status,
            "error_code": record.error_code,
            "record": str(record.id),
        },
        at=record.created_at,
    )
