"""Control runs of every trainer: what is scrambled, what is left alone, where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.table import length_reward, trainers
from trainers.tiny_runs import build, small, train

from interp_rlhf import ConfigError, attach, load_run
from interp_rlhf.activations.engines import unchanged_random_states
from interp_rlhf.audit.layout import differences

SCRAMBLED = [name for name, entry in trainers().items() if entry.available and entry.control]
PLAIN = [name for name, entry in trainers().items() if entry.available and not entry.control]


def run(name: str, folder: Path, control: int | None, **changes: Any) -> tuple[Any, Any]:
    trainer = build(name, folder, **{"max_steps": 3, "save_strategy": "no", **changes})
    config = {"rollouts": {"enabled": False}, "probes": {"enabled": False}, "control": control}
    handle = attach(trainer, small(folder, **config))
    trainer.train()
    return trainer, handle


@pytest.mark.parametrize("name", SCRAMBLED)
def test_a_control_run_of_every_trainer(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    groups = {"num_generations": 4, "per_device_train_batch_size": 4} if name in ("grpo", "rloo") else {}
    real, _ = run(name, folder, None, **groups)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    scrambled, _ = run(name, folder, 1, **groups)
    assert all(path.read_bytes() == data for path, data in files.items()), "the real run's files are as they were"
    new = {path.relative_to(folder).parts[:2] for path in folder.rglob("*") if path.is_file()} - {
        path.relative_to(folder).parts[:2] for path in files
    }
    assert new == {("_controls", "01")}
    found, expected = load_run(folder / "_controls" / "01").info, load_run(folder).info
    assert found["control"]["number"] == 1 and found["control"]["kind"] == trainers()[name].control
    assert expected["control"] is None
    changed = [line.partition(":")[0] for line in differences(expected, found)]
    assert changed and all(place.startswith(("control", "config.control")) for place in changed), changed
    starts = [load_run(path).snapshots[0].tensors() for path in (folder, folder / "_controls" / "01")]
    assert all(torch.equal(value, starts[1][key]) for key, value in starts[0].items()), "the same texts and start"
    weights = [trainer.model.state_dict() for trainer in (real, scrambled)]
    assert any(not torch.equal(value, weights[1][key]) for key, value in weights[0].items()), "trained on other rewards"


@pytest.mark.parametrize("name", PLAIN)
def test_a_training_without_preferences_has_no_control_run(name: str, tmp_path: Path) -> None:
    trainer = build(name, tmp_path / "run")
    before = dict(vars(trainer))
    with pytest.raises(ConfigError, match="nothing to scramble"):
        attach(trainer, small(tmp_path / "run", control=1))
    assert vars(trainer) == before and not (tmp_path / "run" / "_controls").exists()


def test_the_number_draws_and_nothing_else(tmp_path: Path) -> None:
    weights = []
    for place, number in (("a", 1), ("b", 1), ("c", 2)):
        trainer, _ = run("dpo", tmp_path / place / "run", number)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert any(not torch.equal(value, weights[2][key]) for key, value in weights[0].items())


def test_pairs_are_swapped_whole_and_balanced(tmp_path: Path) -> None:
    trainer = build("dpo", tmp_path / "run")
    topics = [f"topic {i % 3}" for i in range(len(trainer.train_dataset))]
    with unchanged_random_states():
        trainer.train_dataset = trainer.train_dataset.add_column("topic", topics)
    evaluated = trainer.eval_dataset
    original, settings = trainer.train_dataset, (trainer.args.output_dir, trainer.args.run_name)
    handle = attach(trainer, small(tmp_path / "run", control=4, control_within="topic"))
    swapped: dict[str, int] = {}
    for before, after in zip(original, trainer.train_dataset, strict=True):
        turned = after["chosen"] == before["rejected"]
        expected = {
            key: before[key.replace("chosen", "REJ").replace("rejected", "chosen").replace("REJ", "rejected")]
            if turned
            else before[key]
            for key in before
        }
        assert after == expected
        swapped[before["topic"]] = swapped.get(before["topic"], 0) + turned
    assert swapped == dict.fromkeys(("topic 0", "topic 1", "topic 2"), len(original) // 6)
    assert trainer.eval_dataset is evaluated
    assert trainer.args.output_dir.endswith("_controls/04") and trainer.args.run_name == "run-control-04"
    handle.detach()
    assert trainer.train_dataset is original
    assert (trainer.args.output_dir, trainer.args.run_name) == settings


def test_labels_keep_their_number(tmp_path: Path) -> None:
    trainer = build("kto", tmp_path / "run")
    before = trainer.train_dataset
    attach(trainer, small(tmp_path / "run", control=1))
    assert sum(trainer.train_dataset["label"]) == sum(before["label"])
    assert trainer.train_dataset["label"] != before["label"]
    assert trainer.train_dataset["completion_ids"] == before["completion_ids"]


@pytest.mark.parametrize("name", [name for name in ("grpo", "rloo") if name in SCRAMBLED])
def test_rewards_stay_in_their_group(name: str, tmp_path: Path) -> None:
    trainer = trainers()[name].build(tmp_path / "run", num_generations=4, per_device_train_batch_size=8, max_steps=2)
    told: list[torch.Tensor] = []
    original = type(trainer)._calculate_rewards

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        told.append(original(trainer, *args, **kwargs))
        return told[-1]

    trainer._calculate_rewards = record
    handle = attach(trainer, small(tmp_path / "run", control=1))
    used: list[torch.Tensor] = []
    inner = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args, **kwargs: used.append(inner(*args, **kwargs)) or used[-1]
    trainer.train()
    assert len(told) == len(used) == 2
    for before, after in zip(told, used, strict=True):
        assert torch.equal(before.view(-1, 4).sort().values, after.view(-1, 4).sort().values)
    assert any(not torch.equal(a, b) for a, b in zip(told, used, strict=True))
    assert handle.callback.control.kind == "rewards permuted"


@pytest.mark.skipif("ppo" not in SCRAMBLED, reason="this TRL has no PPO")
def test_ppo_trains_on_another_texts_score(tmp_path: Path) -> None:
    from trl.experimental.ppo.ppo_trainer import get_reward

    trainer = build("ppo", tmp_path / "run")
    texts = torch.randint(4, 90, (6, 12), generator=torch.Generator().manual_seed(0))
    texts[0, 8:] = texts[1, 10:] = 0  # padding after the answer
    trainer.reward_model.eval()  # without dropout
    with torch.no_grad():
        _, before, _ = get_reward(trainer.reward_model, texts, 0, 5)
        handle = attach(trainer, small(tmp_path / "run", control=1, rollouts={"enabled": False}))
        _, after, _ = get_reward(trainer.reward_model, texts, 0, 5)
        assert torch.allclose(before.sort().values, after.sort().values) and not torch.allclose(before, after)
        handle.detach()
        assert torch.equal(get_reward(trainer.reward_model, texts, 0, 5)[1], before)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    trainer = build("dpo", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"control_within.*expected a column.*topic"):
        attach(trainer, small(tmp_path / "run", control=1, control_within="topic"))
    assert trainer.args.output_dir == str(tmp_path / "run")


def test_controls_of_another_training_do_not_count(tmp_path: Path) -> None:
    """Other data, other trained parameters, other rewards: each is named and left out."""
    folder = tmp_path / "run"
    _, handle = run("dpo", folder, None)
    run("dpo", folder, 1)
    shorter = build("dpo", folder, max_steps=3, save_strategy="no")
    shorter.train_dataset = shorter.train_dataset.select(range(40))
    shorter.eval_dataset = shorter.eval_dataset
    attach(shorter, small(folder, rollouts={"enabled": False}, probes={"enabled": False}, control=2))
    shorter.train()
    run("dpo", folder, 3, use_lora=True)
    controls = handle.summary().controls
    assert controls.k == 1
    reasons = dict(controls.left_out)
    assert "training.data_sha256" in reasons["02"] and "training.trainable_sha256" in reasons["03"]


def test_rewards_are_part_of_what_is_compared(tmp_path: Path) -> None:
    infos = []
    for place, reward in (
        ("a", length_reward),
        ("b", lambda completions, **_: [-1.0 * len(text) for text in completions]),
    ):
        trainer = trainers()["grpo"].build(tmp_path / place)
        trainer.reward_funcs[0] = reward
        infos.append(attach(trainer, small(tmp_path / place)).callback.training)
    assert infos[0]["data_sha256"] == infos[1]["data_sha256"] and infos[0]["rewards"] != infos[1]["rewards"]


def test_arguments_of_a_control_run_are_no_ones_else(tmp_path: Path) -> None:
    trainer = build("dpo", tmp_path / "run")
    attach(trainer, small(tmp_path / "run", control=1))
    again = build("dpo", tmp_path / "run")
    again.args = trainer.args
    attach(again, small(tmp_path / "run", control=2))
    assert again.args.output_dir == str(tmp_path / "run" / "_controls" / "02")
    assert again.args.run_name == "run-control-02"
    real = build("dpo", tmp_path / "run")
    real.args = trainer.args
    with pytest.raises(ConfigError, match="is a control run's"):
        attach(real, small(tmp_path / "run"))


@pytest.mark.parametrize("column", ["label", "chosen and rejected"])
def test_columns_that_are_not_learned_from_are_not_scrambled(column: str, tmp_path: Path) -> None:
    trainer = build("sft", tmp_path / "run")
    n = len(trainer.train_dataset)
    with unchanged_random_states():
        for name in column.split(" and "):
            values = [i % 2 == 0 for i in range(n)] if name == "label" else [f"w{i % 9}" for i in range(n)]
            trainer.train_dataset = trainer.train_dataset.add_column(name, values)
    with pytest.raises(ConfigError, match="nothing to scramble"):
        attach(trainer, small(tmp_path / "run", control=1))


def test_a_text_scored_alone_is_refused_before_training(tmp_path: Path) -> None:
    if "ppo" not in SCRAMBLED:
        pytest.skip("this TRL has no PPO")
    trainer = build("ppo", tmp_path / "run")
    for whole, each in ((2, 1), (3, 2), (1, 2)):
        trainer.args.local_batch_size, trainer.args.local_rollout_forward_batch_size = whole, each
        with pytest.raises(ConfigError, match="would be alone"):
            attach(trainer, small(tmp_path / "run", control=1))


def test_a_resumed_control_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    groups = {"num_generations": 8, "per_device_train_batch_size": 8}
    changes = {"rollouts": {"enabled": False}, "probes": {"enabled": False}, "control": 1}
    weights = []
    for place in ("whole", "resumed"):
        folder = tmp_path / place
        train("grpo", folder, small(folder, **changes), max_steps=4, **groups)
        if place == "resumed":
            checkpoint = folder / "_controls" / "01" / "checkpoint-2"
            trainer, _ = train("grpo", folder, small(folder, **changes), max_steps=4, resume=checkpoint, **groups)
        else:
            trainer, _ = train("grpo", tmp_path / "again", small(tmp_path / "again", **changes), max_steps=4, **groups)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_strata_may_be_lists_and_rewards_have_none(tmp_path: Path) -> None:
    trainer = build("dpo", tmp_path / "dpo")
    with unchanged_random_states():
        tags = [["a"] if i % 2 else ["b", "c"] for i in range(len(trainer.train_dataset))]
        trainer.train_dataset = trainer.train_dataset.add_column("tags", tags)
    assert attach(trainer, small(tmp_path / "dpo", control=1, control_within="tags")).callback.control.changed == 24
    with pytest.raises(ConfigError, match="means nothing where rewards are permuted"):
        attach(build("grpo", tmp_path / "grpo"), small(tmp_path / "grpo", control=1, control_within="tags"))


def test_off_never_trains_a_control_run_on_real_preferences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("dpo", tmp_path / "run")
    monkeypatch.setenv("INTERP_RLHF", "off")
    with pytest.raises(ConfigError, match="would train on the real preferences"):
        attach(trainer, {"control": 1})


def test_reward_functions_see_their_own_completions(tmp_path: Path) -> None:
    """What is permuted is what they return, so that a function's own log stays true."""
    trainer = build("grpo", tmp_path / "run", max_steps=1)
    seen: list[Any] = []

    def spy(completions: list[str], **columns: Any) -> list[float]:
        seen.append(length_reward(completions))
        return seen[-1]

    trainer.reward_funcs[0] = spy
    attach(trainer, small(tmp_path / "run", control=1))
    trainer.train()
    assert seen
