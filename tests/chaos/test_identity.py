"""Keys, limits and the audit log on a whole stack: two gateways, Limits killed, nginx in front."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any

import httpx
import pytest
from openai import OpenAI

from serve_app.cli.tokens import obtain
from serve_app.settings import load_settings
from tests.chaos.conftest import PARTNER, PRICED
from tests.integration.browser_stand_ins import COOKIE, PREFIX
from tests.serve_configs import FAKE_MODEL
from tests.sign_in_door import ADMIN, HTML, USER, SignInDoor, signed_in
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


def _asked(stack: RunningStack, key: str, model: str = FAKE_MODEL) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    body = {**_BODY, "model": model}
    return httpx.post(f"{stack.url}/v1/chat/completions", headers=headers, json=body, timeout=60)


def _at_once(
    stack: RunningStack, key: str, count: int, model: str = FAKE_MODEL
) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: _asked(stack, key, model), range(count)))


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
    _kill_limits(stack)
    after = _at_once(stack, key, 4)
    # No burst: the window is as full as it was, unless it took a minute to come back.
    assert time.monotonic() - begun_s < 55, "the machine was too slow to say"
    assert _statuses(after) == {429: 4}
    assert _left(stack, key)["tokens_per_day"] == before["tokens_per_day"]


def _me(stack: RunningStack, key: str) -> dict[str, Any]:
    me: dict[str, Any] = httpx.get(
        f"{stack.url}/v1/me", headers={"Authorization": f"Bearer {key}"}, timeout=60
    ).json()
    return me


def _left(stack: RunningStack, key: str, whose: str = "your API key") -> dict[str, float]:
    """Return what `GET /v1/me` says is left of the limits of `whose`."""
    return {
        one["limit"]: one["remaining"] for one in _me(stack, key)["limits"] if one["for"] == whose
    }


def test_budgets_of_money_are_exact_and_outlive_the_counters(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    # Four tokens at 0.001 EUR: five requests use up 0.02 EUR.
    keys = {owner: _made(stack, owner)["key"] for owner in ("daily", "monthly")}
    for key in keys.values():
        answers = _at_once(stack, key, _ASKS, PRICED)
        assert _statuses(answers) == {200: 5, 429: _ASKS - 5}
    _kill_limits(stack)
    for owner, limit in (("daily", "cost_per_day"), ("monthly", "cost_per_month")):
        refused = _asked(stack, keys[owner], PRICED)
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            429,
            "insufficient_quota",
        )
        # What costs nothing is not refused.
        assert _asked(stack, keys[owner]).status_code == 200
        [told] = [one for one in _me(stack, keys[owner])["limits"] if one["limit"] == limit]
        assert (told["for"], told["allowed"], told["remaining"]) == ("you", 0.02, 0)
        assert told["currency"] == "EUR"
    assert _left(stack, keys["daily"], "you")["cost_per_month"] == pytest.approx(0.98)


def _kill_limits(stack: RunningStack) -> None:
    """Kill the counters as an out-of-memory killer would, and wait for their successor."""
    [limiter] = stack.replicas("Limits")
    limiter.kill()
    wait_until(stack.ready, "ready again", 60)


def test_limits_of_groups_and_roles_are_exact_and_outlive_the_counters(
    stack: RunningStack, door: SignInDoor
) -> None:
    wait_until(stack.ready, "ready", 60)
    for name in (USER, ADMIN):
        signed_in(stack.url, "/docs", name)
    ada, root = door.flow.tokens[USER], door.flow.tokens[ADMIN]
    crew = [_token(stack, name, "crew") for name in ("jo", "kim")]
    interns = [_token(stack, name, "intern") for name in ("lee", "max")]
    begun_s = time.monotonic()
    # Of two groups the tighter one holds: 4 for each of one, and then what the others left.
    assert _statuses(_at_once(stack, ada, 8)) == {200: 4, 429: 4}
    assert _statuses(_at_once(stack, root, 8)) == {200: 6, 429: 2}
    assert sum((_statuses(_at_once(stack, one, 6)) for one in crew), Counter())[200] == 6
    for one in interns:
        assert _statuses(_at_once(stack, one, 5)) == {200: 3, 429: 2}
    _kill_limits(stack)
    everybody = [ada, root, *crew, *interns]
    after = [_asked(stack, one) for one in everybody]
    assert time.monotonic() - begun_s < 55, "the machine was too slow to say"
    assert _statuses(after) == {429: len(everybody)}
    me = _me(stack, ada)
    assert (me["id"], me["groups"]) == (f"{PARTNER}:{USER}", [f"{PARTNER}:lab", f"{PARTNER}:trial"])
    assert _left(stack, ada, f"each of the group `{PARTNER}:trial`")["requests_per_minute"] == 0
    assert _left(stack, root, f"the group `{PARTNER}:lab`")["requests_per_minute"] == 0
    assert _left(stack, crew[0], "the role `crew`")["requests_per_minute"] == 0
    assert _left(stack, interns[0], "each of the role `intern`")["requests_per_minute"] == 0


def _token(stack: RunningStack, subject: str, role: str) -> str:
    settings = load_settings(stack.env)
    return asyncio.run(obtain(settings, subject, ["comp-ai:user", role], 600))


def test_policy_of_limits_changes_in_place(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    key = _made(stack, "changed")["key"]
    assert _statuses(_at_once(stack, key, 2)) == {200: 2}
    begun_s = time.monotonic()
    processes = _pids(stack)
    config = stack.config()
    changed = deepcopy(config)
    policy = changed["applications"][0]["deployments"][0]["user_config"]["limits"]
    policy["principals"]["changed"] = {"requests_per_minute": 3}
    stack.deploy(changed)
    try:
        wait_until(partial(_told_everywhere, stack, key, 3), "all gateways have the limit", 30)
        answers = _at_once(stack, key, _ASKS)
        # What was used before counts.
        assert time.monotonic() - begun_s < 55, "the machine was too slow to say"
        assert _statuses(answers) == {200: 1, 429: _ASKS - 1}
    finally:
        stack.deploy(config)
        wait_until(partial(_told_everywhere, stack, key, 100_000), "it is as it was", 30)
    assert _pids(stack) == processes


def _pids(stack: RunningStack) -> set[int]:
    """Return the replicas of everything: none may be replaced."""
    return {process.pid for process in stack.processes("ray::ServeReplica:")}


def _told_everywhere(stack: RunningStack, key: str, allowed: int) -> bool:
    with ThreadPoolExecutor(_ASKS) as threads:
        told = threads.map(lambda _: _me(stack, key)["limits"], range(_ASKS))
        return all(
            limit["allowed"] == allowed
            for limits in told
            for limit in limits
            if limit["limit"] == "requests_per_minute"
        )


def test_people_sign_in_for_the_pages_and_only_admins_see_the_dashboard(
    stack: RunningStack, door: SignInDoor
) -> None:
    wait_until(stack.ready, "ready", 60)
    user, page = signed_in(stack.url, "/docs", USER)
    assert (page.status_code, page.url.path) == (200, f"{PREFIX}/docs")
    assert "swagger" in page.text
    assert user.get(f"{PREFIX}/openapi.json").json()["paths"]["/v1/me"]
    assert user.get(f"{PREFIX}/console/").text == "console"
    assert door.console.seen[-1].headers["x-auth-request-user"] == USER
    assert user.get(f"{PREFIX}/dashboard/").status_code == 403
    # A session is nothing to the API.
    assert user.get(f"{PREFIX}/v1/me").status_code == 401
    user.get(f"{PREFIX}/oauth2/sign_out")
    assert user.get(f"{PREFIX}/docs", follow_redirects=False).status_code == 302


def test_the_dashboard_is_rays_own_and_only_read(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    admin, page = signed_in(stack.url, "/dashboard/", ADMIN)
    assert (page.status_code, page.url.path) == (200, f"{PREFIX}/dashboard/")
    assert "<title>Ray Dashboard</title>" in page.text
    served = admin.get(f"{PREFIX}/dashboard/api/serve/applications/").json()
    assert served["applications"]["gateway"]["status"] == "RUNNING"
    for method, path in (
        ("POST", "api/jobs/"),
        ("PUT", "api/serve/applications/"),
        ("DELETE", "api/serve/applications/"),
    ):
        answer = admin.request(method, f"{PREFIX}/dashboard/{path}", json={})
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    # Who says of himself that he is an administrator is nobody.
    forged = {**HTML, "x-auth-request-groups": "staff/admins", "cookie": f"{COOKIE}=forged"}
    answer = httpx.get(f"{stack.url}{PREFIX}/dashboard/", headers=forged)
    assert answer.status_code == 302


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
