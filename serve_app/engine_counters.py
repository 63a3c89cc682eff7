"""What an engine says of itself: vLLM's Prometheus counters, read in its own process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Metric

from serve_app.pickled import set_state_or_defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """The counts that the accounts are checked against, of one replica since its start."""

    replica_id: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    live_leases: int = 0
    # Of those, how many are kept for a next request while none runs under them.
    resting_leases: int = 0

    # During an update it comes from a replica of the release before.
    __setstate__ = set_state_or_defaults


_SAMPLES = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "completion_tokens",
    "vllm:num_requests_running": "requests_running",
    "vllm:num_requests_waiting": "requests_waiting",
}


def read_engine_counters(
    metrics: Iterable[Metric], *, replica_id: str, live_leases: int, resting_leases: int
) -> EngineCounters:
    """Sum vLLM's samples over engine cores. `metrics` is what a registry's `collect` gives."""
    sums = dict.fromkeys(_SAMPLES.values(), 0)
    for metric in metrics:
        for sample in metric.samples:
            if (field := _SAMPLES.get(sample.name)) is not None:
                sums[field] += int(sample.value)
    return EngineCounters(
        replica_id=replica_id, live_leases=live_leases, resting_leases=resting_leases, **sums
    )


# vLLM sets each of these from the messages of its engine core: one of them changes with every
# step, be it of a long prompt (cache), of an answer, or of an embedding.
_PROGRESS = frozenset(
    {
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:iteration_tokens_total_count",
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
    }
)


def read_progress(metrics: Iterable[Metric]) -> tuple[float, ...]:
    """Return figures of which at least one changes with every step of the engine."""
    return tuple(
        sample.value for metric in metrics for sample in metric.samples if sample.name in _PROGRESS
    )
