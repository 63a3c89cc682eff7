"""How much one request may ask for."""

from __future__ import annotations

from typing import Any, TypeGuard

from serve_app.completions.kinds import Kind
from serve_app.config import Caps
from serve_app.errors import InvalidRequest


def check_caps(kind: Kind, body: dict[str, Any], prompts: int, caps: Caps) -> None:
    """Check a body against the policy; `prompts` is what the endpoint counted in it.

    Raises:
        InvalidRequest: names the parameter, its value and the cap.
    """
    _check_messages(kind, body, caps.max_messages)
    _check_stop(body, caps.max_stop)
    if prompts > caps.max_prompts:
        raise InvalidRequest(
            f"The request holds {prompts} prompts; at most {caps.max_prompts} are allowed. "
            "Send several requests.",
            param=kind.endpoint.prompts,
        )
    if kind.endpoint.max_tokens:
        _check_choices(body, prompts, caps)


def _check_messages(kind: Kind, body: dict[str, Any], most: int) -> None:
    name = kind.endpoint.messages
    messages = body.get(name) if name is not None else None
    if isinstance(messages, list) and len(messages) > most:
        raise InvalidRequest(
            f"`{name}` holds {len(messages)} messages; at most {most} are allowed.", param=name
        )


def _check_stop(body: dict[str, Any], most: int) -> None:
    stop = body.get("stop")
    if isinstance(stop, list) and len(stop) > most:
        raise InvalidRequest(
            f"`stop` holds {len(stop)} texts; at most {most} are allowed.", param="stop"
        )


def _check_choices(body: dict[str, Any], prompts: int, caps: Caps) -> None:
    n = body.get("n")
    if n is None:
        n = 1
    if not is_whole(n) or not 1 <= n <= caps.max_n:
        raise InvalidRequest(
            f"`n` is {_shown(n)}; it must be a whole number from 1 to {caps.max_n}.", param="n"
        )
    if n * prompts > caps.max_choices:
        raise InvalidRequest(
            f"`n` is {n} for {prompts} prompts, which makes {n * prompts} answers; "
            f"at most {caps.max_choices} are allowed.",
            param="n",
        )


def check_max_tokens(kind: Kind, body: dict[str, Any], most: int) -> None:
    """Check the parameters that bound what is generated. Raises InvalidRequest."""
    for name in kind.endpoint.max_tokens:
        value = body.get(name)
        if value is None:
            continue
        if not is_whole(value) or not 1 <= value <= most:
            raise InvalidRequest(
                f"`{name}` is {_shown(value)}; it must be a whole number from 1 to {most}.",
                param=name,
            )


def is_whole(value: object) -> TypeGuard[int]:
    """Tell whether a value of JSON is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    # A number is harmless in a message; anything else could be a text of any length.
    if is_whole(value) or isinstance(value, float):
        return str(value)
    return "no number"
