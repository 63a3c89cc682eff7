"""The command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from serve_app.settings import PostgresSettings

COMP_AI = Path(sys.executable).parent / "comp-ai"


def comp_ai_environment(settings: PostgresSettings, **more: str) -> dict[str, str]:
    """Return the environment of a `comp-ai` at the database of `settings`."""
    password = settings.password.get_secret_value() if settings.password else ""
    environ = {
        "POSTGRES_HOST": settings.host,
        "POSTGRES_PORT": str(settings.port),
        "POSTGRES_USER": settings.user,
        "POSTGRES_PASSWORD": password,
        "POSTGRES_DB": settings.database,
        "POSTGRES_SSLMODE": settings.sslmode,
    }
    return os.environ | environ | more


def comp_ai(
    settings: PostgresSettings, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `comp-ai` at the database of `settings`, as an operator does."""
    return subprocess.run(
        [str(COMP_AI), *arguments],
        env=comp_ai_environment(settings, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
