"""`comp-ai up` as an operator meets it: stop, start again, trouble at the start."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.serve_configs import FAKE_MODEL, suite_config
from tests.stack_runner import COMP_AI, RunningStack, start_stack, wait_started


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cai-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def config(home: Path) -> Path:
    file = home / "serve.yaml"
    file.write_text(yaml.safe_dump(suite_config(real_model=False, gateways=1), sort_keys=False))
    return file


def _of_home(home: Path) -> list[str]:
    """Return the processes that still belong to `home`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("COMP_AI_HOME") == str(home) or str(home) in " ".join(
                process.cmdline()
            ):
                found.append(" ".join(process.cmdline())[:80])
        except psutil.Error:
            # Gone meanwhile, or another user's.
            continue
    return found


def _ask(stack: RunningStack) -> int:
    body = {"model": FAKE_MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    answer = httpx.post(
        f"{stack.url}/v1/chat/completions", headers=stack.bootstrap, json=body, timeout=30
    )
    return answer.status_code


# Two starts, each of minutes on a busy machine.
@pytest.mark.timeout(900)
def test_ctrl_c_leaves_nothing_and_a_second_up_reuses_the_data(home: Path, config: Path) -> None:
    stack = start_stack(home, config)
    wait_started(stack)
    assert _ask(stack) == 200
    key = (home / "first-key").read_text()
    stack.stop()
    assert stack.process.returncode == 0
    assert _of_home(home) == []

    again = start_stack(home, config)
    try:
        wait_started(again)
        assert _ask(again) == 200
        assert (home / "first-key").read_text() == key
        # Both first answers, both first completions of `up` itself.
        rows = again.settled_rows(
            "select 1 from comp_ai.requests where route = 'chat.completions'", 4
        )
        assert len(rows) == 4
    finally:
        again.stop()
    assert _of_home(home) == []


@pytest.mark.timeout(900)
def test_a_killed_up_leaves_nothing_to_the_next(home: Path, config: Path) -> None:
    stack = start_stack(home, config)
    wait_started(stack)
    stack.process.send_signal(signal.SIGKILL)
    stack.process.wait()
    again = start_stack(home, config)
    try:
        wait_started(again)
        assert _ask(again) == 200
    finally:
        again.stop()
    assert _of_home(home) == []


def _fails(home: Path, **env: str) -> str:
    stack = start_stack(home, None, **env)
    assert stack.process.wait(120) == 2
    text = (home / "up.log").read_text()
    assert "Traceback" not in text
    return text


def test_a_wrong_setting_is_named(home: Path) -> None:
    text = _fails(home, COMP_AI_MAX_TOKENS="lots")
    assert "COMP_AI_MAX_TOKENS is 'lots'; allowed:" in text


def test_a_taken_port_is_named(home: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = _fails(home, COMP_AI_HTTP_PORT=str(port))
    assert f"COMP_AI_HTTP_PORT is {port}" in text


def test_help_is_quick_and_complete() -> None:
    done = subprocess.run([COMP_AI, "--help"], capture_output=True, text=True, check=True)
    for command in ("up", "status", "migrate", "token", "keys", "model"):
        assert command in done.stdout
