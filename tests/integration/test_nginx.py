"""The real nginx with the real template, before a small real upstream."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from serve_app.stack import nginx
from serve_app.stack.ports import pick_free

PREFIX = "/api/v1/comp-ai"
CHUNK_INTERVAL_S = 0.3
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@dataclass
class Upstream:
    """Stands where Serve stands: remembers what arrived, answers by path."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {k.decode().lower(): v.decode() for k, v in scope["headers"]}
        body = await _read_body(receive)
        self.seen.append(
            {
                "method": scope["method"],
                "path": scope["path"],
                "query": scope["query_string"].decode(),
                "headers": headers,
                "body": body,
            }
        )
        if scope["path"] == "/v1/stream":
            await _stream(send)
        else:
            status = 413 if scope["path"] == "/-/refused/413" else 200
            await _answer(send, status, headers.get("x-request-id", ""))


async def _read_body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _answer(send: Any, status: int, request_id: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"from": "upstream"}'})


async def _stream(send: Any) -> None:
    headers = [(b"content-type", b"text/event-stream"), (b"x-request-id", b"s")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number in range(4):
        await send(
            {
                "type": "http.response.body",
                "body": b"data: %d\n\n" % number,
                "more_body": True,
            }
        )
        await asyncio.sleep(CHUNK_INTERVAL_S)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


@pytest.fixture(scope="module")
def upstream() -> Iterator[tuple[Upstream, int]]:
    app = Upstream()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    _wait_until(lambda: server.started)
    yield app, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def door(upstream: tuple[Upstream, int], tmp_path: Path) -> Iterator[Callable[..., httpx.Client]]:
    app, port = upstream
    app.seen.clear()
    doors: list[tuple[subprocess.Popen[bytes], nginx.Nginx, httpx.Client]] = []

    def open_door(**values: str) -> httpx.Client:
        listen = pick_free(1)[0]
        given = {
            "COMP_AI_NGINX_LISTEN": f"127.0.0.1:{listen}",
            "COMP_AI_NGINX_UPSTREAM": f"127.0.0.1:{port}",
            "COMP_AI_NGINX_LOG": str(tmp_path / "access.log"),
            **{f"COMP_AI_NGINX_{name.upper()}": value for name, value in values.items()},
        }
        (tmp_path / "access.log").touch(mode=0o666)
        server = nginx.prepare(given)
        process = subprocess.Popen(server.command)
        _wait_until(lambda: _listens(listen))
        client = httpx.Client(base_url=f"http://127.0.0.1:{listen}", timeout=20, trust_env=False)
        doors.append((process, server, client))
        return client

    yield open_door
    for process, server, client in doors:
        client.close()
        process.terminate()
        process.wait(timeout=10)
        server.remove()


def _wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "not ready in time"
        time.sleep(0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that a refusal is whole: OpenAI's form, JSON, an id."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers.get_list("x-request-id")) == 1
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/files",
        "/v1/files/file-1/content",
        "/v1/batches/batch_1/cancel",
        "/v1/keys/1/rotate",
        "/admin/keys",
        "/tokenize",
        "/detokenize",
        "/score",
        "/rerank",
        "/v2/rerank",
        "/health",
        "/ready",
        "/docs",
        "/docs/assets/a-b.css",
        "/openapi.json",
    ],
)
def test_each_address_reaches_the_gateway_without_the_prefix(
    door: Any, upstream: Any, prefix: str, path: str
) -> None:
    assert door().get(f"{prefix}{path}?a=b").json() == {"from": "upstream"}
    seen = upstream[0].seen[-1]
    assert (seen["path"], seen["query"]) == (path, "a=b")
    assert seen["headers"].get("x-forwarded-prefix", "") == prefix


def test_a_model_name_with_a_slash_arrives_the_same_with_and_without_the_prefix(
    door: Any, upstream: Any
) -> None:
    client = door()
    client.get("/v1/models/org/name with space")
    client.get(f"{PREFIX}/v1/models/org/name with space")
    assert [seen["path"] for seen in upstream[0].seen] == ["/v1/models/org/name with space"] * 2


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/metrics",
        "/-/healthz",
        "/-/routes",
        "/-/refused/413",
        f"{PREFIX}/-/refused/413",
        f"{PREFIX}/metrics",
        "/v1/../metrics",
        "/v1/%2e%2e/-/refused/413",
        "//-/routes",
        "/api/serve/applications/",
        "/healthz",
        "/tokenizer",
        "/v2/models",
        "/docs/x",
        "/v1",
        "/admin",
        "/administrator",
        "/v1/../admin",
    ],
)
def test_everything_else_is_not_there(door: Any, upstream: Any, path: str) -> None:
    client = door()
    # Sent as it stands: httpx would take the dots out itself.
    answer = _raw(client, f"GET {path} HTTP/1.1")
    assert answer.startswith(b"HTTP/1.1 404")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "not_found"
    assert upstream[0].seen == []


def test_the_404_is_whole(door: Any) -> None:
    _error(door().get("/nothing"), 404, "not_found")


def _raw(client: httpx.Client, request_line: str, *headers: str, body: bytes = b"") -> bytes:
    head = "\r\n".join([request_line, "Host: x", "Connection: close", *headers, "", ""])
    port = client.base_url.port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_a_stream_is_not_held_back(door: Any) -> None:
    times = []
    with door().stream("POST", f"{PREFIX}/v1/stream", json={}) as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                times.append(time.monotonic())
    assert len(times) == 5
    gaps = [b - a for a, b in itertools.pairwise(times)]
    # Held back, they would all come at once at the end.
    assert all(gap > CHUNK_INTERVAL_S / 3 for gap in gaps)


def test_only_the_headers_of_the_list_reach_the_gateway(door: Any, upstream: Any) -> None:
    forbidden = {
        "x-request-disconnect-disabled": "?1",
        "x-request-timeout-seconds": "1",
        "serve_multiplexed_model_id": "m",
        "serve-multiplexed-model-id": "m",
        "x-session-id": "s",
        "x-comp-ai-principal": "admin",
        "x-ray-authorization": "Bearer x",
        "cookie": "session=1",
        "forwarded": "for=1.2.3.4",
        "tracestate": "vendor=1",
    }
    door().post(
        "/v1/chat/completions",
        content=b'{"a": 1}',
        headers={
            **forbidden,
            "authorization": "Bearer key",
            "content-type": "application/json",
            "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
            "idempotency-key": "8e03978e",
            "x-comp-ai-server-timing": "trailer",
            "x-forwarded-for": "1.2.3.4",
            "x-forwarded-proto": "https",
            "x-real-ip": "1.2.3.4",
        },
    )
    seen = upstream[0].seen[-1]
    assert forbidden.keys() & seen["headers"].keys() == set()
    assert seen["body"] == b'{"a": 1}'
    assert seen["headers"]["authorization"] == "Bearer key"
    assert seen["headers"]["content-type"] == "application/json"
    assert seen["headers"]["traceparent"] == f"00-{TRACE}-00f067aa0ba902b7-01"
    assert seen["headers"]["idempotency-key"] == "8e03978e"
    assert seen["headers"]["x-comp-ai-server-timing"] == "trailer"
    for name in ("x-forwarded-for", "x-real-ip"):
        assert seen["headers"][name] == "127.0.0.1"
    assert seen["headers"]["x-forwarded-proto"] == "http"


@pytest.mark.parametrize(
    "given", [None, "00-1-1-01", f"01-{'4' * 32}-{'5' * 16}-01", f"00-{'0' * 32}-{'5' * 16}-01"]
)
def test_a_request_without_a_trace_gets_one_by_its_id(
    door: Any, upstream: Any, tmp_path: Path, given: str | None
) -> None:
    headers = {} if given is None else {"traceparent": given}
    http = door()
    request_id = http.get("/v1/models", headers=headers).headers["x-request-id"]
    [seen] = upstream[0].seen
    assert seen["headers"]["traceparent"] == f"00-{request_id}-{request_id[:16]}-00"
    _wait_until(lambda: (tmp_path / "access.log").read_text() != "")
    [line] = (tmp_path / "access.log").read_text().splitlines()
    assert (json.loads(line)["trace_id"], json.loads(line)["request_id"]) == (request_id,) * 2


def test_a_trace_of_the_clients_is_the_one_that_is_logged(door: Any, tmp_path: Path) -> None:
    http = door()
    http.get("/v1/models", headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"})
    _wait_until(lambda: (tmp_path / "access.log").read_text() != "")
    assert json.loads((tmp_path / "access.log").read_text())["trace_id"] == TRACE


def test_a_trusted_proxy_may_say_who_asks(door: Any, upstream: Any) -> None:
    response = door(trusted="127.0.0.1/32").get(
        "/v1/models", headers={"x-forwarded-for": "6.6.6.6, 1.2.3.4", "x-forwarded-proto": "https"}
    )
    headers = upstream[0].seen[-1]["headers"]
    assert headers["x-real-ip"] == headers["x-forwarded-for"] == "1.2.3.4"
    assert headers["x-forwarded-proto"] == "https"
    assert "strict-transport-security" in response.headers


@pytest.mark.parametrize("given", ["abc-1._Z", "x" * 128])
def test_a_good_request_id_is_kept(door: Any, upstream: Any, given: str) -> None:
    response = door().get("/v1/models", headers={"x-request-id": given})
    assert upstream[0].seen[-1]["headers"]["x-request-id"] == given
    assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "a b", 'a"b', "x" * 129, "a/b"])
def test_any_other_request_id_is_replaced(door: Any, upstream: Any, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given}
    response = door().get("/v1/models", headers=headers)
    made = upstream[0].seen[-1]["headers"]["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    assert response.headers.get_list("x-request-id") == [made]


def test_a_refusal_of_nginx_carries_the_request_id_too(door: Any) -> None:
    assert door().get("/no", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


@pytest.mark.parametrize("path", ["/v1/chat/completions", f"{PREFIX}/v1/chat/completions"])
def test_a_body_over_the_limit_is_refused_by_the_gateway(
    door: Any, upstream: Any, path: str
) -> None:
    response = door(max_body="1k").post(
        path, content=b"x" * 4096, headers={"authorization": "Bearer key"}
    )
    assert response.status_code == 413
    assert response.json() == {"from": "upstream"}
    seen = upstream[0].seen[-1]
    assert (seen["path"], seen["body"]) == ("/-/refused/413", b"")
    assert seen["headers"]["authorization"] == "Bearer key"
    assert seen["headers"]["x-original-uri"] == path
    assert len(upstream[0].seen) == 1


def test_a_chunked_body_over_the_limit_is_refused_by_the_gateway(door: Any, upstream: Any) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(8):
            yield b"x" * 1024

    response = door(max_body="2k").post("/v1/completions", content=chunks())
    assert response.status_code == 413
    assert [seen["path"] for seen in upstream[0].seen] == ["/-/refused/413"]
    assert upstream[0].seen[0]["body"] == b""


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_an_upload_may_be_larger_than_other_bodies(door: Any, upstream: Any, prefix: str) -> None:
    client = door(max_body="1k", max_upload="8k")
    sizes = {"/v1/files": (8192, 8193), "/v1/files/x": (1024, 1025), "/v1/batches": (1024, 1025)}
    for path, (most, too_much) in sizes.items():
        assert client.post(f"{prefix}{path}", content=b"x" * most).status_code == 200
        assert len(upstream[0].seen[-1]["body"]) == most
        assert client.post(f"{prefix}{path}", content=b"x" * too_much).status_code == 413


@pytest.mark.parametrize("path", ["/v1/models", "/v1/keys", "/admin/keys"])
def test_too_many_requests_are_refused_in_the_openai_form(
    door: Any, upstream: Any, path: str
) -> None:
    client = door(rate="1r/m", burst="2")
    answers = [client.get(path) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    error = _error(answers[-1], 429, "rate_limit_exceeded")
    assert error["type"] == "rate_limit_error"
    assert int(answers[-1].headers["retry-after"]) > 0
    assert len(upstream[0].seen) == 3
    assert client.get("/health").status_code == 200


def test_a_gateway_that_is_away_is_said_in_the_openai_form(door: Any) -> None:
    nobody = pick_free(1)[0]
    response = door(upstream=f"127.0.0.1:{nobody}").post("/v1/chat/completions", json={})
    assert _error(response, 503, "unavailable")["type"] == "overloaded_error"
    assert int(response.headers["retry-after"]) > 0


def test_broken_http_is_said_in_the_openai_form(door: Any) -> None:
    answer = _raw(door(), "GET /v1/models HTTP/1.1", "X-Big: " + "x" * 40_000)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_value"


def test_the_access_log_is_json_and_holds_no_secret(door: Any, tmp_path: Path) -> None:
    door().get(
        f"{PREFIX}/v1/models?api_key=hidden-query",
        headers={"authorization": "Bearer hidden-header", "x-request-id": "log-1"},
    )
    log = tmp_path / "access.log"
    _wait_until(lambda: bool(log.read_text().strip()))
    text = log.read_text()
    assert "hidden" not in text
    line = json.loads(text.splitlines()[-1])
    assert line["path"] == f"{PREFIX}/v1/models"
    assert (line["request_id"], line["status"], line["upstream_status"]) == ("log-1", 200, "200")
    assert float(line["upstream_duration_s"]) >= 0


def test_responses_carry_security_headers_and_no_version(door: Any) -> None:
    client = door()
    for response in (client.get("/v1/models"), client.get("/nothing")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert not re.search(r"\d", response.headers["server"])


def test_nginx_refuses_what_it_does_not_understand() -> None:
    with pytest.raises(nginx.NginxRefused, match="burst"):
        nginx.prepare({"COMP_AI_NGINX_BURST": "many"})
