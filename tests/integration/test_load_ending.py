"""A long run that is ended closes what it has open."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

_SLEEPING = """
import time
from load_tests.ending import end_in_order
try:
    end_in_order({limit_s})
    print("open", flush=True)
    time.sleep(60)
finally:
    print("closed", flush=True)
"""
_IN_A_LOOP = """
import asyncio
from load_tests.ending import end_in_order

async def work():
    async with asyncio.TaskGroup() as group:
        group.create_task(sleep())

async def sleep():
    try:
        end_in_order({limit_s})
        print("open", flush=True)
        await asyncio.sleep(60)
    finally:
        print("closed", flush=True)

asyncio.run(work())
"""
# The signal comes while a task of the loop computes.
_IN_A_STEP = """
import asyncio, signal
from load_tests.ending import end_in_order

async def work():
    async with asyncio.TaskGroup() as group:
        group.create_task(compute())

async def compute():
    try:
        end_in_order({limit_s})
        print("open", flush=True)
        while signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            pass
        await asyncio.sleep(60)
    finally:
        print("closed", flush=True)

asyncio.run(work())
"""


def run(program: str, limit_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program.format(limit_s=limit_s)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.mark.parametrize("program", [_SLEEPING, _IN_A_LOOP, _IN_A_STEP])
def test_sigterm_closes_what_is_open(program: str) -> None:
    with run(program, limit_s=60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.terminate()
        said, complained = process.communicate(timeout=30)
    assert (said, process.returncode) == ("closed\n", 128 + signal.SIGTERM)
    assert "Traceback" not in complained
    assert "ended by SIGTERM" in complained


@pytest.mark.parametrize("program", [_SLEEPING, _IN_A_LOOP, _IN_A_STEP])
def test_it_ends_by_itself_at_its_limit(program: str) -> None:
    with run(program, limit_s=0.2) as process:
        said, complained = process.communicate(timeout=30)
    assert said.endswith("closed\n")
    assert process.returncode == 128 + signal.SIGALRM
    assert "ended by SIGALRM" in complained
