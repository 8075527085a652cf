"""The recipes run as a user starts them: a process of their own, one YAML file with TRL's arguments and ``interp:``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainers.table import has_ppo, preferences, prompts, saved_model, scorer

from interp_rlhf import load_run
from interp_rlhf.config import InterpConfig
from interp_rlhf.errors import ConfigError
from interp_rlhf.recipe_arguments import InterpArguments, local_path

INTERP = {
    "hookpoints": ["layers.100%.resid_post"],
    "prompts": {"n": 8},
    "concepts": {"pairs": False, "packs": []},
    "schedule": {"every": 1},
    "statistics": {"bootstrap": 100, "directions": 200},
    "on_error": "raise",
    "report": False,
}
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "interp": INTERP,
}
needs_ppo = pytest.mark.skipif(not has_ppo(), reason="this TRL has no PPO (1.12 is the last line that has it)")


def write_run(folder: Path, rows: Any, **settings: Any) -> Path:
    """A dataset folder and a YAML file for one run below ``folder``."""
    data = folder / "data"
    data.mkdir()
    rows.to_json(data / "train.jsonl")
    rows.select(range(8)).to_json(data / "test.jsonl")
    run = {
        "model_name_or_path": str(saved_model(0)),
        "dataset_name": str(data),
        "output_dir": str(folder / "out"),
        **COMMON,
        **settings,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def start(recipe: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(recipe.parents[1]), "HF_HOME": str(cwd / "hf")}
    return subprocess.run(
        [sys.executable, str(recipe), *words], capture_output=True, text=True, timeout=500, env=environment, cwd=cwd
    )


def check(folder: Path, done: subprocess.CompletedProcess[str], last: int) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    run = load_run(folder / "out")
    steps = {row["step"] for row in run.rows}
    assert {0, last} <= steps
    config = InterpConfig.from_mapping(INTERP)
    assert InterpConfig.from_mapping(run.info["config"]) == config
    assert (folder / "out" / "model.safetensors").exists()


def test_dpo(repository: Path, tmp_path: Path):
    path = write_run(tmp_path, preferences(24), max_length=32)
    check(tmp_path, start(repository / "recipes/dpo.py", "--config", str(path), cwd=tmp_path), 2)


def test_grpo(repository: Path, tmp_path: Path):
    (tmp_path / "my_rewards.py").write_text(
        "def words(completions, **columns):\n    return [len(text.split()) / 10 for text in completions]\n"
    )
    path = write_run(
        tmp_path, prompts(16), reward_funcs=["my_rewards.words"], num_generations=2, max_completion_length=4
    )
    check(tmp_path, start(repository / "recipes/grpo.py", "--config", str(path), cwd=tmp_path), 2)


@needs_ppo
def test_ppo(repository: Path, tmp_path: Path):
    scorer().save_pretrained(tmp_path / "reward")
    path = write_run(
        tmp_path,
        prompts(16),
        reward_model_path=str(tmp_path / "reward"),
        total_episodes=8,
        max_steps=-1,
        response_length=4,
        num_ppo_epochs=1,
        num_sample_generations=0,
    )
    check(tmp_path, start(repository / "recipes/ppo.py", "--config", str(path), cwd=tmp_path), 2)


def test_the_block_may_be_a_path_and_words_override_the_file(repository: Path, tmp_path: Path):
    path = write_run(tmp_path, preferences(24), max_length=32, interp=None)
    block = tmp_path / "interp.yaml"
    block.write_text(yaml.safe_dump(INTERP), encoding="utf-8")
    words = ["--config", str(path), "--interp", str(block), "--max_steps", "1"]
    check(tmp_path, start(repository / "recipes/dpo.py", *words, cwd=tmp_path), 1)


def test_one_flag_makes_a_control_run(repository: Path, tmp_path: Path):
    path = write_run(tmp_path, preferences(24), max_length=32)
    done = start(repository / "recipes/dpo.py", "--config", str(path), "--control", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [place.name for place in (tmp_path / "out").iterdir()] == ["_controls"]
    folder = tmp_path / "out" / "_controls" / "02"
    assert load_run(folder).info["control"] == {"number": 2, "kind": "pairs swapped", "changed": 12}
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.distributed
def test_the_launcher_starts_two_processes(engine: str, repository: Path, tmp_path: Path):
    if engine == ("ddp" if version("trl").startswith("1.12.") else "zero2"):
        pytest.skip(f"{engine} is tested on the other TRL line")
    path = write_run(tmp_path, preferences(24), max_length=32)
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "INTERP_RLHF_VENV": str(Path(sys.executable).parents[1]),
        "HF_HOME": str(tmp_path / "hf"),
    }
    words = ["--processes", "2", engine, "recipes/dpo.py", "--config", str(path)]
    done = subprocess.run(
        ["bash", str(repository / "scripts/launch"), *words],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    check(tmp_path, done, 2)
    world = json.dumps(dict(load_run(tmp_path / "out").info))
    assert "2" in world


def test_a_wrong_block_stops_before_training(repository: Path, tmp_path: Path):
    path = write_run(tmp_path, preferences(24), max_length=32, interp={"promts": {}})
    done = start(repository / "recipes/dpo.py", "--config", str(path), cwd=tmp_path)
    assert done.returncode != 0
    assert "unknown key 'promts'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "interp").exists()


def test_a_misspelt_trl_argument_stops(repository: Path, tmp_path: Path):
    path = write_run(tmp_path, preferences(24), lerning_rate=1)
    done = start(repository / "recipes/dpo.py", "--config", str(path), cwd=tmp_path)
    assert done.returncode != 0
    assert "lerning_rate" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", [INTERP, "configs/interp/observe.yaml", None])
def test_the_parser_keeps_the_block_as_it_is(value: Any, tmp_path: Path):
    from trl import TrlParser

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"interp": value}), encoding="utf-8")
    (parsed,) = TrlParser((InterpArguments,)).parse_args_and_config(["--config", str(path)])
    assert parsed.interp == value


def test_the_complete_runs_name_only_arguments_that_exist(repository: Path):
    from trl import DatasetMixtureConfig, DPOConfig, GRPOConfig, ModelConfig, ScriptArguments

    configs = {"dpo": DPOConfig, "grpo": GRPOConfig}
    if has_ppo():
        from trl.experimental.ppo import PPOConfig

        configs["ppo"] = PPOConfig
    for name, config in configs.items():
        types = (config, DatasetMixtureConfig, ModelConfig, ScriptArguments, InterpArguments)
        known = {field.name for type_ in types for field in fields(type_)} | {"reward_funcs"}
        keys = yaml.safe_load((repository / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert not set(keys) - known


def test_marked_lines_are_all_that_is_ours(repository: Path):
    for path in sorted((repository / "recipes").glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            ours = "interp_rlhf" in line or "interp_args" in line or "attach(" in line
            assert not ours or line.endswith("# interp:"), f"{path.name}: {line}"


def test_local_paths_that_do_not_exist_are_named(tmp_path: Path):
    assert local_path(str(tmp_path), "model_name_or_path") == str(tmp_path)
    assert local_path("owner/name", "dataset_name") == "owner/name"
    with pytest.raises(ConfigError, match=r"^dataset_name: \./nowhere does not exist$"):
        local_path("./nowhere", "dataset_name")
