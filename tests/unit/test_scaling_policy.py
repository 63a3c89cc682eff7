"""What the autoscaling policy asks for, by properties and by the day's cases."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ConfigError
from serve_app.scaling.policy import Bounds, Capacity, Seen, pressure, replicas_wanted
from serve_app.scaling.targets import POLICY, ScalingTargets, check_scaling
from serve_app.stack.serve_api import read_config

TARGETS = ScalingTargets(queue_wait_s=1, time_to_first_token_s=2)
BOUNDS = Bounds(min_replicas=0, max_replicas=8, places=100)
STEADY = Seen(at_s=0, running=2, target=2, ongoing=100, begun_per_s=5, tokens_per_s=6000)

counts = st.integers(0, 20)
amounts = st.floats(0, 1e4)
capacities = st.none() | st.floats(1, 1e5)


@st.composite
def seen_at_any_time(draw: st.DrawFn) -> Seen:
    return Seen(
        at_s=draw(amounts),
        running=draw(counts),
        target=draw(counts),
        ongoing=draw(amounts),
        waiting=draw(amounts),
        begun_per_s=draw(amounts),
        first_token_s=draw(amounts),
        tokens_per_s=draw(amounts),
    )


@given(seen_at_any_time(), capacities, st.integers(0, 4), st.integers(0, 8))
def test_the_bounds_hold(seen: Seen, bears: float | None, least: int, more: int) -> None:
    bounds = Bounds(min_replicas=least, max_replicas=least + more, places=100)
    assert least <= replicas_wanted(seen, bounds, TARGETS, bears) <= least + more


@given(
    seen_at_any_time(),
    capacities,
    st.sampled_from(["ongoing", "waiting", "first_token_s", "tokens_per_s"]),
    amounts,
)
def test_more_load_never_asks_for_fewer(
    seen: Seen, bears: float | None, figure: str, more: float
) -> None:
    loaded = replace(seen, **{figure: getattr(seen, figure) + more})
    assert replicas_wanted(loaded, BOUNDS, TARGETS, bears) >= replicas_wanted(
        seen, BOUNDS, TARGETS, bears
    )


@given(seen_at_any_time(), capacities)
def test_at_most_one_is_given_up_at_a_time(seen: Seen, bears: float | None) -> None:
    wanted = replicas_wanted(seen, BOUNDS, TARGETS, bears)
    assert wanted >= BOUNDS.clip(seen.target) - 1


@given(st.floats(0.1, 700), st.floats(1, 30_000), st.integers(1, 8))
def test_a_steady_load_that_is_borne_does_not_flap(
    ongoing: float, tokens_per_s: float, target: int
) -> None:
    visited = [target]
    for second in range(20):
        seen = Seen(
            at_s=second,
            running=visited[-1],
            target=visited[-1],
            ongoing=ongoing,
            begun_per_s=1,
            tokens_per_s=tokens_per_s,
        )
        visited.append(replicas_wanted(seen, BOUNDS, TARGETS, bears_tokens_per_s=4000))
    turns = [b - a for a, b in itertools.pairwise(visited) if b != a]
    assert all(turn > 0 for turn in turns) or all(turn < 0 for turn in turns)
    assert visited[-1] == visited[-2]


def test_first_request_wakes_a_model_that_sleeps() -> None:
    asleep = Seen(at_s=0, running=0, target=0)
    assert replicas_wanted(asleep, BOUNDS, TARGETS, None) == 0
    assert replicas_wanted(replace(asleep, ongoing=0.2), BOUNDS, TARGETS, None) == 1
    assert replicas_wanted(replace(asleep, ongoing=250), BOUNDS, TARGETS, None) == 3


def test_last_replica_is_given_up_only_where_nothing_runs() -> None:
    idle = Seen(at_s=0, running=1, target=1)
    assert replicas_wanted(idle, BOUNDS, TARGETS, 4000) == 0
    assert replicas_wanted(replace(idle, ongoing=0.1), BOUNDS, TARGETS, 4000) == 1
    kept = replace(BOUNDS, min_replicas=1)
    assert replicas_wanted(idle, kept, TARGETS, 4000) == 1


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        pytest.param(replace(STEADY, ongoing=301), 4, id="more requests than places"),
        pytest.param(replace(STEADY, tokens_per_s=16_500), 5, id="near what they bear"),
        pytest.param(replace(STEADY, first_token_s=2.1), 3, id="slow first tokens"),
        pytest.param(replace(STEADY, first_token_s=60), 3, id="very slow first tokens"),
        pytest.param(replace(STEADY, waiting=6), 3, id="queue of more than a second"),
        pytest.param(replace(STEADY, waiting=6, begun_per_s=0), 3, id="a queue that stands"),
        pytest.param(replace(STEADY, waiting=1.5, begun_per_s=0.1), 2, id="about to be begun"),
        pytest.param(
            replace(STEADY, target=3, first_token_s=60), 3, id="slow while another one starts"
        ),
        pytest.param(replace(STEADY, target=3, ongoing=350), 4, id="but places are counted"),
    ],
)
def test_what_adds_replicas(seen: Seen, wanted: int) -> None:
    assert replicas_wanted(seen, BOUNDS, TARGETS, bears_tokens_per_s=4000) == wanted


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        pytest.param({"ongoing": 10, "tokens_per_s": 2000}, 1, id="one bears it"),
        pytest.param({"ongoing": 80, "tokens_per_s": 2000}, 2, id="too few places"),
        pytest.param({"ongoing": 10, "tokens_per_s": 3000}, 2, id="too near what one bears"),
        pytest.param(
            {"ongoing": 10, "tokens_per_s": 2000, "first_token_s": 1.6}, 2, id="no time to spare"
        ),
    ],
)
def test_what_gives_one_up(change: dict[str, float], wanted: int) -> None:
    seen = replace(STEADY, **change)
    assert replicas_wanted(seen, BOUNDS, TARGETS, bears_tokens_per_s=4000) == wanted


def test_worse_of_the_two_waits_counts() -> None:
    slow = replace(STEADY, waiting=10, first_token_s=3)
    assert slow.queue_wait_s == 2
    assert pressure(slow, TARGETS) == 2
    assert pressure(replace(slow, first_token_s=10), TARGETS) == 5


# What a replica bears.


def test_capacity_is_unknown_until_waits_are_too_long() -> None:
    capacity = Capacity()
    capacity.learn(STEADY, 0.5)
    assert capacity.tokens_per_s is None
    capacity.learn(replace(STEADY, at_s=1), 1.2)
    assert capacity.tokens_per_s == 3000


def test_capacity_is_raised_at_once_and_lowered_slowly() -> None:
    capacity = Capacity()
    capacity.learn(STEADY, 1)
    capacity.learn(replace(STEADY, at_s=1, tokens_per_s=12_000), 0.9)
    assert capacity.tokens_per_s == 6000
    for second in range(60):
        capacity.learn(replace(STEADY, at_s=2 + second, tokens_per_s=4000), 1.5)
    assert capacity.tokens_per_s == pytest.approx(2000 + 4000 / math.e)


def test_nothing_is_learned_of_no_replica() -> None:
    capacity = Capacity()
    capacity.learn(replace(STEADY, running=0), 9)
    assert capacity.tokens_per_s is None


# Settings.


def serve_config(**targets: object) -> list[dict[str, object]]:
    policy = {"policy_function": POLICY, "policy_kwargs": targets}
    model = {"name": "Model:m", "autoscaling_config": {"policy": policy}}
    return [{"name": "gateway"}, {"name": "m", "deployments": [{"name": "other"}, model]}]


def test_right_targets_pass() -> None:
    check_scaling(serve_config(queue_wait_s=3))


@pytest.mark.parametrize(
    ("targets", "name"),
    [({"queue_wait_s": 0}, "queue_wait_s"), ({"growth": 1}, "growth"), ({"wait": 1}, "wait")],
)
def test_wrong_targets_are_named(targets: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_scaling(serve_config(**targets))
    place = "applications.m.deployments.Model:m.autoscaling_config.policy.policy_kwargs"
    assert caught.value.setting == f"{place}.{name}"


def test_wrong_target_stops_the_start(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": serve_config(headroom=2)}))
    with pytest.raises(ConfigError, match="headroom"):
        read_config(config, port=1)
