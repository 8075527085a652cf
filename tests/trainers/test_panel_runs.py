"""The probe panel in live runs: planted rotation and erasure, a sealed probe, texts of the training's own domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_run import PLANTED, planted_run
from torch import nn
from trainers.table import causal_lm, saved_model, trainers
from trainers.test_truth import Plants, start_of
from trainers.tiny_runs import live, small, train

from interp_rlhf import ConfigError, InterpError, LinearProbe, PromptError, attach, load_run
from interp_rlhf.fitting import FitOptions, fit_probe_file

HOOKPOINT = "layers.1.resid_post"


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("planted", ["rotation", "erasure"])
def test_a_concept_that_turns_and_one_that_is_gone(planted: str, tmp_path: Path) -> None:
    """The embeddings of both kinds of words lose what tells them apart; a rotation writes it in another direction."""
    folder = tmp_path / "run"

    def plant(model: nn.Module) -> None:
        weight = model.get_input_embeddings().weight
        v = start_of(folder)[f"direction/{PLANTED}/embed"]
        along = weight @ v
        weight -= torch.outer(along, v)
        if planted == "rotation":
            other = torch.linalg.qr(torch.stack([v, torch.ones_like(v)], 1)).Q[:, 1]
            weight += torch.outer(along, other)

    _, handle = planted_run(
        folder, callbacks=[Plants(plant)], interp={"hookpoints": ["embed", "layers.2.resid_post"]},
        learning_rate=0.0, max_steps=5, warmup_steps=0,
    )  # fmt: skip
    rows = live(handle.timeline()).xs(PLANTED, level="readout").xs("embed", level="hookpoint")
    start, end = (rows.xs(step, level="step") for step in (0, 5))
    stale = end.loc["probe/staleness"]
    assert start.value["probe/auc"] > 0.9 and start.value["probe/staleness"] == pytest.approx(0, abs=1e-9)
    assert end.value["probe/auc"] < 0.8 and end.value["probe/obfuscation_gap"] > 0.15
    if planted == "rotation":
        assert end.value["probe/auc_refit"] > 0.9 and stale.value > stale.null_high
        assert end.value["concept/cosine"] < end.null_low["concept/cosine"]
    else:
        assert end.value["probe/auc_refit"] < 0.85


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


def other_probe(path: Path, **changes: Any) -> str:
    settings = {"name": "order", "hookpoint": HOOKPOINT, "weight": torch.ones(32), "bias": 0.0, **changes}
    LinearProbe(**settings).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": torch.ones(16)}, "expected 32 dimensions, found 16"),
        ({"tokenizer": "0" * 64}, "fitted with another tokenizer"),
        ({"hookpoint": "layers.0.resid_post"}, "its hookpoint layers.0.resid_post is not among those read"),
        ({"name": "another"}, "its concept another is not among those read"),
    ],
)
def test_a_probe_of_another_model_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    sealed = other_probe(tmp_path / "sealed.safetensors", **changes)
    refused(tmp_path, ConfigError, f"probes.sealed: {sealed}", words, probes={"sealed": sealed})


def refused(folder: Path, kind: type[InterpError], *words: str, **changes: Any) -> None:
    trainer = trainers()["dpo"].build(folder / "run")
    with pytest.raises(kind) as caught:
        attach(trainer, {**small(folder / "run"), **changes})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not (folder / "run" / "interp").exists()


def test_labels_that_cannot_be_used(tmp_path: Path) -> None:
    text = {"prompt": "w1 w2", "completion": " w3"}
    for rows, words in (
        ([{**text, "label": True}], "expected labels of both classes, found 1 true, 0 false"),
        ([{**text, "label": True}, {**text, "label": False}], "found both for the same text"),
        ([{**text, "label": "yes"}], "line 1: expected an object with a label, true or false, found label 'yes'"),
        ([{"label": True}], "line 1: no known text column"),
    ):
        own = lines(tmp_path / "own.jsonl", rows)
        refused(tmp_path, PromptError, own, words, probes={"on_domain": {"order": own}})
    refused(tmp_path, PromptError, "cannot be read", probes={"on_domain": {"order": str(tmp_path / "none.jsonl")}})
    refused(tmp_path, ConfigError, "found 'another'", probes={"on_domain": {"another": own}})


def test_a_text_in_two_groups_is_refused(tmp_path: Path) -> None:
    (pack,) = small(tmp_path / "run")["concepts"]["packs"]
    header, first, *rest = [json.loads(line) for line in Path(pack).read_text().splitlines()]
    leaking = lines(tmp_path / "leak.jsonl", [header, first, *rest, {**first, "group": "another"}])
    refused(tmp_path, PromptError, leaking, "line 22", "line 2", "'another'", concepts={"packs": [leaking]})


def test_too_few_negatives_cost_the_recall_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("dpo", folder, small(folder, probes={"fpr": 0.1}), max_steps=2)
    run = load_run(folder)
    (event,) = (e for e in run.events if e["event"] == "refused" and e["readout"] == "order (recall)")
    assert event["reason"] == "recall at a false-positive rate of 0.1 needs at least 100 held-out negatives, found 20"
    metrics = set(run.timeline().metric)
    assert "probe/recall" not in metrics and {"probe/auc", "probe/staleness"} <= metrics


def test_nothing_changes_nothing_is_stale(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, handle = train("dpo", folder, small(folder), max_steps=2, learning_rate=0.0, model=causal_lm())
    rows = live(handle.timeline())
    end = rows.xs(2, level="step")
    for metric in ("probe/staleness", "probe/obfuscation_gap", "probe/obfuscation_excess", "concept/drift_t"):
        assert (end.loc[metric].value == 0).all(), metric
    assert (end.loc["concept/drift_t"].p == 1).all()
