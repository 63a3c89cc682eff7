"""The check of a config before anything is changed: by the code that a start runs."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from serve_app.deploy.config import Application, ServeConfig
from serve_app.deploy.errors import DeployRefused
from serve_app.deploy.plan import Built
from serve_app.errors import ConfigError

# By name: this package knows nothing of Ray.
_CHECK = "deployments.check"
_PROJECT = Path(__file__).resolve().parents[2]
# An engine may be imported, on a machine that is busy.
_TIMEOUT_S = 300.0
_LAST_WORDS_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Checked:
    """The applications as Serve will keep them, and the deployments that their code makes."""

    applications: list[Application]
    built: Built


async def checked(config: ServeConfig) -> Checked:
    """Return what Serve will make of `config`.

    Raises:
        ConfigError: a setting is wrong.
        DeployRefused: it cannot be built for another reason.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        _CHECK,
        cwd=_PROJECT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Ctrl-C is ours to answer.
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            told, words = await process.communicate(orjson.dumps(config))
    except TimeoutError:
        raise DeployRefused(f"The config was not checked within {_TIMEOUT_S:g} s.") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = words.decode(errors="replace").strip()[-_LAST_WORDS_CHARS:]
        raise DeployRefused(f"The applications cannot be built: {last}")
    return _read(orjson.loads(told))


def _read(told: dict[str, Any]) -> Checked:
    if "setting" in told:
        raise ConfigError(told["setting"], told["value"], told["allowed"])
    if "failed" in told:
        raise DeployRefused(told["failed"])
    return Checked(told["applications"], told["built"])
