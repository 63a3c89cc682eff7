"""pg_dump and pg_restore: which ones, and how they are run.

The password goes to them in their environment, which only their own user can read, and never on
the command line. Of what they say only the lines that name an error are passed on: others may
quote a row.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from serve_app.backup.errors import BackupDamaged, BackupError
from serve_app.errors import ConfigError
from serve_app.settings import PostgresSettings

SETTING = "COMP_AI_BACKUP_PROGRAMS"
_SCHEMA, _KEYS_SCHEMA = "comp_ai", "comp_ai_keys"
_LOCK_WAIT_MS = 60_000
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)(\.\d+)?")
_ERROR_LINE = re.compile(r"\b(?:error|ERROR|FATAL):")
_MOST_SAID = 400


@dataclass(frozen=True, slots=True)
class PostgresPrograms:
    """The programs of `folder`, or of PATH where that is None."""

    folder: Path | None = None

    async def check(self, server_major: int) -> str:
        """Return the version of pg_dump, which must not be older than the server's.

        Raises:
            ConfigError: a program is missing, or too old.
        """
        versions = [await self._version(name) for name in ("pg_dump", "pg_restore")]
        for version in versions:
            if int(version.split(".", 1)[0]) < server_major:
                raise ConfigError(
                    SETTING,
                    f"{self._shown}, of PostgreSQL {version}",
                    f"a folder with pg_dump and pg_restore of PostgreSQL {server_major} or later",
                )
        return versions[0]

    async def dump(self, settings: PostgresSettings, file: Path, *, snapshot: str) -> None:
        """Write what `snapshot` shows to `file`, which is there, empty and closed to others.

        The schema of the keys is in it, so that a restore has its tables; no row of it is.

        Raises:
            BackupError: pg_dump failed; says why.
        """
        await self._run(
            settings,
            "pg_dump",
            "--format=custom",
            f"--schema={_SCHEMA}",
            f"--schema={_KEYS_SCHEMA}",
            f"--exclude-table-data={_KEYS_SCHEMA}.*",
            f"--snapshot={snapshot}",
            f"--lock-wait-timeout={_LOCK_WAIT_MS}",
            f"--file={file}",
        )

    async def check_dump(self, file: Path) -> None:
        """Read the table of contents of a dump.

        Raises:
            BackupDamaged: it is none, or holds rows of the keys.
        """
        try:
            listed = await self._run(None, "pg_restore", "--list", str(file))
        except BackupError as error:
            raise BackupDamaged(f"{file.name} is no dump: {error}") from None
        if f" TABLE DATA {_KEYS_SCHEMA} ".encode() in listed:
            raise BackupDamaged(f"{file.name} holds keys of subjects, which no dump may.")

    async def restore(self, settings: PostgresSettings, file: Path) -> None:
        """Make what is in `file`, all of it or nothing; the schemas must not be there.

        Raises:
            BackupError: pg_restore failed; says why.
        """
        await self._run(
            settings,
            "pg_restore",
            "--exit-on-error",
            "--single-transaction",
            "--no-owner",
            f"--dbname={settings.database}",
            str(file),
        )

    async def _version(self, program: str) -> str:
        said = (await self._run(None, program, "--version")).decode("utf-8", "replace")
        match = _VERSION.search(said)
        if match is None:
            raise ConfigError(SETTING, self._shown, f"a folder with {program} of PostgreSQL")
        return match[1] + (match[2] or "")

    async def _run(self, settings: PostgresSettings | None, program: str, *arguments: str) -> bytes:
        process = await self._start(settings, program, *arguments)
        try:
            out, said = await process.communicate()
        except BaseException:  # cancelled: it must not go on without us
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if process.returncode != 0:
            raise BackupError(f"{program} failed: {_reason(said, process.returncode)}")
        return out

    async def _start(
        self, settings: PostgresSettings | None, program: str, *arguments: str
    ) -> asyncio.subprocess.Process:
        path = program if self.folder is None else str(self.folder / program)
        environ = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        if settings is not None:
            environ |= libpq_environment(settings)
        try:
            return await asyncio.create_subprocess_exec(
                path,
                *arguments,
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            allowed = f"a folder with {program} ({error.strerror})"
            raise ConfigError(SETTING, self._shown, allowed) from error

    @property
    def _shown(self) -> str:
        return "PATH" if self.folder is None else str(self.folder)


def libpq_environment(settings: PostgresSettings) -> dict[str, str]:
    """Return how libpq connects as `serve_app.database.connect` does."""
    environ = {
        "PGHOST": settings.host,
        "PGPORT": str(settings.port),
        "PGUSER": settings.user,
        "PGDATABASE": settings.database,
        "PGSSLMODE": "disable" if settings.host.startswith("/") else settings.sslmode,
        "PGAPPNAME": "comp-ai backup",
        "PGCONNECT_TIMEOUT": "10",
    }
    if settings.password is not None:
        environ["PGPASSWORD"] = settings.password.get_secret_value()
    authorities = _authorities(settings)
    if authorities is not None:
        environ["PGSSLROOTCERT"] = authorities
    return environ


def _authorities(settings: PostgresSettings) -> str | None:
    if settings.sslmode not in ("verify-ca", "verify-full"):
        return None
    file = settings.sslrootcert or ssl.get_default_verify_paths().cafile
    if file:
        return str(file)
    # The system's CAs may be a folder, as on Debian; libpq takes them by this word (from 16 on)
    # and for verify-full alone.
    return "system" if settings.sslmode == "verify-full" else None


def _reason(said: bytes, code: int | None) -> str:
    lines = said.decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if _ERROR_LINE.search(line)]
    return " ".join(errors)[:_MOST_SAID] or f"exit code {code}"
