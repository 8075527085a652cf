"""Known answers through the whole pipeline, attached to real trainers: what was planted is found, nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted_run import PLANTED, SAVED, WORDS, planted_run
from scipy.stats import mannwhitneyu, ttest_1samp
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from trainers import recomputed
from trainers.table import trainers
from trainers.tiny_runs import live, small
from transformers import LlamaForCausalLM, TrainerCallback

from interp_rlhf import Direction, Snapshot, attach
from interp_rlhf.activations.prompts import Prompt, content_tokens
from interp_rlhf.drift.nulls import covariance_directions
from interp_rlhf.readouts.packs import Pack, PackPair
from interp_rlhf.readouts.probes import LinearProbe

AT_STEP, LAST = 2, 5
PLACES = {layer: f"layers.{layer}.resid_post" for layer in (1, 2)}
SITES = [f"layers.{n}.{site}" for n in range(3) for site in ("resid_post", "attn_out", "mlp_out")]


class Plants(TrainerCallback):
    """Changes the weights once, after a step of a training whose learning rate is 0."""

    def __init__(self, plant: Callable[[nn.Module], None]) -> None:
        self.plant = plant

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == AT_STEP:
            with torch.no_grad():
                self.plant(kwargs["model"])


def start_of(folder: Path) -> dict[str, Tensor]:
    return Snapshot.load(folder / "interp" / "snapshots" / "01-step-000000").tensors()


def audit_rows(tensors: Mapping[str, Tensor], handle: Any, name: str) -> np.ndarray:
    """Readings of the audit texts ``[N, d]``, one text a unit, picked by id from what a snapshot holds."""
    place = {f"{text % 2**64:016x}": row for row, text in enumerate(tensors["text_ids"].tolist())}
    prompts = handle.callback._plan.audit.prompts
    assert len({prompt.unit for prompt in prompts}) == len(prompts)
    return tensors[name].numpy()[[place[prompt.id] for prompt in prompts]].astype(np.float64)


def at_step(rows: pd.DataFrame, step: int) -> pd.DataFrame:
    """The rows of one step, by metric, readout and hookpoint."""
    return rows.xs(step, level="step")


def at(rows: pd.DataFrame, metric: str, step: int) -> pd.DataFrame:
    """The rows of one metric and step, by readout and hookpoint."""
    return rows.loc[metric].xs(step, level="step")


@pytest.mark.parametrize(("layer", "shift"), [(0, 0.1), (1, -0.4), (2, 1.0)])
def test_a_planted_shift_is_found_at_its_layer_and_concept(layer: int, shift: float, tmp_path: Path) -> None:
    """Added to one block's last bias: some of a concept's direction, less what another would read of it."""
    folder, hookpoint = tmp_path / "run", f"layers.{layer}.resid_post"

    other = Direction("other", hookpoint, torch.randn(32, generator=torch.Generator().manual_seed(layer)))

    def added() -> Tensor:
        v, w = start_of(folder)[f"direction/{PLANTED}/{hookpoint}"].double(), other.vector.double()
        return shift * (v - (v @ w) * w)

    def plant(model: nn.Module) -> None:
        model.transformer.h[layer].mlp.c_proj.bias += added().float()

    other.save(tmp_path / "other.safetensors")
    concepts = {"n_pairs": 64, "packs": [], "directions": [str(tmp_path / "other.safetensors")]}
    _, handle = planted_run(
        folder, gpt2=True, callbacks=[Plants(plant)], interp={"hookpoints": SITES, "concepts": concepts},
        learning_rate=0.0, max_steps=LAST, warmup_steps=0,
    )  # fmt: skip
    rows, start = live(handle.timeline()), start_of(folder)
    drift, x0 = at(rows, "concept/drift", LAST), audit_rows(start, handle, f"start/{hookpoint}")
    v = start[f"direction/{PLANTED}/{hookpoint}"].double().numpy()
    along = float(added().numpy() @ v)
    expected = along / np.std(x0 @ v, ddof=1)
    assert abs(expected) > 0.1 and drift.value[PLANTED, hookpoint] == pytest.approx(expected, abs=1e-4)
    assert drift.value["other", hookpoint] == pytest.approx(0, abs=1e-4)
    share = at(rows, "concept/drift_norm", LAST).value[PLANTED, hookpoint]
    assert share == pytest.approx(along / np.linalg.norm(x0, axis=1).mean(), abs=1e-4)
    here = [finding.readout for finding in handle.summary().moved if hookpoint in finding.moved_at]
    assert here == [PLANTED]

    def reached(place: str) -> bool:
        return int(place.split(".")[1]) > layer or place in (hookpoint, f"layers.{layer}.mlp_out")

    floor = at(rows, "concept/drift", 0)
    for key, value in drift.value.drop(("other", hookpoint)).items():
        assert (floor.null_low[key] <= value <= floor.null_high[key]) != reached(key[1]), key
    for metric, still in (("representation/cosine", 1.0), ("representation/norm_ratio", 1.0)):
        band = at(rows, metric, 0)
        for key, value in at(rows, metric, LAST).value.items():
            inside = band.null_low[key] <= value <= band.null_high[key]
            assert inside != reached(key[1]) and (reached(key[1]) or value == pytest.approx(still, abs=1e-6)), key


@pytest.mark.parametrize("case", ["dpo", "dpo lora", "sft", "grpo", "plain"])
def test_where_nothing_changes_nothing_is_reported(case: str, tmp_path: Path) -> None:
    name, _, adapter = case.partition(" ")
    trainer = trainers()[name].build(tmp_path / "run", use_lora=bool(adapter), learning_rate=0.0)
    handle = attach(trainer, small(tmp_path / "run"))
    trainer.train()
    rows = live(handle.timeline())
    last = int(rows.index.get_level_values("step").max())
    assert last == 6
    for metric in ("representation/cka", "representation/cosine", "representation/norm_ratio"):
        found = at(rows, metric, last)
        assert len(found) and np.allclose(found.value, 1, atol=1e-6)
        assert (found.value.between(found.null_low, found.null_high)).all()
    drift, floor = at(rows, "concept/drift", last), at(rows, "concept/drift", 0)
    assert len(drift) and (drift.value.abs() <= floor.null_high).all()
    still = at(rows, "concept/drift_t", last)
    assert len(still) and (still.value == 0).all() and (still.p == 1).all(), "numerical noise is no movement"
    for metric in ("probe/staleness", "probe/obfuscation_gap", "probe/obfuscation_excess"):
        assert len(at(rows, metric, last)) and (at(rows, metric, last).value == 0).all(), metric
    stale = at(rows, "probe/staleness", last)
    assert stale.value.between(stale.null_low, stale.null_high).all()
    assert np.allclose(at(rows, "concept/cosine", last).value, 1, atol=1e-6)
    assert np.allclose(at(rows, "concept/behaviour_change", last).value, 0, atol=1e-5)
    summary = handle.summary()
    assert not summary.moved and not summary.moved_without_behaviour and not summary.behaviour_without_moved
    assert [finding.readout for finding in summary.not_detected] == ["order"]


def test_a_change_that_no_hookpoint_reads(tmp_path: Path) -> None:
    """Only the head is trained: behaviour changes, no representation does."""
    trainer = trainers()["sft"].build(tmp_path / "run", learning_rate=5e-2)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    handle = attach(trainer, small(tmp_path / "run"))
    trainer.train()
    rows = live(handle.timeline())
    assert np.allclose(at(rows, "representation/cosine", 6).value, 1, atol=1e-6) and not handle.summary().moved
    change = at(rows, "concept/behaviour_change", 6).iloc[0]
    assert abs(change.value) > 0.1 and change.ci_low * change.ci_high > 0
    assert [finding.readout for finding in handle.summary().behaviour_without_moved] == ["order"]


# -- every formula once more, from the saved weights, in NumPy ---------------------------------------------------------


def read_alone(model: Any, prompts: Sequence[Prompt], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """One text at a time: mean of the completion's hidden states ``[N, d]``, and its log-probability ``[N]``, nats."""
    means, log_probs, unscaled = [], [], []
    remember = model.model.norm.register_forward_pre_hook(lambda module, args: unscaled.append(args[0]))
    for prompt in prompts:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prompt.input_ids]), output_hidden_states=True)
        keep = torch.tensor(content_tokens(prompt, "completion", frozenset({1})))
        states = (*output.hidden_states[:-1], unscaled[-1])  # the model returns the last ones after its norm
        means.append(states[layer + 1][0][keep].double().mean(0).numpy())
        scores = output.logits[0].double().log_softmax(-1)
        tokens = range(prompt.completion_start, len(prompt.input_ids))
        log_probs.append(sum(float(scores[i - 1, prompt.input_ids[i]]) for i in tokens))
    remember.remove()
    return np.stack(means), np.array(log_probs)


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Unbiased HSIC of two Gram matrices, term by term as Song et al. 2012 write it."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    total = (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return float(total / (n * (n - 3)))


LABELS = [i % 2 == 0 for i in range(30)]


def attach_everything(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Settings with labelled texts, a sealed probe and a bank of 32 concepts in words that the tiny tokenizer has."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(8)
    texts = [{"prompt": f"b{i} a{i}", "completion": f" {'ba'[label]}{40 + i} a{i}", "label": label}
             for i, label in enumerate(LABELS)]  # fmt: skip
    (folder / "labelled.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    LinearProbe(PLANTED, PLACES[1], torch.from_numpy(draw.normal(size=32)), 0.1).save(folder / "sealed.safetensors")
    packs = []
    for number in range(32):
        words = draw.permutation(WORDS)[:16]
        pairs = [PackPair(f"g{i}", "a1", words[i], words[i + 8]) for i in range(8)]
        packs.append(Pack(f"bank-{number:02d}", "", tuple(pairs)))
    monkeypatch.setattr("interp_rlhf.plan.bank_packs", lambda seed: tuple(packs))
    probes = {"on_domain": {PLANTED: str(folder / "labelled.jsonl")}, "sealed": str(folder / "sealed.safetensors")}
    return {"hookpoints": list(PLACES.values()), "probes": probes}


def test_every_row_is_what_the_saved_weights_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hookpoint = 1, PLACES[1]
    folder = tmp_path / "run"
    saves = {"save_strategy": "steps", "save_steps": 10}
    interp = attach_everything(monkeypatch, tmp_path / "given")
    _, handle = planted_run(folder, interp=interp, learning_rate=3e-2, **saves)
    models = [LlamaForCausalLM.from_pretrained(path) for path in (tmp_path / "model", folder / "checkpoint-10")]
    plan, rows = handle.callback._plan, live(handle.timeline())
    texts = list(plan.audit.prompts)
    (x0, _), (xt, _) = (read_alone(model, texts, layer) for model in models)
    (concept,) = (concept for concept in plan.concepts if concept.name == PLANTED)
    fit = [[getattr(pair, side) for pair in concept.fit] for side in ("positive", "negative")]
    held = [[getattr(pair, side) for pair in concept.held] for side in ("positive", "negative")]
    (fit_0, fit_t), (held_0, held_t) = (
        [[read_alone(model, side, layer) for side in half] for model in models] for half in (fit, held)
    )
    difference = [(half[0][0] - half[1][0]).mean(0) for half in (fit_0, fit_t)]
    v = difference[0] / np.linalg.norm(difference[0])
    gaps = [half[0][1] - half[1][1] for half in (held_0, held_t)]
    grams = x0 @ x0.T, xt @ xt.T
    sigma = np.linalg.svd(xt - xt.mean(0), compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    lengths = np.linalg.norm(x0, axis=1), np.linalg.norm(xt, axis=1)
    positive, negative = (side[0] @ v for side in held_t)
    drift = ((xt - x0) @ v).mean() / (x0 @ v).std(ddof=1)
    sides = [
        tuple(np.r_[a[0], b[0]] for a, b in zip(*halves, strict=True)) for halves in ((fit_0, held_0), (fit_t, held_t))
    ]
    probes, reference = expected_probes(plan, concept, models, sides, layer)
    expected = {
        ("representation/cka", ""): hsic(*grams) / np.sqrt(hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])),
        ("representation/cosine", ""): ((x0 * xt).sum(1) / (lengths[0] * lengths[1])).mean(),
        ("representation/norm_ratio", ""): (lengths[1] / lengths[0]).mean(),
        ("representation/effective_rank", ""): np.exp(-(p * np.log(p)).sum()),
        ("concept/drift", PLANTED): drift,
        ("concept/drift_norm", PLANTED): ((xt - x0) @ v).mean() / lengths[0].mean(),
        ("concept/drift_t", PLANTED): ttest_1samp((xt - x0) @ v, 0).statistic,
        ("specificity/directions_without_top", PLANTED): drift,
        ("specificity/concept_bank", PLANTED): drift,
        ("concept/auc", PLANTED): mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)),
        ("concept/cosine", PLANTED): difference[0] @ difference[1] / np.prod([np.linalg.norm(d) for d in difference]),
        ("concept/behaviour", PLANTED): gaps[1].mean(),
        ("concept/behaviour_change", PLANTED): (gaps[1] - gaps[0]).mean(),
        **{(metric, PLANTED): value for metric, value in probes.items()},
    }
    for (metric, readout), value in expected.items():
        found = at(rows, metric, 10).value
        place = "" if metric.startswith("concept/behaviour") else hookpoint
        assert found[readout, place] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
    assert abs(drift) > 0.05 and expected["representation/cka", ""] < 0.9999
    assert len(set(probes.values())) > 6 and 0.5 < reference <= 1
    written = {metric for metric in rows.index.get_level_values("metric") if not metric.startswith("cost")}
    split = {"component/weight_share"}  # recomputed in test_components.py
    assert written == {metric for metric, _ in expected} | split  # nothing else is logged that was not computed here
    assert set(rows.index.get_level_values("readout")) == {"", PLANTED, SAVED}
    every = handle.timeline().query("reader == 'reference'")
    assert set(every.metric) == {"probe/auc"}, "what was read under the start"
    (frozen,) = every[(every.step == 10) & (every.hookpoint == hookpoint)].value
    assert frozen == pytest.approx(reference, abs=1e-6)
    stale = at(rows, "probe/staleness", 10).loc[PLANTED, hookpoint]
    band = recomputed.staleness_band(
        sides[0], [pair.group for pair in (*concept.fit, *concept.held)], refits=20, seed=0
    )
    assert (stale.null_low, stale.null_high) == pytest.approx(band, abs=1e-6)
    specific_as_the_weights_say(at_step(rows, 10), plan, models[0], x0, xt, v)
    flipped_as_the_weights_say(at_step(rows, 10), start_of(folder), texts, models)


def expected_probes(
    plan: Any, concept: Any, models: Sequence[Any], sides: Sequence[recomputed.Sides], layer: int
) -> tuple[dict[str, float], float]:
    """Every ``probe/`` metric from the readings of all pairs at the start and now; and the frozen AUC at the start."""
    pairs = [*concept.fit, *concept.held]
    groups = [pair.group for pair in pairs]
    found = recomputed.panel(*sides, groups, fpr=0.2, seed=0)
    reference = found.pop("reference")
    found |= recomputed.word_baselines(([p.positive for p in pairs], [p.negative for p in pairs]), groups, seed=0)
    scores = np.r_[sides[1]] @ plan.sealed.weight.numpy().astype(float) + plan.sealed.bias
    found["probe/sealed_auc"] = float(roc_auc_score(np.repeat([1, 0], len(pairs)), scores))
    (labelled,) = plan.on_domain
    assert list(labelled.labels) == LABELS
    on = tuple(read_alone(model, labelled.prompts, layer)[0] for model in models)
    moved = found["probe/auc"] - reference
    found |= recomputed.on_domain(sides[0], on, LABELS, groups, moved, seed=0)
    return found, reference


def specific_as_the_weights_say(
    rows: pd.DataFrame, plan: Any, model: Any, x0: np.ndarray, xt: np.ndarray, v: np.ndarray
) -> None:
    """p and band of ``specificity/…`` at the middle layer."""
    drawn = covariance_directions(torch.from_numpy(x0), 200, 0, drop_top=True).double().numpy()
    assert abs(drawn @ np.linalg.svd(x0 - x0.mean(0))[2][0]).max() < 1e-6, "none along the first principal component"
    sides = [zip(*((pair.positive, pair.negative) for pair in pack.fit), strict=True) for pack in plan.bank]
    read = [tuple(read_alone(model, side, 1)[0] for side in pair) for pair in sides]
    nulls = {
        "directions_without_top": recomputed.drifts(x0, xt, drawn).mean(0),
        "concept_bank": recomputed.bank(x0, xt, v, read),
    }
    assert len(read) == 32 and len(nulls["concept_bank"]) >= 19
    for kind, null in nulls.items():
        row = rows.loc[f"specificity/{kind}", PLANTED, PLACES[1]]
        assert row.p == pytest.approx(recomputed.rank(row.value, null), abs=1e-9), kind
        edge = np.sort(abs(null))[int(np.ceil(0.95 * (len(null) + 1))) - 1]
        assert (row.null_low, row.null_high) == pytest.approx((-edge, edge), rel=1e-4), kind


def flipped_as_the_weights_say(
    rows: pd.DataFrame, start: Mapping[str, Tensor], texts: Sequence[Prompt], models: Sequence[Any]
) -> None:
    """t, p and band of ``concept/drift_t`` over all concepts and hookpoints, by signs of our own."""
    columns = {}
    for key, direction in start.items():
        if key.startswith("direction/"):
            _, name, place = key.split("/")
            x0, xt = (read_alone(model, texts, int(place.split(".")[1]))[0] for model in models)
            columns[name, place] = recomputed.drifts(x0, xt, direction.double().numpy()[None])[:, 0]
    assert len(columns) == 3
    t, p, critical = recomputed.joint_flips(columns, seed=11)
    found = rows.loc["concept/drift_t"]
    assert set(found.index) == set(columns)
    for key, row in found.iterrows():
        assert row.value == pytest.approx(t[key], rel=1e-3), key
        assert row.p == pytest.approx(p[key], abs=0.02), key
        assert row.null_high == -row.null_low == pytest.approx(critical, rel=0.06), key
