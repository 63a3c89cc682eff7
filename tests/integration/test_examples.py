"""The examples of the documents do what they say, against a gateway with a fake engine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from serve_app.settings import PostgresSettings
from tests.integration.fakes import KEY, World, world

PROJECT = Path(__file__).parents[2]
MODELS = [
    {"name": "smollm2-135m-instruct", "app": "small", "max_tokens": 2000},
    {"name": "all-minilm-l6-v2", "app": "embed", "task": "embed"},
]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Each block by itself, as if pasted into a new Python: importing the client once saves a minute.
_RUN_EACH = """
import json, sys
for block in json.load(sys.stdin):
    print("\\x1e", end="")
    exec(compile(block, "an example", "exec"), {"__name__": "__main__"})
"""


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks of a language that ask the service something."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    found = [block for of, block in _FENCE.findall(text) if of == language]
    return [block for block in found if re.search(r"^curl |openai", block, re.MULTILINE)]


@pytest.fixture
async def served(database: PostgresSettings) -> AsyncIterator[World]:
    async with world(database=database, models=MODELS) as made:
        yield made


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the key of a first start."""
    (tmp_path / ".comp-ai").mkdir()
    (tmp_path / ".comp-ai" / "first-key").write_text(KEY, encoding="utf-8")
    return tmp_path


def environment(served: World, home: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "URL": served.url,
        "KEY": KEY,
        "OPENAI_BASE_URL": f"{served.url}/v1",
        "OPENAI_API_KEY": KEY,
    }


async def run(command: list[str], env: Mapping[str, str], stdin: str) -> str:
    """Run an example and return what it prints; it must not fail."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(env),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(stdin.encode())
    assert process.returncode == 0, f"{stdin}\n{out.decode()}\n{err.decode()}"
    return out.decode()


async def run_shell(served: World, home: Path, block: str) -> str:
    here = block.replace("http://127.0.0.1:8080", served.url)
    return await run(["bash", "-euo", "pipefail", "-s"], environment(served, home), here)


async def run_python(served: World, home: Path, found: list[str]) -> list[str]:
    here = [block.replace("http://127.0.0.1:8080/api/v1/comp-ai", served.url) for block in found]
    command = [sys.executable, "-c", _RUN_EACH]
    said = await run(command, environment(served, home), json.dumps(here))
    return said.split("\x1e")[1:]


def answers(said: str) -> list[dict[str, Any]]:
    """Return the JSON objects that curl printed, one after another."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(said):
        answer, at = decoder.raw_decode(said, at)
        found.append(answer)
    return found


async def test_the_curl_examples_are_answered(served: World, home: Path) -> None:
    said = [await run_shell(served, home, block) for block in blocks("docs/examples.md", "sh")]
    models, chat, stream, vectors, refused, me_and_usage, timing = said
    assert [model["id"] for model in answers(models)[0]["data"]] == [m["name"] for m in MODELS]
    assert answers(chat)[0]["choices"][0]["message"]["content"]
    assert stream.endswith("data: [DONE]\n\n")
    assert len(answers(vectors)[0]["data"]) == 2
    assert answers(refused)[0]["error"]["code"] == "unsupported_parameter"
    assert [answer["object"] for answer in answers(me_and_usage)] == ["me", "list"]
    assert "total;dur=" in timing


async def test_the_python_examples_print_what_they_say(served: World, home: Path) -> None:
    said = await run_python(served, home, blocks("docs/examples.md", "python"))
    models, chat, stream, left, many, form, responses, vectors, refused, once, less = said
    assert models.split() == [model["name"] for model in MODELS]
    assert chat.split()[-1].isdigit()
    assert stream.rstrip().endswith("32 tokens")
    assert left.strip()
    assert many.count("w0") == 20
    assert form.strip()
    assert responses.count("w0") == 2
    assert vectors.startswith("2 vectors of ")
    assert refused.startswith("404 model_not_found ")
    assert len(set(once.split())) == 1
    assert less == "length\n"


async def test_the_first_requests_of_the_readme_are_answered(served: World, home: Path) -> None:
    [curl] = blocks("README.md", "sh")
    assert answers(await run_shell(served, home, curl))[0]["choices"]
    [said] = await run_python(served, home, blocks("README.md", "python"))
    assert said.startswith("w0 ")
