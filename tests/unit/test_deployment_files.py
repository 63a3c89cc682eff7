"""What stands beside the code to deploy it: linted, and in step with the settings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from serve_app.settings import GROUPS
from serve_app.stack import nginx

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "k8s-free-compose"
COMPOSE_FILES = sorted(FOLDER.glob("compose*.yaml"))
SCRIPTS = sorted(
    [
        *FOLDER.rglob("*.sh"),
        *(file for file in (PROJECT / ".ci").iterdir() if file.name != "run.log"),
    ]
)
# Settings that a container fixes itself, and why.
FIXED = {
    "COMP_AI_HOME": "the image's",
    "COMP_AI_MODEL_PATH": "the image's",
    "COMP_AI_BACKUP_PATH": "the image's",
    "COMP_AI_BACKUP_PROGRAMS": "the image's",
    "COMP_AI_PORT": "of the container's own network; the plan's 3002",
    "COMP_AI_RAY_PORT": "of the container's own network",
    "COMP_AI_DASHBOARD_PORT": "of the container's own network",
    "COMP_AI_METRICS_PORT": "of the container's own network",
    "COMP_AI_RAY_STORE": "on the volume of the head of several hosts",
    "COMP_AI_ISSUER_PORT": "a container has no local issuer",
    "COMP_AI_DRAIN_S": "belongs to stop_grace_period",
    "COMP_AI_OIDC_ISSUERS": "the path of a file, to be mounted beside it",
    # Opaque tokens need a secret of the issuer's, which the plan's Keycloak does not.
    "COMP_AI_OIDC_INTROSPECTION": "opaque tokens need a compose file of your own",
    "COMP_AI_OIDC_INTROSPECTION_CACHE_S": "opaque tokens",
    "COMP_AI_OIDC_INTROSPECTION_OUTAGE_S": "opaque tokens",
    "COMP_AI_OIDC_INTROSPECTION_RATE": "opaque tokens",
    "COMP_AI_KEYCLOAK_CLIENT_SECRET": "for `comp-ai token` and opaque tokens alone",
}
FIXED_NGINX = {
    "COMP_AI_NGINX_LISTEN",
    "COMP_AI_NGINX_RESOLVER",
    "COMP_AI_NGINX_TLS_CERTIFICATE",
    "COMP_AI_NGINX_TLS_KEY",
    "COMP_AI_NGINX_PLAIN_LISTEN",
    "COMP_AI_NGINX_WEBROOT",
    "COMP_AI_NGINX_STATUS",
    "COMP_AI_NGINX_LOG",
    "COMP_AI_NGINX_OAUTH2_PROXY",
    "COMP_AI_NGINX_DASHBOARD",
    "COMP_AI_NGINX_CONSOLE",
    "COMP_AI_NGINX_KEYCLOAK",
    "COMP_AI_NGINX_KEYCLOAK_SERVER",
}


def _example() -> dict[str, str]:
    text = (FOLDER / ".env.example").read_text()
    return dict(re.findall(r"^(?:# )?([A-Z][A-Z0-9_]*)=(.*)$", text, re.MULTILINE))


def _used() -> set[str]:
    """Return the variables that the compose files take from `.env`."""
    found = set()
    for file in COMPOSE_FILES:
        code = re.sub(r"^\s*#.*$", "", file.read_text(), flags=re.MULTILINE)
        found |= set(re.findall(r"(?<!\$)\$\{(\w+)", code))
        # Without a value a variable is handed through.
        found |= set(re.findall(r"^ +([A-Z][A-Z0-9_]+):$", code, re.MULTILINE))
    return found


def test_the_example_explains_what_the_compose_files_use_and_nothing_else() -> None:
    # COMPOSE_FILE is Compose's own.
    assert _example().keys() - {"COMPOSE_FILE"} == _used()


def test_every_variable_of_the_example_has_a_word_before_it() -> None:
    previous = ""
    for line in (FOLDER / ".env.example").read_text().splitlines():
        if re.match(r"(# )?[A-Z][A-Z0-9_]*=", line):
            # Variables in one group share the words before it; a section ends a group.
            assert previous.startswith("# ") or re.match(r"[A-Z]", previous), line
            assert not previous.startswith("# ---"), line
        previous = line


@pytest.mark.parametrize("group", GROUPS.values(), ids=lambda group: group.__name__)
def test_every_setting_can_be_given_to_the_containers(group: type[BaseModel]) -> None:
    text = "".join(file.read_text() for file in COMPOSE_FILES)
    for field in group.model_fields.values():
        name = str(field.alias)
        if "SecretStr" in str(field.annotation):
            assert f"{name}_FILE: /run/secrets/" in text or name in FIXED, name
        else:
            assert (name in _example()) != (name in FIXED), name


def test_every_value_of_nginx_can_be_given_to_the_containers() -> None:
    assert nginx.DEFAULTS.keys() - FIXED_NGINX <= _example().keys()
    assert not FIXED_NGINX & _example().keys()
    text = "".join(file.read_text() for file in COMPOSE_FILES)
    assert {n for n in FIXED_NGINX if f"{n}:" not in text} == {"COMP_AI_NGINX_LOG"}


def test_the_values_of_the_example_are_the_defaults() -> None:
    example = _example()
    # In containers these are others than on a machine of one's own.
    other = {"POSTGRES_HOST", "POSTGRES_SSLMODE", "COMP_AI_HTTP_HOST"}
    for group in GROUPS.values():
        for field in group.model_fields.values():
            name, default = str(field.alias), field.default
            if name in example and name not in other and default not in (None, ()):
                assert example[name] == _as_written(default), name
    for name, default in nginx.DEFAULTS.items():
        if name in example and name not in {
            "COMP_AI_NGINX_SERVER",
            "COMP_AI_NGINX_UPSTREAM",
            "COMP_AI_NGINX_TRUSTED",
        }:
            assert example[name] == default, name


def _as_written(default: object) -> str:
    match default:
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g}"
        case _:
            return str(default)


def _program(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, f"{name} is not installed: run `make setup`"
    return found


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [_program("hadolint"), PROJECT / "Dockerfile"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_pinned_confined_and_holds_no_tests() -> None:
    text = (PROJECT / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    [postgres] = re.findall(r"^ARG POSTGRES_IMAGE=(\S+@sha256:[0-9a-f]{64})$", text, re.MULTILINE)
    # The server's own, so that pg_dump is not older than it.
    assert f"    image: {postgres}\n" in (FOLDER / "compose.yaml").read_text()
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == [
        "${POSTGRES_IMAGE}",
        *["${PYTHON_IMAGE}"] * 2,
    ]
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    assert ignored[[not line.startswith("#") for line in ignored].index(True)] == "*"
    assert not [line for line in ignored if line.startswith("!") and "test" in line]


def test_what_the_image_copies_is_in_its_context() -> None:
    kept = [
        line[1:]
        for line in (PROJECT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for line in re.findall(
        r"^COPY (?!--from)(.+)$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE
    ):
        for source in line.split()[:-1]:
            assert (PROJECT / source).exists(), source
            assert any(Path(source).is_relative_to(one) for one in kept), source


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_clean(script: Path) -> None:
    done = subprocess.run([_program("shellcheck"), script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_workflows_are_clean() -> None:
    workflows = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))
    done = subprocess.run(
        [_program("actionlint"), "-shellcheck", _program("shellcheck"), *workflows],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_workflows_run_only_what_is_pinned_by_content() -> None:
    for workflow in (PROJECT / ".github" / "workflows").glob("*.yml"):
        for action in re.findall(r"uses: ([^.\s]\S*.*)$", workflow.read_text(), re.MULTILINE):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v?\d+\.\d+\.\d+", action), action
