"""Preparing the model: only whole results are used, and a repeat does nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from serve_app.errors import ConfigError
from serve_app.models import fetch as fetching
from serve_app.models.fetch import MANIFEST, MINILM, RECIPES, SMOLLM2, ModelPreparationFailed, fetch


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "source.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setattr(fetching, "find_source", lambda _recipe: file)
    return file


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand for the converter, which takes half a minute; the e2e suite runs the real one."""
    made: list[Path] = []

    def convert(_source: Path, work: Path) -> None:
        made.append(work)
        (work / "config.json").write_text("{}")

    recipe = replace(RECIPES[SMOLLM2], make=convert)
    monkeypatch.setitem(RECIPES, SMOLLM2, recipe)
    return made


def test_a_model_is_converted_once(source: Path, runs: list[Path], tmp_path: Path) -> None:
    said: list[str] = []
    first = fetch(SMOLLM2, tmp_path / "models", said.append)
    assert first == tmp_path / "models" / SMOLLM2
    assert fetch(SMOLLM2, tmp_path / "models", said.append) == first
    assert len(runs) == len(said) == 1
    manifest = orjson.loads((first / MANIFEST).read_bytes())
    assert len(manifest["source"]["sha256"]) == 64
    assert set(manifest["made_with"]) == {"transformers", "gguf"}


@pytest.mark.parametrize("damage", ["manifest", "file", "size", "source"])
def test_a_damaged_model_is_made_again(
    source: Path, runs: list[Path], tmp_path: Path, damage: str
) -> None:
    folder = fetch(SMOLLM2, tmp_path, lambda _: None)
    match damage:
        case "manifest":
            (folder / MANIFEST).write_text("{")
        case "file":
            (folder / "config.json").unlink()
        case "size":
            (folder / "config.json").write_text("{} ")
        case "source":
            source.write_bytes(b"other weights")
    fetch(SMOLLM2, tmp_path, lambda _: None)
    assert len(runs) == 2


def test_a_failed_conversion_leaves_nothing_that_looks_like_a_model(
    source: Path, tmp_path: Path
) -> None:
    # The real converter, on a file that is no model.
    with pytest.raises(ModelPreparationFailed, match="conversion failed"):
        fetch(SMOLLM2, tmp_path / "models", lambda _: None)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{SMOLLM2}.lock"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_installed_packages_hold_the_weights(name: str) -> None:
    assert fetching.find_source(RECIPES[name]).stat().st_size > 50_000_000


def test_the_embedding_model_is_a_copy_with_its_pooling(tmp_path: Path) -> None:
    folder = fetch(MINILM, tmp_path, lambda _: None)
    assert folder == tmp_path / MINILM
    files = orjson.loads((folder / MANIFEST).read_bytes())["files"]
    # Without these two the engine would not know how to pool, and would not normalise.
    assert {"1_Pooling/config.json", "modules.json", "model.safetensors"} <= set(files)
    (folder / "1_Pooling" / "config.json").unlink()
    fetch(MINILM, tmp_path, lambda _: None)
    assert (folder / "1_Pooling" / "config.json").is_file()


def test_a_model_that_no_package_ships_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gpt-9.*smollm2-135m-instruct, all-minilm-l6-v2"):
        fetch("gpt-9", tmp_path, lambda _: None)
