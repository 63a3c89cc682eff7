"""Clients as they come and go: some leave early, some are new, some have a wrong key."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import aiohttp

from load_tests.bench.asking import Answer, AnswerCut, Door, Question, ask, client
from serve_app.identity.api_keys import generate_key

OWNER = "soak"
# What a client does, and how many of a thousand do it. Keys are made and revoked some hundred times
# an hour, not with every thirtieth request: what is kept of each for the day would hide a leak.
WEIGHTS: Mapping[str, int] = {
    "stream": 500,
    "whole": 250,
    "leaves": 120,
    "new connection": 75,
    "wrong key": 50,
    "key made and revoked": 5,
}
# A program with a wrong key asks with it again and again.
_WRONG_KEYS = 100
_LEAVING_TOKENS = 1000
_LONGEST_ANSWER_S = 60.0
# More than this under way means that the service does not keep up; nothing is asked meanwhile.
MOST_UNDER_WAY = 400


class WrongAnswer(Exception):
    """An answer came that is not the one that should come."""


@dataclass
class Seen:
    """What the clients saw, by what they did."""

    asked: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    # Of streams that were not left: seconds to the first token.
    firsts_s: list[float] = field(default_factory=list)
    # Not asked, since too many were under way.
    held_back: int = 0

    @property
    def failures(self) -> int:
        """Requests that did not end as they should, those that were not asked included."""
        return self.failed.total() + self.held_back


class Churn:
    """Asks one stack in every way of `WEIGHTS`, at random.

    Args:
        door: with the key of an administrator, who makes and revokes keys.
        tokens: fewest and most tokens of an answer.
    """

    def __init__(self, door: Door, model: str, tokens: tuple[int, int], *, seed: int = 0) -> None:
        self._door = door
        self._model = model
        self._tokens = tokens
        self._rng = random.Random(seed)
        self._wrong_keys = [generate_key()[0] for _ in range(_WRONG_KEYS)]
        self.seen = Seen()
        self._ways: Mapping[str, Callable[[aiohttp.ClientSession], Awaitable[None]]] = {
            "stream": self._stream,
            "whole": self._whole,
            "leaves": self._leave,
            "new connection": self._from_a_new_connection,
            "wrong key": self._with_a_wrong_key,
            "key made and revoked": self._with_a_key_of_its_own,
        }

    def forget(self) -> Seen:
        """Begin to count anew; return what is counted from now on."""
        self.seen = Seen()
        return self.seen

    async def by_clients(self, clients: int, requests: int) -> None:
        """Ask `requests` times in all, `clients` at once, each without a pause."""
        left: Iterator[int] = iter(range(requests))

        async def one(http: aiohttp.ClientSession) -> None:
            for _ in left:
                await self._ask(http, self._any_way())

        async with client(_LONGEST_ANSWER_S) as http, asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one(http))

    async def at_rate(self, a_second: float, for_s: float) -> None:
        """Ask `a_second` times a second at random moments, whatever becomes of the answers."""
        loop = asyncio.get_running_loop()
        at_s = loop.time()
        end_s = at_s + for_s
        under_way: set[asyncio.Task[None]] = set()
        async with client(_LONGEST_ANSWER_S) as http, asyncio.TaskGroup() as group:
            while (at_s := at_s + self._rng.expovariate(a_second)) < end_s:
                await asyncio.sleep(at_s - loop.time())
                if len(under_way) >= MOST_UNDER_WAY:
                    self.seen.held_back += 1
                    continue
                task = group.create_task(self._ask(http, self._any_way()))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

    def _any_way(self) -> str:
        [way] = self._rng.choices([*WEIGHTS], [*WEIGHTS.values()])
        return way

    async def _ask(self, http: aiohttp.ClientSession, way: str) -> None:
        self.seen.asked[way] += 1
        try:
            await self._ways[way](http)
        except aiohttp.ClientResponseError as error:
            self.seen.failed[f"{way}: {error.status}"] += 1
        except (aiohttp.ClientError, AnswerCut, WrongAnswer, TimeoutError) as error:
            self.seen.failed[f"{way}: {type(error).__name__}"] += 1

    # The ways.

    async def _stream(self, http: aiohttp.ClientSession) -> None:
        self._note(await ask(http, self._door, self._question()))

    async def _whole(self, http: aiohttp.ClientSession) -> None:
        await ask(http, self._door, self._question(stream=False))

    async def _leave(self, http: aiohttp.ClientSession) -> None:
        leave_after = self._rng.randint(*self._tokens)
        question = Question(model=self._model, tokens=_LEAVING_TOKENS, leave_after=leave_after)
        await ask(http, self._door, question)

    async def _from_a_new_connection(self, _: aiohttp.ClientSession) -> None:
        async with client(_LONGEST_ANSWER_S) as own:
            self._note(await ask(own, self._door, self._question()))

    async def _with_a_wrong_key(self, http: aiohttp.ClientSession) -> None:
        wrong = Door(url=self._door.url, headers=_bearer(self._rng.choice(self._wrong_keys)))
        try:
            await ask(http, wrong, self._question(stream=False))
        except aiohttp.ClientResponseError as error:
            # 429 where more than some come in a minute.
            if error.status not in (401, 429):
                raise
        else:
            raise WrongAnswer

    async def _with_a_key_of_its_own(self, http: aiohttp.ClientSession) -> None:
        keys = f"{self._door.url}/admin/keys"
        # With limits of its own, so that the limits keep an account for it, too.
        wanted = {"name": OWNER, "owner": OWNER, "limits": {"requests_per_minute": 60}}
        async with http.post(keys, json=wanted, headers=self._door.headers) as response:
            response.raise_for_status()
            made = await response.json()
        own = Door(url=self._door.url, headers=_bearer(made["key"]))
        self._note(await ask(http, own, self._question()))
        revoke = f"{keys}/{made['id']}/revoke"
        async with http.post(revoke, headers=self._door.headers) as response:
            response.raise_for_status()
            await response.read()

    def _question(self, *, stream: bool = True) -> Question:
        return Question(model=self._model, tokens=self._rng.randint(*self._tokens), stream=stream)

    def _note(self, answer: Answer) -> None:
        self.seen.firsts_s.append(answer.first_s)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
