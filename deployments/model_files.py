"""Where the files of a model and of its adapters are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deployments.options import ModelArgs
from serve_app.models.weights import adapter_rank, find_adapter, find_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter: the name that the engine serves it under, its folder, and its rank.

    The rank is 0 where the engine is to fetch the files, and so nobody knows it yet.
    """

    name: str
    path: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The weights of a model, a folder or a name that the engine fetches, and its adapters."""

    weights: str
    adapters: tuple[AdapterFiles, ...]


def find_files(model: ModelArgs, models_path: Path) -> ModelFiles:
    """Return where the files of `model` are. Raises ConfigError where some are missing."""
    return ModelFiles(
        weights=find_weights("args.weights", model.weights, models_path),
        adapters=tuple(
            _adapter(f"args.adapters.{index}.weights", adapter.name, adapter.weights, models_path)
            for index, adapter in enumerate(model.adapters)
        ),
    )


def _adapter(setting: str, name: str, weights: str, models_path: Path) -> AdapterFiles:
    path = find_adapter(setting, weights, models_path)
    return AdapterFiles(name=name, path=path, rank=adapter_rank(setting, path) or 0)
