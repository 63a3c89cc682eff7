"""Schemathesis against /openapi.json, with all its checks: no 500, nothing undocumented."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from serve_app.settings import PostgresSettings
from tests.integration.fakes import KEY, World, world

ST = Path(sys.executable).parent / "st"
# A longer hunt: SCHEMATHESIS_EXAMPLES=300 pytest -s tests/integration/test_schemathesis.py
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "5")
# Schemathesis' own list of refusals, and 413: what has more entries than it may is often too large.
CONFIG = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx"]
"""


class _Engine:
    """Takes whatever the document says of the fields: the gateway passes most of them on."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._fields = {
            path.removeprefix("/v1"): {
                name: jsonschema_rs.validator_for(field)
                for name, field in _body(operations)["schema"]["properties"].items()
            }
            for path, operations in document["paths"].items()
            if "schema" in _body(operations)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = await Request(scope, receive).json()
        stream = asked.get("stream") is True
        kind = b"text/event-stream; charset=utf-8" if stream else b"application/json"
        whole = b'{"id":"x","choices":[],"status":"completed","output":[]}'
        answer = b"data: [DONE]\n\n" if stream else whole
        status = 200
        if not self._takes(scope["path"], asked):
            status, kind, answer = 400, b"application/json", b'{"error":{"message":"no"}}'
        start = {"status": status, "headers": [(b"content-type", kind)]}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": answer})

    def _takes(self, path: str, asked: dict[str, Any]) -> bool:
        fields = self._fields[path.removeprefix("/v1")]
        return all(fields[name].is_valid(asked[name]) for name in asked.keys() & fields.keys())


def _body(operations: dict[str, Any]) -> dict[str, Any]:
    content = operations.get("post", {}).get("requestBody", {}).get("content", {})
    body: dict[str, Any] = content.get("application/json", {})
    return body


def _models(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the models that the document's examples name."""
    names = {}
    for path, operations in document["paths"].items():
        if model := _body(operations).get("example", {}).get("model"):
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
    config = report.with_name("schemathesis.toml")
    config.write_text(CONFIG)
    process = await asyncio.create_subprocess_exec(
        str(ST),
        *("--config-file", str(config)),
        *("run", str(schema), "--url", served.url, "--checks", "all"),
        # Which fields go together the document cannot say.
        *("--exclude-checks", "positive_data_acceptance"),
        *("--header", f"Authorization: Bearer {KEY}"),
        *("--max-examples", EXAMPLES, "--generation-deterministic", "--continue-on-failure"),
        *("--no-color", "--report", "json", "--report-json-path", str(report)),
        cwd=report.parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return output.decode()


# Thousands of requests, one after another.
@pytest.mark.timeout(900)
async def test_the_document_is_true(database: PostgresSettings, tmp_path: Path) -> None:
    document = await _document()
    models = _models(document)
    schema, report = tmp_path / "openapi.json", tmp_path / "report.json"
    schema.write_text(json.dumps(_runnable(document, models)))
    async with world(engine_app=_Engine(document), database=database, models=models) as served:
        output = await _run(served, schema, report)
        result = json.loads(report.read_text())
        cases = result["test_cases"]["generated"]
        print(f"schemathesis: {cases} cases on {result['operations']['tested']} operations")
        assert result["test_cases"]["unique_failures"] == 0, output[-20_000:]
        # 502 is what becomes of a stream of the engine that ends at once.
        assert {record.status for record in served.records if record.status >= 500} <= {502}
        assert cases > 100 * result["operations"]["tested"] / 2
