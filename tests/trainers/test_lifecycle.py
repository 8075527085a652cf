"""From attach to detach: second runs, rotation and the best checkpoint, evaluation, failures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.comparing import own_log, random_states
from trainers.tiny_runs import (
    Keeps,
    StopAt,
    assert_rows_are_of,
    assert_rows_equal,
    assert_same_training,
    build,
    interp_log,
    live,
    outside,
    small,
    steps_of,
    train,
    verify,
)
from transformers import TrainerCallback

from interp_rlhf import InterpCallback, InterpError, Snapshot, attach, load_run, with_interp
from interp_rlhf.audit.timeline import TimelineWriter

# -- the same folder again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "again"), [("dpo", "the same trainer"), ("grpo", "the same trainer"), ("dpo", "a new trainer")]
)
def test_a_second_run_in_the_same_folder(name: str, again: str, tmp_path: Path) -> None:
    """A segment of its own with a start of its own; of the first run nothing is written over."""
    folder, config = tmp_path / "run", small(tmp_path / "run")
    trainer, handle = train(name, folder, config, max_steps=4)
    first = live(handle.timeline())
    kept = {
        path: path.read_bytes()
        for path in (folder / "interp").rglob("*")
        if path.is_file() and path.name != "timeline.jsonl"
    }
    timeline = (folder / "interp" / "timeline.jsonl").read_bytes()
    keeps = Keeps()
    if again == "the same trainer":
        trainer.add_callback(keeps)
        trainer.train()
    else:
        trainer, handle = train(name, folder, config, max_steps=4, callbacks=[keeps])
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert (folder / "interp" / "timeline.jsonl").read_bytes().startswith(timeline)
    run = load_run(folder)
    assert [(s.number, s.resumed_from, s.parent) for s in run.segments] == [(1, None, None), (2, 0, None)]
    table = run.timeline()
    assert (table.superseded == (table.segment == 1)).all()
    assert set(table.segment) == {1, 2}
    assert steps_of(handle) == [0, 2, 3, 4]
    assert_rows_are_of(keeps.weights, handle)  # counted from where the second run began
    if again == "a new trainer":
        assert_rows_equal(live(table), first)
    assert len(interp_log(trainer)) == 2
    assert [s.name for s in run.snapshots if s.parent is None] == ["01-step-000000", "02-step-000000"]
    assert Snapshot.load(folder / "checkpoint-4" / "interp").segment == 2
    assert verify(folder) == 0


# -- rotation and the best checkpoint ----------------------------------------------------------------------------------

BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True,
    "metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.mark.parametrize("end", ["saved", "neither logged nor saved"])
def test_rotation_and_the_best_checkpoint(end: str, tmp_path: Path) -> None:
    """The last rows are of the last weights although the best ones are in the model when training ends."""
    folder, keeps = tmp_path / "run", Keeps()
    changes = dict(BEST) if end == "saved" else {**BEST, "logging_steps": 2}
    callbacks = [keeps] if end == "saved" else [keeps, StopAt(7)]
    trainer, handle = train(
        "sft", folder, small(folder, snapshots={"keep": 2}), callbacks=callbacks, **changes
    )  # fmt: skip
    last = trainer.state.global_step
    best = int(Path(trainer.state.best_model_checkpoint).name.split("-")[1])
    assert last == (8 if end == "saved" else 7) and best < last - 1
    assert all(torch.equal(v, keeps.weights[best][k]) for k, v in trainer.model.state_dict().items())
    assert_rows_are_of(keeps.weights, handle)
    assert steps_of(handle)[-1] == last and last in interp_log(trainer)

    assert {path.name for path in folder.glob("checkpoint-*")} <= {f"checkpoint-{best}", "checkpoint-6"}
    run = load_run(folder)
    saved = [2, 4, 6, last]
    assert [s.step for s in run.snapshots] == [0, *saved]
    assert [s.parent for s in run.snapshots[1:]] == [s.name for s in run.snapshots[:-1]]
    kept = [s.step for s in run.snapshots if (s.path / "tensors.safetensors").exists()]
    assert kept == [0, *saved[-2:]]
    assert verify(folder) == 0


@pytest.mark.parametrize("failing", [8, 3])
def test_a_failed_end_is_not_read_from_the_best_checkpoint(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows under the last step's number are of its weights or absent, also when someone logs after training."""
    folder, keeps = tmp_path / "run", Keeps()
    Failing(failing, monkeypatch)
    trainer, handle = train(
        "sft", folder, small(folder, on_error="warn"), callbacks=[keeps, Current()], **BEST
    )  # fmt: skip
    Current.step = -1
    trainer.log({"after": 1.0})
    trainer.evaluate(metric_key_prefix="test")
    assert steps_of(handle) == [step for step in (0, 2, 3, 4, 6, 8) if step != failing]
    assert_rows_are_of(keeps.weights, handle)
    said = [m.reason for m in handle.summary().not_measured if m.step == failing]
    assert any("planted" in reason for reason in said)
    assert any("checkpoint-2 was loaded in their place" in reason for reason in said) == (failing == 8)
    assert not any(row.keys() & {"after", "test_loss"} and any(k.startswith("interp/") for k in row)
                   for row in trainer.state.log_history)  # fmt: skip
    assert verify(folder) == 0


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "sft", "grpo"])
def test_evaluation_between_measurements(name: str, tmp_path: Path) -> None:
    """Evaluation every 3 steps, logging every 2: its rows stay its own, and what follows it reads the right weights."""
    changes = {
        "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "save_steps": 3, "max_steps": 10,
        "eval_on_start": True, "gradient_checkpointing": name == "sft",
    }  # fmt: skip
    bare, _ = train(name, tmp_path / "bare", None, **changes)
    states = random_states()
    keeps = Keeps()
    attached, handle = train(
        name, tmp_path / "run", small(tmp_path / "run", schedule={"every": 2}), callbacks=[keeps], **changes
    )
    assert_same_training(bare, attached)
    assert states == random_states()
    evaluations = [row for row in attached.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6, 9, 10]
    assert not any(key.startswith("interp/") for row in evaluations for key in row)
    assert sorted(interp_log(attached)) == [2, 4, 6, 8, 10]
    assert steps_of(handle) == [0, 2, 3, 4, 6, 8, 9, 10]  # 3, 6, 9 are read right after an evaluation
    assert_rows_are_of(keeps.weights, handle)
    assert verify(tmp_path / "run") == 0


# -- attach and detach -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "sft", "grpo"])
def test_detached_is_as_before(name: str, tmp_path: Path) -> None:
    trainer = build(name, tmp_path / "run", max_steps=2)
    before = outside(trainer)
    with pytest.raises(InterpError):
        attach(trainer, small(tmp_path / "run", hookpoints=["layers.9.resid_post"]))
    assert outside(trainer) == before
    handle = attach(trainer, small(tmp_path / "run"))
    assert outside(trainer) != before
    with pytest.raises(InterpError, match="attached already"):
        attach(trainer, small(tmp_path / "run"))
    assert len(trainer.callback_handler.callbacks) == len(before[2]) + 1
    handle.detach()
    assert outside(trainer) == before
    handle.detach()  # a second call does nothing

    again = attach(trainer, small(tmp_path / "run"))
    trainer.train()
    assert [s.number for s in load_run(tmp_path / "run").segments] == [1]
    again.detach()
    after = outside(trainer)
    assert (after[0], after[2], after[3], after[4]) == (before[0], before[2], before[3], before[4])
    bare, _ = train(name, tmp_path / "bare", None, max_steps=2)
    assert vars(trainer).keys() == vars(bare).keys()
    assert steps_of(again) == [0, 2], "what was measured can still be asked for"
    trainer.train()
    assert [s.number for s in load_run(tmp_path / "run").segments] == [1], "a detached trainer writes nothing of ours"


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("INTERP_RLHF", "off")
    trainer = build("dpo", tmp_path / "run", max_steps=2)
    before = outside(trainer)
    capsys.readouterr()
    handle = attach(trainer, small(tmp_path / "run"))
    assert capsys.readouterr().out == "interp_rlhf: off (INTERP_RLHF=off), the trainer is left as it is\n"
    assert outside(trainer) == before
    trainer.train()
    assert handle.timeline().empty and "off" in handle.summary()
    handle.detach()
    assert not interp_log(trainer)
    assert not (tmp_path / "run" / "interp").exists() and not (tmp_path / "run" / "_interp").exists()
    assert not (tmp_path / "run" / "checkpoint-2" / "interp").exists()


def subclassed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, config: Any, **changes: Any) -> Any:
    """The table's trainer built from ``with_interp(its class)``."""
    import trl

    plain = {"dpo": trl.DPOTrainer, "sft": trl.SFTTrainer}[name]
    with monkeypatch.context() as patch:
        patch.setattr(trl, plain.__name__, with_interp(plain, config))
        return build(name, folder, **changes), plain


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_the_class_with_interp(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and log keys are those of ``attach``; its instances detach and attach like any other."""
    expected, handle = train(name, tmp_path / "run", small(tmp_path / "run"))
    trainer, plain = subclassed(name, tmp_path / "class", monkeypatch, small(tmp_path / "run"))
    assert isinstance(trainer, plain)
    with pytest.raises(InterpError, match="attached already"):
        attach(trainer)
    torch.manual_seed(6)
    trainer.train()
    assert_rows_equal(live(trainer.interp.timeline()), live(handle.timeline()), 1e-9)
    assert own_log(trainer) == own_log(expected)
    assert {s: set(r) for s, r in interp_log(trainer).items()} == {s: set(r) for s, r in interp_log(expected).items()}

    callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, InterpCallback)]
    trainer.interp.detach()
    assert "interp" not in vars(trainer) and trainer.callback_handler.callbacks == callbacks
    trainer.log({"after": 1.0})
    attach(trainer, small(tmp_path / "run")).detach()
    assert "interp" not in vars(trainer) and trainer.callback_handler.callbacks == callbacks

    monkeypatch.setenv("INTERP_RLHF", "off")
    off, _ = subclassed(name, tmp_path / "off", monkeypatch, small(tmp_path / "run"), max_steps=2)
    off.train()
    assert not interp_log(off) and not (tmp_path / "off" / "interp").exists()


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_bare_callback_observes_only(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"prompts": {"n": 16, "source": "training"}, "rollouts": {"enabled": False}}  # all that it is not shown
    config = small(tmp_path / "run", **changes)
    expected, handle = train(name, tmp_path / "run", config)
    callback = InterpCallback(config)
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        trainer, _ = train(name, tmp_path / "bare", None, callbacks=[callback])
        assert_same_training(expected, trainer)
        assert not interp_log(trainer)
        assert_rows_equal(live(callback.timeline()), live(handle.timeline()), 1e-9)
        snapshots = [[s.name for s in load_run(tmp_path / folder).snapshots] for folder in ("run", "bare")]
        assert snapshots[0] == snapshots[1] and verify(tmp_path / "bare") == 0
        trainer.train()
    assert [m for m in caplog.messages if m.startswith("bare InterpCallback")] == [
        "bare InterpCallback: timeline and snapshots only; attach(trainer) also fills the trainer's log"
    ]


# -- failures ----------------------------------------------------------------------------------------------------------


class Current(TrainerCallback):
    """Tells :class:`Failing` which step it is."""

    step = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Current.step = state.global_step


class Failing:
    """Readings fail at one step with something that is no error of ours."""

    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from interp_rlhf import session

        original = session.read_table

        def read_table(*args: Any, **kwargs: Any) -> Any:
            if Current.step == step:
                raise RuntimeError("planted: out of memory\nsecond line")
            return original(*args, **kwargs)

        Current.step = -1
        monkeypatch.setattr(session, "read_table", read_table)


class Poison(TrainerCallback):
    """NaN in the weights when a step is over, gone before the next one begins: training itself never sees it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.weight = next(p for n, p in kwargs["model"].named_parameters() if "layers.1.mlp.down_proj" in n)
            self.kept = self.weight.detach().clone()
            self.weight.data[0, 0] = float("nan")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.weight.data.copy_(self.kept)


@pytest.mark.parametrize(
    ("what", "name"), [("weights that are not finite", "grpo"), ("an error inside the reading", "dpo")]
)
def test_a_failed_measurement_costs_its_rows_only(
    what: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poisoned = what == "weights that are not finite"
    callbacks = [Poison(3)] if poisoned else [Current()]
    bare, _ = train(name, tmp_path / "bare", None, callbacks=callbacks)
    states = random_states()
    if not poisoned:
        Failing(3, monkeypatch)
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        attached, handle = train(
            name, tmp_path / "run", small(tmp_path / "run", on_error="warn"), callbacks=callbacks
        )  # fmt: skip
    assert_same_training(bare, attached)
    assert states == random_states()
    assert steps_of(handle) == [0, 2, 4, 6, 8] and sorted(interp_log(attached)) == [6, 8]
    failures = [e for e in load_run(tmp_path / "run").events if e["event"] == "failure"]
    assert [(e["step"], e["what"]) for e in failures] == [(3, "a measurement")]
    reason = "finite" if poisoned else "RuntimeError: planted: out of memory"
    assert reason in failures[0]["reason"] and "\n" not in failures[0]["reason"]
    assert len(caplog.messages) == 1 and "step 3: a measurement failed, training goes on" in caplog.messages[0]
    assert [m.step for m in handle.summary().not_measured if m.what == "a measurement"] == [3]
    assert reason in str(handle.summary())
    monkeypatch.undo()
    _, whole = train(name, tmp_path / "whole", small(tmp_path / "run"))
    rows = live(whole.timeline())
    assert_rows_equal(live(handle.timeline()), rows[rows.index.get_level_values("step") != 3], 1e-9)
    assert verify(tmp_path / "run") == 0


@pytest.mark.parametrize("failing", [-1, 2, 3, 8], ids=["the start", "a save", "a log", "the end"])
def test_asked_to_a_failure_ends_the_run(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(failing, monkeypatch)
    trainer = build("dpo", tmp_path / "run", callbacks=[Current()])
    before = outside(trainer)
    handle = attach(trainer, small(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="planted: out of memory"):
        trainer.train()
    assert trainer.state.global_step == max(failing, 0)
    handle.detach()
    after = outside(trainer)
    assert (after[0], after[2], after[3], after[4]) == (before[0], before[2], before[3], before[4])
    assert verify(tmp_path / "run") == 0


def test_a_disk_that_fails_costs_rows_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither measurements nor the note of their failure can be written: training goes on, warned about, bit by bit."""
    bare, _ = train("dpo", tmp_path / "bare", None)

    def full(self: Any, data: bytes) -> None:
        raise InterpError(f"{self.path}: cannot be written (No space left on device)")

    class Full(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                monkeypatch.setattr(TimelineWriter, "_append_bytes", full)

    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        attached, handle = train("dpo", tmp_path / "run", small(tmp_path / "run", on_error="warn"), callbacks=[Full()])
    assert_same_training(bare, attached)
    assert any("the failure is not in the timeline" in m and "No space left" in m for m in caplog.messages)
    assert steps_of(handle) == [0, 2]
    monkeypatch.undo()
    assert verify(tmp_path / "run") == 0
