"""Every setting of the nginx template with a real nginx: TLS, several gateways, other doors."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.errors import ConfigError
from serve_app.stack import nginx
from serve_app.stack.placeholder_certificate import make_missing
from serve_app.stack.ports import pick_free

PROJECT = Path(__file__).parents[2]
EXISTING = PROJECT / "k8s-free-compose" / "nginx" / "existing"
HOST = "comp-ai.example.com"


@dataclass
class Gateway:
    """A gateway of one word: it says its name, or breaks off in the middle of a request."""

    name: str
    breaks: bool = False
    seen: list[str] = field(default_factory=list)
    server: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.getsockname()[1]}"

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                self.seen.append(connection.recv(65536).decode())
                if not self.breaks:
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n"
                        b"Content-Length: %d\r\n\r\n%s" % (len(self.name), self.name.encode())
                    )


@pytest.fixture
def gateways() -> Iterator[Callable[..., Gateway]]:
    made: list[Gateway] = []

    def make(name: str, *, breaks: bool = False) -> Gateway:
        gateway = Gateway(name, breaks)
        threading.Thread(target=gateway.serve, daemon=True).start()
        made.append(gateway)
        return gateway

    yield make
    for gateway in made:
        # `close` alone leaves an `accept` that waits.
        gateway.server.shutdown(socket.SHUT_RDWR)
        gateway.server.close()


@pytest.fixture
def start() -> Iterator[Callable[..., None]]:
    processes: list[subprocess.Popen[bytes]] = []
    folders: list[nginx.Nginx] = []

    def run(command: list[str], port: int) -> None:
        processes.append(subprocess.Popen(command))
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert processes[-1].poll() is None
            assert time.monotonic() < deadline, "nginx does not listen"
            time.sleep(0.02)

    def door(port: int, **values: str) -> None:
        given = {f"COMP_AI_NGINX_{name.upper()}": value for name, value in values.items()}
        server = nginx.prepare({"COMP_AI_NGINX_LISTEN": f"127.0.0.1:{port}"} | given)
        folders.append(server)
        run(server.command, port)

    door.command = run  # type: ignore[attr-defined]
    yield door
    for process in processes:
        process.terminate()
        process.wait(timeout=10)
    for folder in folders:
        folder.remove()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    files = (tmp_path / "fullchain.pem", tmp_path / "key.pem")
    assert make_missing(*files, HOST)
    return files


@pytest.fixture
def webroot() -> Iterator[Path]:
    # nginx's workers are somebody else, and may not look into tmp_path.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def _handshake(port: int, certificate: Path, *, most: ssl.TLSVersion) -> tuple[Any, Any]:
    context = ssl.create_default_context(cafile=str(certificate))
    context.maximum_version = most
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as connection,
    ):
        return connection.version(), connection.selected_alpn_protocol()


@pytest.mark.parametrize(
    ("most", "version"),
    [(ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")],
)
def test_tls_speaks_both_versions_and_http2(
    start: Any, certificate: tuple[Path, Path], most: ssl.TLSVersion, version: str
) -> None:
    [port] = pick_free(1)
    start(port, tls_certificate=str(certificate[0]), tls_key=str(certificate[1]))
    assert _handshake(port, certificate[0], most=most) == (version, "h2")


def test_plain_http_leads_to_https_but_for_the_challenges(
    start: Any, gateways: Any, certificate: tuple[Path, Path], tmp_path: Path, webroot: Path
) -> None:
    port, plain = pick_free(2)
    log = tmp_path / "access.log"
    log.touch(mode=0o666)
    challenges = webroot / ".well-known" / "acme-challenge"
    challenges.mkdir(parents=True)
    (challenges / "token").write_text("answer")
    start(
        port,
        upstream=gateways("one").address,
        tls_certificate=str(certificate[0]),
        tls_key=str(certificate[1]),
        plain_listen=f"127.0.0.1:{plain}",
        webroot=str(webroot),
        log=str(log),
    )
    with httpx.Client(trust_env=False, headers={"host": HOST}) as http:
        base = f"http://127.0.0.1:{plain}"
        assert http.get(f"{base}/.well-known/acme-challenge/token").text == "answer"
        answer = http.post(f"{base}/v1/chat/completions?a=1", content="{}")
        assert answer.status_code == 308
        assert answer.headers["location"] == f"https://{HOST}/v1/chat/completions?a=1"
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with httpx.Client(verify=context, http2=True, trust_env=False) as https:
        answer = https.get(
            f"https://127.0.0.1:{port}/v1/models",
            headers={"host": HOST},
            extensions={"sni_hostname": HOST},
        )
    assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    line = json.loads(log.read_text().splitlines()[-1])
    assert (line["tls"], line["protocol"]) == ("TLSv1.3", "HTTP/2.0")
    assert line["upstream"].startswith("127.0.0.1:")


def test_a_key_without_its_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="COMP_AI_NGINX_TLS_KEY"):
        nginx.prepare({"COMP_AI_NGINX_TLS_KEY": "/key.pem"})


def test_a_gateway_that_is_away_is_passed_over(start: Any, gateways: Any) -> None:
    [port, nobody] = pick_free(2)
    start(port, upstream=f"127.0.0.1:{nobody},{gateways('two').address}")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        for _ in range(6):
            # No byte went to the first one, so a POST may go on too.
            assert http.post("/v1/chat/completions", content="{}").text == "two"
            assert http.get("/v1/models").text == "two"


def test_what_a_gateway_may_have_begun_is_not_sent_twice(start: Any, gateways: Any) -> None:
    [port] = pick_free(1)
    bad, good = gateways("bad", breaks=True), gateways("good")
    start(port, upstream=f"{bad.address},{good.address}")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        answers = [http.post("/v1/chat/completions", content="{}") for _ in range(4)]
    posts = sum("POST" in seen for seen in bad.seen + good.seen)
    assert posts == len(answers)
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == len(bad.seen) >= 1
    assert refused[0].json()["error"]["code"] == "unavailable"


def test_what_may_be_done_twice_is_asked_of_the_next(start: Any, gateways: Any) -> None:
    [port] = pick_free(1)
    bad, good = gateways("bad", breaks=True), gateways("good")
    start(port, upstream=f"{bad.address},{good.address}")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        assert {http.get("/v1/models").text for _ in range(4)} == {"good"}
    assert len(bad.seen) >= 1


def _counts() -> bool:
    version = subprocess.run([nginx.binary(), "-V"], capture_output=True, text=True)
    return "http_stub_status_module" in version.stderr


@pytest.mark.skipif(not _counts(), reason="this nginx was built without stub_status")
def test_the_counters_are_at_an_address_of_their_own(start: Any, gateways: Any) -> None:
    port, status = pick_free(2)
    start(port, upstream=gateways("one").address, status=f"127.0.0.1:{status}")
    with httpx.Client(trust_env=False) as http:
        counters = http.get(f"http://127.0.0.1:{status}/stub_status")
        assert "Active connections" in counters.text
        assert http.get(f"http://127.0.0.1:{status}/metrics").status_code == 404


def test_metrics_and_counters_are_closed_and_health_is_open(start: Any, gateways: Any) -> None:
    [port] = pick_free(1)
    start(port, upstream=gateways("one").address)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        for closed in ("/stub_status", "/metrics", "/nginx_status", "/-/healthz"):
            assert http.get(closed).status_code == 404
        assert http.get("/health").text == "one"


SWITCHES: dict[str, dict[str, str]] = {
    "tls": {"COMP_AI_NGINX_TLS_CERTIFICATE": "{0}", "COMP_AI_NGINX_TLS_KEY": "{1}"},
    "plain": {"COMP_AI_NGINX_PLAIN_LISTEN": "8081", "COMP_AI_NGINX_WEBROOT": "/webroot"},
    "several": {"COMP_AI_NGINX_UPSTREAM": "gateway-1:3002,gateway-2:3002,[fd00::1]:3002"},
    "browsers": {
        "COMP_AI_NGINX_OAUTH2_PROXY": "oauth2-proxy:4180",
        "COMP_AI_NGINX_DASHBOARD": "comp-ai-service:8265",
        "COMP_AI_NGINX_CONSOLE": "console:3000",
        "COMP_AI_NGINX_KEYCLOAK": "keycloak:8080",
        "COMP_AI_NGINX_KEYCLOAK_SERVER": "auth.example.com",
    },
}


@pytest.mark.parametrize(
    "chosen",
    list(product((False, True), repeat=len(SWITCHES))),
    ids=lambda on: "".join("01"[x] for x in on),
)
def test_nginx_takes_what_is_written_for_its_container(
    chosen: tuple[bool, ...], certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    values = {"COMP_AI_NGINX_LISTEN": "8080", "COMP_AI_NGINX_RESOLVER": "127.0.0.11"}
    values |= {"COMP_AI_NGINX_UPSTREAM": "comp-ai-service:3002", "COMP_AI_NGINX_SERVER": HOST}
    for on, switch in zip(chosen, SWITCHES.values(), strict=True):
        values |= {k: v.format(*certificate) for k, v in switch.items()} if on else {}
    folder, work = tmp_path / "etc", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    nginx.write(values, folder, work=work, ray_token="t" * 64)
    done = subprocess.run(
        [nginx.binary(), "-t", "-e", "stderr", "-c", folder / "nginx.conf"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr
    # Ray's token is only written down where something passes to the dashboard.
    assert (folder / nginx.RAY_HEADER_FILE).exists() == chosen[3]


@pytest.mark.parametrize("file", ["location.conf", "subdomain.conf"])
def test_an_nginx_that_is_already_there_leads_to_ours(
    file: str, start: Any, gateways: Any, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    ours, theirs = pick_free(2)
    gateway = gateways("one")
    start(ours, upstream=gateway.address, trusted="127.0.0.1/32")
    text = (EXISTING / file).read_text().replace("lianel-comp-ai-nginx:8080", f"127.0.0.1:{ours}")
    text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{theirs} ssl")
    folder = f"/etc/letsencrypt/live/{HOST}"
    text = text.replace(f"{folder}/fullchain.pem", str(certificate[0]))
    text = text.replace(f"{folder}/privkey.pem", str(certificate[1]))
    if file == "location.conf":
        text = f"server {{ listen 127.0.0.1:{theirs}; {text} }}"
    paths = " ".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {paths}\n"
        f"limit_req_zone $binary_remote_addr zone=general:10m rate=50r/s;\n{text}\n}}"
    )
    start.command([nginx.binary(), "-e", "stderr", "-c", tmp_path / "nginx.conf"], theirs)
    scheme, path = ("http", "/api/v1/comp-ai") if file == "location.conf" else ("https", "")
    with httpx.Client(verify=False, trust_env=False, headers={"host": HOST}) as http:
        answer = http.get(f"{scheme}://127.0.0.1:{theirs}{path}/v1/models")
    assert answer.text == "one"
    assert gateway.seen[0].startswith("GET /v1/models ")
    assert f"X-Forwarded-Proto: {scheme}" in gateway.seen[0]
    assert f"Host: {HOST}" in gateway.seen[0]


def test_keycloak_is_there_for_people_and_not_for_its_administrators(
    start: Any, gateways: Any
) -> None:
    [port] = pick_free(1)
    start(
        port,
        upstream=gateways("gateway").address,
        keycloak=gateways("keycloak").address,
        keycloak_server="auth.example.com",
        server=HOST,
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        auth, ours = {"host": "auth.example.com"}, {"host": HOST}
        assert http.get("/realms/lianel/protocol/openid-connect/auth", headers=auth).text == (
            "keycloak"
        )
        for closed in ("/admin/", "/realms/master/account", "/metrics", "/", "/v1/models"):
            assert http.get(closed, headers=auth).status_code == 404
        assert http.get("/v1/models", headers=ours).text == "gateway"
        # Who asks for no known name is asked by ours, not by Keycloak.
        assert http.get("/v1/models").text == "gateway"
        assert http.get("/realms/lianel/", headers=ours).status_code == 404


def test_a_certificate_that_is_there_is_left_alone(certificate: tuple[Path, Path]) -> None:
    before = certificate[0].read_bytes()
    assert not make_missing(*certificate, HOST)
    assert certificate[0].read_bytes() == before
