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
    """

    model: str
    tokens: int
    stream: bool = True

    def body(self) -> dict[str, Any]:
        """Return the request's JSON; greedy, so that each system generates the same."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": _PROMPT}],
            "max_tokens": self.tokens,
            "temperature": 0,
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
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Yield an HTTP client that keeps its connections and puts no bound on their number."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        yield http


async def ask(http: aiohttp.ClientSession, door: Door, question: Question) -> Answer:
    """Ask once and read to the end.

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
            await _read_stream(response, answer, begun_s)
        else:
            await response.read()
    answer.took_s = time.perf_counter() - begun_s
    return answer


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer, begun_s: float) -> None:
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
        tail = (tail + chunk)[-64:]
    if _DONE not in tail:
        raise AnswerCut


async def keep_asking(
    door: Door, question: Question, *, clients: int, answers: int
) -> list[Answer]:
    """Ask `answers` times in all, `clients` at once: each asks again when it has its answer."""
    left: Iterator[int] = iter(range(answers))
    seen: list[Answer] = []

    async def one(http: aiohttp.ClientSession) -> None:
        for _ in left:
            seen.append(await ask(http, door, question))

    async with client() as http:
        await asyncio.gather(*(one(http) for _ in range(clients)))
    return seen


async def ask_in_turn(doors: list[Door], question: Question, *, rounds: int) -> list[list[Answer]]:
    """Ask each of `doors` once a round, each round beginning with another one.

    One after the other, so that whatever else the machine does hits all alike. Returns the
    answers of each round, in the order of `doors`.
    """
    seen: list[list[Answer]] = []
    async with client() as http:
        for number in range(rounds):
            order = [(number + step) % len(doors) for step in range(len(doors))]
            answers = {index: await ask(http, doors[index], question) for index in order}
            seen.append([answers[index] for index in range(len(doors))])
    return seen
