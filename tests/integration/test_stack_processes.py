"""The supervisor with real children: they are killed, and leave orphans.

Each scenario runs in a process of its own: the supervisor makes it the reaper of its
descendants, which pytest must not become.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

_HEAD = """
import asyncio, os, signal, sys, time
from pathlib import Path
import psutil
from serve_app.stack import processes
from serve_app.stack.processes import ProcessSpec, Supervisor, descendants

home = Path(sys.argv[1])
SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]

def spec(name, command=SLEEP, **more):
    return ProcessSpec(name=name, command=command, log=home / f"{name}.log", **more)

async def until(true, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.02)

async def main():
    supervisor = Supervisor(home)
"""
_TAIL = """
asyncio.run(main())
print("done")
"""


def scenario(home: Path, body: str) -> str:
    """Run a scenario, check that nothing of it is left, return its stdout."""
    script = _HEAD + textwrap.indent(textwrap.dedent(body), "    ") + _TAIL
    done = subprocess.run(
        [sys.executable, "-c", script, str(home)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"SCENARIO": str(home)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert _left(home) == []
    return done.stdout


def _left(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SCENARIO") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_children_are_out_of_reach_of_ctrl_c_and_share_the_time_of_the_cpu(
    tmp_path: Path,
) -> None:
    # The terminal signals a process group; the kernel shares its time out by session.
    scenario(
        tmp_path,
        """
        await supervisor.start(spec("one"))
        pid = supervisor.pid("one")
        await until(lambda: os.getpgid(pid) == pid)
        assert os.getsid(pid) == os.getsid(0)
        await supervisor.close()
        """,
    )


def test_a_killed_child_runs_again(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        await supervisor.start(spec("one"))
        first = supervisor.pid("one")
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.pid("one") not in (None, first))
        await supervisor.close()
        """,
    )


@pytest.mark.parametrize(
    ("more", "worker"),
    [
        pytest.param("", "", id="nginx: a worker that holds the port outlives its master"),
        pytest.param(
            "own_session=True", "process_group=0", id="ray: its workers have groups of their own"
        ),
    ],
)
def test_what_a_killed_child_left_is_ended_before_it_runs_again(
    more: str, worker: str, tmp_path: Path
) -> None:
    scenario(
        tmp_path,
        f"""
        code = (
            "import subprocess, sys, time\\n"
            "sleep = [sys.executable, '-c', 'import time; time.sleep(300)']\\n"
            "worker = subprocess.Popen(sleep, {worker})\\n"
            "time.sleep(300)"
        )
        await supervisor.start(spec("master", [sys.executable, "-c", code], {more}))
        first = supervisor.pid("master")
        await until(lambda: len(psutil.Process(first).children()) == 1)
        worker = psutil.Process(first).children()[0]
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.pid("master") not in (None, first))
        assert not worker.is_running()
        await supervisor.close()
        """,
    )


def test_a_child_that_dies_at_once_is_started_ever_more_rarely(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        calls = []
        failing = spec("bad", [sys.executable, "-c", "raise SystemExit(3)"],
                       before_restart=lambda: calls.append(time.monotonic()))
        await supervisor.start(failing)
        await until(lambda: len(calls) >= 4)
        gaps = [b - a for a, b in zip(calls, calls[1:])]
        assert gaps[2] > gaps[0]
        await supervisor.close()
        """,
    )


def test_the_death_of_a_vital_child_is_reported_with_its_last_words(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        code = "import sys; print('port is taken', file=sys.stderr); sys.exit(7)"
        await supervisor.start(spec("vital", [sys.executable, "-c", code], restart=False))
        error = await asyncio.wait_for(supervisor.died(), 20)
        assert "exit code 7" in str(error) and "port is taken" in str(error), error
        await supervisor.close()
        """,
    )


def test_a_vital_child_may_fail_to_start_but_not_die_later(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        await supervisor.start(spec("vital", restart=False, attempts=3))
        first = supervisor.pid("vital")
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.pid("vital") not in (None, first))
        supervisor.called_ready("vital")
        os.kill(supervisor.pid("vital"), signal.SIGKILL)
        assert "SIGKILL" in str(await asyncio.wait_for(supervisor.died(), 20))
        await supervisor.close()
        """,
    )


def test_orphans_come_to_us_and_are_ended(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        code = (
            "import subprocess, sys\\n"
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'],"
            " start_new_session=True)"
        )
        await supervisor.start(spec("parent", [sys.executable, "-c", code], restart=False))
        await supervisor.died()
        orphans = psutil.Process().children()
        assert len(orphans) == 1, orphans
        await supervisor.close()
        assert descendants() == []
        """,
    )


def test_dead_orphans_are_reaped(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        processes._REAP_INTERVAL_S = 0.1
        code = (
            "import subprocess, sys\\n"
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.3)'],"
            " start_new_session=True)"
        )
        await supervisor.start(spec("parent", [sys.executable, "-c", code], restart=False))
        await supervisor.died()
        assert len(psutil.Process().children()) == 1
        await until(lambda: psutil.Process().children() == [])
        await supervisor.close()
        """,
    )


def test_a_child_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        code = (
            "import signal, time\\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
            "print('deaf', flush=True)\\ntime.sleep(300)"
        )
        await supervisor.start(spec("deaf", [sys.executable, "-c", code], stop_timeout_s=0.3))
        await until(lambda: "deaf" in (home / "deaf.log").read_text())
        await supervisor.stop("deaf")
        assert supervisor.pid("deaf") is None
        await supervisor.close()
        """,
    )


def test_kill_all_leaves_nothing(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        for name in "abc":
            await supervisor.start(spec(name))
        supervisor.kill_all()
        assert descendants() == []
        """,
    )


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    scenario(
        tmp_path,
        """
        try:
            await supervisor.start(spec("ghost", ["/no/such/program"]))
        except processes.ProcessDied as error:
            assert "ghost" in str(error)
        else:
            raise AssertionError("it started")
        await supervisor.close()
        """,
    )


def test_leftovers_of_a_killed_up_are_found_and_ended(tmp_path: Path) -> None:
    script = (
        _HEAD
        + "    await supervisor.start(spec('left'))\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        + _TAIL
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=60)
    find = (
        "import sys; from pathlib import Path; from serve_app.stack.processes import *\n"
        "found = leftovers(Path(sys.argv[1])); print(len(found)); end_processes(found, 5)\n"
        "print(len(leftovers(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", find, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "0"]


@pytest.mark.parametrize(("code", "words"), [(1, "exit code 1"), (-9, "signal SIGKILL")])
def test_an_exit_is_said_in_words(code: int, words: str) -> None:
    from serve_app.stack.processes import describe_exit

    assert describe_exit(code) == words
