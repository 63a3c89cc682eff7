"""How many tokens a request may use at most: what is reserved of the limits for it.

A token stands for one byte of text or more, so the bytes of the body that goes to the engine bound
the tokens of what it says. What is not in the body is added: what the chat template says, what the
tokenizer puts around each prompt, and a query that is read once with each document. Pictures,
sound and film can be more tokens than bytes. Where the config names the context of the model, no
prompt is more than that.
"""

from __future__ import annotations

from serve_app.completions.body import Ask
from serve_app.completions.sse import Usage

# What a tokenizer puts around a prompt, or around both sides of a pair, is four tokens at most.
_AROUND_A_PROMPT = 4
# Of a request with pictures, sound or film to a model whose context the config does not name.
_CONTEXT_UNKNOWN = 131_072
# Keys and types of parts that are no text. They cannot stand inside a JSON string: there the
# quotation mark would be escaped.
_MEDIA = tuple(
    f'"{name}"'.encode()
    for name in (
        "image_url",
        "input_image",
        "image_embeds",
        "image_pil",
        "audio_url",
        "input_audio",
        "audio_embeds",
        "video_url",
        "file_url",
    )
)


def most_tokens(ask: Ask) -> Usage:
    """Return the most tokens that `ask` can use, as the accounts count them."""
    if not ask.kind.endpoint.counts_tokens:
        return Usage(0, 0)
    context = ask.model.context_tokens
    # One token of the context at least is the prompt's.
    answer = ask.max_tokens if context is None else min(ask.max_tokens, context - 1)
    return Usage(_prompt_tokens(ask, context), answer * ask.choices)


def _prompt_tokens(ask: Ask, context: int | None) -> int:
    if any(mark in ask.payload for mark in _MEDIA):
        return (context or _CONTEXT_UNKNOWN) * ask.prompts
    around = ask.model.template_tokens if ask.kind.endpoint.messages else _AROUND_A_PROMPT
    said = len(ask.payload) + ask.repeated_bytes * (ask.prompts - 1)
    most = said + around * ask.prompts
    return most if context is None else min(most, context * ask.prompts)
