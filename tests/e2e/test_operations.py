"""What an operator sees: health, metrics, logs, closed doors, a lean gateway."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from tests.serve_configs import (
    ADAPTER,
    COLD_MODEL,
    COLD_MODEL_REFUSED,
    FAKE_MODEL,
    REAL_MODEL,
)
from tests.stack_runner import BOOTSTRAP_KEY, RunningStack, wait_until

SECRET_PROMPT = "tell nobody about the yellow submarine"


def _ask(stack: RunningStack, request_id: str, model: str = FAKE_MODEL) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": SECRET_PROMPT}]}
    headers = stack.bootstrap | {"X-Request-ID": request_id}
    answer = httpx.post(
        f"{stack.url}/v1/chat/completions", headers=headers, json=body | {"max_tokens": 5}
    )
    assert answer.status_code == 200
    assert "queue;dur=" in answer.headers["server-timing"]


def test_health_and_readiness(stack: RunningStack) -> None:
    assert httpx.get(f"{stack.url}/health").json() == {"status": "ok"}
    ready = httpx.get(f"{stack.url}/ready", timeout=10)
    assert ready.status_code == 200, ready.text
    parts = ready.json()["parts"]
    assert parts == {
        "limits": True,
        "request_log": True,
        f"model {REAL_MODEL}": True,
        f"model {ADAPTER}": True,
        f"model {FAKE_MODEL}": True,
        # Scaled to zero is ready: a request starts one.
        f"model {COLD_MODEL}": True,
        f"model {COLD_MODEL_REFUSED}": True,
    }


def test_status_command(stack: RunningStack) -> None:
    assert json.loads(stack.cli("status", "--json"))["ready"] is True


def test_serve_status_works_beside_it(stack: RunningStack) -> None:
    token = stack.home / "run" / "ray-token"
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "serve"),
            "status",
            "-a",
            f"http://127.0.0.1:{stack.env['COMP_AI_DASHBOARD_PORT']}",
        ],
        env=stack.env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gateway" in done.stdout


def test_the_dashboard_wants_the_token(stack: RunningStack) -> None:
    port = stack.env["COMP_AI_DASHBOARD_PORT"]
    answer = httpx.get(f"http://127.0.0.1:{port}/api/serve/applications/")
    assert answer.status_code in (401, 403)


@pytest.mark.parametrize(
    "path", ["/metrics", "/-/routes", "/-/healthz", "/-/refused/413", "/api/serve/applications/"]
)
def test_what_is_not_public_is_not_found(stack: RunningStack, path: str) -> None:
    for prefix in ("", "/api/v1/comp-ai"):
        answer = httpx.get(f"{stack.url}{prefix}{path}", headers=stack.bootstrap)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("prefix", ["", "/api/v1/comp-ai"])
def test_the_docs_page_needs_nothing_from_outside(stack: RunningStack, prefix: str) -> None:
    page = httpx.get(f"{stack.url}{prefix}/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert httpx.get(f"{stack.url}{prefix}/docs/assets/{asset}").status_code == 200
    document = httpx.get(f"{stack.url}{prefix}/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]


def test_a_header_cannot_turn_off_disconnects_or_deadlines(stack: RunningStack) -> None:
    body = {"model": FAKE_MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 30}
    headers = stack.bootstrap | {
        "x-request-timeout-seconds": "0.01",
        "serve_multiplexed_model_id": "x",
    }
    answer = httpx.post(f"{stack.url}/v1/chat/completions", headers=headers, json=body)
    assert answer.status_code == 200


def test_one_json_line_a_request_without_text_or_secret(stack: RunningStack) -> None:
    request_id = uuid.uuid4().hex
    _ask(stack, request_id)
    log = stack.home / "up.log"

    def line() -> dict[str, object] | None:
        for text in log.read_text(errors="replace").splitlines():
            if request_id in text and text.startswith("{"):
                found: dict[str, object] = json.loads(text)
                return found
        return None

    wait_until(lambda: line() is not None, "a line on stdout", 20)
    found = line()
    assert found is not None
    assert found["action"] == "request"
    assert found["principal_id"] == "bootstrap"
    assert found["completion_tokens"] == 5


def test_no_secret_and_no_prompt_in_any_log_file(stack: RunningStack) -> None:
    _ask(stack, uuid.uuid4().hex)
    _ask(stack, uuid.uuid4().hex, REAL_MODEL)
    folders = [stack.home / "logs", stack.home / "ray"]
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
    assert any("worker-" in file.name for file in files)
    for file in [*files, stack.home / "up.log"]:
        text = file.read_text(errors="replace")
        assert BOOTSTRAP_KEY not in text, file
        assert SECRET_PROMPT not in text, file


def test_metrics_of_every_kind_are_exported(stack: RunningStack) -> None:
    _ask(stack, uuid.uuid4().hex, REAL_MODEL)
    wanted = {
        "ray_comp_ai_requests_total",
        "ray_comp_ai_time_to_first_token_s_bucket",
        "ray_comp_ai_request_duration_s_bucket",
        "ray_comp_ai_prompt_tokens_total",
        "ray_comp_ai_completion_tokens_total",
        "ray_comp_ai_queue_s_bucket",
        "ray_comp_ai_queue_waiting",
        "ray_comp_ai_log_spool_depth",
        "ray_comp_ai_log_lag_s",
        "ray_comp_ai_log_rows_written_total",
        "ray_comp_ai_postgres_write_s_bucket",
    }

    def exported() -> set[str]:
        text = httpx.get(stack.metrics_url).text
        return {line.split("{")[0] for line in text.splitlines() if line.startswith("ray_comp_ai")}

    wait_until(lambda: wanted <= exported(), f"missing {wanted - exported()}", 60)


def test_the_gateway_process_has_loaded_neither_torch_nor_vllm(stack: RunningStack) -> None:
    for replica in stack.replicas("Gateway"):
        files = [mapped.path for mapped in replica.memory_maps()]
        assert not [path for path in files if "/torch/" in path or "/vllm/" in path]


def test_the_gateways_modules_import_neither_torch_nor_vllm() -> None:
    script = (
        "import sys, deployments.gateway\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_every_parameter_that_passes_is_one_that_the_engine_knows() -> None:
    script = (
        "import json\n"
        "from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest\n"
        "from vllm.entrypoints.openai.completion.protocol import CompletionRequest\n"
        "from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest\n"
        "from vllm.entrypoints.pooling.scoring import protocol as scoring\n"
        "from vllm.entrypoints.serve.tokenize import protocol as tokenize\n"
        "from serve_app.completions.kinds import Kind\n"
        "known = {\n"
        " Kind.CHAT: [ChatCompletionRequest],\n"
        " Kind.TEXT: [CompletionRequest],\n"
        " Kind.EMBEDDINGS: [EmbeddingCompletionRequest],\n"
        " Kind.RERANK: [scoring.RerankRequest],\n"
        " Kind.SCORE: [scoring.ScoreDataRequest, scoring.ScoreQueriesDocumentsRequest,\n"
        "  scoring.ScoreQueriesItemsRequest, scoring.ScoreTextRequest],\n"
        " Kind.TOKENIZE: [tokenize.TokenizeCompletionRequest, tokenize.TokenizeChatRequest],\n"
        " Kind.DETOKENIZE: [tokenize.DetokenizeRequest],\n"
        "}\n"
        "fields = {k: {f for c in cs for f in c.model_fields} for k, cs in known.items()}\n"
        # What says what we keep is taken out on the way, see `govern`.
        "ours = {'store'}\n"
        "print(json.dumps({k: sorted(k.endpoint.parameters - fields[k] - ours) for k in fields}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    unknown = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(unknown) >= {"/v1/chat/completions", "/v1/embeddings", "/rerank", "/tokenize"}
    assert not any(unknown.values())
