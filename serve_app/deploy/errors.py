"""How a deployment can end badly."""

from __future__ import annotations

from serve_app.errors import CompAIError


class DeployRefused(CompAIError):
    """Nothing was changed."""


class RolledBack(CompAIError):
    """The change failed, and what ran before runs again."""


class NotRolledBack(CompAIError):
    """The change failed, and so did going back."""
