"""What the documents say is in the code, and what an operator must know is in the documents."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

from deployments.options import AdapterArgs, ModelArgs, RequestLogOptions
from serve_app import error_reference, settings_reference
from serve_app.accounts.retention.policy import RetentionPolicy
from serve_app.cli.app import app as command_line
from serve_app.completions.kinds import ENDPOINTS
from serve_app.config import GatewayConfig
from serve_app.http_app import create_app
from serve_app.identity.issuers_file import FurtherIssuer
from serve_app.scaling.targets import ScalingTargets
from serve_app.settings import GROUPS
from serve_app.stack import nginx

PROJECT = Path(__file__).parents[2]
PAGES = sorted([PROJECT / "README.md", PROJECT / "CHANGELOG.md", *(PROJECT / "docs").glob("*.md")])
CONFIGURATION = (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8")
ERRORS = (PROJECT / "docs" / "errors.md").read_text(encoding="utf-8")
API = (PROJECT / "docs" / "api.md").read_text(encoding="utf-8")
OPERATIONS = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")

MERMAID = os.environ.get("TEST_MERMAID")
ENVIRONMENT = re.compile(r"\b(?:COMP_AI|POSTGRES|KEYCLOAK)_[A-Z][A-Z_]*[A-Z]\b")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_METRIC = re.compile(r'\b(Counter|(?:Kept)?Gauge|Histogram)\(\s*"(comp_ai_\w+)"')


def page_id(path: Path) -> str:
    return path.name


# Settings.


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each table row, code marks taken off."""
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            yield [cell.strip().strip("`") for cell in cells]


def heading(text: str, line: str) -> str:
    """Return what stands below a heading, up to the next one."""
    match = re.search(rf"^{re.escape(line)}$\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"there is no heading {line!r}"
    return match[1]


def section(name: str) -> dict[str, str]:
    """Return what the table below the heading of `name` says: setting → default."""
    return {row[0]: row[1] for row in rows(heading(CONFIGURATION, f"### `{name}`"))}


def models_within(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return `model` and every model that its fields hold."""
    found = [model]
    for kind in walked(field.annotation for field in model.model_fields.values()):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += [within for within in models_within(kind) if within not in found]
    return found


def walked(kinds: Iterable[object]) -> Iterator[object]:
    """Yield types and what stands in their brackets."""
    for kind in kinds:
        yield kind
        yield from walked(get_args(kind))


DOCUMENTED = [
    *GROUPS.values(),
    FurtherIssuer,
    *models_within(GatewayConfig),
    *models_within(RetentionPolicy),
    ModelArgs,
    AdapterArgs,
    RequestLogOptions,
    ScalingTargets,
]


@pytest.mark.parametrize("kind", DOCUMENTED, ids=lambda kind: kind.__name__)
def test_every_class_of_settings_has_its_table(kind: type[BaseModel]) -> None:
    text = heading(CONFIGURATION, f"### `{kind.__name__}`")
    assert f"<!-- Settings of {kind.__module__}:{kind.__name__}, by `make docs`. -->" in text


def test_the_reference_of_settings_is_up_to_date() -> None:
    assert settings_reference.renewed(CONFIGURATION) == CONFIGURATION, "run `make docs`"


def test_every_nginx_variable_is_documented() -> None:
    assert section("nginx") == dict(nginx.DEFAULTS)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_variable_that_is_named_exists(page: Path) -> None:
    files = [
        *PROJECT.glob("serve_app/**/*.py"),
        *PROJECT.glob("k8s-free-compose/**/*.sh"),
        *PROJECT.glob("k8s-free-compose/compose*.yaml"),
        PROJECT / ".ci" / "setup",
        PROJECT / "Makefile",
    ]
    code = set(ENVIRONMENT.findall(" ".join(file.read_text(encoding="utf-8") for file in files)))
    named = {name.removesuffix("_FILE") for name in ENVIRONMENT.findall(page.read_text("utf-8"))}
    assert named <= code


# Errors.


def test_the_reference_of_errors_is_up_to_date() -> None:
    assert error_reference.renewed(ERRORS) == ERRORS, "run `make docs`"


def test_every_refusal_of_nginx_is_documented_and_no_other() -> None:
    template = nginx.TEMPLATE.read_text(encoding="utf-8")
    refusals = re.findall(
        r"""return (\d+) '\{"error":\{"message":"(.*?)","type":"(\w+)","param":null,"""
        r""""code":"(\w+)"\}\}'""",
        template,
    )
    assert refusals
    theirs = heading(ERRORS, "## What nginx refuses")
    expected = {(code, status, kind, message) for status, message, kind, code in refusals}
    assert {tuple(row) for row in rows(theirs)} == expected


# The API.


def test_every_parameter_that_passes_is_documented() -> None:
    passed, _, _ = API.partition("### Refused")
    named = set(re.findall(r"`(\w+)`", passed))
    for endpoint in ENDPOINTS.values():
        assert endpoint.parameters <= named


def test_every_address_is_documented() -> None:
    document = create_app(lambda: pytest.fail("not asked"), list).openapi()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in API
    for endpoint in ENDPOINTS.values():
        for address in endpoint.addresses:
            assert f"`POST {address}`" in API


# Metrics.


def exported_metrics() -> set[str]:
    """Return the names under which Prometheus sees our metrics."""
    found = set()
    for file in (PROJECT / "deployments").glob("*.py"):
        for kind, name in _METRIC.findall(file.read_text(encoding="utf-8")):
            found.add(f"ray_{name}_total" if kind == "Counter" else f"ray_{name}")
    return found


def test_every_metric_is_documented_and_no_other() -> None:
    assert exported_metrics()
    assert set(re.findall(r"`(ray_comp_ai_\w+)`", OPERATIONS)) == exported_metrics()


# Commands.


def commands() -> list[tuple[str, list[str]]]:
    """Return every `comp-ai` command line of the pages, with its page."""
    found = []
    for page in PAGES:
        for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
            if language != "sh":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                for match in re.finditer(r"(?:^|bin/)comp-ai ([^|;)#]+)", line.split(" # ")[0]):
                    found.append((page.name, shlex.split(match[1])))
    return found


@pytest.mark.parametrize(("page", "words"), commands())
def test_every_command_that_is_shown_exists(page: str, words: list[str]) -> None:
    command: Any = get_command(command_line)
    names = iter(words)
    while hasattr(command, "commands"):
        name = next(names)
        assert name in command.commands, f"{page}: comp-ai {shlex.join(words)}"
        command = command.commands[name]
    options = {option for param in command.params for option in param.opts}
    assert {word for word in names if word.startswith("--")} <= options


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_make_target_that_is_shown_exists(page: Path) -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    blocks = " ".join(block for _, block in _FENCE.findall(page.read_text(encoding="utf-8")))
    assert set(re.findall(r"\bmake ([a-z-]+)", blocks)) <= targets


# Pages.


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    without_code = _FENCE.sub("", text)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in _LINK.findall(text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.skipif(
    MERMAID is None, reason="needs Mermaid's own parser: set TEST_MERMAID (README.md, Tests)"
)
def test_every_diagram_can_be_drawn() -> None:
    check = Path(__file__).parent / "mermaid_check.mjs"
    done = subprocess.run(
        ["node", check, str(MERMAID), *PAGES], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(_LINK.findall((PROJECT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in (PROJECT / "docs").glob("*.md")} <= linked


def test_changelog_knows_the_version() -> None:
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d{2}-\d{2})?$", text, re.MULTILINE)
    assert sections == [
        name for name in sections if re.fullmatch(r"Unreleased|\d+\.\d+\.\d+", name)
    ]
    # A version that was released has its section; the first one is still to come.
    assert sections[0] in ("Unreleased", version)
    assert version in sections or sections == ["Unreleased"]
