"""Hosts of a cluster on one machine: namespaces of their own, joined by a bridge.

A host has its own network, processes and disk, as a machine or a container has. The bridge is in
a network namespace of its own, too, which the calling thread enters: nothing crosses the
machine's own network, and when the processes are gone, so is everything else.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.stack_runner import has_ended, wait_until

DOOR = "10.77.0.1"
"""Address of the bridge: of the tests, and of what is on no host."""

_CLONE_NEWNET = 0x40000000
_GONE_S = 30
_BOOT = """
set -e
mount --bind "$HOST_DISK" "$HOST_PLACE"
echo there
read -r _
ip link set lo up
ip address add "$HOST_ADDRESS/24" dev eth0
ip link set eth0 up
set +e
stopping=
trap 'stopping=1; kill -TERM $command' TERM
# As a container that is started again whatever it ended with, unless it was told to stop.
while [ -z "$stopping" ]; do
    "$@" >>"$HOST_LOG" 2>&1 </dev/null &
    command=$!
    wait $command
    wait $command
    sleep 0.2
done
"""
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def why_not() -> str | None:
    """Say why hosts cannot be had here; None where they can."""
    if os.geteuid() != 0:
        return "hosts are namespaces, which only root may make"
    for command in (
        [*_UNSHARE, "mount", "--bind", "/mnt", "/mnt"],
        ["unshare", "--net", "ip", "link", "add", "comp-ai-br", "type", "bridge"],
        ["unshare", "--net", "ip", "link", "add", "comp-ai-a", "type", "veth"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            return f"hosts need {error.filename}"
        if done.returncode != 0:
            return f"no namespaces: {' '.join(command)}: {done.stderr.strip()}"
    return None


@contextmanager
def bridge() -> Iterator[None]:
    """Be, with this thread, in a new network that has nothing but a bridge."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _libc("unshare", _CLONE_NEWNET)
        try:
            _ip("link", "set", "lo", "up")
            _ip("link", "add", "br0", "type", "bridge")
            _ip("address", "add", f"{DOOR}/24", "dev", "br0")
            _ip("link", "set", "br0", "up")
            yield
        finally:
            _libc("setns", before, _CLONE_NEWNET)
    finally:
        os.close(before)


class Host:
    """One host. Its disk outlives it; it is at `place`, for itself alone.

    Args:
        place: an empty folder, the same for all hosts.
    """

    def __init__(self, name: str, number: int, folder: Path, place: Path) -> None:
        self.name = name
        self.address = f"10.77.0.{10 + number}"
        self.disk = folder / name
        self.log = folder / f"{name}.log"
        self._place = place
        self._cable = f"port{number}"
        self._process: subprocess.Popen[bytes] | None = None
        self.disk.mkdir()

    @property
    def runs(self) -> bool:
        """Tell whether it was switched on and what it was given to run still runs."""
        return self._process is not None and self._process.poll() is None

    def switch_on(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Run `command` on it, until that ends or the host is switched off."""
        own = {
            "HOST_DISK": str(self.disk),
            "HOST_PLACE": str(self._place),
            "HOST_ADDRESS": self.address,
            "HOST_LOG": str(self.log),
        }
        self._process = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", _BOOT, "sh", *command],
            env={**env, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"there\n", f"{self.name} has no namespaces"
        self._plug_in(self._process.pid)
        self._process.stdin.write(b"go\n")
        self._process.stdin.close()

    def _plug_in(self, pid: int) -> None:
        # That of a host that was switched off goes a moment after its last process.
        subprocess.run(["ip", "link", "delete", self._cable], capture_output=True, check=False)
        peer = ("peer", "name", "eth0", "netns", str(pid))
        _ip("link", "add", self._cable, "type", "veth", *peer)
        _ip("link", "set", self._cable, "master", "br0", "up")

    def unplug(self) -> None:
        """Take its network away: its connections stay open and pass nothing on."""
        _ip("link", "set", self._cable, "down")

    def switch_off(self) -> None:
        """Kill all its processes at once, with SIGKILL."""
        if self._process is None:
            return
        first = self._first()
        if first is not None:
            # With the first process of their namespace the kernel kills all others.
            with suppress(psutil.NoSuchProcess):
                first.kill()
        self._process.kill()
        self._process.wait()
        if first is not None:
            # The kernel ends all others before the first one, whose parent may not look.
            wait_until(lambda: has_ended(first), f"{self.name} is off", _GONE_S)
        self._process = None

    def stop(self, timeout_s: float = 120) -> None:
        """Tell its command to stop, and wait for its end."""
        first = self._first()
        assert first is not None
        assert self._process is not None
        first.terminate()
        self._process.wait(timeout_s)
        self._process = None

    def listens(self) -> set[int]:
        """Return the TCP ports that are listened on, on addresses that others reach."""
        first = self._first()
        assert first is not None
        found = set()
        for kind in ("tcp", "tcp6"):
            lines = Path(f"/proc/{first.pid}/net/{kind}").read_text().splitlines()[1:]
            for _, local, _, state, *_ in map(str.split, lines):
                address, _, port = local.partition(":")
                if state == "0A" and address not in _LOOPBACK:
                    found.add(int(port, 16))
        return found

    def said(self) -> str:
        """Return what its command wrote since the first time it was switched on."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _first(self) -> psutil.Process | None:
        """Return the first process of its namespace."""
        if self._process is None:
            return None
        with suppress(psutil.NoSuchProcess):
            return next(iter(psutil.Process(self._process.pid).children()), None)
        return None


# As the kernel writes 127.0.0.1, ::1 and ::ffff:127.0.0.1.
_LOOPBACK = (
    "0100007F",
    "00000000000000000000000001000000",
    "0000000000000000FFFF00000100007F",
)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _libc(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
