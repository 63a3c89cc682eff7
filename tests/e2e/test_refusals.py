"""Every refusal is an OpenAI error, and in the log."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import create_key
from tests.serve_configs import FAKE_MODEL, LIMITED_OWNER, REAL_MODEL
from tests.stack_runner import RunningStack

_CHAT = "/api/v1/comp-ai/v1/chat/completions"


def _body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": REAL_MODEL, "messages": messages, "max_tokens": 4} | fields


_CASES: dict[str, tuple[Callable[[], dict[str, Any]], int, str]] = {
    "unknown model": (lambda: {"json": _body(model="nope")}, 404, "model_not_found"),
    "bad JSON": (lambda: {"content": b'{"model": '}, 400, "invalid_json"),
    "no tokens": (lambda: {"json": _body(max_tokens=-1)}, 400, "invalid_value"),
    "parameter": (lambda: {"json": _body(service_tier="x")}, 400, "unsupported_parameter"),
    "over our limit": (lambda: {"content": b"x" * 5_000_000}, 413, "request_too_large"),
    "over nginx's limit": (lambda: {"content": b"x" * 40_000_000}, 413, "request_too_large"),
    "engine's word": (lambda: {"json": _body(top_p=7)}, 400, "invalid_value"),
}


@pytest.mark.parametrize("case", _CASES)
def test_refused_in_openai_form_and_recorded(stack: RunningStack, api_key: str, case: str) -> None:
    request, status, code = _CASES[case]
    request_id = uuid.uuid4().hex
    headers = {"Authorization": f"Bearer {api_key}", "X-Request-ID": request_id}
    answer = httpx.post(f"{stack.url}{_CHAT}", headers=headers, timeout=60, **request())
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers.get_list("x-request-id") == [request_id]
    [row] = stack.settled_rows(
        "select * from comp_ai.requests where request_id = $1", 1, request_id
    )
    assert (row["status"], row["outcome"], row["error_code"]) == (status, "refused", code)
    assert row["principal_id"] == "developer"


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer cai-wrong"}])
def test_no_or_wrong_key(stack: RunningStack, header: dict[str, str]) -> None:
    request_id = uuid.uuid4().hex
    headers = header | {"X-Request-ID": request_id}
    answer = httpx.post(f"{stack.url}{_CHAT}", headers=headers, json=_body())
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    [row] = stack.settled_rows(
        "select * from comp_ai.requests where request_id = $1", 1, request_id
    )
    assert (row["status"], row["principal_id"]) == (401, None)


def test_the_client_library_knows_the_errors(stack: RunningStack, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    stranger = OpenAI(base_url=f"{stack.url}/v1", api_key="cai-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_revoked_key_is_refused(stack: RunningStack) -> None:
    key = create_key(stack, "leaver")
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{stack.url}/v1/models", headers=headers).status_code == 200
    stack.cli("keys", "revoke", "-".join(key.split("-")[:2]).removeprefix("cai-"))
    # A gateway may hold a key for one second.
    answers = [httpx.get(f"{stack.url}/v1/models", headers=headers).status_code]
    while answers[-1] == 200 and len(answers) < 1000:
        answers.append(httpx.get(f"{stack.url}/v1/models", headers=headers).status_code)
    assert answers[-1] == 401


def test_a_limit_holds_across_two_gateways(stack: RunningStack) -> None:
    assert len(stack.replicas("Gateway")) == 2
    key = create_key(stack, LIMITED_OWNER)
    headers = {"Authorization": f"Bearer {key}"}

    def ask(_: int) -> httpx.Response:
        return httpx.post(
            f"{stack.url}/v1/chat/completions",
            headers=headers,
            json=_body(model=FAKE_MODEL),
            timeout=60,
        )

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] * 10 + [429] * 40
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(answer.json()["error"]["code"] == "rate_limit_exceeded" for answer in refused)
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    rows = stack.settled_rows(
        "select status from comp_ai.requests where principal_id = $1", 50, LIMITED_OWNER
    )
    assert sorted(row["status"] for row in rows) == statuses
