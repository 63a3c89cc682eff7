"""Starts the systems that are compared, each in front of the same kind of engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from load_tests.bench import ways
from load_tests.bench.asking import Door
from load_tests.bench.cost import Processes, below
from load_tests.bench.engines import Engine, cpu_engine, serving
from tests.serve_configs import suite_config
from tests.stack_runner import PROJECT, free_ports, running_stack, wait_until

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
def bare_vllm(engine: Engine | None = None) -> Iterator[System]:
    """Run vLLM's own server; with the model of `configs/local-cpu.yaml` where none is given."""
    engine = engine or cpu_engine()
    port = free_ports(1)[0]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", engine.weights, "--served-model-name", engine.model),
        *("--host", "127.0.0.1", "--port", str(port), *engine.flags()),
    ]
    url = f"http://127.0.0.1:{port}"
    with _running(command, engine.environment, f"{url}/health"):
        yield System("bare vLLM", Door(url=url), list)


@contextmanager
def comp_ai(engine: Speed | Engine, **settings: str) -> Iterator[System]:
    """Run Comp AI with all that is on when it is shipped: JWT, limits, log, nginx."""
    with running_stack(_our_config(engine), **settings) as stack:
        token = stack.cli("token", "--subject", "bench").strip()
        door = Door(url=stack.url, headers={"Authorization": f"Bearer {token}"})
        yield System("Comp AI", door, lambda: _without_engine(stack.process.pid))


@contextmanager
def carriers(speed: Speed) -> Iterator[list[System]]:
    """Run a gateway for each of the ways to the replica, behind HAProxy and without nginx.

    The model counts as a part of each, because what it does depends on the way.
    """
    config = suite_config(real_model=False, gateways=1)
    config["applications"][1:] = ways.applications(vars(speed))
    with running_stack(config) as stack:
        yield [
            System(
                carrier.title,
                Door(url=f"{stack.serve_url}/{way}"),
                lambda: below(stack.process.pid),
            )
            for way, carrier in ways.WAYS.items()
        ]


@contextmanager
def ray_direct_streaming(speed: Speed) -> Iterator[System]:
    """Run Ray Serve LLM with its direct streaming: HAProxy asks the replica, no gateway."""
    flags = {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    with _ray_serve_llm(speed, flags) as started:
        yield System("Ray's direct streaming", started.door, lambda: below(started.pid))


@contextmanager
def ray_serve_llm(engine: Speed | Engine) -> Iterator[System]:
    """Run Ray Serve LLM's own ingress, `build_openai_app`, on a Ray of its own."""
    with _ray_serve_llm(engine, {}) as started:
        yield System("Ray Serve LLM", started.door, lambda: _without_engine(started.pid))


@dataclass(frozen=True)
class _Started:
    door: Door
    pid: int


@contextmanager
def _ray_serve_llm(engine: Speed | Engine, flags: Mapping[str, str]) -> Iterator[_Started]:
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "load_tests.bench.ray_llm", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", **flags}
    if isinstance(engine, Engine):
        command += ["--engine", engine.dumps()]
        environment |= engine.environment
    else:
        command += ["--time-to-first-token-s", str(engine.time_to_first_token_s)]
        command += ["--time-per-token-s", str(engine.time_per_token_s)]
    url = f"http://127.0.0.1:{port}"
    with _running(command, environment, f"{url}/v1/models") as process:
        yield _Started(Door(url=url), process.pid)


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


def has_litellm() -> bool:
    """Tell whether LiteLLM is installed where `make bench` installs it."""
    return LITELLM.exists()


def _our_config(engine: Speed | Engine) -> dict[str, Any]:
    if isinstance(engine, Engine):
        config = serving(engine)
    else:
        config = suite_config(real_model=False, gateways=1)
        model = config["applications"][1]
        model["args"]["speed"] = vars(engine)
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
    names = (":Model:", ":LLMServer", "FakeServer", "VLLM::", "EngineCore", "RayWorker")
    return any(name in title for name in names)


@contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], ready_url: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends, all that it started included."""
    with tempfile.NamedTemporaryFile(prefix="bench-", suffix=".log") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, cwd=PROJECT
        )
        try:
            _wait_until_it_answers(process, ready_url, Path(log.name))
            yield process
        finally:
            _end(process)


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    def answering() -> bool:
        ended = process.poll() is not None
        assert not ended, f"{process.args!r} ended"
        try:
            return httpx.get(url, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(answering, url, _STARTS_WITHIN_S)
    except AssertionError as error:
        error.add_note(log.read_text(errors="replace")[-4000:])
        raise


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
