"""What the pipeline does on a host, with stand-ins for ssh, docker and curl."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".github" / "deploy.sh"
STAND_INS = {
    # Runs on this machine what was meant for the host.
    "ssh": 'printf "%s\\n" "$*" >>"$NOTES/ssh"\nbash -c "${@: -1}"',
    "docker": 'printf "%s %s\\n" "$COMP_AI_TAG" "$*" >>"$NOTES/docker"\n'
    'if [[ $* == *" up "* ]]; then echo "$COMP_AI_TAG" >"$NOTES/running"; fi\n'
    '[[ "$COMP_AI_TAG $*" != *${FAILS:-nothing}* ]]',
    "curl": '[[ "$(<"$NOTES/running")" != "${BROKEN:-}" ]]',
    "sleep": "",
}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    programs, compose = tmp_path / "bin", tmp_path / "compose"
    programs.mkdir()
    compose.mkdir()
    (compose / ".env").write_text("COMP_AI_IMAGE=image\nCOMP_AI_TAG=old\n")
    for name, code in STAND_INS.items():
        file = programs / name
        file.write_text(f"#!/usr/bin/env bash\n{code}\n")
        file.chmod(0o755)
    return tmp_path


def _deploy(host: Path, tag: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {
        "PATH": f"{host / 'bin'}:{os.environ['PATH']}",
        "NOTES": str(host),
        "DEPLOY_SSH_KEY": "key",
        "DEPLOY_HOST": "host.example.com",
        "DEPLOY_USER": "deploy",
        "DEPLOY_HOST_KEY": "host.example.com ssh-ed25519 AAAA",
        "DEPLOY_PATH": str(host / "compose"),
        "DEPLOY_SMOKE_URL": "https://www.example.com/api/v1/comp-ai",
        "SMOKE_TRIES": "2",
        "TAG": tag,
    }
    return subprocess.run([SCRIPT], env=env | more, capture_output=True, text=True)


def _asked(host: Path) -> list[str]:
    return (host / "docker").read_text().splitlines()


def _kept_tag(host: Path) -> str:
    return (host / "compose" / ".env").read_text().splitlines()[1]


def test_a_release_is_pulled_migrated_started_and_kept(host: Path) -> None:
    done = _deploy(host, "new")
    assert done.returncode == 0, done.stderr
    verbs = [line.split()[2] for line in _asked(host)]
    assert verbs == ["pull", "run", "up", "ps"]
    assert all(line.startswith("new ") for line in _asked(host))
    assert _kept_tag(host) == "COMP_AI_TAG=new"


@pytest.mark.parametrize("wrong", [{"BROKEN": "new"}, {"FAILS": "new compose up"}])
def test_a_release_that_does_not_serve_is_taken_back(host: Path, wrong: dict[str, str]) -> None:
    done = _deploy(host, "new", **wrong)
    assert done.returncode == 1
    assert "new does not serve; old serves again" in done.stderr
    assert _asked(host)[-1].startswith("old compose up ")
    assert (host / "running").read_text().strip() == "old"
    assert _kept_tag(host) == "COMP_AI_TAG=old"


def test_a_migration_that_fails_leaves_what_runs(host: Path) -> None:
    done = _deploy(host, "new", FAILS="new compose run")
    assert done.returncode != 0
    assert not [line for line in _asked(host) if " up " in line]
    assert _kept_tag(host) == "COMP_AI_TAG=old"


def test_the_host_is_known_by_its_pinned_key_alone(host: Path) -> None:
    _deploy(host, "new")
    for line in (host / "ssh").read_text().splitlines():
        if line.startswith("-i "):
            assert "StrictHostKeyChecking=yes" in line
            assert "GlobalKnownHostsFile=/dev/null" in line
    assert "StrictHostKeyChecking=no" not in SCRIPT.read_text()


@pytest.mark.parametrize("tag", ["a b", "$(reboot)", "a;b", "'", "", "-x"])
def test_what_is_no_tag_reaches_no_host(host: Path, tag: str) -> None:
    assert _deploy(host, tag).returncode != 0
    assert not (host / "ssh").exists()
