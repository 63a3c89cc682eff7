"""Preparing the model: only whole results are used, and a repeat does nothing."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from serve_app.models import fetch
from serve_app.models.fetch import MANIFEST, SMOLLM2, ModelPreparationFailed


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "source.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setattr(fetch, "find_gguf", lambda: file)
    return file


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand for the converter, which takes half a minute; the e2e suite runs the real one."""
    made: list[Path] = []

    def convert(_source: Path, work: Path) -> None:
        made.append(work)
        (work / "config.json").write_text("{}")

    monkeypatch.setattr(fetch, "_run_converter", convert)
    return made


def test_a_model_is_converted_once(source: Path, runs: list[Path], tmp_path: Path) -> None:
    said: list[str] = []
    first = fetch.fetch_smollm2(tmp_path / "models", said.append)
    assert first == tmp_path / "models" / SMOLLM2
    assert fetch.fetch_smollm2(tmp_path / "models", said.append) == first
    assert len(runs) == len(said) == 1
    manifest = orjson.loads((first / MANIFEST).read_bytes())
    assert len(manifest["source"]["sha256"]) == 64
    assert set(manifest["made_with"]) == {"transformers", "gguf"}


@pytest.mark.parametrize("damage", ["manifest", "file", "size", "source"])
def test_a_damaged_model_is_made_again(
    source: Path, runs: list[Path], tmp_path: Path, damage: str
) -> None:
    folder = fetch.fetch_smollm2(tmp_path, lambda _: None)
    match damage:
        case "manifest":
            (folder / MANIFEST).write_text("{")
        case "file":
            (folder / "config.json").unlink()
        case "size":
            (folder / "config.json").write_text("{} ")
        case "source":
            source.write_bytes(b"other weights")
    fetch.fetch_smollm2(tmp_path, lambda _: None)
    assert len(runs) == 2


def test_a_failed_conversion_leaves_nothing_that_looks_like_a_model(
    source: Path, tmp_path: Path
) -> None:
    # The real converter, on a file that is no model.
    with pytest.raises(ModelPreparationFailed, match="conversion failed"):
        fetch.fetch_smollm2(tmp_path / "models", lambda _: None)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{SMOLLM2}.lock"]


def test_the_installed_package_holds_the_weights() -> None:
    assert fetch.find_gguf().stat().st_size > 50_000_000
