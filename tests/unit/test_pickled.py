"""What gateways and replicas of two releases send each other during an update."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest
from ray import serve
from ray.serve._private.config import DeploymentConfig
from ray.serve.context import ReplicaContext

from deployments.leasing import slots
from serve_app.contracts import LeaseGrant
from serve_app.engine_counters import EngineCounters


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantOfBefore:
    """A grant as the release before knows it."""

    address: str
    token: str
    replica_id: str


def test_grant_of_a_replica_of_before_allows_nothing_to_be_kept() -> None:
    grant = LeaseGrant.__new__(LeaseGrant)
    grant.__setstate__(
        GrantOfBefore(address="a", token="t", replica_id="r").__getstate__()  # type: ignore[arg-type]
    )
    assert grant == LeaseGrant(address="a", token="t", replica_id="r", may_keep=0)


def test_grant_is_understood_by_a_gateway_of_before() -> None:
    grant = GrantOfBefore.__new__(GrantOfBefore)
    sent = LeaseGrant(address="a", token="t", replica_id="r", may_keep=4).__getstate__()
    grant.__setstate__(sent)  # type: ignore[attr-defined]
    assert grant == GrantOfBefore(address="a", token="t", replica_id="r")


def test_counters_of_a_replica_of_before_say_that_none_rests() -> None:
    counters = EngineCounters.__new__(EngineCounters)
    counters.__setstate__(["r", 1, 2, 3, 4, 5])
    assert counters == EngineCounters(
        replica_id="r",
        prompt_tokens=1,
        completion_tokens=2,
        requests_running=3,
        requests_waiting=4,
        live_leases=5,
        resting_leases=0,
    )


def test_both_survive_a_process_border() -> None:
    for one in (
        LeaseGrant(address="a", token="t", replica_id="r", may_keep=4),
        EngineCounters(replica_id="r", live_leases=5, resting_leases=2),
    ):
        assert pickle.loads(pickle.dumps(one)) == one


def test_replica_learns_from_ray_how_many_slots_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DeploymentConfig(max_ongoing_requests=64)
    context = ReplicaContext(None, None, config, None, 1)  # type: ignore[arg-type]
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    assert slots() == 64


def test_replica_that_is_not_told_keeps_to_one_request_a_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "get_replica_context", object)
    assert slots() == 0
