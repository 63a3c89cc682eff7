"""Schemathesis against /openapi.json, with all its checks: no 500, nothing undocumented."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import orjson
from starlette.types import Receive, Scope, Send

from serve_app.settings import PostgresSettings
from tests.integration.fakes import KEY, World, world

ST = Path(sys.executable).parent / "st"
# A longer hunt: SCHEMATHESIS_EXAMPLES=300 pytest -s tests/integration/test_schemathesis.py
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "5")


async def _any_engine(scope: Scope, receive: Receive, send: Send) -> None:
    """Take whatever comes: what the engine takes is not in the document."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    stream = orjson.loads(body).get("stream") is True
    kind = b"text/event-stream; charset=utf-8" if stream else b"application/json"
    whole = b'{"id":"x","choices":[],"status":"completed","output":[]}'
    answer = b"data: [DONE]\n\n" if stream else whole
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": answer})


def _models(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the models that the document's examples name."""
    names = {}
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {})
        if model := body.get("application/json", {}).get("example", {}).get("model"):
            embeds = any(word in path for word in ("embed", "rerank", "score"))
            names[model] = "embed" if embeds else "generate"
    return [{"name": name, "app": name, "task": task} for name, task in names.items()]


async def _document() -> dict[str, Any]:
    async with world() as served, httpx.AsyncClient(base_url=served.url) as http:
        document: dict[str, Any] = (await http.get("/openapi.json")).json()
        return document


def _runnable(document: dict[str, Any], models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the document with the names of models that serve each address.

    Nobody guesses a name, so that otherwise every request would end with 404. And without
    Idempotency-Key, under which the same key with another body is refused, rightly.
    """
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["parameters"] = [
                parameter
                for parameter in operation.get("parameters", [])
                if parameter["name"] != "Idempotency-Key"
            ]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if (model := body.get("example", {}).get("model")) is not None:
                assert model in [each["name"] for each in models]
                body["schema"]["properties"]["model"] = {"type": "string", "enum": [model]}
    return document


async def _run(served: World, schema: Path, report: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        str(ST),
        *("run", str(schema), "--url", served.url, "--checks", "all"),
        # Which fields go together the document cannot say, and most of a body is the engine's to
        # judge, where this one takes everything. test_fuzz.py has the wrong values.
        *("--exclude-checks", "positive_data_acceptance,negative_data_rejection"),
        *("--header", f"Authorization: Bearer {KEY}"),
        *("--max-examples", EXAMPLES, "--generation-deterministic", "--continue-on-failure"),
        *("--no-color", "--report", "json", "--report-json-path", str(report)),
        cwd=report.parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return output.decode()


async def test_the_document_is_true(database: PostgresSettings, tmp_path: Path) -> None:
    document = await _document()
    models = _models(document)
    schema, report = tmp_path / "openapi.json", tmp_path / "report.json"
    schema.write_text(json.dumps(_runnable(document, models)))
    async with world(engine_app=_any_engine, database=database, models=models) as served:
        output = await _run(served, schema, report)
        result = json.loads(report.read_text())
        cases = result["test_cases"]["generated"]
        print(f"schemathesis: {cases} cases on {result['operations']['tested']} operations")
        assert result["test_cases"]["unique_failures"] == 0, output[-20_000:]
        # 502 is what becomes of a stream of the engine that ends at once.
        assert {record.status for record in served.records if record.status >= 500} <= {502}
        assert cases > 100 * result["operations"]["tested"] / 2
