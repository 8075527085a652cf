"""Causal shares at the end of a run: the numbers of the function itself, a reason where there are none, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainers.tiny_runs import small, train

from interp_rlhf import load_run
from interp_rlhf.activations.reference import find_frozen
from interp_rlhf.causal import causal_share

PLACE = "layers.2.resid_post"


def run(name: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    statistics = {"bootstrap": 100, "directions": 200, "tolerance": 0.0}  # whatever has moved at all
    settings = small(folder, causal=True, probes={"enabled": False}, rollouts={"enabled": False}, statistics=statistics)
    return train(name, folder, settings, max_steps=4, **changes)


def told(folder: Path) -> tuple[Any, list[str]]:
    """Rows of causal shares, and reasons why there are none."""
    found = load_run(folder)
    table = found.timeline()
    reasons = [e["reason"] for e in found.events if e["event"] == "refused" and "causal share" in e["readout"]]
    assert not [e for e in found.events if e["event"] == "failure"]
    return table[table.metric.str.startswith("causal/")], reasons


@pytest.mark.parametrize("lora", [True, False])
def test_rows_are_the_shares_of_the_last_weights(tmp_path: Path, lora: bool) -> None:
    trainer, handle = run("dpo", tmp_path / "out", use_lora=lora, learning_rate=2e-3)
    session = handle.callback._current
    session.find_causes(4, [("order", PLACE)])  # as the end of a run does for what stands out
    rows, reasons = told(tmp_path / "out")
    baseline = session.baseline
    (concept,) = (c for c in baseline.concepts if c.name == "order")
    assert set(rows.readout) == {"order"} and set(rows.step) == {4}, (reasons, str(handle.summary()))
    assert set(rows.hookpoint) == {PLACE}
    start = find_frozen(trainer.model, getattr(trainer, "ref_model", None))
    expected = causal_share(
        trainer.model, start, concept.texts.held, PLACE, concept.directions[PLACE].vector,
        batch_size=16, pad_token_id=baseline.plan.pad_token_id, bootstrap=100, seed=0,
    )  # fmt: skip
    found = rows[rows.readout == "order"].set_index("metric").value
    assert set(found.index) == set(expected.rows())
    for metric, value in expected.rows().items():
        assert found[metric] == pytest.approx(value.value, abs=1e-6), metric
    assert bool(expected.reason) == any(expected.reason == reason for reason in reasons)


def test_nothing_moved_asks_nothing(tmp_path: Path) -> None:
    run("dpo", tmp_path / "out", use_lora=True, learning_rate=0.0)
    rows, reasons = told(tmp_path / "out")
    assert rows.empty and not reasons


def test_without_a_frozen_start_the_reason_is_told(tmp_path: Path) -> None:
    _, handle = run("sft", tmp_path / "out", learning_rate=2e-3)
    handle.callback._current.find_causes(4, [("order", PLACE)])
    rows, reasons = told(tmp_path / "out")
    assert rows.empty and reasons and all(reason.startswith("no frozen copy of the start") for reason in reasons)
