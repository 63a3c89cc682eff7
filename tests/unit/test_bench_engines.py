"""The engines of the comparison: every system is given the same one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from load_tests.bench.engines import GPU_MODEL, Engine, gpu_engine, serving
from tests.serve_configs import REAL_MODEL

ENGINE = Engine(
    model="small",
    weights="/models/small",
    device="gpu",
    arguments={
        "max_num_seqs": 8,
        "enforce_eager": True,
        "enable_lora": False,
        "compilation_config": {"mode": 0},
    },
    environment={"HF_HUB_OFFLINE": "1"},
)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    small = tmp_path / REAL_MODEL
    small.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (small / name).write_text(name)
    monkeypatch.setenv("COMP_AI_MODEL_PATH", str(tmp_path))
    with gpu_engine() as engine:
        yield engine


def test_engine_reaches_another_process_whole() -> None:
    assert Engine.loads(ENGINE.dumps()) == ENGINE


def test_arguments_as_flags() -> None:
    told = ["--max-num-seqs", "8", "--enforce-eager", "--compilation-config", '{"mode": 0}']
    assert ENGINE.flags() == told


def test_made_up_model_has_the_shape_of_the_file_and_a_tokenizer(gpu: Engine) -> None:
    folder = Path(gpu.weights)
    shape = json.loads((folder / "config.json").read_text())
    assert (shape["num_hidden_layers"], shape["hidden_size"]) == (32, 4096)
    assert (folder / "tokenizer.json").read_text() == "tokenizer.json"
    assert gpu.arguments["load_format"] == "dummy"
    # What the shipped config says of the engine holds where the file says nothing.
    assert gpu.arguments["scheduling_policy"] == "priority"


def test_comp_ai_serves_that_engine_and_no_other(gpu: Engine) -> None:
    gateway, model = serving(gpu)["applications"]
    offered = gateway["deployments"][0]["user_config"]["models"]
    assert [(one["name"], one["app"]) for one in offered] == [(GPU_MODEL, GPU_MODEL)]
    assert model["args"]["engine"] == gpu.arguments
    assert (model["args"]["weights"], model["args"]["device"]) == (gpu.weights, "gpu")
    assert model["deployments"][0]["name"] == f"Model:{GPU_MODEL}"
    replicas = model["deployments"][0]["autoscaling_config"]
    assert (replicas["min_replicas"], replicas["max_replicas"]) == (1, 1)
