"""The compose files, as Docker Compose itself reads them. No container is started."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "k8s-free-compose"
# What `${NAME:?…}` asks for.
GIVEN = {
    "COMP_AI_IMAGE": "registry.example.com/comp-ai-service",
    "COMP_AI_TAG": "1.2.3",
    "COMP_AI_TLS_FOLDER": "tls",
    "COMP_AI_NGINX_SERVER": "www.example.com",
    "COMP_AI_ACME_EMAIL": "operator@example.com",
    "COMP_AI_PUBLIC_URL": "https://www.example.com/api/v1/comp-ai",
    "COMP_AI_NGINX_TRUSTED": "172.18.0.0/16",
    "COMP_AI_NGINX_UPSTREAM": "10.0.0.1:3002,10.0.0.2:3002",
    "COMP_AI_NODE_ADDRESS": "10.0.0.1",
    "COMP_AI_RAY_HEAD": "10.0.0.1:6379",
    "KEYCLOAK_HOST": "auth.example.com",
    "KEYCLOAK_URL": "https://auth.example.com",
    "POSTGRES_HOST": "db.example.com",
}
OWN_POSTGRES = {name: value for name, value in GIVEN.items() if name != "POSTGRES_HOST"}
SYSTEM_CAS = "/etc/ssl/certs/ca-certificates.crt"
CHOICES = (
    ((), ("gpu",)),
    ((), ("tls",), ("tls", "letsencrypt")),
    ((), ("monitoring", "tracing", "backup")),
    ((), ("keycloak",), ("join",), ("cluster",), ("keycloak", "cluster")),
)
COMBINATIONS = [sum(chosen, ()) for chosen in product(*CHOICES)] + [
    ("monitoring",),
    ("backup",),
]
LARGEST = [
    ("gpu", "tls", "letsencrypt", "monitoring", "tracing", "backup", "keycloak"),
    ("tls", "monitoring", "tracing", "backup", "join"),
    ("gpu", "monitoring", "tracing", "backup", "cluster"),
]


def _compose() -> list[str] | None:
    ours = PROJECT / ".tools" / "bin" / "docker-compose"
    if os.access(ours, os.X_OK):
        return [str(ours)]
    docker = shutil.which("docker")
    if (
        docker
        and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        return [docker, "compose"]
    return None


COMPOSE = _compose()
pytestmark = pytest.mark.skipif(COMPOSE is None, reason="no Docker Compose: run .ci/compose-binary")


def _config(
    names: tuple[str, ...], given: dict[str, str], *options: str, first: str = "compose.yaml"
) -> subprocess.CompletedProcess[str]:
    assert COMPOSE is not None
    files = [f"--file={FOLDER / first}", *(f"--file={FOLDER}/compose.{n}.yaml" for n in names)]
    return subprocess.run(
        [*COMPOSE, "--env-file=/dev/null", *files, "config", *options],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | given,
    )


def _given(names: tuple[str, ...]) -> dict[str, str]:
    given = GIVEN if "join" in names else OWN_POSTGRES
    if "letsencrypt" not in names:
        # Else it is the volume `tls`.
        given = given | {"COMP_AI_TLS_FOLDER": "/etc/comp-ai/tls"}
    return given


def _resolved(names: tuple[str, ...]) -> dict[str, Any]:
    done = _config(names, _given(names), "--format=json")
    assert done.returncode == 0, done.stderr
    resolved: dict[str, Any] = json.loads(done.stdout)
    return resolved


@pytest.fixture(scope="module", params=LARGEST, ids="+".join)
def stack(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _resolved(request.param)


@pytest.fixture(scope="module")
def worker() -> dict[str, Any]:
    done = _config((), GIVEN, "--format=json", first="compose.worker.yaml")
    assert done.returncode == 0, done.stderr
    resolved: dict[str, Any] = json.loads(done.stdout)
    return resolved


def _services(*stacks: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for one in stacks:
        yield from one["services"].items()


def _seconds(text: str) -> int:
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    assert parts is not None, text
    hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return hours * 3600 + minutes * 60 + seconds


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "alone")
def test_every_combination_is_valid(names: tuple[str, ...]) -> None:
    done = _config(names, _given(names), "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("names", [(), *LARGEST], ids=lambda names: "+".join(names) or "alone")
def test_what_is_required_is_asked_for_in_words(names: tuple[str, ...]) -> None:
    texts = [FOLDER / "compose.yaml", *(FOLDER / f"compose.{name}.yaml" for name in names)]
    asked = set(re.findall(r"\$\{(\w+):\?", "".join(file.read_text() for file in texts)))
    assert asked <= GIVEN.keys()
    for name in asked:
        done = _config(names, {k: v for k, v in GIVEN.items() if k != name}, "--quiet")
        assert done.returncode != 0
        said = re.search(rf"required variable {name} is missing a value: (.+)", done.stderr)
        assert said is not None
        assert len(said[1].split()) >= 3


def test_nginx_alone_publishes_ports(stack: dict[str, Any]) -> None:
    publish = {name for name, service in _services(stack) if service.get("ports")}
    if "existing" in json.dumps(stack["networks"]) or stack["networks"]["back"].get("external"):
        # The nginx that is there leads to ours.
        assert publish == set()
    elif stack["services"]["comp-ai-service"].get("network_mode") == "host":
        # Replicas on other hosts write to PostgreSQL: at this host's address in the cluster alone.
        assert publish == {"nginx", "postgres"}
        [port] = stack["services"]["postgres"]["ports"]
        assert port["host_ip"] == GIVEN["COMP_AI_NODE_ADDRESS"]
    else:
        assert publish == {"nginx"}


def test_prometheus_finds_the_head_of_several_hosts_by_its_address() -> None:
    services = _resolved(("monitoring", "cluster"))["services"]
    for name in ("prometheus", "blackbox-exporter"):
        assert services[name]["extra_hosts"] == ["comp-ai-service=10.0.0.1"]
    given = {k: v for k, v in OWN_POSTGRES.items() if k != "COMP_AI_NODE_ADDRESS"}
    alone = json.loads(_config(("monitoring",), given, "--format=json").stdout)["services"]
    # There Docker knows the name.
    assert "comp-ai-service" not in str(alone["prometheus"]["extra_hosts"])


def test_the_nodes_of_a_cluster_agree_on_their_ports(worker: dict[str, Any]) -> None:
    head = _resolved(("cluster",))["services"]["comp-ai-service"]["environment"]
    node = worker["services"]["comp-ai-worker"]["environment"]
    assert head["COMP_AI_NODE_PORTS"] == node["COMP_AI_NODE_PORTS"] == "20000-20999"
    # On the volume, so that a head that is made anew takes the cluster over.
    [data] = [
        volume["target"]
        for volume in _resolved(("cluster",))["services"]["comp-ai-service"]["volumes"]
        if volume["source"] == "data"
    ]
    assert head["COMP_AI_RAY_STORE"].startswith(f"{data}/")


def test_without_tls_only_this_host_reaches_nginx() -> None:
    [port] = _resolved(())["services"]["nginx"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "8080", 8080)
    ports = _resolved(("tls", "letsencrypt"))["services"]["nginx"]["ports"]
    assert {(one["published"], one["target"]) for one in ports} == {("80", 8081), ("443", 8080)}


def test_the_head_sees_the_backups_and_may_write_their_key_ring(stack: dict[str, Any]) -> None:
    head, backup = (stack["services"][name] for name in ("comp-ai-service", "backup"))
    for service in (head, backup):
        [mount] = [one for one in service["volumes"] if one["target"] == "/backups"]
        assert (mount["source"], mount.get("read_only", False)) == ("backups", False)
        assert service["environment"]["COMP_AI_BACKUP_PATH"] == "/backups"
    # Files and folder are closed to other users.
    assert head["user"] == backup["user"]


# Keycloak's `start` builds its own code; alloy reads Docker's files, which are root's.
WRITES = {"keycloak"}
ROOT = {"alloy"}
CAPABILITIES = {"alloy": ["DAC_READ_SEARCH"], "gpu-exporter": ["SYS_ADMIN"]}


def test_every_service_is_confined(stack: dict[str, Any], worker: dict[str, Any]) -> None:
    for name, service in _services(stack, worker):
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("cap_add", []) == CAPABILITIES.get(name, []), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert service.get("read_only", False) == (name not in WRITES), name
        # Where none is named, the image itself names one that is not root.
        assert service.get("user", "image").startswith("0") == (name in ROOT), name
        assert "docker.sock" not in json.dumps(service), name


def test_every_service_is_bounded_and_comes_back(
    stack: dict[str, Any], worker: dict[str, Any]
) -> None:
    for name, service in _services(stack, worker):
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0, name
        assert int(limits["memory"]) > 0, name
        assert service["logging"]["driver"] == "json-file", name
        assert set(service["logging"]["options"]) == {"max-size", "max-file", "tag"}, name
        once = name in ("migrate", "nginx-config")
        assert service["restart"] == ("no" if once else "unless-stopped"), name


def test_nginx_goes_before_a_model_that_has_all_cpus_busy(
    stack: dict[str, Any], worker: dict[str, Any]
) -> None:
    services = _services(stack, worker)
    assert {name for name, service in services if service.get("cpu_shares")} == {"nginx"}


def test_every_image_names_its_version(stack: dict[str, Any], worker: dict[str, Any]) -> None:
    for name, service in _services(stack, worker):
        tag = service["image"].rsplit("/", 1)[-1].split("@")[0].partition(":")[2]
        assert re.search(r"\d", tag), (name, service["image"])


def test_others_wait_for_what_they_need(stack: dict[str, Any]) -> None:
    services = stack["services"]
    done = "service_completed_successfully"
    assert services["comp-ai-service"]["depends_on"]["migrate"]["condition"] == done
    assert services["nginx"]["depends_on"]["nginx-config"]["condition"] == done
    # So nginx is stopped first, and lets requests finish while the gateway is still there.
    assert services["nginx"]["depends_on"]["comp-ai-service"]["condition"] == "service_healthy"
    if "postgres" in services:
        assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert services["backup"]["depends_on"]["migrate"]["condition"] == done


def _deadlines() -> list[float]:
    found = []
    for file in (PROJECT / "configs").glob("*.yaml"):
        for application in yaml.safe_load(file.read_text())["applications"]:
            for deployment in application["deployments"]:
                if deployment["name"] == "Gateway":
                    found.append(deployment["user_config"]["deadline_s"])
    return found


def test_no_stop_cuts_the_longest_stream(stack: dict[str, Any], worker: dict[str, Any]) -> None:
    head, nginx = stack["services"]["comp-ai-service"], stack["services"]["nginx"]
    drain_s = float(head["environment"]["COMP_AI_DRAIN_S"])
    assert max(_deadlines()) < drain_s < _seconds(head["stop_grace_period"])
    assert drain_s < _seconds(nginx["stop_grace_period"])
    assert nginx["stop_signal"] == "SIGQUIT"
    [(_, other)] = _services(worker)
    assert float(other["environment"]["COMP_AI_DRAIN_S"]) < _seconds(other["stop_grace_period"])


def test_secrets_are_files_and_nothing_else(stack: dict[str, Any], worker: dict[str, Any]) -> None:
    for name, service in _services(stack, worker):
        for variable, value in (service.get("environment") or {}).items():
            if re.search(r"PASS(WORD)?\b|PASS_|SECRET|TOKEN\b|TOKEN_|API_KEY|MASTER_KEY", variable):
                assert variable.endswith(("_FILE", "__FILE")), (name, variable)
                assert value.startswith("/run/secrets/"), (name, variable)
                assert value.rpartition("/")[2] in {one["source"] for one in service["secrets"]}


def test_every_secret_is_one_that_is_made(
    stack: dict[str, Any], worker: dict[str, Any], tmp_path: Path
) -> None:
    script = FOLDER / "make-secrets.sh"
    subprocess.run([script, tmp_path / "secrets"], check=True, capture_output=True)
    made = {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}
    for one in (stack, worker):
        files = {secret["file"] for secret in one["secrets"].values()} - {SYSTEM_CAS}
        assert {Path(file).name for file in files} <= made.keys()
    # A password ends with no newline, and a file in PEM with one.
    assert all(len(text) >= 32 and text == text.lstrip() for text in made.values())
    assert all(t == t.rstrip() or "\n-----END " in t for t in made.values())
    assert len(set(made.values())) == len(made)
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    # A second run changes nothing.
    subprocess.run([script, tmp_path / "secrets"], check=True, capture_output=True)
    assert {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()} == made


def test_a_certificate_is_renewed_by_the_same_ca(tmp_path: Path) -> None:
    script, secrets = tmp_path / "make-secrets.sh", tmp_path / "secrets"
    shutil.copy(FOLDER / "make-secrets.sh", script)
    subprocess.run([script], check=True, capture_output=True)
    ca, certificate = secrets / "postgres_ca", secrets / "postgres_tls_certificate"
    before = ca.read_text(), certificate.read_text()
    certificate.unlink()
    # The head of several hosts is reached by its address.
    (tmp_path / ".env").write_text("COMP_AI_NODE_ADDRESS=10.0.0.1\n")
    said = subprocess.run([script], check=True, capture_output=True, text=True).stderr
    assert "DNS:postgres, IP:10.0.0.1, valid until " in said
    assert (ca.read_text() == before[0], certificate.read_text() == before[1]) == (True, False)
    for name in ("-verify_hostname=postgres", "-verify_ip=10.0.0.1"):
        words = ["openssl", "verify", "-x509_strict", *name.split("="), "-CAfile", ca, certificate]
        subprocess.run(words, check=True, capture_output=True)
    # Without its CA a certificate may be somebody's own: neither is made over it.
    ca.unlink()
    refused = subprocess.run([script], capture_output=True, text=True)
    assert (refused.returncode, ca.exists()) == (1, False)
    assert "its CA is not" in refused.stderr


# Whom each service that speaks to PostgreSQL trusts, and how it says so.
def _says_verify_full(service: dict[str, Any]) -> bool:
    environment = service["environment"]
    if "USAGE_DATABASE_SSLMODE" in environment:
        # Grafana's data source names the file.
        return bool(environment["USAGE_DATABASE_SSLMODE"] == "verify-full")
    uri = environment.get("DATA_SOURCE_URI") or environment.get("KC_DB_URL")
    if uri is not None:
        return bool(uri.endswith("?sslmode=verify-full&sslrootcert=/run/secrets/postgres_ca"))
    return (environment["POSTGRES_SSLMODE"], environment["POSTGRES_SSLROOTCERT"]) == (
        "verify-full",
        "/run/secrets/postgres_ca",
    )


def test_who_speaks_to_postgres_knows_its_name_and_its_ca(
    stack: dict[str, Any], worker: dict[str, Any]
) -> None:
    passwords = {"postgres_password", "keycloak_db_password", "grafana_db_password"}
    speak = set()
    for name, service in _services(stack, worker):
        secrets = {one["source"] for one in service.get("secrets", ())}
        if secrets & passwords and name != "postgres":
            speak.add(name)
            assert "postgres_ca" in secrets, name
            assert _says_verify_full(service), name
        # The key is its server's alone.
        assert ("postgres_tls_key" in secrets) == (name == "postgres"), name
    assert speak - {"keycloak"} == {
        *("comp-ai-service", "comp-ai-worker", "migrate", "backup"),
        *("postgres-exporter", "grafana"),
    }


def test_a_server_that_is_there_is_held_against_this_hosts_cas() -> None:
    assert _resolved(("join",))["secrets"]["postgres_ca"]["file"] == SYSTEM_CAS
    done = _config(("join",), GIVEN | {"POSTGRES_SSLROOTCERT": "/etc/company.pem"}, "--format=json")
    assert json.loads(done.stdout)["secrets"]["postgres_ca"]["file"] == "/etc/company.pem"


def test_the_files_that_are_mounted_are_there(stack: dict[str, Any]) -> None:
    for name, service in _services(stack):
        for volume in service.get("volumes", ()):
            source = Path(volume["source"])
            if volume["type"] == "bind" and source.is_relative_to(PROJECT):
                assert source.exists(), (name, source)


def test_traces_go_to_where_grafana_finds_them(stack: dict[str, Any]) -> None:
    services = stack["services"]
    assert services["comp-ai-service"]["environment"]["COMP_AI_TRACING_ENDPOINT"] == (
        "http://tempo:4318"
    )
    assert services["tempo"]["networks"].keys() <= services["grafana"]["networks"].keys()
    provisioned = PROJECT / "monitoring" / "grafana" / "provisioning" / "datasources"
    sources = {
        source["uid"]: source
        for source in yaml.safe_load((provisioned / "comp-ai.yml").read_text())["datasources"]
    }
    config = yaml.safe_load((PROJECT / "monitoring" / "tempo" / "tempo.yml").read_text())
    assert sources["tempo"]["url"] == f"http://tempo:{config['server']['http_listen_port']}"
    received = config["distributor"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert received.endswith(":4318")
    [field] = sources["loki"]["jsonData"]["derivedFields"]
    assert field["datasourceUid"] == "tempo"
    assert sources["tempo"]["jsonData"]["tracesToLogsV2"]["datasourceUid"] == "loki"
    [trace_id] = re.findall(field["matcherRegex"], f'{{"a":1,"trace_id":"{"4f" * 16}"}}')
    assert trace_id == "4f" * 16


def test_without_its_overlay_nothing_is_traced() -> None:
    environment = _resolved(())["services"]["comp-ai-service"]["environment"]
    assert not environment.get("COMP_AI_TRACING_ENDPOINT")


def test_the_names_of_the_plan(stack: dict[str, Any]) -> None:
    service = stack["services"]["comp-ai-service"]
    assert service["container_name"] == "lianel-comp-ai-service"
    assert service["environment"]["COMP_AI_PORT"] == "3002"
    check = service["healthcheck"]
    assert (check["interval"], check["timeout"], check["retries"]) == ("30s", "10s", 3)


def test_joining_uses_the_networks_name_that_is_given() -> None:
    assert _resolved(("join",))["networks"]["back"] == {
        "name": "lianel-network",
        "external": True,
        "ipam": {},
    }
