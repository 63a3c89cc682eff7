"""Where the weights of models and adapters lie."""

from __future__ import annotations

from pathlib import Path

import orjson

from serve_app.errors import ConfigError

_HUB = "hub:"


def find_weights(setting: str, value: str, models_path: Path) -> str:
    """Return the folder or the hub's name that `value` stands for.

    Raises:
        ConfigError: there is no folder with a model.
    """
    return _find(setting, value, models_path, "config.json", " `comp-ai model fetch` makes one")


def find_adapter(setting: str, value: str, models_path: Path) -> str:
    """Return the folder or the hub's name of the LoRA adapter that `value` stands for.

    Raises:
        ConfigError: there is no folder with an adapter.
    """
    return _find(setting, value, models_path, "adapter_config.json", "")


def adapter_rank(setting: str, folder: str) -> int | None:
    """Return the rank that the adapter in `folder` states; None where it is not on this disk.

    Raises:
        ConfigError: its adapter_config.json cannot be read or states no rank.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        config = orjson.loads(file.read_bytes())
        ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(setting, folder, "an adapter_config.json in PEFT's form") from None
    return max(ranks)


def _find(setting: str, value: str, models_path: Path, file: str, hint: str) -> str:
    if value.startswith(_HUB):
        return value.removeprefix(_HUB)
    folder = models_path / Path(value).expanduser()
    if not (folder / file).is_file():
        raise ConfigError(setting, value, f"a folder with {file}; looked in {folder}.{hint}")
    return str(folder)
