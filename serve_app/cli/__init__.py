"""The `comp-ai` command line."""

from __future__ import annotations

from serve_app.cli.app import main

__all__ = ["main"]
