"""The permissions that there are."""

from __future__ import annotations

import enum


class Permission(enum.StrEnum):
    """What a principal may do. An admin may do everything."""

    USER = "comp-ai:user"
    ADMIN = "comp-ai:admin"
    AUDITOR = "comp-ai:auditor"
    # Lets an API key manage the keys of its owner; who signs in otherwise may do so anyway.
    KEYS = "comp-ai:keys"
