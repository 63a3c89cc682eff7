"""The endpoints that an engine serves, as one table: what each takes, needs and answers."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.completions import response_body
from serve_app.completions.answers import Answers, Embedded, Pooled, Tokens
from serve_app.completions.prompts import (
    SIDES,
    count_chat,
    count_documents,
    count_inputs,
    count_pairs,
    count_prompts,
    count_tokenized,
    count_tokens,
)
from serve_app.completions.response_events import ResponseAnswers
from serve_app.config import Task

Body = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One endpoint of the engine.

    `addresses` is where clients find it; the first stands in the OpenAPI document. It is empty
    for one that has a handler of its own. `max_tokens` names the parameters that bound what is
    generated, the one that we fill in last; it is empty where nothing is generated.
    `engine_max_tokens` is what the engine generates at most where none of them is given; None is
    up to the end of its context. `messages` names the parameter that may hold a conversation,
    `prompts` the one that may hold several prompts.
    `count` checks what the engine is to work on and returns how many prompts that is.
    `repeated` names what is read once with each prompt, unless it is a list. `counts_tokens` is
    false where nothing is used of which a counter of tokens knows.
    """

    route: str
    summary: str
    addresses: tuple[str, ...]
    parameters: frozenset[str]
    count: Callable[[Body], int]
    answers: Answers
    tasks: frozenset[Task] = frozenset(Task)
    max_tokens: tuple[str, ...] = ()
    engine_max_tokens: int | None = None
    messages: str | None = None
    prompts: str | None = None
    repeated: tuple[str, ...] = ()
    counts_tokens: bool = True
    # Whether usage comes on a stream only if `stream_options` asks for it.
    stream_options: bool = False


# vLLM takes unknown fields in silence, so what may pass is listed here. Left out on purpose:
# what steers the server itself (request_id, kv_transfer_params, chat_template, …).
_SAMPLING = frozenset(
    "add_special_tokens allowed_token_ids bad_words cache_salt frequency_penalty ignore_eos "
    "include_stop_str_in_output length_penalty logit_bias logprob_token_ids logprobs max_tokens "
    "min_p min_tokens model n presence_penalty priority prompt_logprobs repetition_detection "
    "repetition_penalty response_format return_token_ids return_tokens_as_token_ids seed "
    "skip_special_tokens spaces_between_special_tokens stop stop_token_ids store stream "
    "stream_options "
    "structured_outputs temperature thinking_token_budget top_k top_p truncate_prompt_tokens "
    "truncation_side user".split()
)
_POOLING = frozenset(
    "model priority truncate_prompt_tokens truncation_side use_activation user".split()
)
_SCORING = _POOLING | frozenset(
    "chat_template_kwargs instruction max_tokens_per_doc max_tokens_per_query".split()
)


class Kind(enum.StrEnum):
    """An endpoint of the engine; the value is the path below the engine's root."""

    CHAT = "/v1/chat/completions"
    TEXT = "/v1/completions"
    RESPONSES = "/v1/responses"
    EMBEDDINGS = "/v1/embeddings"
    RERANK = "/rerank"
    SCORE = "/score"
    TOKENIZE = "/tokenize"
    DETOKENIZE = "/detokenize"

    @property
    def endpoint(self) -> Endpoint:
        """The row of the table."""
        return ENDPOINTS[self]

    @property
    def route(self) -> str:
        """The name of the endpoint in records and metrics."""
        return self.endpoint.route

    @property
    def answers(self) -> Answers:
        """How its answers are read."""
        return self.endpoint.answers


ENDPOINTS: Mapping[Kind, Endpoint] = {
    Kind.CHAT: Endpoint(
        route="chat.completions",
        summary="Answer a conversation",
        addresses=("/v1/chat/completions",),
        parameters=_SAMPLING
        | frozenset(
            "add_generation_prompt chat_template_kwargs continue_final_message documents echo "
            "include_reasoning max_completion_tokens messages parallel_tool_calls "
            "reasoning_effort tool_choice tools top_logprobs".split()
        ),
        count=count_chat,
        # The role comes in a frame of its own.
        answers=Answers(opening_frames=1),
        tasks=frozenset({Task.GENERATE}),
        max_tokens=("max_tokens", "max_completion_tokens"),
        messages="messages",
        stream_options=True,
    ),
    Kind.TEXT: Endpoint(
        route="completions",
        summary="Continue a text",
        addresses=("/v1/completions",),
        parameters=_SAMPLING | frozenset("echo prompt suffix".split()),
        count=count_prompts,
        prompts="prompt",
        answers=Answers(),
        tasks=frozenset({Task.GENERATE}),
        max_tokens=("max_tokens",),
        engine_max_tokens=16,
        stream_options=True,
    ),
    Kind.RESPONSES: Endpoint(
        route="responses",
        summary="Make a response",
        addresses=("/v1/responses",),
        parameters=response_body.PARAMETERS,
        count=response_body.check_response,
        answers=ResponseAnswers(),
        tasks=frozenset({Task.GENERATE}),
        max_tokens=("max_output_tokens",),
        messages="input",
    ),
    Kind.EMBEDDINGS: Endpoint(
        route="embeddings",
        summary="Turn texts into vectors",
        addresses=("/v1/embeddings",),
        parameters=_POOLING
        | frozenset("add_special_tokens dimensions encoding_format input".split()),
        count=count_inputs,
        prompts="input",
        answers=Embedded(),
        tasks=frozenset({Task.EMBED}),
    ),
    Kind.RERANK: Endpoint(
        route="rerank",
        summary="Order documents by what they say to a query",
        addresses=("/v1/rerank", "/v2/rerank", "/rerank"),
        parameters=_SCORING | frozenset("documents query top_n".split()),
        count=count_documents,
        prompts="documents",
        repeated=("query", "instruction"),
        answers=Pooled(),
        tasks=frozenset({Task.EMBED, Task.SCORE}),
    ),
    Kind.SCORE: Endpoint(
        route="score",
        summary="Score pairs of texts",
        addresses=("/v1/score", "/score"),
        parameters=_SCORING
        | frozenset("data_1 data_2 documents items queries text_1 text_2".split()),
        count=count_pairs,
        repeated=(*SIDES, "instruction"),
        answers=Pooled(),
        tasks=frozenset({Task.EMBED, Task.SCORE}),
    ),
    Kind.TOKENIZE: Endpoint(
        route="tokenize",
        summary="Turn a text or a conversation into tokens",
        addresses=("/v1/tokenize", "/tokenize"),
        parameters=frozenset(
            "add_generation_prompt add_special_tokens chat_template_kwargs "
            "continue_final_message messages model prompt return_token_strs tools".split()
        ),
        count=count_tokenized,
        messages="messages",
        answers=Tokens(),
        counts_tokens=False,
    ),
    Kind.DETOKENIZE: Endpoint(
        route="detokenize",
        summary="Turn tokens into a text",
        addresses=("/v1/detokenize", "/detokenize"),
        parameters=frozenset({"model", "tokens"}),
        count=count_tokens,
        answers=Tokens(),
        counts_tokens=False,
    ),
}


def kinds_of(task: Task) -> list[Kind]:
    """Return the endpoints that a model of `task` serves."""
    return [kind for kind in Kind if task in kind.endpoint.tasks]
