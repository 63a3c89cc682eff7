"""What a model's `args` ask of vLLM, as Ray's LLMServer is told it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.serve.llm import LLMConfig

from deployments.model import leave_nodes_as_they_are, llm_config
from deployments.options import ModelArgs
from serve_app.config import parse_config
from serve_app.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMP_AI_MODEL_PATH", str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for name, rank in (("small", 4), ("large", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return tmp_path


def told(adapters: list[str], **engine: Any) -> LLMConfig:
    raw = {
        "name": "base",
        "weights": "base",
        "device": "cpu",
        "adapters": [{"name": name, "weights": name} for name in adapters],
        "engine": engine,
    }
    return llm_config(parse_config(ModelArgs, raw, "args"))


def engine_arguments(adapters: list[str], **engine: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = told(adapters, **engine).engine_kwargs
    return arguments


def test_ray_prepares_no_node(folder: Path) -> None:
    config = told([])
    # What we set must be there: a field that Ray had renamed would be set in vain.
    assert config.get_or_create_callback().ctx.run_init_node is True
    leave_nodes_as_they_are(config)
    assert config.get_or_create_callback().ctx.run_init_node is False


def test_without_adapters_the_engine_gets_what_is_written(folder: Path) -> None:
    assert engine_arguments([], max_num_seqs=4) == {"max_num_seqs": 4}


def test_adapters_are_loaded_at_start_with_room_for_all_and_the_largest_rank(folder: Path) -> None:
    assert engine_arguments(["small", "large"]) == {
        "enable_lora": True,
        "lora_modules": [
            {"name": "small", "path": str(folder / "small")},
            {"name": "large", "path": str(folder / "large")},
        ],
        "max_loras": 2,
        "max_lora_rank": 32,
    }


def test_what_the_engine_is_told_wins(folder: Path) -> None:
    arguments = engine_arguments(["small"], max_lora_rank=64, max_loras=8)
    assert (arguments["max_lora_rank"], arguments["max_loras"]) == (64, 8)


def test_a_missing_adapter_is_refused_before_the_engine_starts(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"args\.adapters\.1\.weights is 'gone'"):
        engine_arguments(["small", "gone"])
