"""Circuits of checkpoints: the rows of a live run again, and between models that were never attached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from trainers.table import preferences, trainers
from trainers.tiny_runs import small

from interp_rlhf import attach, compare, load_run
from interp_rlhf.offline import measure


def settings(folder: Path) -> dict[str, Any]:
    (pack,) = small(folder / "run")["concepts"]["packs"]
    return {
        "hookpoints": ["layers.50%.resid_post"],
        "prompts": {"n": 8},
        "concepts": {"n_pairs": 16, "packs": [pack]},
        "statistics": {"bootstrap": 100, "directions": 200},
        "circuits": {"tasks": ["induction"], "pairs": 16, "steps": 2, "size": 0.1},
        "probes": {"enabled": False},
        "schedule": {"every": 2},
        "on_error": "raise",
    }


def circuits(table: pd.DataFrame, step: int) -> pd.Series:
    rows = table[(table["step"] == step) & table["metric"].str.startswith("circuit/")]
    return rows[rows["metric"] != "circuit/seconds"].set_index("metric")["value"].sort_index()


pytestmark = pytest.mark.xdist_group("offline circuits")  # one worker, so that it is built once


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPO run of 4 steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("circuits")
    trainer = trainers()["dpo"].build(folder / "out", max_steps=4, save_strategy="steps", save_steps=2)
    attach(trainer, settings(folder))
    trainer.train()
    return folder / "out"


def test_a_checkpoint_of_a_run_gives_the_rows_that_the_run_wrote(run: Path, tmp_path: Path):
    live = load_run(run).timeline()
    found = measure(run / "checkpoint-2", out=tmp_path / "measured")
    expected = circuits(live, 2)
    assert len(expected) >= 6
    pd.testing.assert_series_equal(circuits(found.timeline(), 2), expected, atol=1e-6, rtol=0)
    pd.testing.assert_series_equal(circuits(found.timeline(), 0), circuits(live, 0), atol=1e-6, rtol=0)
    assert [mechanism.task for mechanism in found.summary().mechanisms] == ["induction"]
    written = load_run(tmp_path / "measured")
    assert [event["step"] for event in written.events if event["event"] == "circuit"] == [0, 2]
    again = measure(run / "checkpoint-4", run=tmp_path / "measured")
    pd.testing.assert_series_equal(circuits(again.timeline(), 4), circuits(live, 4), atol=1e-6, rtol=0)


def test_models_that_were_never_attached_are_compared(run: Path, tmp_path: Path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preferences(24)), encoding="utf-8")
    wanted = settings(tmp_path)
    models = [run / "checkpoint-2", run / "checkpoint-4"]
    found = compare(*models, config=wanted, data=data)
    (table,) = found.timelines.values()
    begun, now = circuits(table, 0), circuits(table, int(table["step"].max()))
    assert begun["circuit/structure_change"] == 0.0
    assert {"circuit/metric", "circuit/structure_jaccard"} <= set(now.index)
    assert "induction" in str(found)
