"""The client of the comparison: asks one system and notes when each frame came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_PROMPT = "Explain in a few sentences how a bicycle stays upright while it is moving."
_DONE = b"data: [DONE]"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every system is asked.

    Args:
        tokens: how many tokens the answer has, whatever the model would like.
        stream: whether it comes as server-sent events.
        temperature: 0 is greedy, so that each system generates the same.
        leave_after: of a stream, after how many tokens the client is gone; None reads to the end.
    """

    model: str
    tokens: int
    stream: bool = True
    temperature: float = 0
    leave_after: int | None = None

    def body(self) -> dict[str, Any]:
        """Return the request's JSON."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": _PROMPT}],
            "max_tokens": self.tokens,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": self.stream,
        }


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where a system is asked."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """When the parts of one answer came: seconds from the moment it was asked.

    `gaps_s` holds the time from each frame with a token to the next; frames that came in one
    piece have none between them.
    """

    first_s: float = 0.0
    took_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    frames: int = 0
    server_timing: str | None = None


class AnswerCut(Exception):
    """A system ended a stream without its mark: its figures would be of another work."""


@asynccontextmanager
async def client(timeout_s: float = 600) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield an HTTP client that keeps its connections and puts no bound on their number."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        yield http


async def ask(http: aiohttp.ClientSession, door: Door, question: Question) -> Answer:
    """Ask once and read to the end, or until the question says that its client leaves.

    Raises:
        aiohttp.ClientError: for a refusal or a broken connection.
        AnswerCut: where a stream ends without `[DONE]`.
    """
    answer = Answer()
    begun_s = time.perf_counter()
    url = f"{door.url}/v1/chat/completions"
    async with http.post(url, json=question.body(), headers=door.headers) as response:
        response.raise_for_status()
        answer.server_timing = response.headers.get("Server-Timing")
        if question.stream:
            await _read_stream(response, answer, begun_s, question.leave_after)
        else:
            await response.read()
    answer.took_s = time.perf_counter() - begun_s
    return answer


async def _read_stream(
    response: aiohttp.ClientResponse, answer: Answer, begun_s: float, leave_after: int | None
) -> None:
    tail = b""
    last_s = 0.0
    async for chunk in response.content.iter_any():
        now_s = time.perf_counter()
        # The first frame may carry the role alone: what a user waits for is the text.
        tokens = chunk.count(b'"content":"') - chunk.count(b'"content":""')
        if tokens:
            if answer.frames:
                answer.gaps_s.append(now_s - last_s)
            else:
                answer.first_s = now_s - begun_s
            answer.frames += tokens
            last_s = now_s
        if leave_after is not None and answer.frames >= leave_after:
            # Its connection is not read to the end, so it is closed.
            return
        tail = (tail + chunk)[-64:]
    if _DONE not in tail:
        raise AnswerCut


async def keep_asking(
    door: Door, question: Question, *, clients: int, answers: int, timeout_s: float = 600
) -> list[Answer]:
    """Ask `answers` times in all, `clients` at once: each asks again when it has its answer.

    Raises what `ask` does, and TimeoutError where an answer takes longer than `timeout_s`.
    """
    left: Iterator[int] = iter(range(answers))
    seen: list[Answer] = []

    async def one(http: aiohttp.ClientSession) -> None:
        for _ in left:
            seen.append(await ask(http, door, question))

    async with client(timeout_s) as http:
        await asyncio.gather(*(one(http) for _ in range(clients)))
    return seen
