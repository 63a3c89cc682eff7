"""A load that remembers which of its requests it saw complete."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field

import httpx
import orjson

from tests.serve_configs import FAKE_MODEL

_CLIENTS = 16
_TOKENS = 20
_RETRY_S = 0.1


@dataclass
class Seen:
    """What the clients saw, by request id."""

    completed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> int:
        """Requests that have ended one way or the other."""
        return len(self.completed) + len(self.failed)


class Load:
    """Clients that ask without pause until they are told to stop."""

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        *,
        model: str = FAKE_MODEL,
        streams: bool = True,
    ) -> None:
        self._url = url
        self._headers = headers
        self._model = model
        self._streams = streams
        self._stop = asyncio.Event()
        self.seen = Seen()

    async def run(self) -> None:
        """Ask until `stop`."""
        async with httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=60, trust_env=False
        ) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(_CLIENTS)))

    def stop(self) -> None:
        """Let every client finish its request, then end."""
        self._stop.set()

    async def completed(self, more: int) -> None:
        """Wait until `more` further requests were seen complete."""
        wanted = len(self.seen.completed) + more
        async with asyncio.timeout(120):
            while len(self.seen.completed) < wanted:  # noqa: ASYNC110  many clients add to it
                await asyncio.sleep(0.02)

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        while not self._stop.is_set():
            request_id = uuid.uuid4().hex
            try:
                trouble = await self._ask(
                    http, request_id, stream=self._streams and number % 2 == 0
                )
            except httpx.HTTPError as error:
                trouble = type(error).__name__
            if trouble is None:
                self.seen.completed.add(request_id)
                continue
            self.seen.failed[request_id] = trouble
            # A client that is refused tries again a little later.
            await asyncio.sleep(_RETRY_S)

    async def _ask(self, http: httpx.AsyncClient, request_id: str, *, stream: bool) -> str | None:
        """Return None where a complete answer came, else what came instead."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": _TOKENS,
            "stream": stream,
        }
        headers = {"X-Request-ID": request_id}
        answer = await http.post("/v1/chat/completions", json=body, headers=headers)
        if answer.status_code != 200:
            return str(answer.status_code)
        if stream:
            return None if answer.text.endswith("data: [DONE]\n\n") else "stream cut"
        usage = orjson.loads(answer.content)["usage"]
        return None if usage["completion_tokens"] == _TOKENS else "answer cut"
