"""How much a key may do that its owner makes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import Bodies, LimitPolicy, ModelEntry
from serve_app.errors import PermissionDenied
from serve_app.identity.api_keys import KeyTerms
from serve_app.identity.key_rules import Bounds, looser, require_new_keys, require_own_keys
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind

SOON = datetime(2030, 1, 1, tzinfo=UTC)
ADA = Principal(id="ada", kind=PrincipalKind.USER, permissions=frozenset({Permission.USER}))
KEY = replace(ADA, kind=PrincipalKind.API_KEY)
TIGHT = Bounds(
    permissions=frozenset({Permission.USER}),
    models=frozenset({"small"}),
    limits=LimitPolicy(concurrency=2),
    bodies=Bodies.METADATA,
    expires_at=SOON,
)
GOOD: dict[str, Any] = {"name": "k", **TIGHT.widest()}


def test_a_token_may_and_a_key_needs_the_permission() -> None:
    require_own_keys(ADA)
    require_own_keys(replace(KEY, permissions=frozenset({Permission.KEYS})))
    require_own_keys(replace(KEY, permissions=frozenset({Permission.ADMIN})))
    with pytest.raises(PermissionDenied, match="comp-ai:keys"):
        require_own_keys(KEY)


def test_a_key_with_limits_makes_no_others() -> None:
    require_new_keys(KEY)
    with pytest.raises(PermissionDenied):
        require_new_keys(replace(KEY, limits=LimitPolicy(concurrency=2)))


def test_what_may_be_given_away() -> None:
    assert Bounds.of(ADA, None, ()).permissions == {Permission.USER, Permission.KEYS}
    assert Bounds.of(KEY, None, ()).permissions == {Permission.USER}
    admin = replace(KEY, permissions=frozenset({Permission.ADMIN}))
    assert Bounds.of(admin, None, ()).permissions == frozenset(Permission)


def test_a_list_names_no_model_that_its_owner_may_not_use_nor_tells_that_there_is_one() -> None:
    models = [
        ModelEntry(name="small", app="a"),
        ModelEntry(name="secret", app="a", restricted=True),
    ]
    bounds = Bounds.of(ADA, None, models)
    bounds.check(KeyTerms(name="k", models=frozenset({"small"})))
    bounds.check(KeyTerms(name="k"))
    said = []
    for name in ("secret", "absent"):
        with pytest.raises(PermissionDenied) as refused:
            bounds.check(KeyTerms(name="k", models=frozenset({"small", name})))
        said.append((refused.value.param, refused.value.message))
    assert said[0] == said[1]
    assert said[0][0] == "models"


def test_as_much_as_one_has_is_allowed() -> None:
    TIGHT.check(KeyTerms(**GOOD))


@pytest.mark.parametrize(
    ("name", "wider"),
    [
        ("permissions", frozenset({Permission.USER, Permission.AUDITOR})),
        ("permissions", frozenset({Permission.ADMIN})),
        ("models", None),
        ("models", frozenset({"small", "large"})),
        ("bodies", None),
        ("bodies", Bodies.REDACTED),
        ("limits", None),
        ("limits", LimitPolicy()),
        ("limits", LimitPolicy(concurrency=3)),
        ("limits", LimitPolicy(requests_per_minute=1)),
        ("expires_at", None),
        ("expires_at", SOON + timedelta(seconds=1)),
    ],
)
def test_more_is_refused_by_name(name: str, wider: object) -> None:
    with pytest.raises(PermissionDenied) as refusal:
        TIGHT.check(KeyTerms(**{**GOOD, name: wider}))
    assert refusal.value.param == name


_NUMBERS = st.none() | st.integers(1, 5)
_POLICIES = st.builds(
    LimitPolicy, requests_per_minute=_NUMBERS, tokens_per_day=_NUMBERS, concurrency=_NUMBERS
)


@given(_POLICIES, _POLICIES, st.integers(1, 5), st.sampled_from(sorted(LimitPolicy.model_fields)))
def test_limits_are_within_others_only_if_they_let_nothing_more_through(
    limits: LimitPolicy, bound: LimitPolicy, used: int, name: str
) -> None:
    def lets_through(policy: LimitPolicy) -> bool:
        most = getattr(policy, name)
        return most is None or used <= most

    if looser(limits, bound) is None:
        assert not lets_through(limits) or lets_through(bound)
    assert looser(limits, limits) is None
    assert looser(limits, None) is None
