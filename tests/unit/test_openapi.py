"""The OpenAPI document and the pages that need no model."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import httpx
import pytest

from serve_app.completions.kinds import Kind
from serve_app.config import LimitPolicy
from serve_app.errors import ClientGone, every_error, to_openai
from serve_app.http_app import Check, create_app

KEY_ADDRESSES = ("", "/{key_id}", "/{key_id}/rotate", "/{key_id}/revoke")


def _no_gateway() -> NoReturn:
    raise AssertionError("these pages need no gateway")


async def _yes() -> bool:
    return True


async def _no() -> bool:
    return False


async def _never() -> bool:
    await asyncio.Event().wait()
    return True


def client(*checks: Check) -> httpx.AsyncClient:
    app = create_app(_no_gateway, lambda: list(checks))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://comp-ai")


@pytest.fixture
def document() -> dict[str, Any]:
    return create_app(_no_gateway, list).openapi()


@pytest.mark.parametrize("kind", Kind)
def test_body_of_a_completion_is_what_is_taken(document: dict[str, Any], kind: Kind) -> None:
    operation = document["paths"][kind.endpoint.addresses[0]]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"].keys() == kind.endpoint.parameters
    assert body["schema"]["additionalProperties"] is False
    assert set(body["schema"]["required"]) <= body["example"].keys()
    assert body["example"].keys() <= kind.endpoint.parameters


@pytest.mark.parametrize("kind", Kind)
def test_refusals_are_documented_in_openai_form(document: dict[str, Any], kind: Kind) -> None:
    answers = document["paths"][kind.endpoint.addresses[0]]["post"]["responses"]
    assert {"400", "401", "403", "404", "413", "429", "502", "503", "504"} <= answers.keys()
    for status, answer in answers.items():
        if status != "200":
            [content] = answer["content"].values()
            assert content["schema"] == {"$ref": "#/components/schemas/Error"}


def test_every_error_that_is_sent_is_in_the_document(document: dict[str, Any]) -> None:
    sent = [error for error in every_error() if error is not ClientGone]
    schema = document["components"]["schemas"]["Error"]["properties"]["error"]
    assert schema["properties"]["code"]["enum"] == [error.code for error in sent]
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    for error in sent:
        content = answers[str(error.status)]["content"]["application/json"]
        assert content["examples"][error.code]["value"] == to_openai(error())


def test_no_answer_is_documented_that_is_never_sent(document: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in str(document)


def test_only_what_a_client_may_call_is_documented(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/responses/{response_id}/input_items",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v1/tokenize",
        "/v1/detokenize",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/me",
        "/v1/usage",
        "/admin/usage",
        "/admin/requests",
        "/admin/requests/{id}",
        "/admin/holds",
        "/admin/subjects/{subject}/export",
        "/admin/subjects/{subject}/erase",
        "/admin/subjects/{subject}/hold",
        "/admin/subjects/{subject}/release",
        "/admin/audit",
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/cancel",
        *(f"{at}{of}" for at in ("/v1/keys", "/admin/keys") for of in KEY_ADDRESSES),
        "/health",
        "/ready",
    }


def test_bodies_of_keys_are_whole_schemas(document: dict[str, Any]) -> None:
    for at, required in (("/v1/keys", {"name"}), ("/admin/keys", {"name", "owner"})):
        body = document["paths"][at]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["required"]) == required
        assert body["additionalProperties"] is False
        # Nothing that points to a place that the document lacks.
        assert "$ref" not in str(body)
        limits = body["properties"]["limits"]["anyOf"][0]["properties"]
        assert limits.keys() == LimitPolicy.model_fields.keys()


async def test_document_and_page_are_served_without_an_outside_network() -> None:
    async with client() as http:
        assert (await http.get("/openapi.json")).json()["info"]["title"] == "Comp AI"
        page = await http.get("/docs")
        assert page.status_code == 200
        assert "https://" not in page.text
        assert (await http.get("/docs/assets/swagger-ui-bundle.js")).status_code == 200


async def test_health() -> None:
    async with client(Check("x", _no)) as http:
        assert (await http.get("/health")).json() == {"status": "ok"}


@pytest.mark.parametrize("broken", [_no, _never])
async def test_ready_names_the_part_that_does_not_work(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.http_app._READY_TIMEOUT_S", 0.05)
    async with client(Check("good", _yes), Check("bad", broken)) as http:
        response = await http.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"ready": False, "parts": {"good": True, "bad": False}}


async def test_ready() -> None:
    async with client(Check("good", _yes)) as http:
        response = await http.get("/ready")
    assert response.status_code == 200
    assert response.json() == {"ready": True, "parts": {"good": True}}
