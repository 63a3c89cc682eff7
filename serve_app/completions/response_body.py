"""What a request for a response may ask for: what vLLM would take and not do is refused here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from serve_app.errors import InvalidRequest, UnsupportedParameter

# Left out on purpose: what vLLM echoes or drops without doing it (max_tool_calls, prompt,
# prompt_cache_key, safety_identifier, service_tier, stream_options), what steers the server
# itself (request_id, kv_transfer_params, …), and `conversation`, which is not here.
PARAMETERS = frozenset(
    "background cache_salt chat_template_kwargs frequency_penalty ignore_eos include "
    "include_reasoning include_stop_str_in_output input instructions logit_bias max_output_tokens "
    "metadata model parallel_tool_calls presence_penalty previous_response_id priority reasoning "
    "repetition_penalty seed skip_special_tokens stop store stream structured_outputs temperature "
    "text tool_choice tools top_k top_logprobs top_p truncation user".split()
)
LOGPROBS = "message.output_text.logprobs"
_ITEMS = frozenset({"message", "reasoning", "function_call", "function_call_output"})
_TOOLS = frozenset({"function"})
_TOOL_CHOICES = frozenset({"auto", "none", "required"})


def check_response(body: dict[str, Any]) -> int:
    """Check what the engine would not; return how many prompts there are, which is one.

    Raises:
        UnsupportedParameter: a part that would not be honoured.
        InvalidRequest: a part with a wrong value.
    """
    _check_input(body.get("input"))
    _check_tools(body)
    _check_include(body)
    _refuse_others(body, "reasoning", {"effort"})
    _refuse_others(body, "text", {"format"})
    if body.get("parallel_tool_calls") is False:
        raise _unsupported("parallel_tool_calls", "`parallel_tool_calls: false` is not supported.")
    return 1


def _check_input(given: object) -> None:
    if isinstance(given, str) and given:
        return
    if not isinstance(given, list) or not given:
        raise InvalidRequest("`input` must be a text or a list of items.", param="input")
    for index, item in enumerate(given):
        param = f"input[{index}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"`{param}` must be an object.", param=param)
        _check_type(item.get("type") or "message", _ITEMS, f"{param}.type")


def _check_tools(body: dict[str, Any]) -> None:
    tools = body.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InvalidRequest("`tools` must be a list of tools.", param="tools")
    for index, tool in enumerate(tools or []):
        param = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise InvalidRequest(f"`{param}` must be an object.", param=param)
        _check_type(tool.get("type"), _TOOLS, f"{param}.type")
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        _check_type(choice.get("type"), _TOOLS, "tool_choice.type")
    elif choice is not None:
        _check_type(choice, _TOOL_CHOICES, "tool_choice")


def _check_include(body: dict[str, Any]) -> None:
    include = body.get("include")
    if include is not None and not isinstance(include, list):
        raise InvalidRequest("`include` must be a list.", param="include")
    for index, one in enumerate(include or []):
        _check_type(one, {LOGPROBS}, f"include[{index}]")
    if body.get("top_logprobs") and LOGPROBS not in (include or []):
        raise InvalidRequest(
            f"`top_logprobs` needs `{LOGPROBS}` in `include`.", param="top_logprobs"
        )


def _refuse_others(body: dict[str, Any], name: str, known: Collection[str]) -> None:
    value = body.get(name)
    if value is None:
        return
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{name}` must be an object.", param=name)
    for part, given in value.items():
        if part not in known and given is not None:
            raise _unsupported(f"{name}.{part[:100]}")


def _check_type(value: object, known: Collection[str], param: str) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(f"`{param}` must be a text.", param=param)
    if value not in known:
        allowed = ", ".join(f"`{one}`" for one in sorted(known))
        raise _unsupported(
            param, f"`{value[:100]}` is not supported as `{param}`; it can be {allowed}."
        )


def _unsupported(param: str, message: str | None = None) -> UnsupportedParameter:
    return UnsupportedParameter(
        message or f"The parameter `{param}` is not supported. Leave it out.", param=param
    )
