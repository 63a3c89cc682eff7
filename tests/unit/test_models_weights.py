"""Weights and adapters are found where the settings say, or the refusal names the setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.models.weights import adapter_rank, find_adapter, find_weights

SETTING = "args.adapters.0.weights"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "pirate"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 4}')
    return folder


def test_a_folder_is_looked_for_below_the_models_path(tmp_path: Path, adapter: Path) -> None:
    assert find_adapter(SETTING, "pirate", tmp_path) == str(adapter)


def test_an_absolute_folder_is_taken_as_it_is(adapter: Path) -> None:
    assert find_adapter(SETTING, str(adapter), Path("/nowhere")) == str(adapter)


def test_a_name_of_the_hub_is_left_to_the_engine() -> None:
    assert find_weights("args.weights", "hub:org/model", Path("/nowhere")) == "org/model"


def test_a_missing_adapter_is_refused_with_setting_value_and_what_is_allowed(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError) as refused:
        find_adapter(SETTING, "pirat", tmp_path)
    assert str(refused.value) == (
        "args.adapters.0.weights is 'pirat'; allowed: a folder with adapter_config.json; "
        f"looked in {tmp_path}/pirat."
    )


def test_an_adapter_is_no_model(tmp_path: Path, adapter: Path) -> None:
    assert adapter.is_dir()
    with pytest.raises(ConfigError, match=r"args.weights is 'pirate'.*config.json"):
        find_weights("args.weights", "pirate", tmp_path)


@pytest.mark.parametrize(
    ("config", "rank"),
    [({"r": 4}, 4), ({"r": 8, "rank_pattern": {"q_proj": 24}}, 24), ({"r": 8, "lora_alpha": 1}, 8)],
)
def test_the_rank_is_the_largest_that_the_adapter_states(
    adapter: Path, config: dict[str, object], rank: int
) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_rank(SETTING, str(adapter)) == rank


@pytest.mark.parametrize(
    "config", ["{", "[]", "{}", '{"r": "high"}', '{"r": 4, "rank_pattern": 1}']
)
def test_an_adapter_in_another_form_is_refused(adapter: Path, config: str) -> None:
    (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(ConfigError, match="PEFT"):
        adapter_rank(SETTING, str(adapter))


def test_the_rank_of_an_adapter_from_the_hub_is_not_known() -> None:
    assert adapter_rank(SETTING, "org/adapter") is None
