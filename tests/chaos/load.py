"""A load that remembers which of its requests it saw complete."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import orjson

from tests.serve_configs import FAKE_MODEL

CLIENTS = 16
_RETRY_S = 0.3
# Of nginx or Serve's proxy, where no gateway could be reached.
UNREACHED = "503 unavailable"
_DONE = b"data: [DONE]\n\n"


@dataclass
class Seen:
    """What the clients saw, by request id."""

    # With the tokens that the answer told: prompt and completion.
    completed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    # Where the client went away itself.
    left: set[str] = field(default_factory=set)
    # When each was asked and had ended, by `time.monotonic`.
    begun_s: dict[str, float] = field(default_factory=dict)
    ended_s: dict[str, float] = field(default_factory=dict)

    @property
    def asked(self) -> list[str]:
        """Requests that have ended one way or the other."""
        return [*self.completed, *self.failed, *self.left]

    def last_failure_s(self, since_s: float) -> float:
        """Return how long after `since_s` the last request was asked that failed; 0 for none."""
        return max((self.begun_s[one] - since_s for one in self.failed), default=0.0)

    def longest_pause_s(self, since_s: float) -> float:
        """Return the longest time without an answer that was complete, from `since_s` on."""
        ends = sorted(self.ended_s[one] for one in self.completed)
        times = [since_s, *(end for end in ends if end > since_s)]
        return max((after - before for before, after in pairwise(times)), default=0.0)

    @property
    def troubles(self) -> Counter[str]:
        """How often requests failed, by what the client saw."""
        return Counter(self.failed.values())


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the clients ask for.

    Args:
        clients: how many ask at once.
        tokens: fewest and most tokens of an answer.
        streams: whether every other client streams.
        leaving: which part of the streams is left in the middle.
        pause_s: how long a client waits from an answer to its next question.
    """

    model: str = FAKE_MODEL
    clients: int = CLIENTS
    tokens: tuple[int, int] = (20, 20)
    streams: bool = True
    leaving: float = 0.0
    pause_s: float = 0.0


class Load:
    """Clients that ask without pause until they are told to stop."""

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        wishes: Wishes | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self._url = url
        self._headers = headers
        self._wishes = wishes or Wishes()
        self._seed = seed
        self._stop = asyncio.Event()
        self.seen = Seen()

    async def run(self) -> None:
        """Ask until `stop`."""
        async with httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=60, trust_env=False
        ) as http:
            numbers = range(self._wishes.clients)
            await asyncio.gather(*(self._client(http, number) for number in numbers))

    def stop(self) -> None:
        """Let every client finish its request, then end."""
        self._stop.set()

    async def completed(self, more: int, *, timeout_s: float = 120) -> None:
        """Wait until `more` further requests were seen complete. Raises TimeoutError."""
        wanted = len(self.seen.completed) + more
        async with asyncio.timeout(timeout_s):
            while len(self.seen.completed) < wanted:  # noqa: ASYNC110  many clients add to it
                await asyncio.sleep(0.02)

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(f"{self._seed}-{number}")
        stream = self._wishes.streams and number % 2 == 0
        while not self._stop.is_set():
            request_id = uuid.uuid4().hex
            self.seen.begun_s[request_id] = time.monotonic()
            try:
                await self._ask(http, request_id, rng, stream=stream)
            except httpx.HTTPError as error:
                self.seen.failed[request_id] = type(error).__name__
            self.seen.ended_s[request_id] = time.monotonic()
            # A client that is refused tries again a little later.
            failed = request_id in self.seen.failed
            await asyncio.sleep(max(_RETRY_S * failed, self._wishes.pause_s))

    async def _ask(
        self, http: httpx.AsyncClient, request_id: str, rng: random.Random, *, stream: bool
    ) -> None:
        tokens = rng.randint(*self._wishes.tokens)
        body = {
            "model": self._wishes.model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": tokens,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        leaves = stream and rng.random() < self._wishes.leaving
        headers = {"X-Request-ID": request_id}
        async with http.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers
        ) as answer:
            if leaves and answer.status_code == 200:
                self.seen.left.add(request_id)
                return
            self._note(request_id, answer, await answer.aread(), tokens)

    def _note(self, request_id: str, answer: httpx.Response, content: bytes, tokens: int) -> None:
        last = _last_object(content)
        # A stream is complete with its mark, whatever came before.
        whole = answer.status_code == 200 and content.endswith((_DONE, b"}"))
        usage = last.get("usage") if whole else None
        if usage is not None and usage["completion_tokens"] == tokens:
            self.seen.completed[request_id] = usage["total_tokens"]
        else:
            code = (last.get("error") or {}).get("code", "cut")
            self.seen.failed[request_id] = f"{answer.status_code} {code}"


def _last_object(content: bytes) -> dict[str, Any]:
    """Return the answer, or the last frame of a stream that came to its end; else nothing."""
    if not content.startswith(b"{"):
        content = content.removesuffix(_DONE).rstrip().rpartition(b"data: ")[2]
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
