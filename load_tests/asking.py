"""What the users of Locust have in common: how they ask, and what is reported of it.

Importing this makes the process gevent's, as Locust does.
"""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import gevent
from locust import User
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.stats import RequestStats, StatsEntry
from locust.util.timespan import parse_timespan

from load_tests.sse import Answer, Client, End, Refused
from load_tests.thresholds import Measured, Thresholds

_LOG = logging.getLogger(__name__)
CHAT = "/v1/chat/completions"
_LONGEST_PAUSE_S = 30.0
_POLL_S = 1.0
_BOUNDARY = "comp-ai-load-test"
_OURS = ("TTFT", "ITL")


def add_common_options(parser: LocustArgumentParser) -> None:
    """Add what every locustfile of ours can be told."""
    parser.add_argument("--key", env_var="LOCUST_KEY", default="", include_in_web_ui=False)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="longest silence")
    parser.add_argument("--most-failures-percent", type=float, default=1.0)
    parser.add_argument("--ttft-p95-ms", type=float, default=None, help="fail above it")
    parser.add_argument("--itl-p99-ms", type=float, default=None, help="fail above it")


def begin_now(**_: object) -> None:
    """Let `--run-time` begin now: gevent counts from its last look at the clock, before imports."""
    gevent.get_hub().loop.update_now()


def run_length_s(options: Any) -> float:
    """Return `--run-time`, which Locust's web page leaves as it was typed; a minute without."""
    given = options.run_time or 60.0
    return float(parse_timespan(given) if isinstance(given, str) else given)


def judge(environment: Environment, **_: object) -> None:
    """End the process with an error where a threshold was not kept."""
    options = environment.parsed_options
    assert options is not None
    kept = Thresholds(
        failures_percent=options.most_failures_percent,
        first_token_p95_ms=options.ttft_p95_ms,
        gap_p99_ms=options.itl_p99_ms,
    )
    broken = list(kept.broken_by(measured(environment.stats)))
    for sentence in broken:
        _LOG.error("threshold: %s", sentence)
    environment.process_exit_code = 1 if broken else 0


def bucket_ms(time_ms: float) -> float:
    """Round a time for Locust's histogram to three figures: its own whole ms hide our tokens."""
    for above, digits in ((1000, -2), (100, 0), (10, 1)):
        if time_ms >= above:
            return round(time_ms, digits)
    return round(time_ms, 2)


def measured(stats: RequestStats) -> Measured:
    """Return what the thresholds are held against: our own two kinds are no requests."""
    asked = [entry for (_, kind), entry in stats.entries.items() if kind not in _OURS]
    return Measured(
        requests=sum(entry.num_requests for entry in asked),
        failures=sum(entry.num_failures for entry in asked),
        first_token_p95_ms=_percentile(stats, "TTFT", 0.95),
        gap_p99_ms=_percentile(stats, "ITL", 0.99),
    )


def _percentile(stats: RequestStats, kind: str, part: float) -> float | None:
    whole = StatsEntry(stats, kind, kind)
    for (_, of), entry in stats.entries.items():
        if of == kind:
            whole.extend(entry)
    return whole.get_response_time_percentile(part) if whole.num_requests else None


class AskingUser(User):
    """A user with a key, a connection of its own, and what it says of a request."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.options: Any = environment.parsed_options
        self.client = self.new_client()

    def new_client(self) -> Client:
        """Return a client with a connection of its own."""
        url, key = str(self.host).rstrip("/"), self.options.key or None
        return Client(url, key, timeout_s=self.options.timeout_s)

    @property
    def length_s(self) -> float:
        """How long the test runs."""
        return run_length_s(self.options)

    def on_stop(self) -> None:
        """Close the connection."""
        self.client.close()

    def body(self, *, prompt_tokens: int, answer_tokens: int) -> dict[str, Any]:
        """Return a streamed chat of some length: one common word is about a token."""
        return {
            "model": self.options.model,
            "messages": [{"role": "user", "content": "word " * max(1, prompt_tokens)}],
            "max_tokens": answer_tokens,
            "stream": True,
        }

    def say(
        self,
        name: str,
        *,
        prompt_tokens: int,
        answer_tokens: int,
        leave_after_tokens: int | None = None,
        client: Client | None = None,
    ) -> None:
        """Ask, read the stream, and report the request, its first token and its gaps."""
        body = self.body(prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)
        asking = client or self.client
        got = self.ask(
            "POST", name, lambda: asking.post(CHAT, body, leave_after_tokens=leave_after_tokens)
        )
        if got is None:
            return
        if got.first_token_s is not None:
            self._report("TTFT", name, got.first_token_s)
        for gap_s in got.gaps_s:
            self._report("ITL", name, gap_s)
        if got.retry_after_s is not None:
            gevent.sleep(min(got.retry_after_s, _LONGEST_PAUSE_S))

    def expect_refusal(self, name: str, body: bytes) -> None:
        """Send what is wrong; anything but a 4xx in OpenAI's form is a failure."""

        def ask() -> Answer:
            got = self.client.post(CHAT, body)
            refused = 400 <= got.status < 500 and got.code is not None
            got.end = End.DONE if refused else End.FAILED
            return got

        self.ask("POST", name, ask)

    def upload_batch(self, lines: int) -> str:
        """Upload a file of `lines` requests and return its id. Raises Refused."""
        body = {**self.body(prompt_tokens=20, answer_tokens=20), "stream": False}
        asked = (
            {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}
            for number in range(lines)
        )
        file = b"\n".join(self.as_bytes(one) for one in asked)
        form = _form(file, purpose="batch")
        kind = f"multipart/form-data; boundary={_BOUNDARY}"
        return str(self.client.call("POST", "/v1/files", form, kind)["id"])

    def make_batch(self, file_id: str) -> str:
        """Have the requests of a file run and return the batch's id. Raises Refused."""
        asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        return str(self.client.call("POST", "/v1/batches", self.as_bytes(asked))["id"])

    def wait_a_moment(self) -> None:
        """Pause between two looks at a batch."""
        gevent.sleep(_POLL_S)

    @staticmethod
    def as_bytes(body: Mapping[str, Any]) -> bytes:
        """Return `body` as JSON."""
        return json.dumps(body).encode()

    def ask(self, kind: str, name: str, send: Callable[[], Answer]) -> Answer | None:
        """Report one request as what `send` says of it; None where it was not answered."""
        begun_at = time.perf_counter()
        try:
            answer = send()
        except (OSError, http.client.HTTPException, Refused) as error:
            self._report(kind, name, time.perf_counter() - begun_at, failure=error)
            return None
        failure = None
        if answer.end not in (End.DONE, End.LEFT):
            failure = Refused(f"{answer.end}: {answer.status} {answer.code}")
        took_s = time.perf_counter() - begun_at
        self._report(kind, name, took_s, size_bytes=answer.size_bytes, failure=failure)
        return answer

    def _report(
        self,
        kind: str,
        name: str,
        took_s: float,
        *,
        size_bytes: int = 0,
        failure: Exception | None = None,
    ) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=took_s * 1000,
            response_length=size_bytes,
            exception=failure,
            context={},
        )


def _form(file: bytes, **fields: str) -> bytes:
    parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
    parts.append(('name="file"; filename="requests.jsonl"', file))
    form = b""
    for name, value in parts:
        head = f"--{_BOUNDARY}\r\nContent-Disposition: form-data; {name}\r\n\r\n"
        form += head.encode() + value + b"\r\n"
    return form + f"--{_BOUNDARY}--\r\n".encode()
