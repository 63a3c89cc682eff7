"""What the fake engine answers as a response: object and events as vLLM 0.29 writes them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson


def prompt_of(body: dict[str, Any]) -> str:
    """Return every text that the model is given, in its order."""
    given = body["input"]
    items = [{"content": given}] if isinstance(given, str) else given
    texts = [_text_of(item) for item in items]
    return " ".join(filter(None, [body.get("instructions"), *texts]))


class FakeResponse:
    """One response, and the events of its stream."""

    def __init__(self, body: dict[str, Any], prompt_tokens: int, asked: int) -> None:
        self._body = body
        self._prompt_tokens = prompt_tokens
        self._asked = asked
        self._events = 0
        self._item_id = f"msg_{body.get('request_id')}"

    def whole(self, words: list[str]) -> dict[str, Any]:
        """Return the response that `words` make."""
        cut = len(words) == self._asked
        return self._object(
            "incomplete" if cut else "completed",
            output=[self._message("completed", [_part("".join(words))] if words else [])],
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage={
                "input_tokens": self._prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": len(words),
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self._prompt_tokens + len(words),
            },
        )

    async def frames(self, words: AsyncIterator[str]) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        opening = self._object("in_progress", output=[])
        yield self._event("response.created", response=opening)
        yield self._event("response.in_progress", response=opening)
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        said: list[str] = []
        async for word in words:
            if not said:
                item = self._message("in_progress", [])
                yield self._event("response.output_item.added", item=item, output_index=0)
                yield self._event("response.content_part.added", **place, part=_part(""))
            said.append(word)
            yield self._event("response.output_text.delta", **place, delta=word, logprobs=[])
        if said:
            text = "".join(said)
            yield self._event("response.output_text.done", **place, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=_part(text))
            item = self._message("completed", [_part(text)])
            yield self._event("response.output_item.done", item=item, output_index=0)
        # Also where the answer was cut at its limit: vLLM has no event of its own for that.
        yield self._event("response.completed", response=self.whole(said))

    def _object(self, status: str, **fields: Any) -> dict[str, Any]:
        body = self._body
        return {
            "id": body.get("request_id") or "resp_fake",
            "created_at": 0,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata"),
            "model": body["model"],
            "object": "response",
            "parallel_tool_calls": True,
            "temperature": body.get("temperature"),
            "tool_choice": body.get("tool_choice", "none"),
            "tools": body.get("tools", []),
            "top_p": body.get("top_p", 1.0),
            "background": False,
            "max_output_tokens": self._asked,
            "previous_response_id": body.get("previous_response_id"),
            "status": status,
            "truncation": body.get("truncation", "disabled"),
            "usage": None,
            **fields,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        message = {"content": content, "role": "assistant", "type": "message"}
        return {"id": self._item_id, **message, "status": status}

    def _event(self, name: str, **fields: Any) -> bytes:
        event = {**fields, "sequence_number": self._events, "type": name}
        self._events += 1
        return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}


def _text_of(item: dict[str, Any]) -> str:
    content = item.get("content") or item.get("output") or item.get("arguments") or ""
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text")) for part in content)
