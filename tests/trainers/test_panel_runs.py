"""The probe panel in live runs: a sealed probe beside texts of the own domain; nothing stale where nothing moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainers.table import causal_lm, saved_model
from trainers.tiny_runs import live, small, train

from interp_rlhf import load_run
from interp_rlhf.fitting import FitOptions, fit_probe_file

HOOKPOINT = "layers.1.resid_post"


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_sealed_probe_and_texts_of_the_own_domain(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (pack,) = small(folder)["concepts"]["packs"]
    sealed = tmp_path / "sealed.safetensors"
    fit_probe_file(saved_model(0), sealed, FitOptions(hookpoint=HOOKPOINT, pack=pack))
    labelled = [
        {"prompt": f"w{i} w{i + 20}", "completion": " w3 w3 w60" if i % 2 else " w60 w3 w3", "label": i % 2 == 1}
        for i in range(30)
    ]
    own = lines(tmp_path / "own.jsonl", labelled)
    probes = {"sealed": str(sealed), "on_domain": {"order": own}, "fpr": 0.5}
    train("dpo", folder, small(folder, probes=probes), max_steps=2, learning_rate=1e-2)
    run = load_run(folder)
    assert run.info["sealed_probe"]["name"] == "order" and len(run.info["sealed_probe"]["sha256"]) == 64
    assert run.info["config"]["probes"]["sealed"] == "sealed.safetensors"
    assert run.info["config"]["probes"]["on_domain"] == {"order": "own.jsonl"}
    rows = live(run.timeline()).xs("order", level="readout")
    wanted = ("sealed_auc", "auc_on", "auc_on_refit", "concept_drift", "recall", "baseline_shuffled")
    assert {f"probe/{name}" for name in wanted} <= set(rows.index.get_level_values("metric"))
    start = rows.xs(0, level="step").value
    assert start["probe/concept_drift"].abs().max() < 1e-6 and start["probe/auc_on", HOOKPOINT] > 0.5
    assert start["probe/sealed_auc"].index.tolist() == [HOOKPOINT]


def test_nothing_changes_nothing_is_stale(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, handle = train("dpo", folder, small(folder), max_steps=2, learning_rate=0.0, model=causal_lm())
    rows = live(handle.timeline())
    end = rows.xs(2, level="step")
    for metric in ("probe/staleness", "probe/obfuscation_gap", "probe/obfuscation_excess", "concept/drift_t"):
        assert (end.loc[metric].value == 0).all(), metric
    assert (end.loc["concept/drift_t"].p == 1).all()
