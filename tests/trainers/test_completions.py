"""Sampled completions in live runs: which trainers get them, what they say, what a failure of theirs costs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from trainers.comparing import assert_same, run
from trainers.table import trainers
from trainers.tiny_runs import small, train, verify

from interp_rlhf import ConfigError, attach, load_run

AVAILABLE = [name for name, entry in trainers().items() if entry.available]
ROLLOUTS = {"enabled": True, "prompts": 8, "max_new_tokens": 5}


def quick(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {"probes": {"enabled": False}, "rollouts": ROLLOUTS, "schedule": {"every": 2}, **changes}
    return small(folder, **settings)


def shifts(folder: Path, step: int) -> pd.DataFrame:
    """``shift/*`` values by readout and hookpoint, one column per metric."""
    rows = load_run(folder).timeline()
    rows = rows[rows.metric.str.startswith("shift/") & (rows.step == step) & ~rows.superseded]
    assert (rows.text == "rollout").all() and (rows.reader == "policy").all()
    return rows.pivot(index=["readout", "hookpoint"], columns="metric", values="value")


def refused(folder: Path) -> list[str]:
    return [event["reason"] for event in load_run(folder).events if event["event"] == "refused"]


@pytest.mark.parametrize("name", AVAILABLE)
def test_who_trains_on_completions_is_sampled(name: str, tmp_path: Path) -> None:
    entry = trainers()[name]
    settings = quick(tmp_path / "run", rollouts={**ROLLOUTS, "enabled": "auto"})
    train(name, tmp_path / "run", settings, max_steps=2, save_strategy="no")
    metrics = set(load_run(tmp_path / "run").timeline().metric)
    assert ("shift/total" in metrics) == entry.samples
    assert ({"cost/rollout_seconds", "cost/rollout_tokens"} <= metrics) == entry.samples


@pytest.mark.parametrize(
    ("name", "lora", "apart"),
    [("dpo", True, True), ("dpo", False, True), ("grpo", True, True), ("kto", True, True), ("sft", False, False)],
)
def test_text_and_representation_add_up(name: str, lora: bool, apart: bool, tmp_path: Path) -> None:
    """With an adapter that can be switched off, or the trainer's reference model; without either the reason is told."""
    folder = tmp_path / "run"
    train(name, folder, quick(folder), max_steps=4, use_lora=lora, learning_rate=1e-2)
    found = shifts(folder, 4)
    assert len(found) and (found["shift/total"].abs() > 1e-4).any()
    if apart:
        parts = found["shift/text"] + found["shift/representation"]
        np.testing.assert_allclose(found["shift/total"], parts, atol=1e-6)
        np.testing.assert_allclose(
            found["shift/interaction"],
            found["shift/representation"] - found["shift/representation_on_start"],
            atol=1e-6,
        )
    else:
        assert list(found) == ["shift/representation_on_start", "shift/total"]
        assert any("no frozen copy of the start" in reason for reason in refused(folder))


def test_a_model_that_does_not_change_writes_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("grpo", folder, quick(folder), max_steps=2, use_lora=True, learning_rate=0.0)
    assert shifts(folder, 2).abs().to_numpy().max() < 1e-5


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_training_is_bit_identical_while_completions_are_sampled(name: str, tmp_path: Path) -> None:
    entry = trainers()[name]
    assert_same(
        run(entry, tmp_path / "bare", {}, None),
        run(entry, tmp_path / "attached" / "run", {}, quick(tmp_path / "attached" / "run")),
    )


@pytest.mark.parametrize("texts", ["kept", "lost"])
def test_a_resumed_run_compares_with_what_its_start_wrote(texts: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = quick(folder, on_error="warn")
    train("dpo", tmp_path / "whole", settings, max_steps=4, use_lora=True)
    train("dpo", folder, settings, max_steps=4, use_lora=True)
    if texts == "lost":
        shutil.rmtree(folder / "_interp")
    train("dpo", folder, settings, max_steps=4, use_lora=True, resume=folder / "checkpoint-2")
    assert verify(folder) == 0 and not [e for e in load_run(folder).events if e["event"] == "failure"]
    if texts == "kept":
        np.testing.assert_allclose(shifts(folder, 4), shifts(tmp_path / "whole", 4), atol=1e-5)
    else:
        assert any("the texts cannot be read" in reason for reason in refused(folder))
        assert "concept/drift" in set(load_run(folder).timeline().metric)


def test_labels_sort_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_labels.py").write_text(
        "def short(prompts, completions):\n"
        "    assert len(prompts) == len(completions) and all(isinstance(text, str) for text in completions)\n"
        "    return [None if i == 0 else len(text.split()) % 2 == 1 for i, text in enumerate(completions)]\n"
        "def breaks(prompts, completions):\n"
        "    raise RuntimeError('planted')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "run"
    wanted = {**ROLLOUTS, "prompts": 16, "labels": "my_labels.short"}
    train("dpo", folder, quick(folder, rollouts=wanted, probes={"enabled": True}), max_steps=2, use_lora=True)
    rows = load_run(folder).timeline()
    rows = rows[rows.metric.str.startswith("quadrant/") & (rows.step == 2)]
    assert set(rows.metric.str.removeprefix("quadrant/")) == {
        "honest", "blatant", "obfuscated_policy", "obfuscated_activations", "unknown"
    }  # fmt: skip
    sums = rows.groupby(["readout", "hookpoint"]).value.sum()
    assert len(sums) and np.allclose(sums, 1)
    unknown = rows[rows.metric == "quadrant/unknown"]
    assert np.allclose(unknown.value, 1 / (2 * unknown.n)), (
        "two completions of each prompt, one of them without a label"
    )

    folder = tmp_path / "broken"
    wanted["labels"] = "my_labels.breaks"
    settings = quick(folder, rollouts=wanted, probes={"enabled": True}, on_error="warn")
    train("dpo", folder, settings, max_steps=2, use_lora=True)
    (failure,) = (event for event in load_run(folder).events if event["event"] == "failure")
    assert failure["what"] == "the quadrant" and "planted" in failure["reason"]
    assert {"shift/text", "concept/drift"} <= set(load_run(folder).timeline().metric)
    for labels in ("nowhere.at_all", "my_labels.absent", "short"):
        trainer = trainers()["dpo"].build(tmp_path / "never")
        with pytest.raises(ConfigError, match=r"rollouts\.labels"):
            attach(trainer, quick(tmp_path / "never", rollouts={**wanted, "labels": labels}))
