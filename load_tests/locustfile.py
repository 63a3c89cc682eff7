"""Users of a running service, for Locust: with its web page, or headless.

    export LOCUST_KEY=$(cat ~/.comp-ai/first-key)
    .venv/bin/locust -f load_tests/locustfile.py --host http://127.0.0.1:8080 \\
        --headless --users 20 --run-time 5m --shape step --ttft-p95-ms 2000

Beside Locust's requests there are two of our own: `TTFT` is the time to the first token, `ITL` the
time between two tokens of a stream, one entry a token. See docs/load-testing.md.
"""

from __future__ import annotations

import random

import locust.stats
from locust import LoadTestShape, between, constant, events, task
from locust.argument_parser import LocustArgumentParser

from load_tests import shapes
from load_tests.asking import (
    AskingUser,
    add_common_options,
    begin_now,
    bucket_ms,
    judge,
    run_length_s,
)
from load_tests.sse import Answer, End

_BATCH_LINES = 20
_BATCH_POLLS = 300
_ENDED = ("completed", "failed", "expired", "cancelled")

locust.stats.bucket_response_time = bucket_ms
events.init.add_listener(begin_now)
events.quitting.add_listener(judge)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add what this file can be told."""
    add_common_options(parser)
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="steady")
    parser.add_argument("--long-prompt-tokens", type=int, default=2000)


class Shape(LoadTestShape):
    """The shape of `--shape`, over `--run-time`, up to `--users`."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Return users and how fast to change to them, or None at the end."""
        assert self.runner is not None
        options = self.runner.environment.parsed_options
        assert options is not None
        at_s, length_s = self.get_run_time(), run_length_s(options)
        users = shapes.users_at(options.shape, at_s, length_s=length_s, most=options.num_users or 1)
        return None if users is None else (users, options.spawn_rate or users)


class ChatUser(AskingUser):
    """Somebody who talks: reads the answer as it comes, thinks, goes on."""

    weight = 10
    wait_time = between(1, 5)

    @task
    def chat(self) -> None:
        """Ask, as long as people ask, for as much as they get."""
        self.say(
            "chat", prompt_tokens=random.randint(20, 400), answer_tokens=random.randint(20, 200)
        )


class LongPromptUser(AskingUser):
    """Somebody who hands over a document and wants a sentence."""

    weight = 2
    wait_time = between(2, 10)

    @task
    def summarise(self) -> None:
        """Ask with a long prompt for a short answer."""
        self.say("long prompt", prompt_tokens=self.options.long_prompt_tokens, answer_tokens=32)


class ImpatientUser(AskingUser):
    """Somebody who leaves in the middle. The engine must then stop."""

    weight = 2
    wait_time = between(0.5, 2)

    @task
    def leave(self) -> None:
        """Leave after a few tokens."""
        self.say(
            "impatient",
            prompt_tokens=50,
            answer_tokens=1000,
            leave_after_tokens=random.randint(1, 20),
        )


class AbusiveUser(AskingUser):
    """Somebody who sends what must be refused, without a pause that is worth the name."""

    weight = 1
    wait_time = constant(0.2)

    @task
    def abuse(self) -> None:
        """Send one of the wrong requests; only a refusal of the right kind is a success."""
        kind, body = random.choice(list(self.wrong().items()))
        self.expect_refusal(f"abusive: {kind}", body)

    def wrong(self) -> dict[str, bytes]:
        """Return what is wrong, by what is wrong with it."""
        good = self.body(prompt_tokens=5, answer_tokens=5)
        return {
            "no JSON": b'{"model": ',
            "unknown model": self.as_bytes({**good, "model": "no-such-model"}),
            "unknown field": self.as_bytes({**good, "best_of": 4}),
            "too many tokens": self.as_bytes({**good, "max_tokens": 10**9}),
            "no messages": self.as_bytes({**good, "messages": []}),
        }


class BatchUser(AskingUser):
    """A job that hands over a file and looks in now and then until it is done."""

    weight = 1
    wait_time = between(10, 30)

    @task
    def batch(self) -> None:
        """Upload a file, make a batch, and wait for its end."""
        self.ask("BATCH", "batch, to its end", self._run)

    def _run(self) -> Answer:
        made = self.make_batch(self.upload_batch(_BATCH_LINES))
        for _ in range(_BATCH_POLLS):
            status = str(self.client.call("GET", f"/v1/batches/{made}")["status"])
            if status in _ENDED:
                return Answer(end=End.DONE if status == "completed" else End.FAILED, code=status)
            self.wait_a_moment()
        return Answer(end=End.FAILED, code="not done in time")
