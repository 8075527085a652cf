"""Sampled completions in a real training: who samples, what is told apart, what a failure costs, and that nothing else
changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from trainers.comparing import assert_same, run
from trainers.own_data import entry
from trainers.table import causal_lm, sentence, trainers
from trainers.tiny_runs import HOOKPOINTS, StopAt, assert_rows_equal, direct_means, live, small, train, verify

from interp_rlhf import Snapshot, load_run
from interp_rlhf.rollouts import measure_rollouts

PARTS = ("total", "text", "representation", "representation_on_start", "interaction")
ALONE = ("total", "representation_on_start")
READOUTS = ("order", "order (probe)")
SHORT = {"prompts": 8, "completions": 2, "max_new_tokens": 4}
SAMPLING = [name for name, one in trainers().items() if one.available and one.samples]
#: Three steps, a strong push, no file of the trainer's own.
BRIEF = {"max_steps": 3, "save_strategy": "no", "learning_rate": 2e-2}


def settings(folder: Path, enabled: Any = "auto", **rollouts: Any) -> dict[str, Any]:
    """Few short completions, read at two hookpoints."""
    return small(folder, rollouts={"enabled": enabled, **SHORT, **rollouts})


def shifts(handle: Any) -> dict[str, pd.Series]:
    """Part to value by readout, hookpoint and step."""
    rows = live(handle.timeline())
    rows = rows[rows.index.get_level_values("metric").str.startswith("shift/")]
    assert (rows.text == "rollout").all()
    return {name.removeprefix("shift/"): part.droplevel("metric").value for name, part in rows.groupby("metric")}


def told(folder: Path, kind: str = "refused") -> dict[str, str]:
    """What was refused (or failed), and why."""
    events = [event for event in load_run(folder).events if event["event"] == kind]
    return {event.get("readout", event.get("what")): event["reason"] for event in events}


def completed(n: int = 32) -> Dataset:
    return Dataset.from_list(
        [{"prompt": sentence(2 * i, 5), "completion": " " + sentence(2 * i + 1, 5)} for i in range(n)]
    )


def sft(**changes: Any) -> Any:
    return entry("sft", train=completed, evaluation=lambda: completed(24), **changes)


# -- who samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLING)
def test_trainers_that_sample_are_sampled_from(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, handle = train(name, folder, settings(folder), **BRIEF)
    found = shifts(handle)
    assert set(found) == set(PARTS)
    for part in found.values():
        assert set(part.index) == {(readout, place, 3) for readout in READOUTS for place in HOOKPOINTS}
    assert np.allclose(found["total"], found["text"] + found["representation"], atol=1e-6)
    assert np.allclose(found["interaction"], found["representation"] - found["representation_on_start"], atol=1e-6)
    assert (found["total"].abs() > 1e-3).any()
    assert not told(folder, "failure") and verify(folder) == 0
    rows = handle.timeline()
    cost = rows[rows.metric.str.startswith("cost/rollout")]
    assert set(zip(cost.metric, cost.step, strict=True)) == {
        (f"cost/rollout_{what}", step) for what in ("seconds", "tokens") for step in (0, 3)
    }
    assert (cost.value > 0).all()


@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_others_are_sampled_from_only_where_that_is_asked_for(name: str, tmp_path: Path) -> None:
    made = sft() if name == "sft" else trainers()[name]
    for place, enabled in (("auto", "auto"), ("asked", True)):
        folder = tmp_path / place / "run"
        handle = run(made, folder, BRIEF, settings(folder, enabled))["handle"]
        assert bool(shifts(handle)) == (enabled is True)
        assert (folder / "_interp" / "01-completions.jsonl").exists() == (enabled is True)
        assert handle.timeline().metric.str.startswith("cost/rollout").any() == (enabled is True)


def test_a_trainer_that_samples_need_not_be(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, handle = train("grpo", folder, settings(folder, False), **BRIEF)
    assert not shifts(handle) and "sampled completions" not in told(folder)


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_training_is_unchanged(name: str, tmp_path: Path) -> None:
    made = sft() if name == "sft" else trainers()[name]
    bare = run(made, tmp_path / "bare", {"max_steps": 4}, None)
    attached = run(made, tmp_path / "run", {"max_steps": 4}, settings(tmp_path / "run", True))
    assert_same(bare, attached)
    assert shifts(attached["handle"])


# -- what is told apart ------------------------------------------------------------------------------------------------

FROZEN = {
    "dpo ref_model": ("dpo", {}),
    "grpo ref_model": ("grpo", {"beta": 0.04}),
    "dpo adapter": ("dpo", {"use_lora": True}),
    "grpo adapter": ("grpo", {"use_lora": True, "beta": 0.0}),
}


@pytest.mark.parametrize("case", FROZEN)
def test_with_a_frozen_copy_text_and_representation_add_up(case: str, tmp_path: Path) -> None:
    name, changes = FROZEN[case]
    folder = tmp_path / "run"
    _, handle = train(name, folder, settings(folder, True), **BRIEF, **changes)
    found = shifts(handle)
    assert set(found) == set(PARTS)
    assert np.allclose(found["total"], found["text"] + found["representation"], atol=1e-6)
    assert (found["representation"].abs() > 1e-4).all()
    assert not [reason for what, reason in told(folder).items() if what.startswith("shift")]


@pytest.mark.parametrize("reference", ["auto", "cached"])
def test_without_one_only_what_needs_none_is_told(reference: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = {**settings(folder), "reference": reference}
    _, handle = train("grpo", folder, config, **BRIEF, beta=0.0)
    assert set(shifts(handle)) == set(ALONE)
    assert "no frozen copy of the start" in told(folder)["shift: text and representation apart"]


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_the_same_weights_do_not_shift(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, handle = train(name, folder, settings(folder, True), **{**BRIEF, "learning_rate": 0.0})
    found = shifts(handle)
    assert set(found) == set(PARTS)
    for part, values in found.items():
        assert (values.abs() < 1e-5).all(), part


def test_rows_are_what_the_saved_weights_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read one text at a time, from the files of the start and of the checkpoint."""
    folder, drawn = tmp_path / "run", []
    record = lambda *args: drawn.append(measure_rollouts(*args)) or drawn[-1]  # noqa: E731
    monkeypatch.setattr("interp_rlhf.session.measure_rollouts", record)
    saves = {"save_strategy": "steps", "save_steps": 3}
    trainer, handle = train("grpo", folder, settings(folder), **{**BRIEF, **saves})
    policy, start = type(trainer.model).from_pretrained(folder / "checkpoint-3"), causal_lm()
    run_now, place = handle.callback._run, HOOKPOINTS[0]
    texts = {"start": run_now.rollouts.completions, "now": drawn[-1].completions}
    assert texts["start"] != texts["now"]
    tensors = Snapshot.load(folder / "interp" / "snapshots" / "01-step-000000").tensors()
    v = tensors[f"direction/order/{place}"].double().numpy()
    audit = direct_means(start, handle.callback._plan.audit.prompts, place, frozenset({1})).double().numpy()
    spread = (audit @ v).std(ddof=1)

    def g(model: Any, prompts: Sequence[Any]) -> float:
        return float((direct_means(model, prompts, place, frozenset()).double().numpy() @ v).mean() / spread)

    tt, t0, zt, z0 = (g(model, texts[kind]) for kind in ("now", "start") for model in (policy, start))
    expected = {
        "total": tt - z0, "text": t0 - z0, "representation": tt - t0, "representation_on_start": zt - z0,
        "interaction": (tt - t0) - (zt - z0),
    }  # fmt: skip
    for part, value in expected.items():
        assert shifts(handle)[part]["order", place, 3] == pytest.approx(value, abs=1e-4), part
    assert abs(expected["text"]) > 0.01 and abs(expected["representation"]) > 0.01


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A GRPO run with an adapter, whole, and one that was stopped at step 4."""
    folder = tmp_path_factory.mktemp("rollouts")
    config = settings(folder / "whole")
    more = {"use_lora": True, "learning_rate": 2e-2, "max_steps": 6}
    _, handle = train("grpo", folder / "whole", config, **more)
    train("grpo", folder / "stopped", config, callbacks=[StopAt(4)], **more)
    return {"folder": folder / "stopped", "config": config, "whole": live(handle.timeline()), "more": more}


def resumed(stopped: dict[str, Any], folder: Path, change: Any = None, **settings: Any) -> Any:
    shutil.copytree(stopped["folder"], folder)
    if change is not None:
        change(folder)
    config = {**stopped["config"], **settings}
    return train("grpo", folder, config, resume=folder / "checkpoint-4", **stopped["more"])[1]


def test_a_resumed_run_compares_with_what_the_start_wrote(stopped: dict[str, Any], tmp_path: Path) -> None:
    handle = resumed(stopped, tmp_path / "run")
    assert_rows_equal(live(handle.timeline()), stopped["whole"])
    steps = shifts(handle)["total"].index.get_level_values(2)
    assert sorted(set(steps)) == [2, 3, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "run/_interp/01-completions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [text.id for text in handle.callback._run.rollouts.completions]
    assert not (tmp_path / "run/_interp/02-completions.jsonl").exists() and verify(tmp_path / "run") == 0


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_without_what_the_start_wrote_the_rest_goes_on(damage: str, stopped: dict[str, Any], tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        file = folder / "_interp" / "01-completions.jsonl"
        file.unlink() if damage == "missing" else file.write_text(file.read_text().replace(":", ": ", 1))

    handle = resumed(stopped, tmp_path / "run", change)
    reason = told(tmp_path / "run")["sampled completions"]
    assert "01-completions.jsonl" in reason and ("cannot be read" if damage == "missing" else "SHA-256") in reason
    rows, whole = live(handle.timeline()), stopped["whole"]
    late = whole.index.get_level_values("metric").str.startswith("shift/") & (whole.index.get_level_values("step") > 4)
    assert late.any()
    assert_rows_equal(rows, whole[~late])
    assert not told(tmp_path / "run", "failure")


# -- labels and failures -----------------------------------------------------------------------------------------------


def odd_length(prompts: list[str], completions: list[str]) -> list[bool | None]:
    """Positive where a completion ends in an odd word; some are left open."""
    words = [(text.split() or ["w0"])[-1] for text in completions]
    return [None if word.endswith("7") else word[-1] in "13" for word in words]


def breaks(prompts: list[str], completions: list[str]) -> list[bool | None]:
    """A judge that is out of order."""
    raise RuntimeError("the judge is out")


def labelled(name: str, folder: Path, **changes: Any) -> Any:
    config = settings(folder, completions=4, labels=f"trainers.test_live_rollouts.{name}")
    return train("grpo", folder, {**config, "on_error": "warn"}, **BRIEF, **changes)[1]


def test_labels_sort_completions_into_shares(tmp_path: Path) -> None:
    handle = labelled("odd_length", tmp_path / "run", use_lora=True)
    rows = live(handle.timeline())
    rows = rows[rows.index.get_level_values("metric").str.startswith("quadrant/")]
    shares = rows.value.unstack("metric")
    assert set(shares.index) == {("order", place, 3) for place in HOOKPOINTS} and shares.shape[1] == 5
    assert np.allclose(shares.sum(axis=1), 1)
    run_now = handle.callback._run
    assert (shares["quadrant/honest"] > 0).all() and (shares["quadrant/honest"] < 1).all()
    assert not told(tmp_path / "run", "failure") and shifts(handle) and run_now.labels is not None


@pytest.mark.parametrize(("name", "beta", "reason"), [("breaks", 0.04, "judge is out"), ("odd_length", 0.0, "frozen")])
def test_labels_that_fail_cost_the_quadrant_only(name: str, beta: float, reason: str, tmp_path: Path) -> None:
    handle = labelled(name, tmp_path / "run", beta=beta)
    assert reason in told(tmp_path / "run", "failure")["the quadrant"]
    metrics = set(handle.timeline().metric)
    assert {"shift/total", "cost/rollout_tokens", "probe/auc"} <= metrics
    assert not [metric for metric in metrics if metric.startswith("quadrant/")]


@pytest.mark.parametrize("at", ["start", "later"])
def test_sampling_that_fails_costs_the_sampled_rows_only(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("planted")

    monkeypatch.setattr(f"interp_rlhf.session.{'start' if at == 'start' else 'measure'}_rollouts", fails)
    folder = tmp_path / "run"
    _, handle = train("grpo", folder, {**settings(folder), "on_error": "warn"}, **BRIEF)
    assert any("planted" in reason for reason in told(folder, "failure").values())
    rows = live(handle.timeline())
    assert set(rows.index.get_level_values("step")) == {0, 3} and not shifts(handle)
    assert [snapshot.name for snapshot in load_run(folder).snapshots] == ["01-step-000000", "01-step-000003"]
