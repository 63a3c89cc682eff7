"""Child processes of `comp-ai up`: start, watch, start again, and leave none behind.

Each child leads a group of its own, so that a Ctrl-C in the terminal reaches `up` alone,
which then stops them in order. `up` is the reaper of all its descendants: what a dead child
leaves behind comes to us and is ended with the rest.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from serve_app.errors import CompAIError

_logger = logging.getLogger(__name__)

HOME_MARK = "COMP_AI_UP_HOME"
"""Environment variable that every child inherits: by it a later `up` knows its leftovers."""

_PR_SET_CHILD_SUBREAPER = 36
_FIRST_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 10.0
_HEALTHY_AFTER_S = 30.0
_REAP_INTERVAL_S = 2.0
_MAX_LOG_BYTES = 64 * 1024 * 1024


class ProcessDied(CompAIError):
    """A process that everything depends on ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """How to run one child.

    Args:
        user: system user and group to run as; None is our own.
        restart: start it again when it dies; otherwise its death ends `up`.
        attempts: starts that are tried before it is called ready, where `restart` is off.
        before_restart: called, in a thread, before each new start.
        own_session: lead a session, too, by which all that it leaves is found, whatever groups
            its processes have made. Linux shares the CPUs out by session (sched_autogroup), and
            there are kernels that let what is in another session than an engine's wait for seconds.
    """

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] | None = None
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 10.0
    restart: bool = True
    attempts: int = 1
    before_restart: Callable[[], None] | None = None
    own_session: bool = False


@dataclass(slots=True)
class _Child:
    spec: ProcessSpec
    process: asyncio.subprocess.Process
    started: float
    stopping: bool = False
    attempt: int = 1
    backoff_s: float = _FIRST_BACKOFF_S
    watcher: asyncio.Task[None] | None = field(default=None)


class Supervisor:
    """Starts children and keeps them alive until it is told to stop them.

    Args:
        mark: the data folder, written into every child's environment.
    """

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)
        self._children: dict[str, _Child] = {}
        self._died: asyncio.Future[ProcessDied] = asyncio.get_running_loop().create_future()
        become_subreaper()
        self._reaper = asyncio.create_task(self._reap_orphans(), name="reap orphans")

    async def start(self, spec: ProcessSpec) -> None:
        """Start one child; returns as soon as it runs, not when it is ready.

        Raises:
            ProcessDied: the program cannot be run.
        """
        child = _Child(spec, await self._spawn(spec), time.monotonic())
        self._children[spec.name] = child
        child.watcher = asyncio.create_task(self._watch(child), name=f"watch {spec.name}")

    @property
    def started(self) -> bool:
        """Tell whether there is a child to stop."""
        return bool(self._children)

    def pid(self, name: str) -> int | None:
        """Return the process id of a child that runs, or None."""
        child = self._children.get(name)
        if child is None or child.process.returncode is not None:
            return None
        return child.process.pid

    def called_ready(self, name: str) -> None:
        """Note that a child is ready: its next death counts."""
        child = self._children.get(name)
        if child is not None:
            child.attempt = child.spec.attempts

    async def died(self) -> ProcessDied:
        """Return once a child that is not started again has ended by itself."""
        return await asyncio.shield(self._died)

    async def stop(self, name: str, *, force: bool = False) -> None:
        """End one child, gently first; returns when it is gone. Unknown names are fine."""
        child = self._children.pop(name, None)
        if child is None:
            return
        child.stopping = True
        if child.watcher is not None:
            child.watcher.cancel()
            await asyncio.gather(child.watcher, return_exceptions=True)
        _send(child.process, signal.SIGKILL if force else child.spec.stop_signal)
        try:
            async with asyncio.timeout(child.spec.stop_timeout_s):
                await child.process.wait()
        except TimeoutError:
            _logger.warning("%s does not stop: killing it", name)
            _send(child.process, signal.SIGKILL)
            await child.process.wait()

    async def close(self, *, timeout_s: float = 5.0) -> None:
        """End everything that still descends from this process."""
        self._reaper.cancel()
        for name in reversed(list(self._children)):
            await self.stop(name)
        await asyncio.to_thread(end_descendants, timeout_s)

    def kill_all(self) -> None:
        """Kill every descendant at once."""
        for child in self._children.values():
            child.stopping = True
        end_descendants(0)

    async def _spawn(self, spec: ProcessSpec) -> asyncio.subprocess.Process:
        rotate(spec.log)
        env = dict(os.environ if spec.env is None else spec.env) | {HOME_MARK: self._mark}
        identity = {} if spec.user is None else {"user": spec.user, "group": spec.user}
        with spec.log.open("ab") as log:
            try:
                return await asyncio.create_subprocess_exec(
                    *spec.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                    # A new session is a new group.
                    start_new_session=spec.own_session,
                    process_group=None if spec.own_session else 0,
                    **identity,  # type: ignore[arg-type]  # passed on to subprocess.Popen
                )
            except OSError as error:
                raise ProcessDied(f"{spec.name} cannot be started: {error}") from error

    async def _watch(self, child: _Child) -> None:
        while True:
            code = await child.process.wait()
            if child.stopping:
                return
            _logger.warning("%s ended with %s", child.spec.name, describe_exit(code))
            if not child.spec.restart and child.attempt >= child.spec.attempts:
                self._report(child, code)
                return
            child.attempt += 1
            await self._revive(child)

    def _report(self, child: _Child, code: int) -> None:
        if not self._died.done():
            self._died.set_result(
                ProcessDied(
                    f"{child.spec.name} ended by itself with {describe_exit(code)}. "
                    f"Its last words: {last_lines(child.spec.log)} (all: {child.spec.log})"
                )
            )

    async def _revive(self, child: _Child) -> None:
        if time.monotonic() - child.started > _HEALTHY_AFTER_S:
            child.backoff_s = _FIRST_BACKOFF_S
        # What it left may hold its port or its data: nginx's workers outlive their master.
        await asyncio.to_thread(end_processes, left_by(child.process.pid), 1.0)
        while True:
            await asyncio.sleep(child.backoff_s)
            child.backoff_s = min(child.backoff_s * 2, _MAX_BACKOFF_S)
            try:
                if child.spec.before_restart is not None:
                    await asyncio.to_thread(child.spec.before_restart)
                child.process = await self._spawn(child.spec)
            except CompAIError as error:
                _logger.warning("%s cannot be started again: %s", child.spec.name, error)
                continue
            child.started = time.monotonic()
            _logger.warning("%s runs again as process %s", child.spec.name, child.process.pid)
            return

    async def _reap_orphans(self) -> None:
        while True:
            await asyncio.sleep(_REAP_INTERVAL_S)
            reap_orphans({child.process.pid for child in self._children.values()})


def reap_orphans(own: set[int]) -> None:
    """Take the exit codes of dead processes that came to us, `own` children excepted."""
    for process in psutil.Process().children():
        with suppress(psutil.Error, OSError):
            # What `subprocess.run` started shares our group: its zombie is not ours to
            # take, the caller wants the exit code.
            orphan = process.pid not in own and os.getpgid(process.pid) != os.getpgrp()
            if orphan and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


def become_subreaper() -> None:
    """Have the kernel hand us the children of dead descendants."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def descendants() -> list[psutil.Process]:
    """Return all processes below this one."""
    return psutil.Process().children(recursive=True)


def left_by(leader: int) -> list[psutil.Process]:
    """Return our descendants that belong to the group or to the session which `leader` led."""
    found = []
    for process in descendants():
        with suppress(OSError):
            if leader in (os.getpgid(process.pid), os.getsid(process.pid)):
                found.append(process)
    return found


def leftovers(mark: Path) -> list[psutil.Process]:
    """Return what an `up` on this folder left when it was killed, with all descendants.

    Ours are known by a variable in the environment. Some programs overwrite theirs to show
    a title: these are below one that does not, or say the same on their command line.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and _is_marked(process, mark):
                below = process.children(recursive=True)
                found |= {one.pid: one for one in (process, *below)}
    # Never ourselves, nor those who called us: a test may run inside of a marked process.
    for ancestor in (psutil.Process(), *psutil.Process().parents()):
        found.pop(ancestor.pid, None)
    return list(found.values())


def mark_argument(mark: Path) -> str:
    """Return what marks a process on its command line; nginx takes it as a directive."""
    return f"env {HOME_MARK}={mark};"


def _is_marked(process: psutil.Process, mark: Path) -> bool:
    if process.environ().get(HOME_MARK) == str(mark):
        return True
    return mark_argument(mark) in " ".join(process.cmdline())


def end_processes(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    """End these processes: gently, and by force those that still run after `timeout_s`."""
    alive = list(processes)
    if timeout_s > 0:
        _each(alive, signal.SIGTERM)
        _, alive = psutil.wait_procs(alive, timeout=timeout_s)
    _each(alive, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)


def end_descendants(timeout_s: float) -> None:
    """End everything below this process."""
    end_processes(descendants(), timeout_s)
    # A process may start another while it dies, so look again until there is none.
    for _ in range(20):
        alive = descendants()
        if not alive:
            return
        end_processes(alive, 0)


def _each(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def describe_exit(code: int) -> str:
    """Say an exit status in words."""
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def last_lines(path: Path, count: int = 3, max_bytes: int = 4096) -> str:
    """Return the end of a log on one line."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - max_bytes))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return "(none)"
    return " | ".join(line.strip() for line in lines[-count:]) or "(none)"


def rotate(log: Path) -> None:
    """Keep one older log once this one is large."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_suffix(log.suffix + ".1"))
