"""config.py: defaults, round trip, and errors that name the file and the field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from interp_rlhf.config import InterpConfig, PromptsConfig, ScheduleConfig
from interp_rlhf.errors import ConfigError


def test_the_file_the_preset_and_the_defaults_are_one(repository: Path):
    assert InterpConfig.from_yaml(repository / "configs/interp/observe.yaml") == InterpConfig()
    assert InterpConfig.preset("observe") == InterpConfig()
    assert InterpConfig.preset() == InterpConfig()


def test_the_preset_spells_out_every_default():
    from importlib import resources

    text = (resources.files("interp_rlhf") / "presets" / "observe.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == InterpConfig().as_mapping()


def test_every_file_to_start_from_is_valid_and_changes_what_it_says(repository: Path):
    circuits = InterpConfig.from_yaml(repository / "configs/interp/circuits.yaml")
    assert replace(circuits, circuits=InterpConfig().circuits) == InterpConfig()
    assert circuits.circuits.tasks and circuits.circuits.control and circuits.circuits.every
    assert {path.name for path in (repository / "configs/interp").iterdir()} == {"observe.yaml", "circuits.yaml"}


@pytest.mark.parametrize(
    "config",
    [
        InterpConfig(),
        InterpConfig(
            hookpoints=("embed", "layers.2.heads"),
            prompts=PromptsConfig(source="named", path="prompts.jsonl", n=8),
            schedule=ScheduleConfig(every=3),
            on_error="raise",
            headline=0,
        ),
    ],
)
def test_round_trip_through_yaml(config: InterpConfig, tmp_path: Path):
    assert InterpConfig.from_mapping(config.as_mapping()) == config
    path = tmp_path / "interp.yaml"
    path.write_text(yaml.safe_dump(config.as_mapping()), encoding="utf-8")
    assert InterpConfig.from_yaml(path) == config
    path.write_text(yaml.safe_dump({"learning_rate": 1e-5, "interp": config.as_mapping()}), encoding="utf-8")
    assert InterpConfig.from_yaml(path) == config


def test_resolve_takes_everything_attach_is_promised(repository: Path):
    path = repository / "configs/interp/observe.yaml"
    config = replace(InterpConfig(), seed=7)
    assert InterpConfig.resolve(None) == InterpConfig()
    assert InterpConfig.resolve("observe") == InterpConfig()
    assert InterpConfig.resolve(path) == InterpConfig.resolve(str(path)) == InterpConfig()
    assert InterpConfig.resolve({"seed": 7}) == config
    assert InterpConfig.resolve(config) is config
    with pytest.raises(ConfigError, match="found int"):
        InterpConfig.resolve(3)  # type: ignore[arg-type]


def test_partial_blocks_keep_the_other_defaults():
    config = InterpConfig.from_mapping({"prompts": {"n": 64}})
    assert config == replace(InterpConfig(), prompts=PromptsConfig(n=64))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"promts": {}}, ["unknown key", "promts"]),
        ({"prompts": {"number": 3}}, ["unknown key", "prompts.number"]),
        ({"prompts": {"n": 2}}, ["prompts.n", "greater than or equal to 8", "found 2"]),
        ({"prompts": {"n": "many"}}, ["prompts.n", "valid integer", "found 'many'"]),
        ({"statistics": {"directions": 20}}, ["statistics.directions", "200", "found 20"]),
        ({"statistics": {"confidence": 1.0}}, ["statistics.confidence", "less than 1", "found 1.0"]),
        ({"schedule": {"every": 0}}, ["schedule.every", "greater than 0", "found 0"]),
        ({"headline": 51}, ["headline", "less than or equal to 50", "found 51"]),
        ({"hookpoints": []}, ["hookpoints", "at least 1", "found []"]),
        ({"on_error": "ignore"}, ["on_error", "'warn'", "'raise'", "found 'ignore'"]),
        ({"reference": "ema"}, ["reference", "'cached'", "found 'ema'"]),
        ({"interp": 3}, ["expected a mapping", "found int"]),
        ({"interp": {"seed": -1}}, ["seed", "found -1"]),
        ({"seed": -1, "headline": 99}, ["(and 1 more)"]),
    ],
)
def test_wrong_values_name_file_and_field_in_one_line(block: dict[str, Any], words: list[str], tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(block), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        InterpConfig.from_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"a: [1, 2", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- 1\n- 2\n", "expected a mapping of settings, found list"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_unreadable_files_are_one_line(content: bytes | None, words: str, tmp_path: Path):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        InterpConfig.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_the_defaults(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("", encoding="utf-8")
    assert InterpConfig.from_yaml(path) == InterpConfig()


def test_unknown_presets_list_what_exists():
    with pytest.raises(ConfigError, match="'obsrve' does not exist; found observe"):
        InterpConfig.resolve("obsrve")


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        InterpConfig().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["dpo", "ppo", "grpo"])
def test_the_interp_blocks_of_complete_runs_are_valid(name: str, repository: Path):
    path = repository / "configs" / f"{name}.yaml"
    assert "interp" in yaml.safe_load(path.read_text(encoding="utf-8"))
    InterpConfig.from_yaml(path)
