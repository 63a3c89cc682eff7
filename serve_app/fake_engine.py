"""A deterministic stand-in for an engine, with vLLM's HTTP face: for tests and load tests.

It answers "w0 w1 w2 …" at a set speed. A prompt may hold directives that make it fail:
`[[drop_after=5]]` cuts the connection after 5 tokens, `[[error=500]]` answers with that
status, `[[stall_after=5]]` stops sending after 5 tokens.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app import fake_pooling
from serve_app.engine_counters import EngineCounters
from serve_app.fake_journal import CountJournal
from serve_app.fake_responses import FakeResponse, prompt_of

_DIRECTIVE = re.compile(r"\[\[(drop_after|stall_after|error)=(\d+)\]\]")
_DEFAULT_TOKENS = 16


class FakeEngineConfig(BaseModel):
    """How fast the fake engine answers, and how much."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time_to_first_token_s: float = Field(default=0.02, ge=0)
    time_per_token_s: float = Field(default=0.005, ge=0)
    word_chars: int = Field(default=0, ge=0, description="Words are made as long as this.")
    journal: Path | None = Field(
        default=None, description="Folder where each step is noted, for counts beyond a SIGKILL."
    )


class ConnectionDropped(Exception):
    """Raised through the server to cut a connection as a dying engine would."""


class FakeEngine:
    """Counts like vLLM and answers like it, without a model."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self._config = config
        self._aborted: dict[str, asyncio.Event] = {}
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._journal = None if config.journal is None else CountJournal(config.journal)
        # The last bodies, without what was asked: for tests.
        self.asked: deque[dict[str, Any]] = deque(maxlen=100)

    def app(self) -> Starlette:
        """Return the ASGI app."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completion, methods=["POST"]),
                Route("/v1/responses", self._responses, methods=["POST"]),
                Route("/v1/embeddings", self._embeddings, methods=["POST"]),
                Route("/rerank", self._rerank, methods=["POST"]),
                Route("/score", self._score, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
            ]
        )

    def abort(self, request_id: str) -> None:
        """End the request early, in good order."""
        if (event := self._aborted.get(request_id)) is not None:
            event.set()

    def counters(self, *, replica_id: str, live_leases: int, resting_leases: int) -> EngineCounters:
        """Return the counts of this engine since its start."""
        return EngineCounters(
            replica_id=replica_id,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            requests_running=len(self._aborted),
            live_leases=live_leases,
            resting_leases=resting_leases,
        )

    async def chat(self, request_id: str, body: dict[str, Any]) -> Response:
        """Answer the JSON of a chat completion: with frames where it asks for a stream."""
        prompt = " ".join(str(message.get("content")) for message in body["messages"])
        return await self._answer(request_id, body, prompt, _ChatShape(body["model"]))

    async def _chat(self, request: Request) -> Response:
        return await self.chat(_id_of(request), orjson.loads(await request.body()))

    async def _completion(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        shape = _TextShape(body["model"])
        return await self._answer(_id_of(request), body, str(body["prompt"]), shape)

    async def _responses(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.asked.append({k: v for k, v in body.items() if k != "input"})
        prompt = prompt_of(body)
        directives = _directives(prompt)
        if (status := directives.get("error")) is not None:
            return _told_to_fail(status)
        prompt_tokens = max(1, len(prompt.split()))
        asked = body.get("max_output_tokens") or _DEFAULT_TOKENS
        made = FakeResponse(body, prompt_tokens, asked)
        # The one endpoint where the engine takes its id from the body.
        request_id = str(body.get("request_id")).removeprefix("resp_")
        words = self._words(request_id, prompt_tokens, asked, directives)
        if body.get("stream"):
            return StreamingResponse(made.frames(words), media_type="text/event-stream")
        return JSONResponse(made.whole([word async for word in words]))

    async def _embeddings(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        texts = fake_pooling.texts_of(body["input"])
        return await self._pooled(request, texts, fake_pooling.embeddings(body, texts))

    async def _rerank(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        pairs = [(str(body["query"]), text) for text in fake_pooling.texts_of(body["documents"])]
        texts = [" ".join(pair) for pair in pairs]
        return await self._pooled(request, texts, fake_pooling.ranking(body, pairs))

    async def _score(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        pairs = fake_pooling.score_pairs(body)
        texts = [" ".join(pair) for pair in pairs]
        return await self._pooled(request, texts, fake_pooling.scores(body, pairs))

    async def _pooled(self, request: Request, texts: list[str], answer: Any) -> Response:
        """Answer after the time to first token, and count the prompts with the answer."""
        directives = dict(_DIRECTIVE.findall(" ".join(texts)))
        if (status := directives.get("error")) is not None:
            return JSONResponse({"error": {"message": "told to fail"}}, int(status))
        request_id = _id_of(request)
        aborted = self._aborted[request_id] = asyncio.Event()
        stalled = "stall_after" in directives
        due = asyncio.get_running_loop().time() + self._config.time_to_first_token_s
        try:
            ended_early = await _happened_before(aborted, float("inf") if stalled else due)
        finally:
            del self._aborted[request_id]
        # Ended early vLLM states these prompts all the same, but does not count them.
        if not ended_early:
            self._count(request_id, fake_pooling.count(texts), 0)
        return JSONResponse(answer)

    async def _tokenize(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        messages = body.get("messages") or []
        text = body.get("prompt") or " ".join(str(message.get("content")) for message in messages)
        return JSONResponse(fake_pooling.tokens(text))

    async def _detokenize(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        return JSONResponse({"prompt": " ".join(f"w{token}" for token in body["tokens"])})

    async def _answer(
        self, request_id: str, body: dict[str, Any], prompt: str, shape: _Shape
    ) -> Response:
        self.asked.append({k: v for k, v in body.items() if k not in ("messages", "prompt")})
        directives = _directives(prompt)
        if (status := directives.get("error")) is not None:
            return _told_to_fail(status)
        prompt_tokens = max(1, len(prompt.split()))
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or _DEFAULT_TOKENS
        words = self._words(request_id, prompt_tokens, asked, directives)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            frames = _frames(words, shape, prompt_tokens, asked, usage=usage)
            return StreamingResponse(frames, media_type="text/event-stream")
        text = [word async for word in words]
        return JSONResponse(shape.whole("".join(text), prompt_tokens, len(text), asked))

    async def _words(
        self, request_id: str, prompt_tokens: int, asked: int, directives: dict[str, int]
    ) -> AsyncIterator[str]:
        aborted = self._aborted[request_id] = asyncio.Event()
        loop = asyncio.get_running_loop()
        due = loop.time() + self._config.time_to_first_token_s
        try:
            for index in range(asked):
                if index == directives.get("drop_after"):
                    raise ConnectionDropped
                if index == directives.get("stall_after"):
                    due = float("inf")
                if await _happened_before(aborted, due):
                    return
                # Against a fixed schedule, so that a busy machine does not stretch the speed.
                due += self._config.time_per_token_s
                self._count(request_id, prompt_tokens if index == 0 else 0, 1)
                yield f"w{index} ".ljust(self._config.word_chars, "x")
        finally:
            del self._aborted[request_id]

    def _count(self, request_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        self._prompt_tokens += prompt_tokens
        self._completion_tokens += completion_tokens
        if self._journal is not None:
            self._journal.count(request_id, prompt_tokens, completion_tokens)


def _id_of(request: Request) -> str:
    return request.headers.get("x-request-id") or uuid.uuid4().hex


def _directives(prompt: str) -> dict[str, int]:
    return {name: int(value) for name, value in _DIRECTIVE.findall(prompt)}


def _told_to_fail(status: int) -> Response:
    return JSONResponse({"error": {"message": "told to fail"}}, status)


async def _happened_before(event: asyncio.Event, due: float) -> bool:
    """Wait for `event` until the loop's clock reaches `due`; tell whether it happened."""
    loop = asyncio.get_running_loop()
    if due == float("inf"):
        return await event.wait()
    try:
        async with asyncio.timeout_at(max(due, loop.time())):
            return await event.wait()
    except TimeoutError:
        return False


async def _frames(
    words: AsyncIterator[str], shape: _Shape, prompt_tokens: int, asked: int, *, usage: bool
) -> AsyncIterator[bytes]:
    count = 0
    async for word in words:
        if count == 0 and (opening := shape.opening()) is not None:
            yield _frame(opening)  # with the first token, not before it: as vLLM does
        count += 1
        yield _frame(shape.delta(word))
    yield _frame(shape.closing(_finish(count, asked)))
    if usage:
        yield _frame(shape.usage(prompt_tokens, count))
    yield b"data: [DONE]\n\n"


def _finish(count: int, asked: int) -> str:
    return "length" if count == asked else "abort"


def _frame(chunk: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


class _Shape:
    """The JSON of one kind of answer; `object` differs between a chunk and a whole."""

    chunk_object = ""
    whole_object = ""

    def __init__(self, model: str) -> None:
        self._model = model

    def opening(self) -> dict[str, Any] | None:
        return None

    def delta(self, word: str) -> dict[str, Any]:
        return self._chunk([self._choice(word)])

    def closing(self, finish: str) -> dict[str, Any]:
        return self._chunk([{**self._choice(""), "finish_reason": finish}])

    def usage(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        return {**self._chunk([]), "usage": _usage(prompt_tokens, completion_tokens)}

    def whole(self, text: str, prompt_tokens: int, count: int, asked: int) -> dict[str, Any]:
        return {
            **self._chunk([{**self._whole_choice(text), "finish_reason": _finish(count, asked)}]),
            "object": self.whole_object,
            "usage": _usage(prompt_tokens, count),
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": "fake",
            "object": self.chunk_object,
            "created": 0,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class _ChatShape(_Shape):
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self) -> dict[str, Any] | None:
        choice = self._choice("")
        return self._chunk([{**choice, "delta": {"role": "assistant", "content": ""}}])

    def _choice(self, text: str) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": text}, "finish_reason": None}

    def _whole_choice(self, text: str) -> dict[str, Any]:
        return {"index": 0, "message": {"role": "assistant", "content": text}}


class _TextShape(_Shape):
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def _choice(self, text: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": None}

    _whole_choice = _choice


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
