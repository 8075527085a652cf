"""Known answers through the whole pipeline, attached to real trainers: what was planted is found, nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted_run import PLANTED, SAVED, planted_run
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from trainers.table import trainers
from trainers.tiny_runs import live, small
from transformers import TrainerCallback

from interp_rlhf import Direction, Snapshot, attach
from interp_rlhf.activations.prompts import Prompt, content_tokens

AT_STEP, LAST = 2, 5
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


def read_alone(model: Any, prompts: list[Prompt], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """One text at a time: mean of the completion's hidden states ``[N, d]``, and its log-probability ``[N]``, nats."""
    means, log_probs = [], []
    for prompt in prompts:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prompt.input_ids]), output_hidden_states=True)
        keep = torch.tensor(content_tokens(prompt, "completion", frozenset({1})))
        means.append(output.hidden_states[layer + 1][0][keep].double().mean(0).numpy())
        scores = output.logits[0].double().log_softmax(-1)
        tokens = range(prompt.completion_start, len(prompt.input_ids))
        log_probs.append(sum(float(scores[i - 1, prompt.input_ids[i]]) for i in tokens))
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


def test_every_row_is_what_the_saved_weights_give(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    layer, hookpoint = 1, "layers.1.resid_post"
    folder = tmp_path / "run"
    hookpoints = [hookpoint, "layers.2.resid_post"]
    saves = {"save_strategy": "steps", "save_steps": 10}
    _, handle = planted_run(folder, interp={"hookpoints": hookpoints}, learning_rate=3e-2, **saves)
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
    expected = {
        ("representation/cka", ""): hsic(*grams) / np.sqrt(hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])),
        ("representation/cosine", ""): ((x0 * xt).sum(1) / (lengths[0] * lengths[1])).mean(),
        ("representation/norm_ratio", ""): (lengths[1] / lengths[0]).mean(),
        ("representation/effective_rank", ""): np.exp(-(p * np.log(p)).sum()),
        ("concept/drift", PLANTED): ((xt - x0) @ v).mean() / (x0 @ v).std(ddof=1),
        ("concept/drift_norm", PLANTED): ((xt - x0) @ v).mean() / lengths[0].mean(),
        ("concept/auc", PLANTED): mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)),
        ("concept/cosine", PLANTED): difference[0] @ difference[1] / np.prod([np.linalg.norm(d) for d in difference]),
        ("concept/behaviour", PLANTED): gaps[1].mean(),
        ("concept/behaviour_change", PLANTED): (gaps[1] - gaps[0]).mean(),
    }
    for (metric, readout), value in expected.items():
        found = at(rows, metric, 10).value
        place = "" if metric.startswith("concept/behaviour") else hookpoint
        assert found[readout, place] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
    assert abs(expected["concept/drift", PLANTED]) > 0.05 and expected["representation/cka", ""] < 0.9999
    written = {metric for metric in rows.index.get_level_values("metric") if not metric.startswith("cost")}
    assert written == {metric for metric, _ in expected}  # nothing is logged that was not computed here
    assert set(rows.index.get_level_values("readout")) == {"", PLANTED, SAVED}
