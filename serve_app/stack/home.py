"""The data folder of one installation, and the lock that keeps two `up` out of it.

<home>/run/up.lock      held while `comp-ai up` runs; holds its process id
<home>/run/deploy.lock  held while a deployment is under way
<home>/run/ray-token    the token of the local Ray cluster
<home>/run/haproxy/     HAProxy's, unless that path is too long for its sockets
<home>/deployments/     what was deployed, see serve_app.deploy.history
<home>/first-key        the API key that the first start made
<home>/keys/master.key  the master keys, unless the settings name others
<home>/logs/            one file for each child process
<home>/issuer/          key and clients of the local token issuer
<home>/ray/             Ray's sessions, unless that path is too long for its sockets
<home>/models/          weights
<home>/postgres/        see serve_app.stack.postgres
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from serve_app.errors import CompAIError, ConfigError
from serve_app.files import write_whole

# Ray puts `/session_<date>_<time>_<micros>_<pid>/sockets/plasma_store` behind it, and a Unix
# socket's path holds 107 bytes.
_RAY_TEMP_MAX_BYTES = 40
# Serve and HAProxy put `/<56 letters>/ctl` behind it, and HAProxy takes paths of 97 bytes.
_HAPROXY_MAX_BYTES = 36


class AlreadyRunning(CompAIError):
    """Another `comp-ai up` uses this data folder."""


@dataclass(frozen=True, slots=True)
class Home:
    """The data folder; the properties name what lies in it."""

    path: Path

    @property
    def logs(self) -> Path:
        """Folder of the children's logs."""
        return self.path / "logs"

    @property
    def run(self) -> Path:
        """Folder of what is only good while `up` runs, and of the cluster token."""
        return self.path / "run"

    @property
    def deploy_lock(self) -> Path:
        """File that a deployment holds."""
        return self.run / "deploy.lock"

    @property
    def deployments(self) -> Path:
        """Folder of what was deployed."""
        return self.path / "deployments"

    @property
    def issuer(self) -> Path:
        """Folder of the local issuer."""
        return self.path / "issuer"

    @property
    def first_key(self) -> Path:
        """File of the key that the first start made."""
        return self.path / "first-key"

    @property
    def master_key(self) -> Path:
        """File of the master keys."""
        return self.path / "keys" / "master.key"

    @property
    def ray_token(self) -> Path:
        """File of the Ray cluster's token."""
        return self.run / "ray-token"

    @property
    def ray_temp(self) -> Path:
        """Folder of Ray's sessions."""
        return self._short(self.path / "ray", "", _RAY_TEMP_MAX_BYTES)

    @property
    def haproxy(self) -> Path:
        """Folder of HAProxy's configuration and of its control socket."""
        return self._short(self.run / "haproxy", "-h", _HAPROXY_MAX_BYTES)

    def _short(self, wanted: Path, suffix: str, most_bytes: int) -> Path:
        """Return `wanted`, or a folder for it elsewhere where its path is too long."""
        if len(os.fsencode(wanted)) <= most_bytes:
            return wanted
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]
        short = Path(tempfile.gettempdir()) / f"comp-ai-{os.geteuid()}-{digest}{suffix}"
        if len(os.fsencode(short)) <= most_bytes:
            return short
        return Path("/tmp") / short.name  # noqa: S108  made private and checked in `prepare`

    def prepare(self) -> None:
        """Make the folders, closed to other users.

        Raises:
            ConfigError: one cannot be made, or is another user's.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            own = (self.logs, self.run, self.issuer, self.master_key.parent)
            for folder in (*own, self.ray_temp, self.haproxy):
                _private_folder(folder)
        except OSError as error:
            raise ConfigError(
                "COMP_AI_HOME", str(self.path), f"a folder that we may write ({error.strerror})"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            AlreadyRunning: another process holds it; names it.
        """

        def refusal(pid: str) -> AlreadyRunning:
            return AlreadyRunning(
                f"`comp-ai up` already runs on {self.path} (process {pid}). "
                "Stop it, or set COMP_AI_HOME to another folder."
            )

        with held(self.run / "up.lock", refusal):
            yield

    def running_pid(self) -> int | None:
        """Return the process id of the `up` that holds this folder, or None."""
        try:
            with (self.run / "up.lock").open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read().strip() or 0) or None
        except (OSError, ValueError):
            return None
        return None

    def keep_ray_token(self, token: str) -> None:
        """Write down the cluster's token where Ray reads it."""
        write_secret(self.ray_token, token)

    def make_ray_token(self) -> str:
        """Return the cluster's token, making it at the first start."""
        with suppress(FileNotFoundError):
            return self.ray_token.read_text(encoding="ascii").strip()
        token = secrets.token_hex(32)
        write_secret(self.ray_token, token)
        return token


@contextmanager
def held(path: Path, refusal: Callable[[str], CompAIError]) -> Iterator[None]:
    """Hold the lock file `path` for this process.

    Raises:
        CompAIError: another process holds it: what `refusal` makes of its process id.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise refusal(file.read().strip()) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    # In a shared folder somebody else may have been there first.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigError(str(folder), "of another user", "a folder that is ours; remove it")
    folder.chmod(0o700)


def write_secret(path: Path, text: str) -> None:
    """Write `text` so that nobody else can read it, whole or not at all."""
    write_whole(path, text.encode("ascii"))
