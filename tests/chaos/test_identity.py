"""Keys, limits and the audit log on a whole stack: two gateways, Limits killed, nginx in front."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from openai import OpenAI

from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack, wait_until

_BODY = {"model": FAKE_MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
# Serve's proxy spreads requests over the gateways; so many reach both.
_ASKS = 24


def _made(stack: RunningStack, owner: str, **fields: Any) -> dict[str, Any]:
    """Make a key as an administrator, over HTTP."""
    answer = httpx.post(
        f"{stack.url}/admin/keys",
        headers=stack.bootstrap,
        json={"name": "test", "owner": owner, **fields},
    )
    assert answer.status_code == 200, answer.text
    key: dict[str, Any] = answer.json()
    return key


def _asked(stack: RunningStack, key: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{stack.url}/v1/chat/completions", headers=headers, json=_BODY, timeout=60)


def _at_once(stack: RunningStack, key: str, count: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: _asked(stack, key), range(count)))


def _statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


def test_limit_of_a_key_is_exact_over_gateways_and_outlives_the_counters(
    stack: RunningStack,
) -> None:
    wait_until(stack.ready, "ready", 60)
    limits = {"requests_per_minute": 10, "tokens_per_day": 1_000_000}
    key = _made(stack, "limited", limits=limits)["key"]
    begun_s = time.monotonic()
    answers = _at_once(stack, key, _ASKS)
    assert _statuses(answers) == {200: 10, 429: _ASKS - 10}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    before = _left(stack, key)
    [limiter] = stack.replicas("Limits")
    limiter.kill()
    wait_until(stack.ready, "ready again", 60)
    after = _at_once(stack, key, 4)
    # No burst: the window is as full as it was, unless it took a minute to come back.
    assert time.monotonic() - begun_s < 55, "the machine was too slow to say"
    assert _statuses(after) == {429: 4}
    assert _left(stack, key)["tokens_per_day"] == before["tokens_per_day"]


def _left(stack: RunningStack, key: str) -> dict[str, int]:
    """Return what `GET /v1/me` says is left of the key's own limits."""
    me = httpx.get(f"{stack.url}/v1/me", headers={"Authorization": f"Bearer {key}"}).json()
    assert me["id"] == "limited"
    return {one["limit"]: one["remaining"] for one in me["limits"]}


def test_key_that_is_revoked_is_refused_by_every_gateway(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    made = _made(stack, "leaver", models=[FAKE_MODEL])
    client = OpenAI(base_url=f"{stack.url}/v1", api_key=made["key"], max_retries=0)
    assert [model.id for model in client.models.list()] == [FAKE_MODEL]
    assert _statuses(_at_once(stack, made["key"], _ASKS)) == {200: _ASKS}
    revoked = httpx.post(f"{stack.url}/admin/keys/{made['id']}/revoke", headers=stack.bootstrap)
    assert revoked.json()["status"] == "revoked"
    begun_s = time.monotonic()
    wait_until(
        lambda: _statuses(_at_once(stack, made["key"], _ASKS)) == {401: _ASKS},
        "all gateways refuse it",
        10,
    )
    print(f"refused everywhere within {time.monotonic() - begun_s:.2f} s")


def test_rotated_key_and_its_successor_work_for_the_overlap(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    made = _made(stack, "rotator")
    url = f"{stack.url}/admin/keys/{made['id']}/rotate"
    again = httpx.post(url, headers=stack.bootstrap, json={"overlap_s": 600}).json()
    assert again["id"] == made["id"]
    for key in (made["key"], again["key"]):
        assert _statuses(_at_once(stack, key, _ASKS)) == {200: _ASKS}
    last = httpx.post(url, headers=stack.bootstrap, json={"overlap_s": 0}).json()
    for key in (made["key"], again["key"]):
        wait_until(lambda key=key: _asked(stack, key).status_code == 401, "it ended", 10)  # type: ignore[misc]
    assert _asked(stack, last["key"]).status_code == 200


def test_token_without_a_role_may_do_nothing_and_that_is_audited(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    token = stack.cli("token", "--subject", "nobody", "--role", "other").strip()
    headers = {"Authorization": f"Bearer {token}"}
    me = httpx.get(f"{stack.url}/v1/me", headers=headers).json()
    assert (me["id"], me["permissions"], me["models"]) == ("nobody", [], [])
    refused = _asked(stack, token)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    stack.settled_rows(
        "select 1 from comp_ai.audit_log where actor_id = 'nobody' "
        "and action = 'permission.refuse'",
        1,
    )
    found = json.loads(stack.cli("audit", "verify", "--json"))
    assert found["intact"] is True, found
    acts = httpx.get(
        f"{stack.url}/admin/audit", headers=stack.bootstrap, params={"action": "key.revoke"}
    ).json()
    assert [act["after"]["owner"] for act in acts["data"]] == ["leaver"]
