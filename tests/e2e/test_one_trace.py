"""One request as one trace, through every process of the real stack."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx

from serve_app.completions.spans import FIRST_TOKEN
from serve_app.timing import Stage
from tests.integration.collector import Collector, collector, parents, value
from tests.serve_configs import REAL_MODEL
from tests.stack_runner import RunningStack, wait_until

PROMPT = "marker-of-the-prompt"
ROOT = f"chat {REAL_MODEL}"


@contextmanager
def collecting(port: int) -> Iterator[Collector]:
    """Serve a collector from a thread."""
    started: list[Collector] = []
    ready, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with collector(port) as made:
            started.append(made)
            ready.set()
            await over.wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(20)
        yield started[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def test_one_trace_from_the_door_through_the_engine_to_postgresql(stack: RunningStack) -> None:
    port = urlsplit(stack.env["COMP_AI_TRACING_ENDPOINT"]).port
    assert port is not None
    trace_id, parent = secrets.token_hex(16), secrets.token_hex(8)
    headers = stack.bootstrap | {"traceparent": f"00-{trace_id}-{parent}-01"}
    body = {
        "model": REAL_MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 8,
        "stream": True,
    }
    expected = {
        ROOT: None,
        **{stage.value: ROOT for stage in Stage},
        FIRST_TOKEN: "relay",
        "replica": "relay",
        "llm_request": "replica",
        "spool": "record",
    }
    with collecting(port) as collected:
        answer = httpx.post(
            f"{stack.url}/v1/chat/completions", headers=headers, json=body, timeout=60
        )
        assert answer.status_code == 200
        # Those of the engine come every 5 s.
        wait_until(
            lambda: {*expected, "drain"} <= {span.name for span in collected.spans}, "spans", 60
        )
    found = [(s, span) for s, span in collected.spans_by_service if span.trace_id.hex() == trace_id]
    assert parents([span for _, span in found]) == expected
    assert {service for service, _ in found} == {
        *("comp-ai-gateway", "comp-ai-model", "comp-ai-engine", "comp-ai-request-log")
    }
    [row] = stack.settled_rows("select * from comp_ai.requests where trace_id = $1", 1, trace_id)
    root = collected.the(ROOT)
    assert root.parent_span_id.hex() == parent
    assert value(root, "comp_ai.request.id") == str(row["id"])
    assert value(root, "gen_ai.usage.output_tokens") == row["completion_tokens"] == 8
    [link] = collected.the("drain").links
    assert link.trace_id.hex() == trace_id
    assert PROMPT.encode() not in b"".join(collected.bodies)
