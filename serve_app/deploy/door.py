"""The smoke test: does what was deployed answer, asked as a client asks?"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import httpx

from serve_app.completions.kinds import Kind
from serve_app.config import ModelEntry, Task
from serve_app.deploy.errors import DeployRefused
from serve_app.errors import CompAIError
from serve_app.stack.serve_api import Say
from serve_app.stack.waiting import NotReady, wait_until

# The least that shows that a model computes.
_ASKED: Mapping[Task, tuple[Kind, Mapping[str, Any]]] = {
    Task.GENERATE: (Kind.TEXT, {"prompt": "Hello", "max_tokens": 1}),
    Task.EMBED: (Kind.EMBEDDINGS, {"input": "Hello"}),
    Task.SCORE: (Kind.RERANK, {"query": "Hello", "documents": ["Hello"]}),
}
_ANSWER_TIMEOUT_S = 60.0
_MESSAGE_MAX_CHARS = 300
# Too many requests: another time it may go well, as with whatever the server is to blame for.
_TRY_AGAIN = 429


class SmokeFailed(CompAIError):
    """What was deployed does not serve."""


class Door:
    """The address that clients use, with a key that may ask."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=_ANSWER_TIMEOUT_S,
            # The address is of the operator's own installation, and it carries the key.
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        """Open nothing yet."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def check_key(self) -> None:
        """Return where the key is good, or where nobody can tell now.

        Raises:
            DeployRefused: the door refuses the key.
        """
        try:
            answer = await self._http.get("/v1/models")
        except httpx.HTTPError:
            return
        if answer.status_code in (401, 403):
            raise DeployRefused(
                f"{self.url} refuses the key of the smoke test ({answer.status_code}). "
                "Name another with --key-file."
            )

    async def serves(
        self, models: Sequence[ModelEntry], asleep: Collection[str], timeout_s: float, say: Say
    ) -> None:
        """Return once the gateway and every model that runs have answered.

        Args:
            models: what is on offer; what the key may not use is passed over.
            asleep: applications without a replica, which are left asleep.

        Raises:
            SmokeFailed: one did not answer well in time.
        """
        listed: set[str] = set()

        async def lists() -> str | None:
            answer = await self._http.get("/v1/models")
            if answer.status_code == 200:
                listed.update(model["id"] for model in answer.json()["data"])
            return _complaint(answer)

        await self._until(partial(self._get, "/health"), "/health", timeout_s, say)
        await self._until(lists, "/v1/models", timeout_s, say)
        for model in models:
            if model.app in asleep or model.name not in listed:
                continue
            await self._until(partial(self._ask, model), model.name, timeout_s, say)

    async def _until(
        self, ask: Callable[[], Awaitable[str | None]], what: str, timeout_s: float, say: Say
    ) -> None:
        say(what)

        async def asked() -> str | None:
            try:
                return await ask()
            except httpx.HTTPError as error:
                return f"no answer ({type(error).__name__})"

        try:
            await wait_until(what, asked, timeout_s)
        except NotReady as error:
            raise SmokeFailed(error.message) from None

    async def _get(self, path: str) -> str | None:
        return _complaint(await self._http.get(path))

    async def _ask(self, model: ModelEntry) -> str | None:
        kind, body = _ASKED[model.task]
        address = kind.endpoint.addresses[0]
        return _complaint(await self._http.post(address, json={"model": model.name, **body}))


def _complaint(answer: httpx.Response) -> str | None:
    """Return why `answer` is no good one yet; None where it is.

    Raises:
        SmokeFailed: the next one will be no better.
    """
    if answer.status_code == 200:
        return None
    words = f"{answer.status_code} {answer.text[:_MESSAGE_MAX_CHARS]}"
    if answer.status_code < 500 and answer.status_code != _TRY_AGAIN:
        raise SmokeFailed(f"{answer.request.url.path} answers {words}")
    return words
