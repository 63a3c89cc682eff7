"""The browser door: real nginx with the real template, small servers around it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from serve_app.stack import nginx
from serve_app.stack.ports import pick_free
from tests.integration.browser_stand_ins import (
    COOKIE,
    PREFIX,
    RENEWED,
    Seen,
    StandIn,
    StandInOAuth2Proxy,
    serving,
)

RAY_TOKEN = "token-of-the-cluster"
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8", "user-agent": "Mozilla/5.0"}
PROGRAM = {"accept": "*/*", "user-agent": "curl/8"}
BEARER = {"accept": "text/html", "authorization": "Bearer cai-key"}


@dataclass
class Door:
    """nginx and what stands behind it."""

    port: int
    gateway: StandIn
    oauth2_proxy: StandInOAuth2Proxy
    dashboard: StandIn
    console: StandIn

    def ask(
        self, path: str, headers: dict[str, str], session: str | None = None, method: str = "GET"
    ) -> httpx.Response:
        cookies = {"cookie": f"{COOKIE}={session}"} if session else {}
        return httpx.request(
            method,
            f"http://127.0.0.1:{self.port}{path}",
            headers={**headers, **cookies},
            timeout=20,
            trust_env=False,
        )

    def raw(self, target: str, *headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send a request line as it stands; a client library would tidy it up."""
        lines = [f"GET {target} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall("\r\n".join(lines).encode("latin-1"))
            received = b""
            while part := connection.recv(65536):
                received += part
        head, _, body = received.partition(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        found = {name.lower(): value.strip() for name, _, value in (r.partition(":") for r in rest)}
        return int(first.split()[1]), found, body

    @property
    def behind(self) -> list[Seen]:
        """What came through to the pages."""
        return [*self.gateway.seen, *self.dashboard.seen, *self.console.seen]

    def forget(self) -> None:
        for server in (self.gateway, self.oauth2_proxy, self.dashboard, self.console):
            server.seen.clear()


@contextmanager
def open_door(**values: str) -> Iterator[Door]:
    with ExitStack() as stack:
        apps = (
            StandIn("gateway"),
            StandInOAuth2Proxy("oauth2-proxy"),
            StandIn("dashboard", cookie=f"ray-authentication-token={RAY_TOKEN}"),
            StandIn("console", cookie="console=1"),
        )
        gateway, oauth2_proxy, dashboard, console = (
            f"127.0.0.1:{stack.enter_context(serving(app))}" for app in apps
        )
        [port] = pick_free(1)
        given = {
            "LISTEN": f"127.0.0.1:{port}",
            "LOG": "/dev/null",
            "UPSTREAM": gateway,
            "OAUTH2_PROXY": oauth2_proxy,
            "DASHBOARD": dashboard,
            "CONSOLE": console,
            **values,
        }
        server = nginx.prepare(
            {f"COMP_AI_NGINX_{name}": value for name, value in given.items() if value},
            ray_token=RAY_TOKEN,
        )
        stack.callback(server.remove)
        process = subprocess.Popen(server.command, stderr=subprocess.DEVNULL)
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        deadline = time.monotonic() + 20
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield Door(port, *apps)


@pytest.fixture(scope="module")
def shared() -> Iterator[Door]:
    with open_door() as door:
        yield door


@pytest.fixture
def door(shared: Door) -> Door:
    shared.forget()
    return shared


def refusal(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


PAGES = ["/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/console/", "/dashboard/"]
GUARDED_BY_ROLE = {"/dashboard/"}


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("who", [BROWSER, PROGRAM, BEARER], ids=["browser", "program", "bearer"])
@pytest.mark.parametrize("session", [None, "forged", "ada", "root"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_who_comes_through_the_door(
    door: Door, prefix: str, path: str, who: dict[str, str], session: str | None, method: str
) -> None:
    answer = door.ask(f"{prefix}{path}", who, session, method)
    may = session == "root" or (session == "ada" and path not in GUARDED_BY_ROLE)
    if may:
        assert answer.status_code == 200
        assert len(door.behind) == 1
        return
    assert door.behind == []
    if session == "ada":
        assert answer.status_code == 403
        assert ("text/html" in answer.headers["content-type"]) == (who is BROWSER)
    elif who is BROWSER:
        assert answer.status_code == 302
        assert "set-cookie" not in answer.headers
    else:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "location" not in answer.headers


def test_the_refusals_of_programs_have_openais_form(door: Door) -> None:
    refusal(door.ask("/docs", PROGRAM), 401, "sign_in_required")
    refusal(door.ask("/dashboard/", PROGRAM, "ada"), 403, "permission_denied")
    refusal(door.ask("/dashboard/", BEARER, "ada"), 403, "permission_denied")


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(
    ("asked", "page"),
    [
        ("/docs", "/docs"),
        ("/docs?a=b&rd=//evil.example", "/docs"),
        ("/dashboard/", "/dashboard/"),
        ("/dashboard/static/js/main.js", "/dashboard/static/js/main.js"),
        ("/console/d/abc?orgId=1", "/console/d/abc"),
        # What could not be put into a query as it stands.
        ("/console/a&rd=https://evil.example", "/docs"),
        ("/console/%22%3E", "/docs"),
        ("/console//evil.example", "/docs"),
        ("/console/..//docs", "/docs"),
    ],
)
def test_a_browser_is_sent_to_sign_in_and_back(
    door: Door, prefix: str, asked: str, page: str
) -> None:
    status, headers, _ = door.raw(f"{prefix}{asked}", "Accept: text/html")
    assert status == 302
    # Below the prefix, for which the session's cookie is; relative, whatever our address is.
    assert headers["location"] == f"{PREFIX}/oauth2/start?rd={PREFIX}{page}"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_only_reading_is_sent_to_sign_in(door: Door, method: str) -> None:
    refusal(door.ask("/console/", BROWSER, method=method), 401, "sign_in_required")


@pytest.mark.parametrize(
    "rd",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "/%2Fevil.example",
        "%2F%2Fevil.example",
        "/docs//evil.example",
        "/docs/..//evil.example",
        "/docs@evil.example",
        "/docs.evil.example",
        f"{PREFIX}//evil.example",
        "/dashboard/../../..//evil.example",
        "/dashboard/%2e%2e//evil.example",
        "javascript:alert(1)",
        "/console/\t//evil.example",
        "/v1/models",
        "/api/v1/comp-ai/oauth2/sign_out",
        "",
    ],
)
@pytest.mark.parametrize("page", ["start", "sign_in"])
def test_no_open_redirection(door: Door, rd: str, page: str) -> None:
    for query in (
        httpx.QueryParams({"rd": rd}),
        f"RD={PREFIX}/docs&rd={rd}".replace("\t", "%09"),
        f"rd={rd}&rd={PREFIX}/docs".replace("\t", "%09"),
    ):
        door.raw(f"{PREFIX}/oauth2/{page}?{query}", "Accept: text/html")
        assert door.oauth2_proxy.seen.pop().query == f"rd={PREFIX}/docs"


def test_a_sign_in_begins_at_the_issuer(door: Door) -> None:
    answer = door.ask(f"{PREFIX}/oauth2/start?rd={PREFIX}/dashboard/", BROWSER)
    assert answer.status_code == 302
    assert answer.headers["location"].startswith("https://issuer.example/auth?state=nonce")
    assert f"{COOKIE}_csrf" in answer.headers["set-cookie"]
    [seen] = door.oauth2_proxy.seen
    assert (seen.path, seen.query) == (f"{PREFIX}/oauth2/start", f"rd={PREFIX}/dashboard/")


def test_what_the_issuer_sends_reaches_oauth2_proxy_whole(door: Door) -> None:
    query = "state=a%3Ab&code=c.d&session_state=e&iss=https%3A%2F%2Fissuer.example"
    answer = door.ask(f"{PREFIX}/oauth2/callback?{query}", BROWSER)
    assert answer.headers.get_list("set-cookie") == list(RENEWED)
    [seen] = door.oauth2_proxy.seen
    assert (seen.path, seen.query) == (f"{PREFIX}/oauth2/callback", query)


def test_who_signs_out_ends_at_a_page_of_ours(door: Door) -> None:
    answer = door.ask(f"{PREFIX}/oauth2/sign_out?rd=https://evil.example", BROWSER, "ada")
    assert answer.headers["location"] == f"{PREFIX}/oauth2/signed_out"
    page = door.ask(f"{PREFIX}/oauth2/signed_out", BROWSER)
    assert page.status_code == 200
    assert f'href="{PREFIX}/docs"' in page.text


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(
    "path",
    [
        "/oauth2/auth",
        "/oauth2/auth/user",
        "/oauth2/auth/admin",
        "/oauth2/auth/x",
        "/oauth2/%61uth/user",
        "/oauth2//auth/admin",
        "/oauth2/userinfo",
        "/oauth2/",
        "/oauth2/ping",
        "/oauth2/start/../auth",
        "/oauth2/static/../auth",
        "/ping",
        "/ready/../metrics",
    ],
)
def test_nothing_else_of_oauth2_proxy_is_reached(door: Door, prefix: str, path: str) -> None:
    status, _, body = door.raw(f"{prefix}{path}", f"Cookie: {COOKIE}=root", "Accept: text/html")
    assert status == 404
    assert json.loads(body)["error"]["code"] == "not_found"
    assert door.oauth2_proxy.seen == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_pages_of_a_session_are_only_read(door: Door, method: str) -> None:
    answer = door.ask(f"{PREFIX}/oauth2/callback?code=1", BROWSER, method=method)
    refusal(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD"
    assert door.oauth2_proxy.seen == []


# A session is for pages. The API takes a key or a token, and nothing that a browser adds by itself.


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/keys", "/admin/keys", "/tokenize", "/ready"])
def test_a_session_is_nothing_to_the_api(door: Door, prefix: str, path: str) -> None:
    for method in ("GET", "POST"):
        assert door.ask(f"{prefix}{path}", BROWSER, "root", method).text == "gateway"
        seen = door.gateway.seen.pop()
        assert "cookie" not in seen.headers
        assert "authorization" not in seen.headers
        assert not [name for name in seen.headers if name.startswith("x-auth-request")]
    assert door.oauth2_proxy.seen == []


FORGED = {
    "X-Auth-Request-User": "root",
    "X-Auth-Request-Email": "root@example.com",
    "X-Auth-Request-Groups": "role:comp-ai:admin",
    "X-Auth-Request-Preferred-Username": "Root",
    "X-Auth-Request-Access-Token": "forged",
    "X-Auth-Request-Redirect": "https://evil.example",
    "X-Forwarded-User": "root",
    "X-Forwarded-Email": "root@example.com",
    "X-Forwarded-Groups": "role:comp-ai:admin",
    "X-Forwarded-Access-Token": "forged",
    "X-Forwarded-Uri": "/ping",
    "X-Forwarded-Method": "OPTIONS",
    "X-Original-URI": "/ping",
    "X-WEBAUTH-USER": "root",
    "Gap-Auth": "root",
    "X-Ray-Authorization": "Bearer forged",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_header_opens_nothing_and_does_not_pass(door: Door, name: str) -> None:
    forged = {name: FORGED[name], name.replace("-", "_"): FORGED[name]}
    assert door.ask("/docs", {**BROWSER, **forged}).status_code == 302
    assert door.ask("/dashboard/", {**BROWSER, **forged}, "ada").status_code == 403
    for path in ("/docs", "/console/", "/v1/models"):
        assert door.ask(path, {**BROWSER, **forged}, "ada").status_code == 200
    assert door.ask("/dashboard/", {**BROWSER, **forged}, "root").status_code == 200
    door.ask(f"{PREFIX}/oauth2/start", {**BROWSER, **forged})
    for seen in [*door.behind, *door.oauth2_proxy.seen]:
        assert (
            FORGED[name] not in seen.headers.values()
            or seen.headers.get(name.lower()) != (FORGED[name])
        )
        assert name.lower().replace("-", "_") not in seen.headers


def test_a_console_is_told_who_asks_and_gets_no_cookie(door: Door) -> None:
    answer = door.ask(f"{PREFIX}/console/d/x?a=b", {**BROWSER, "authorization": "Bearer k"}, "ada")
    assert answer.text == "console"
    assert "set-cookie" not in answer.headers
    [seen] = door.console.seen
    assert (seen.path, seen.query) == ("/d/x", "a=b")
    assert {name: seen.headers[name] for name in seen.headers if "auth" in name} == {
        "x-auth-request-user": "ada",
        "x-auth-request-preferred-username": "Ada",
        "x-auth-request-email": "ada@example.com",
        "x-auth-request-groups": "role:comp-ai:user",
    }
    assert "cookie" not in seen.headers


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_renewed_session_reaches_the_browser_in_all_its_parts(door: Door, parts: int) -> None:
    for path in ("/docs", "/console/"):
        answer = door.ask(path, BROWSER, f"old{parts}")
        assert answer.status_code == 200
        assert answer.headers.get_list("set-cookie") == list(RENEWED[:parts])
    # Where it is refused too: at the issuer the old one may be used up.
    for who in (BROWSER, PROGRAM):
        answer = door.ask("/dashboard/", who, f"old{parts}")
        assert answer.status_code == 403
        assert answer.headers.get_list("set-cookie") == list(RENEWED[:parts])
    for session in ("ada", "ended"):
        assert "set-cookie" not in door.ask("/docs", BROWSER, session).headers


def test_a_large_session_passes(door: Door) -> None:
    parts = "; ".join(f"{COOKIE}_{number}={'x' * 3900}" for number in range(3))
    headers = {**BROWSER, "cookie": f"{COOKIE}=ada; {parts}"}
    assert door.ask("/docs", headers).status_code == 200


# Ray's dashboard.


def test_nginx_brings_rays_token_and_the_browser_never_has_it(door: Door) -> None:
    for headers in (BROWSER, {**BROWSER, "authorization": "Bearer of-a-client"}):
        answer = door.ask(f"{PREFIX}/dashboard/api/version?x=1", headers, "root")
        assert answer.text == "dashboard"
        seen = door.dashboard.seen.pop()
        assert (seen.path, seen.query) == ("/api/version", "x=1")
        assert seen.headers["authorization"] == f"Bearer {RAY_TOKEN}"
        assert "cookie" not in seen.headers
        assert RAY_TOKEN not in str(answer.headers)
        assert "set-cookie" not in answer.headers


def test_rays_token_goes_nowhere_else(door: Door) -> None:
    for path in ("/docs", "/console/", "/v1/models", f"{PREFIX}/oauth2/start"):
        door.ask(path, BROWSER, "root")
    seen = [*door.gateway.seen, *door.console.seen, *door.oauth2_proxy.seen]
    assert len(seen) >= 4
    assert RAY_TOKEN not in str(seen)


def test_the_file_with_rays_token_is_private() -> None:
    given = {"COMP_AI_NGINX_OAUTH2_PROXY": "127.0.0.1:1"}
    server = nginx.prepare(given, ray_token=RAY_TOKEN)
    try:
        file = server.work / nginx.RAY_HEADER_FILE
        assert file.stat().st_mode & 0o777 == 0o600
        others = [path for path in server.work.iterdir() if path.is_file() and path != file]
        assert RAY_TOKEN not in "".join(path.read_text() for path in others)
        assert RAY_TOKEN not in " ".join(server.command)
    finally:
        server.remove()


def test_without_a_browser_door_rays_token_is_not_written(tmp_path: Path) -> None:
    server = nginx.prepare({}, ray_token=RAY_TOKEN)
    try:
        assert not (server.work / nginx.RAY_HEADER_FILE).exists()
    finally:
        server.remove()


def test_a_query_of_the_client_does_not_choose_who_is_an_admin(door: Door) -> None:
    for query in ("allowed_groups=", "allowed_groups=role:comp-ai:user", "allowed_groups"):
        assert door.ask(f"/dashboard/?{query}", BROWSER, "ada").status_code == 403
    assert {seen.query for seen in door.oauth2_proxy.seen} == {
        f"allowed_groups={nginx.DEFAULTS['COMP_AI_NGINX_ADMIN_GROUPS']}"
    }


WRITING = ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
PROFILERS = ["task/traceback", "worker/cpu_profile", "worker/gpu_profile", "memory_profile"]
CLOSED = [
    "api/packages/gcs/x.zip",
    "api/v0/delay/9",
    "test/dump",
    "api/jobs/1/logs/tail",
    "api/job_agent/jobs/1/logs",
    "unknown",
    "api/v0/unknown",
    "nodes/a/b",
    "api/jobs/1/stop",
    "API/version",
    "-/healthz",
]
ASKED = [
    "",
    "static/js/main.js",
    "nodes?view=summary",
    "nodes/abc",
    "logical/actors",
    "api/jobs/",
    "api/jobs/01/logs",
    "api/serve/applications/",
    "api/v0/tasks/summarize?x=1",
    "api/v0/logs/file?node_id=1&filename=x",
]


@pytest.fixture(scope="module", params=["read", "profile", "write"])
def allowing(request: pytest.FixtureRequest) -> Iterator[tuple[str, Door]]:
    with open_door(DASHBOARD_ALLOWS=request.param) as opened:
        yield request.param, opened


def test_what_passes_to_the_dashboard(allowing: tuple[str, Door]) -> None:
    allows, opened = allowing
    tries = [
        *(("GET", path, True) for path in ASKED),
        *(("HEAD", path, True) for path in ASKED),
        *(("GET", path, allows in ("profile", "write")) for path in PROFILERS),
        *(("GET", path, allows == "write") for path in CLOSED),
        *((method, path, allows == "write") for method in WRITING for path in ("api/jobs/", "")),
        ("PUT", "api/serve/applications/", allows == "write"),
        ("DELETE", "api/serve/applications/", allows == "write"),
    ]
    for method, path, passes in tries:
        opened.forget()
        answer = opened.ask(f"{PREFIX}/dashboard/{path}", PROGRAM, "root", method)
        assert len(opened.dashboard.seen) == passes, (method, path)
        if not passes and method in WRITING:
            refusal(answer, 405, "method_not_allowed")
            assert answer.headers["allow"] == "GET, HEAD"
        elif not passes:
            refusal(answer, 404, "not_found")
        # For others it is closed in every case.
        assert opened.ask(f"/dashboard/{path}", PROGRAM, "ada", method).status_code in (
            403,
            404,
            405,
        )
        assert len(opened.dashboard.seen) == passes


# Of the routes of Ray's dashboard: what looks into a process, and what is not for looking at.
PROFILING_ROUTES = {
    "/task/traceback",
    "/task/cpu_profile",
    "/worker/traceback",
    "/worker/cpu_profile",
    "/worker/gpu_profile",
    "/worker/jax_profile",
    "/memory_profile",
}
CLOSED_ROUTES = {
    "/test/dump",
    "/api/packages/{protocol}/{package_name}",
    "/api/v0/delay/{delay_s}",
    # A WebSocket.
    "/api/jobs/{job_or_submission_id}/logs/tail",
}


def rays_routes() -> set[str]:
    """Return what Ray's dashboard answers to GET, as its source says."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "dashboard"
    found = set()
    for file in [folder / "http_server_head.py", *folder.glob("modules/**/*_head.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func) == "routes.get"
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(str(node.args[0].value))
    return found


def test_each_route_of_the_installed_ray_is_open_or_closed_on_purpose(
    allowing: tuple[str, Door],
) -> None:
    allows, opened = allowing
    routes = rays_routes()
    assert routes >= PROFILING_ROUTES | CLOSED_ROUTES | {"/", "/nodes", "/api/jobs/"}
    closed = {"read": PROFILING_ROUTES | CLOSED_ROUTES, "profile": CLOSED_ROUTES, "write": set()}
    for route in sorted(routes):
        path = route.replace("{media_type}", "file")
        opened.forget()
        opened.ask(f"{PREFIX}/dashboard{re.sub('{.*?}', 'x', path)}", BROWSER, "root")
        assert bool(opened.dashboard.seen) == (route not in closed[allows]), route


def test_ray_can_tell_a_browser_from_a_program(door: Door) -> None:
    """Its own guard against forged requests looks at these."""
    sent = {
        "origin": "https://evil.example",
        "referer": "https://evil.example/",
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "cors",
    }
    door.ask("/dashboard/", {**BROWSER, **sent}, "root")
    headers = door.dashboard.seen[-1].headers
    assert sent.items() <= headers.items()
    assert headers["user-agent"] == BROWSER["user-agent"]


# Ways round the door.


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(
    "target",
    [
        "//dashboard/",
        "/dashboard//",
        "/%64ashboard/",
        "/dashboard%2f",
        "/dashboard/%2e/",
        "/v1/../dashboard/",
        "/v1/%2e%2e/dashboard/",
        "/v1/..%2fdashboard/",
        "/v1/x/..%2f..%2fdashboard/",
        "/docs/../dashboard/",
        "/docs/..%2Fdashboard/api/version",
        "/console/../dashboard/nodes",
        "/oauth2/../dashboard/",
        "/dashboard/x/../nodes",
        "/dashboard/static/../nodes",
        "/health/../dashboard/",
        "/dashboard/./",
        "/.//dashboard/",
    ],
)
def test_no_spelling_of_an_address_goes_round_the_door(
    door: Door, prefix: str, target: str
) -> None:
    assert door.raw(f"{prefix}{target}", "Accept: text/html")[0] in (302, 404)
    assert door.raw(f"{prefix}{target}", f"Cookie: {COOKIE}=ada")[0] in (403, 404)
    assert door.raw(f"{prefix}{target}", f"Authorization: Bearer {RAY_TOKEN}")[0] in (401, 404)
    assert door.behind == []


@pytest.mark.parametrize(
    "target",
    [
        "/dashboard/../v1/models",
        "/dashboard/%2e%2e/v1/models",
        "/dashboard/..%2fv1/models",
        "/console/../v1/models",
        "/docs/../v1/models",
        f"/dashboard/..{PREFIX}/v1/models",
    ],
)
def test_a_session_does_not_slip_into_the_api(door: Door, target: str) -> None:
    door.raw(target, f"Cookie: {COOKIE}=root")
    assert door.dashboard.seen == door.console.seen == []
    for seen in door.gateway.seen:
        assert not {"cookie", "authorization"} & set(seen.headers)


@pytest.mark.parametrize(
    "target",
    [
        "/dashboard/api/v0/nodes/../delay/9",
        "/dashboard/static/..%2fapi/packages/gcs/x",
        "/dashboard/static/%2e%2e/api/packages/gcs/x",
        "/dashboard/static/..%5capi/packages/x",
        "/dashboard/%77orker/traceback",
        "/dashboard//worker/traceback",
        "/dashboard/api/jobs/../packages/gcs/x",
    ],
)
def test_no_spelling_opens_what_is_closed_in_the_dashboard(door: Door, target: str) -> None:
    door.raw(target, f"Cookie: {COOKIE}=root")
    for seen in door.dashboard.seen:
        # Ray decodes once; what passes must be below what is open.
        assert re.match(r"/static/[^/]*$|/static/\.\.%5C", seen.path, re.IGNORECASE)


def test_a_page_without_its_slash_is_sent_to_the_one_with(door: Door) -> None:
    for page in ("dashboard", "console"):
        for prefix in ("", PREFIX):
            answer = door.ask(f"{prefix}/{page}", BROWSER)
            assert answer.headers["location"] == f"{PREFIX}/{page}/"


# What is away, and what is not configured.


def test_an_oauth2_proxy_that_is_away_opens_nothing() -> None:
    with open_door(OAUTH2_PROXY=f"127.0.0.1:{pick_free(1)[0]}") as opened:
        for path in ("/docs", "/dashboard/", "/console/"):
            answer = opened.ask(path, BROWSER, "root")
            refusal(answer, 503, "sign_in_unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert opened.behind == []
        assert opened.ask("/v1/models", PROGRAM).status_code == 200


def test_an_oauth2_proxy_with_another_prefix_opens_nothing(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door.oauth2_proxy, "lost", True)
    for path in ("/docs", "/dashboard/", "/console/"):
        refusal(door.ask(path, BROWSER, "root"), 503, "sign_in_unavailable")
    assert door.behind == []


def test_without_oauth2_proxy_the_documents_are_open_and_nothing_else_is_there() -> None:
    with open_door(OAUTH2_PROXY="") as opened:
        for prefix in ("", PREFIX):
            for path in ("/docs", "/docs/assets/a.css", "/openapi.json"):
                assert opened.ask(f"{prefix}{path}", PROGRAM).text == "gateway"
            for path in (
                "/dashboard",
                "/dashboard/",
                "/dashboard/nodes",
                "/console/",
                "/oauth2/start",
                "/oauth2/auth/user",
                "/oauth2/signed_out",
                "/oauth2/callback",
            ):
                refusal(opened.ask(f"{prefix}{path}", BROWSER, "root"), 404, "not_found")
        assert opened.dashboard.seen == opened.console.seen == opened.oauth2_proxy.seen == []


def test_without_their_settings_neither_dashboard_nor_console_is_there() -> None:
    with open_door(DASHBOARD="", CONSOLE="") as opened:
        for path in ("/dashboard/", "/console/"):
            refusal(opened.ask(path, BROWSER, "root"), 404, "not_found")
        assert opened.ask("/docs", BROWSER, "ada").status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ADMIN_GROUPS", ","),
        ("ADMIN_GROUPS", "a,,b"),
        ("ADMIN_GROUPS", "a&allowed_groups=b"),
        ("ADMIN_GROUPS", "a%2Cb"),
        ("DASHBOARD_ALLOWS", "everything"),
        ("DASHBOARD_ALLOWS", "read|write"),
    ],
)
def test_a_value_that_would_open_the_door_stops_the_start(name: str, value: str) -> None:
    with pytest.raises(nginx.ConfigError, match=f"COMP_AI_NGINX_{name}"):
        nginx.prepare({f"COMP_AI_NGINX_{name}": value})
