"""Starts the systems that are compared, each in front of the same kind of engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from load_tests.bench.asking import Door
from load_tests.bench.cost import Processes, below
from tests.serve_configs import REAL_MODEL, suite_config
from tests.stack_runner import PROJECT, free_ports, models_path, running_stack, wait_until

LITELLM = PROJECT / ".tools" / "litellm" / "bin" / "litellm"
_STARTS_WITHIN_S = 400.0
_LITELLM_KEY = "sk-bench-0123456789"
# What bounds a client in an ordinary setting must not bound the comparison.
_NO_BOUND = 1_000_000


@dataclass(frozen=True)
class Speed:
    """Of the fake engine, seconds."""

    time_to_first_token_s: float
    time_per_token_s: float


@dataclass(frozen=True)
class System:
    """One of those that are compared.

    Args:
        processes: those of the system, without the engine.
    """

    name: str
    door: Door
    processes: Processes


@contextmanager
def bare_fake(speed: Speed) -> Iterator[System]:
    """Run the fake engine behind uvicorn alone."""
    port = free_ports(1)[0]
    command = [
        *(sys.executable, "-m", "load_tests.bench.fake_server", "--port", str(port)),
        *("--time-to-first-token-s", str(speed.time_to_first_token_s)),
        *("--time-per-token-s", str(speed.time_per_token_s)),
    ]
    url = f"http://127.0.0.1:{port}"
    with _running(command, {}, f"{url}/health"):
        yield System("bare engine", Door(url=url), list)


@contextmanager
def bare_vllm() -> Iterator[System]:
    """Run vLLM's own server with the weights and the arguments of `configs/local-cpu.yaml`."""
    port = free_ports(1)[0]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(models_path() / REAL_MODEL), "--served-model-name", REAL_MODEL),
        *("--host", "127.0.0.1", "--port", str(port)),
        *(flag for name, value in shipped_engine().items() for flag in _flag(name, value)),
    ]
    url = f"http://127.0.0.1:{port}"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with _running(command, environment, f"{url}/health"):
        yield System("bare vLLM", Door(url=url), list)


@contextmanager
def comp_ai(speed: Speed | None, **settings: str) -> Iterator[System]:
    """Run Comp AI with all that is on when it is shipped: JWT, limits, log, nginx.

    Args:
        speed: of the fake engine; the real one where it is None.
    """
    with running_stack(_our_config(speed), **settings) as stack:
        token = stack.cli("token", "--subject", "bench").strip()
        door = Door(url=stack.url, headers={"Authorization": f"Bearer {token}"})
        yield System("Comp AI", door, lambda: _without_engine(stack.process.pid))


@contextmanager
def ray_serve_llm(speed: Speed | None) -> Iterator[System]:
    """Run Ray Serve LLM's own ingress, `build_openai_app`, on a Ray of its own."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "load_tests.bench.ray_llm", "--port", str(port)]
    if speed is not None:
        command += ["--time-to-first-token-s", str(speed.time_to_first_token_s)]
        command += ["--time-per-token-s", str(speed.time_per_token_s)]
    url = f"http://127.0.0.1:{port}"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with _running(command, environment, f"{url}/v1/models") as process:
        yield System("Ray Serve LLM", Door(url=url), lambda: _without_engine(process.pid))


@contextmanager
def litellm(engine: Door, model: str) -> Iterator[System]:
    """Run LiteLLM's proxy in front of `engine`, with its master key and without its database.

    The database needs Prisma's engines, which are downloaded at run time from a host of its own.
    """
    port = free_ports(1)[0]
    upstream = {"model": f"hosted_vllm/{model}", "api_base": f"{engine.url}/v1"}
    config = {
        "model_list": [{"model_name": model, "litellm_params": upstream}],
        "general_settings": {"master_key": _LITELLM_KEY},
    }
    url = f"http://127.0.0.1:{port}"
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [str(LITELLM), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
        with _running(command, environment, f"{url}/health/readiness") as process:
            door = Door(url=url, headers={"Authorization": f"Bearer {_LITELLM_KEY}"})
            yield System("LiteLLM", door, lambda: below(process.pid))


def shipped_engine() -> dict[str, Any]:
    """Return the engine arguments of `configs/local-cpu.yaml`."""
    engine: dict[str, Any] = _shipped()["applications"][1]["args"]["engine"]
    return engine


def has_litellm() -> bool:
    """Tell whether LiteLLM is installed where `make bench` installs it."""
    return LITELLM.exists()


def _shipped() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((PROJECT / "configs" / "local-cpu.yaml").read_text())
    return config


def _our_config(speed: Speed | None) -> dict[str, Any]:
    if speed is None:
        config = _shipped()
    else:
        config = suite_config(real_model=False, gateways=1)
        model = config["applications"][1]
        model["args"]["speed"] = vars(speed)
        model["deployments"][0] |= {"max_ongoing_requests": 5000, "max_queued_requests": 5000}
    gateway = config["applications"][0]["deployments"][0]
    gateway["max_ongoing_requests"] = 5000
    gateway["graceful_shutdown_timeout_s"] = 10
    limits = {"requests_per_minute": _NO_BOUND, "concurrency": 5000}
    gateway["user_config"]["limits"]["default"] = limits
    return config


def _without_engine(pid: int) -> list[psutil.Process]:
    return [process for process in below(pid) if not _is_engine(process)]


def _is_engine(process: psutil.Process) -> bool:
    """Tell whether it is a replica with a model, or what vLLM starts for one."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return True
    names = (":Model:", ":LLMServer", "FakeServer", "VLLM::", "EngineCore")
    return any(name in title for name in names)


def _flag(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    return [flag, str(value)]


@contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], ready_url: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends, all that it started included."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, cwd=PROJECT
        )
        try:
            wait_until(_answering(process, ready_url, log.name), ready_url, _STARTS_WITHIN_S)
            yield process
        finally:
            _end(process)


def _answering(process: subprocess.Popen[bytes], url: str, log: object) -> Callable[[], bool]:
    def answering() -> bool:
        assert process.poll() is None, f"{process.args!r} ended, see {log}"
        try:
            return httpx.get(url, timeout=5).status_code < 500
        except httpx.HTTPError:
            return False

    return answering


def _end(process: subprocess.Popen[bytes]) -> None:
    family = below(process.pid)
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=30)
    for straggler in alive:
        straggler.kill()
    process.wait(10)


def install_litellm() -> None:
    """Install LiteLLM's proxy, as `load_tests/bench/litellm.txt` pins it, into an own venv."""
    folder = LITELLM.parents[1]
    shutil.rmtree(folder, ignore_errors=True)
    uv = PROJECT / ".tools" / "bin" / "uv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    pins = PROJECT / "load_tests" / "bench" / "litellm.txt"
    install = [str(uv), "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
    subprocess.run([*install, "--require-hashes", "--requirement", str(pins)], check=True)
