"""Clients that ask again and again while something is staged; they stop by themselves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from tests.serve_configs import FAKE_MODEL, LIMITED_OWNER
from tests.stack_runner import RunningStack

_LONGEST_S = 400.0
_ANSWER_S = 60.0


@contextmanager
def asking(
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any],
    *,
    clients: int = 1,
    pause_s: float = 0.1,
    apart_s: float = 0.0,
) -> Iterator[None]:
    """Have `clients` ask for completions, one after another, with a pause between.

    They begin `apart_s` after each other. What they are answered is for the metrics to tell.
    """
    stop = threading.Event()
    ends = time.monotonic() + _LONGEST_S

    def client(number: int) -> None:
        stop.wait(number * apart_s)
        with httpx.Client(headers=headers, timeout=_ANSWER_S, trust_env=False) as http:
            while not stop.is_set() and time.monotonic() < ends:
                try:
                    http.post(f"{url}/v1/chat/completions", json=body)
                except httpx.HTTPError:
                    # The door may be what is staged.
                    stop.wait(1)
                stop.wait(pause_s)

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(client, number) for number in range(clients)]
        try:
            yield
        finally:
            stop.set()
    for one in asked:
        one.result()


def chat(model: str, prompt: str = "Hello", tokens: int = 2) -> dict[str, Any]:
    """Return the body of one request."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
    }


@contextmanager
def all_sorts(stack: RunningStack) -> Iterator[None]:
    """Ask for what the dashboards tell of: a batch, more than a limit grants, then streams.

    The streams go on until the end: a histogram that stands still answers nothing.
    """
    start_batch(stack, chat(FAKE_MODEL))
    stream = {**chat(FAKE_MODEL, tokens=5), "stream": True}
    _ask_as(stack, LIMITED_OWNER, stream, times=15)
    with asking(stack.url, stack.bootstrap, stream, pause_s=1):
        yield


def _ask_as(stack: RunningStack, owner: str, body: Mapping[str, Any], times: int) -> None:
    """Ask some times with a new key of `owner`."""
    made = json.loads(stack.cli("keys", "create", "watch", "--owner", owner, "--json"))
    headers = {"Authorization": f"Bearer {made['key']}"}
    with httpx.Client(headers=headers, timeout=_ANSWER_S, trust_env=False) as http:
        for _ in range(times):
            http.post(f"{stack.url}/v1/chat/completions", json=body)


def start_batch(stack: RunningStack, *bodies: Mapping[str, Any]) -> str:
    """Start a batch of these requests; return its id."""
    url = "/v1/chat/completions"
    lines = [
        json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body})
        for number, body in enumerate(bodies)
    ]
    root = f"{stack.url}/v1"
    with httpx.Client(headers=stack.bootstrap, timeout=_ANSWER_S, trust_env=False) as http:
        sent = http.post(
            f"{root}/files",
            data={"purpose": "batch"},
            files={"file": ("in.jsonl", "\n".join(lines).encode())},
        ).raise_for_status()
        wanted = {
            "input_file_id": sent.json()["id"],
            "endpoint": url,
            "completion_window": "24h",
        }
        made = http.post(f"{root}/batches", json=wanted).raise_for_status()
    return str(made.json()["id"])
