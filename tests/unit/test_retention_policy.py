"""How long data is kept: what may be set, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.accounts.retention.policy import DataClass, Keep, RetentionPolicy
from serve_app.config import parse_config
from serve_app.errors import ConfigError


def test_nothing_set_is_kept_for_ever() -> None:
    policy = RetentionPolicy()
    assert [policy.of(data) for data in DataClass] == [None] * len(DataClass)


def test_bodies_go_with_their_requests_where_nothing_else_is_set() -> None:
    policy = RetentionPolicy(requests=Keep(months=13))
    assert policy.of(DataClass.BODIES) == Keep(months=13)
    policy = RetentionPolicy(requests=Keep(months=13), bodies=Keep(days=30))
    assert policy.of(DataClass.BODIES) == Keep(days=30)
    assert policy.of(DataClass.USAGE_DAY) is None


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ({"requests": {"days": 0}}, "retention.requests.days"),
        ({"requests": {}}, "retention.requests"),
        ({"requests": {"days": 1, "months": 1}}, "retention.requests"),
        ({"requests": {"weeks": 1}}, "retention.requests.weeks"),
        ({"answers": {"days": 1}}, "retention.answers"),
        ({"requests": {"days": 30}, "bodies": {"days": 31}}, "retention"),
        # A February is shorter.
        ({"requests": {"days": 30}, "bodies": {"months": 1}}, "retention"),
        ({"requests": {"months": 1}, "bodies": {"days": 30}}, "retention"),
    ],
)
def test_what_cannot_be_kept_is_refused(raw: Any, where: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(RetentionPolicy, raw, "retention")
    assert refused.value.setting == where


def test_the_same_time_for_both_is_fine() -> None:
    both = {"requests": {"months": 3}, "bodies": {"months": 3}}
    assert parse_config(RetentionPolicy, both, "retention").bodies == Keep(months=3)
