"""What can go wrong with a backup."""

from __future__ import annotations

from serve_app.errors import CompAIError


class BackupError(CompAIError):
    """The backup failed."""


class BackupDamaged(BackupError):
    """The backup is not what was written."""
