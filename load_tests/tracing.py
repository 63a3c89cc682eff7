"""What tracing costs a request, in CPU time of the gateway's event loop, without a network.

    python -m load_tests.tracing

Each figure is the median of rounds, in which the steps take turns. CPU time of one thread, so a
busy machine moves it little. Writes `load_tests/results/tracing.{json,md}`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan

from serve_app.completions.exchange import Exchange
from serve_app.completions.parts import Tracing
from serve_app.completions.spans import spans_of
from serve_app.contracts import LeaseGrant
from serve_app.timing import Stage
from serve_app.tracing.otlp import OtlpSink
from serve_app.tracing.sampling import Sampling
from serve_app.tracing.spans import Span, SpanResult

RESULTS = Path(__file__).parent / "results"
_ROUNDS = 25
_TIMES = 400
_GRANT = LeaseGrant(address="10.0.0.1:8000", token="t", replica_id="r")
_CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class _Nowhere:
    """Counts nothing."""

    def spans_ended(self, result: SpanResult, spans: int) -> None:
        """Do nothing."""


class _Sdk(OtlpSink):
    """Makes the SDK's spans, and keeps the last ones instead of sending them."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9/v1/traces", {"service.name": "s"}, _Nowhere())
        self.made: list[ReadableSpan] = []

    def take(self, spans: Sequence[Span]) -> None:
        """Keep them."""
        self.made = [self._finished(span) for span in spans]


def _by_hand() -> None:
    """Time three stages as it was done before there was one clock."""
    Exchange(route="chat.completions", request_id="r", client_address=None)
    timings: dict[str, float] = {}
    for name in ("auth", "limits", "queue"):
        begun_s = time.perf_counter()
        try:
            pass
        finally:
            timings[name] = time.perf_counter() - begun_s
    ", ".join(f"{name};dur={s * 1000:.2f}" for name, s in timings.items())


def _pass(tracing: Tracing | None) -> Exchange:
    """Do all that the path of a request does for its clock and its trace."""
    exchange = Exchange(
        route="chat.completions",
        request_id="r",
        client_address=None,
        trace=tracing and tracing.begin(_CLIENT),
    )
    with exchange.traced(Stage.ADMIT):
        pass
    with exchange.timings.lap(Stage.AUTHENTICATE):
        pass
    with exchange.traced(Stage.AUTHORIZE):
        pass
    with exchange.timings.lap(Stage.RESERVE):
        pass
    with exchange.timings.lap(Stage.LEASE):
        exchange.grants.append(_GRANT)
    with exchange.traced(Stage.RELAY) as lap:
        span = exchange.below(lap)
        _ = None if span is None else span.traceparent
    with exchange.traced(Stage.SETTLE):
        pass
    with exchange.traced(Stage.RECORD) as lap:
        exchange.below(lap)
    exchange.timings.server_timing()
    return exchange


def _cpu_us(step: Callable[[], object]) -> float:
    begun = time.thread_time()
    for _ in range(_TIMES):
        step()
    return (time.thread_time() - begun) / _TIMES * 1e6


def measure() -> dict[str, float]:
    """Return CPU µs a request, by step."""
    sdk = _Sdk()
    unlucky = Tracing(sampling=Sampling(0.0), sink=sdk)
    lucky = Tracing(sampling=Sampling(1.0), sink=sdk)
    ended = _pass(lucky)
    record = ended.record(ended.trace and ended.trace.own)
    sdk.take(spans_of(ended, record, "small"))
    made = sdk.made
    steps: dict[str, Callable[[], object]] = {
        "before: three stages timed by hand": _by_hand,
        "tracing off": lambda: _pass(None),
        "on, a request that is not traced": lambda: _pass(unlucky),
        "on, a traced one: until its end": lambda: _pass(lucky),
        "and its spans, made and put on the queue": lambda: sdk.take(
            spans_of(ended, record, "small")
        ),
        "in the exporter's thread: its spans encoded": lambda: encode_spans(
            made
        ).SerializeToString(),
    }
    rounds = [{name: _cpu_us(step) for name, step in steps.items()} for _ in range(_ROUNDS)]
    return {name: round(statistics.median(one[name] for one in rounds), 1) for name in steps}


def main() -> None:
    """Measure, and write what was seen."""
    found = measure()
    gib = round(psutil.virtual_memory().total / 2**30)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {gib} GiB, no GPU"
    what = f"{machine}, Python {platform.python_version()}; load average {os.getloadavg()[0]:.1f}."
    rows = "\n".join(f"| {name} | {value} |" for name, value in found.items())
    text = (
        f"{what} CPU time in µs a request; medians of {_ROUNDS} rounds. Each of the first four "
        "makes the account of a request and the header Server-Timing too.\n\n"
        f"| step | µs |\n| --- | --- |\n{rows}\n"
    )
    RESULTS.joinpath("tracing.md").write_text(text, encoding="utf-8")
    data = {"machine": what, "cpu_us": found}
    RESULTS.joinpath("tracing.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
