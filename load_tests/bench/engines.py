"""The engines of the comparison that are real: vLLM with the same arguments in every system."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tests.serve_configs import REAL_MODEL, shipped
from tests.stack_runner import models_path

GPU_MODEL = "llama-7b-dummy"
_GPU_FILE = Path(__file__).with_name("gpu.yaml")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One vLLM: a model and the arguments that every system gives it.

    Args:
        model: name that it is asked under.
        weights: folder with config.json and tokenizer.
        arguments: vLLM's engine arguments by their Python names.
        environment: variables of vLLM's processes.
    """

    model: str
    weights: str
    device: Literal["cpu", "gpu"]
    arguments: dict[str, Any]
    environment: dict[str, str]

    def dumps(self) -> str:
        """Return it as text for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Engine:
        """Return what `dumps` was given."""
        return cls(**json.loads(text))

    def flags(self) -> list[str]:
        """Return the arguments as vLLM's own server takes them."""
        return [flag for name, value in self.arguments.items() for flag in _flag(name, value)]


def cpu_engine() -> Engine:
    """Return the model and the arguments of `configs/local-cpu.yaml`."""
    return Engine(
        model=REAL_MODEL,
        weights=str(models_path() / REAL_MODEL),
        device="cpu",
        arguments=_model_args(shipped("local-cpu"))["engine"],
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    )


@contextmanager
def gpu_engine() -> Iterator[Engine]:
    """Make the folder of the model of gpu.yaml, with the tokenizer of the small model."""
    told = yaml.safe_load(_GPU_FILE.read_text())
    with tempfile.TemporaryDirectory(prefix="bench-model-") as folder:
        for name in _TOKENIZER:
            shutil.copy(models_path() / REAL_MODEL / name, folder)
        (Path(folder) / "config.json").write_text(json.dumps(told["model"]))
        yield Engine(
            model=GPU_MODEL,
            weights=folder,
            device="gpu",
            arguments=_model_args(shipped("single-gpu"))["engine"] | told["engine"],
            environment={"HF_HUB_OFFLINE": "1"},
        )


def serving(engine: Engine) -> dict[str, Any]:
    """Return the shipped Serve config of the engine's device, with this model alone."""
    config = shipped("local-cpu" if engine.device == "cpu" else "single-gpu")
    gateway, model = config["applications"]
    policy = gateway["deployments"][0]["user_config"]["models"][0]
    policy |= {"name": engine.model, "app": engine.model}
    model["name"] = engine.model
    model["args"] |= {
        "name": engine.model,
        "weights": engine.weights,
        "engine": deepcopy(engine.arguments),
    }
    model["deployments"][0]["name"] = f"Model:{engine.model}"
    model["deployments"][0]["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
    return config


def _model_args(config: dict[str, Any]) -> dict[str, Any]:
    args: dict[str, Any] = config["applications"][1]["args"]
    return args


def _flag(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
