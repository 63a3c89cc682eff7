"""Requests as they came elsewhere, one after another at their times, for Locust.

    export LOCUST_KEY=$(cat ~/.comp-ai/first-key)
    .venv/bin/locust -f load_tests/replay.py --host http://127.0.0.1:8080 \\
        --headless --users 1 --run-time 5m --kind conversation --per-s 2

Nobody waits for an answer before the next request is sent, so a service that is too slow gets a
queue, as it would from people. `--trace FILE` replays a file of Azure's form instead, see
`load_tests/traffic.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import gevent
import locust.stats
from gevent.pool import Pool
from locust import events, task
from locust.argument_parser import LocustArgumentParser
from locust.exception import StopUser

from load_tests.asking import AskingUser, add_common_options, begin_now, bucket_ms, judge
from load_tests.traffic import KINDS, Arrival, arrivals, read_trace

# Beyond so many under way the replay is held back, and so no longer true: it says so.
_MOST_OPEN = 2000

locust.stats.bucket_response_time = bucket_ms
events.init.add_listener(begin_now)
events.quitting.add_listener(judge)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add what this file can be told."""
    add_common_options(parser)
    parser.add_argument("--kind", choices=list(KINDS), default="conversation")
    parser.add_argument("--per-s", type=float, default=1.0, help="requests a second in the mean")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", default="", help="a file of Azure's form instead")
    parser.add_argument("--faster", type=float, default=1.0, help="times as fast as the file")
    parser.add_argument("--most-prompt-tokens", type=int, default=3000)
    parser.add_argument("--most-answer-tokens", type=int, default=1000)


class ReplayUser(AskingUser):
    """Sends every request of the trace at its time, each over a connection of its own."""

    fixed_count = 1

    @task
    def replay(self) -> None:
        """Send them all, wait for the answers, and end."""
        pool, begun_at = Pool(_MOST_OPEN), time.perf_counter()
        for arrival in self._arrivals():
            gevent.sleep(max(0.0, arrival.at_s - (time.perf_counter() - begun_at)))
            if pool.full():
                self._report("REPLAY", "held back", 0.0, failure=RuntimeError("too many are open"))
            pool.spawn(self._send, arrival)
        pool.join()
        raise StopUser

    def _arrivals(self) -> Iterator[Arrival]:
        options = self.options
        if options.trace:
            return read_trace(Path(options.trace), faster=options.faster)
        kind = KINDS[options.kind]
        return arrivals(kind, per_s=options.per_s, length_s=self.length_s, seed=options.seed)

    def _send(self, arrival: Arrival) -> None:
        client = self.new_client()
        self.say(
            self.options.kind,
            prompt_tokens=min(arrival.prompt_tokens, self.options.most_prompt_tokens),
            answer_tokens=max(1, min(arrival.answer_tokens, self.options.most_answer_tokens)),
            client=client,
        )
        client.close()
