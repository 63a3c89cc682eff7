"""What a model's `args` ask of vLLM, as Ray's LLMServer is told it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from deployments import engine, model
from deployments.engine import leave_nodes_as_they_are, llm_config
from deployments.model import placement
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


def args(**more: Any) -> dict[str, Any]:
    return {"name": "base", "weights": "base", "device": "cpu", **more}


def parsed(**more: Any) -> ModelArgs:
    return parse_config(ModelArgs, args(**more), "args")


def told(adapters: list[str], **arguments: Any) -> LLMConfig:
    named = [{"name": name, "weights": name} for name in adapters]
    return llm_config(parsed(adapters=named, engine=arguments))


def engine_arguments(adapters: list[str], **arguments: Any) -> dict[str, Any]:
    given: dict[str, Any] = told(adapters, **arguments).engine_kwargs
    return given


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


def test_nothing_is_told_to_rays_statistics() -> None:
    # A method that Ray had renamed would be overridden in vain.
    assert "_start_engine" in vars(LLMServer.__mro__[1])
    assert "_start_engine" in vars(engine._Server)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"replica_cpus": 2},
        {"device": "gpu"},
        {"device": "gpu", "accelerator_type": "H100", "replica_cpus": 0},
        {
            "device": "gpu",
            "accelerator_type": "L4",
            "engine": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        },
    ],
)
def test_placement_is_that_of_rays_library_and_the_replica(
    folder: Path, more: dict[str, Any]
) -> None:
    wanted = parsed(**more)
    theirs = llm_config(wanted).get_engine_config()
    ours = placement(wanted)
    ours[0]["CPU"] -= wanted.replica_cpus
    assert [{k: v for k, v in one.items() if v} for one in ours] == theirs.placement_bundles
    assert theirs.placement_strategy == "PACK"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"device": "gpu", "accelerator_type": "H1"}, r"args\.accelerator_type is 'H1'.*H100"),
        (
            {"engine": {"tensor_parallel_size": "two"}},
            r"args\.engine\.tensor_parallel_size is 'two'",
        ),
        ({"engine": {"pipeline_parallel_size": 0}}, r"args\.engine\.pipeline_parallel_size is 0"),
        ({"weights": "gone"}, r"args\.weights is 'gone'"),
        ({"adapters": [{"name": "a", "weights": "gone"}]}, r"args\.adapters\.0\.weights is 'gone'"),
    ],
)
def test_wrong_args_are_refused_where_the_application_is_built(
    folder: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        model.build(args(**more))


def test_an_argument_that_vllm_does_not_know_is_found_by_the_check(folder: Path) -> None:
    model.check(args(engine={"max_num_seqs": 4}))
    with pytest.raises(ConfigError, match=r"args\.engine is \['max_seqs'\].*max_seqs"):
        model.check(args(engine={"max_seqs": 4}))


def test_an_application_is_built_without_vllm(folder: Path) -> None:
    program = (
        "import json, sys; from deployments.model import build; build(json.loads(sys.argv[1]));"
        "print([name for name in ('vllm', 'torch') if name in sys.modules])"
    )
    built = subprocess.run(
        [sys.executable, "-c", program, json.dumps(args())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert built.stdout.strip() == "[]", built.stderr
