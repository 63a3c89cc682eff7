"""What an endpoint works on: checked to be there, and counted.

Each function takes the body of one endpoint, returns how many prompts the engine makes of it,
and raises InvalidRequest where it is missing or no such thing. What is inside a text, a message
or a document is the engine's to judge.
"""

from __future__ import annotations

from typing import Any

from serve_app.errors import InvalidRequest

# The four ways in which vLLM takes the two sides of a score.
_PAIRS = (
    ("text_1", "text_2"),
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
)
SIDES = tuple(dict.fromkeys(name for pair in _PAIRS for name in pair))
# What every tokenizer can be asked about; beyond it some fail instead of refusing.
_MOST_TOKEN = 2**31 - 1


def count_chat(body: dict[str, Any]) -> int:
    """Count the one prompt of a conversation."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("`messages` must be a list of messages.", param="messages")
    return 1


def count_prompts(body: dict[str, Any]) -> int:
    """Count the prompts to be continued."""
    return _texts(body, "prompt")


def count_inputs(body: dict[str, Any]) -> int:
    """Count the texts to be embedded."""
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise InvalidRequest(
            "`encoding_format` must be `float` or `base64`.", param="encoding_format"
        )
    return _texts(body, "input")


def count_documents(body: dict[str, Any]) -> int:
    """Count the documents to be ordered."""
    _items(body, "query", most=1)
    return _items(body, "documents")


def count_pairs(body: dict[str, Any]) -> int:
    """Count the pairs to be scored: one with each, or each with its counterpart."""
    named = {name for name in SIDES if body.get(name) is not None}
    for first, second in _PAIRS:
        if named == {first, second}:
            return max(_items(body, first), _items(body, second))
    ways = ", or ".join(f"`{first}` and `{second}`" for first, second in _PAIRS)
    raise InvalidRequest(f"Name two sides to score: {ways}.", param="text_1")


def count_tokenized(body: dict[str, Any]) -> int:
    """Count the one text or conversation to be turned into tokens."""
    if body.get("messages") is not None and body.get("prompt") is not None:
        raise InvalidRequest("Name `prompt` or `messages`, not both.", param="prompt")
    if body.get("messages") is not None:
        return count_chat(body)
    # An empty text has tokens too: those that the tokenizer puts around a text.
    if not isinstance(body.get("prompt"), str):
        raise InvalidRequest(
            "`prompt` must be a text, or `messages` a list of messages.", param="prompt"
        )
    return 1


def count_tokens(body: dict[str, Any]) -> int:
    """Count the one list of tokens to be turned into a text."""
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not _are_tokens(tokens):
        raise InvalidRequest(
            f"`tokens` must be a list of whole numbers from 0 to {_MOST_TOKEN}.", param="tokens"
        )
    return 1


def _are_tokens(values: list[Any]) -> bool:
    # By the built-ins, because there may be a million of them. `bool` is a type of its own here.
    if not values:
        return True
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= _MOST_TOKEN


def _texts(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if isinstance(value, str) and value:
        return 1
    if isinstance(value, list) and value:
        return 1 if isinstance(value[0], int) else len(value)
    raise InvalidRequest(f"`{name}` must be a text or a list of texts.", param=name)


def _items(body: dict[str, Any], name: str, most: int | None = None) -> int:
    """Count texts, or objects with contents as vLLM takes them."""
    value = body.get(name)
    if isinstance(value, str | dict) and value:
        return 1
    if isinstance(value, list) and value and most is None:
        return len(value)
    what = "a text" if most == 1 else "a text or a list of texts"
    raise InvalidRequest(f"`{name}` must be {what}.", param=name)
