"""What the fake engine answers where nothing is generated: vectors, scores and tokens.

A word is a token. Its number is the sum of its bytes, its vector as many ones; two texts score
by the words that they share. So a test can tell the right answer beforehand.
"""

from __future__ import annotations

import base64
import struct
from typing import Any

_DIMENSIONS = 8


def texts_of(value: Any) -> list[str]:
    """Return the prompts in what a client may send: a text, tokens, an object, or a list."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        return [" ".join(map(str, value))]
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def count(texts: list[str]) -> int:
    """Return the tokens of prompts."""
    return sum(max(1, len(text.split())) for text in texts)


def embeddings(body: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Return vectors as `/v1/embeddings` does."""
    vectors = [_vector(text, body.get("dimensions") or _DIMENSIONS) for text in texts]
    encode = body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(v) if encode else v}
        for index, v in enumerate(vectors)
    ]
    return {"object": "list", "model": body["model"], "data": data, "usage": _usage(texts)}


def score_pairs(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs of `/score`: one with each, or each with its counterpart."""
    for first, second in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items")):
        if body.get(first) is not None and body.get(second) is not None:
            left, right = texts_of(body[first]), texts_of(body[second])
            return list(zip(left * len(right) if len(left) == 1 else left, right, strict=True))
    return []


def scores(body: dict[str, Any], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return scores as `/score` does."""
    data = [
        {"object": "score", "index": index, "score": _score(*pair)}
        for index, pair in enumerate(pairs)
    ]
    usage = _usage([" ".join(pair) for pair in pairs])
    return {"object": "list", "model": body["model"], "data": data, "usage": usage}


def ranking(body: dict[str, Any], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return documents, the best first, as `/rerank` does."""
    best = sorted(enumerate(pairs), key=lambda numbered: -_score(*numbered[1]))
    results = [
        {"index": index, "document": {"text": pair[1]}, "relevance_score": _score(*pair)}
        for index, pair in best
    ]
    usage = _usage([" ".join(pair) for pair in pairs])
    kept = results[: body.get("top_n") or len(results)]
    return {"model": body["model"], "results": kept, "usage": usage}


def tokens(text: str) -> dict[str, Any]:
    """Return tokens as `/tokenize` does."""
    numbers = [sum(word.encode()) for word in text.split()]
    return {"count": len(numbers), "max_model_len": 4096, "tokens": numbers}


def _vector(text: str, dimensions: int) -> list[float]:
    ones = sum(text.encode()) % (dimensions + 1)
    return [1.0 if index < ones else 0.0 for index in range(dimensions)]


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _score(first: str, second: str) -> float:
    words = set(second.split())
    return len(words & set(first.split())) / max(1, len(words))


def _usage(texts: list[str]) -> dict[str, Any]:
    # vLLM's embeddings and scores say 0 completion tokens, its rerank says none.
    return {"prompt_tokens": count(texts), "total_tokens": count(texts), "completion_tokens": 0}
