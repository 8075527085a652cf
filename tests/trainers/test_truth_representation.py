"""Representations that were scaled, turned or mixed up on purpose, in a real training: each metric says just that."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainers.table import trainers
from trainers.tiny_runs import live, small
from transformers import TrainerCallback

from interp_rlhf import attach

AT_STEP, LAST, WIDTH = 2, 3, 32
METRICS = ("cka", "cosine", "norm_ratio", "effective_rank")


class Changes(TrainerCallback):
    """Replaces the embeddings once, after a step of a training whose learning rate is 0."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == AT_STEP:
            with torch.no_grad():
                weight = kwargs["model"].get_input_embeddings().weight
                weight.copy_(self.change(weight.double()))


def rotation() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q


def flat(weight: Tensor) -> Tensor:
    """The part in the two leading directions."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    s[2:] = 0
    return u @ torch.diag(s) @ v


def trained(folder: Path, change: Callable[[Tensor], Tensor]) -> tuple[Any, dict[str, float], dict[str, float]]:
    """Metrics of the embeddings at the start and after the change, and the handle."""
    trainer = trainers()["dpo"].build(folder, learning_rate=0.0, max_steps=LAST)
    trainer.add_callback(Changes(change))
    handle = attach(trainer, {**small(folder), "hookpoints": ["embed", "layers.0.resid_post"]})
    trainer.train()
    rows = live(handle.timeline())

    def at(step: int) -> dict[str, float]:
        return {metric: float(rows.loc[(f"representation/{metric}", "", "embed", step)].value) for metric in METRICS}

    return handle, at(0), at(LAST)


def text_means(handle: Any, weight: Tensor) -> np.ndarray:
    """Means ``[N, d]`` of the embeddings of each audit text's completion, in the order of the prompt set."""
    prompts = handle.callback._plan.audit.prompts
    ids = [list(prompt.input_ids[prompt.completion_start :]) for prompt in prompts]
    return np.stack([weight[row].mean(0).numpy() for row in ids])


@pytest.mark.parametrize("factor", [0.5, 1.25, 3.0])
def test_a_scale_shows_in_the_norm_ratio_only(factor: float, tmp_path: Path) -> None:
    _, start, found = trained(tmp_path / "run", lambda weight: factor * weight)
    assert found["norm_ratio"] == pytest.approx(factor, rel=1e-5)
    assert found["cosine"] == pytest.approx(1, abs=1e-6) and found["cka"] == pytest.approx(1, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(start["effective_rank"], rel=1e-5)


def test_a_rotation_shows_in_the_cosine_only(tmp_path: Path) -> None:
    turn = rotation()
    handle, start, found = trained(tmp_path / "run", lambda weight: weight @ turn)
    assert found["cka"] == pytest.approx(1, abs=1e-6) and found["norm_ratio"] == pytest.approx(1, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(start["effective_rank"], rel=1e-5)
    x = text_means(handle, embeddings(handle) @ turn.T)
    expected = np.einsum("nd,nd->n", x, x @ turn.numpy()) / (x * x).sum(1)
    assert found["cosine"] == pytest.approx(expected.mean(), abs=1e-5) and abs(found["cosine"]) < 0.5


def embeddings(handle: Any) -> Tensor:
    """As they are after training."""
    return handle._trainer.model.get_input_embeddings().weight.detach().double()


def test_a_mirror_image_keeps_everything_but_the_sign_of_the_cosine(tmp_path: Path) -> None:
    _, start, found = trained(tmp_path / "run", lambda weight: -weight)
    assert found["cosine"] == pytest.approx(-1, abs=1e-6)
    assert found["cka"] == pytest.approx(1, abs=1e-6) and found["norm_ratio"] == pytest.approx(1, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(start["effective_rank"], rel=1e-5)


def test_a_plane_has_rank_two_at_most(tmp_path: Path) -> None:
    handle, start, found = trained(tmp_path / "run", flat)
    x = text_means(handle, embeddings(handle))
    sigma = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = sigma[sigma > 1e-9] / sigma[sigma > 1e-9].sum()
    assert len(p) == 2
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert found["effective_rank"] <= 2 < start["effective_rank"] / 2


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased, by its definition: the mean over all quadruples of prompts (Song et al. 2012, theorem 2)."""
    k, m, n = x @ x.T, y @ y.T, len(x)
    quadruples = np.array(list(permutations(range(n), 4))).T
    i, j, q, r = quadruples
    return float((k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])).mean())


def test_other_embeddings_are_unrelated(tmp_path: Path) -> None:
    """Words that got the embeddings of others: prompts are arranged differently, so CKA is far from 1."""
    order = torch.randperm(94, generator=torch.Generator().manual_seed(9))
    handle, _, found = trained(tmp_path / "run", lambda weight: weight[order])
    after = embeddings(handle)
    before = torch.empty_like(after)
    before[order] = after
    x0, xt = text_means(handle, before), text_means(handle, after)
    lengths = np.linalg.norm(x0, axis=1), np.linalg.norm(xt, axis=1)
    assert found["cosine"] == pytest.approx(((x0 * xt).sum(1) / (lengths[0] * lengths[1])).mean(), abs=1e-5)
    assert found["norm_ratio"] == pytest.approx((lengths[1] / lengths[0]).mean(), abs=1e-5)
    cka = hsic(x0, xt) / np.sqrt(hsic(x0, x0) * hsic(xt, xt))
    assert found["cka"] == pytest.approx(cka, abs=1e-5) and cka < 0.5


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_layer_that_lies_below_the_change_does_not_move(use_lora: bool, tmp_path: Path) -> None:
    """Only the last block's MLP is trained: exactly it and what it writes to move."""
    trainer = trainers()["dpo"].build(tmp_path / "run", learning_rate=1e-2, use_lora=use_lora)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(trains_last(name, parameter, use_lora))
    sites = [f"layers.{n}.{site}" for n in range(3) for site in ("attn_out", "mlp_out", "resid_post")]
    handle = attach(trainer, {**small(tmp_path / "run"), "hookpoints": ["embed", *sites]})
    trainer.train()
    cosine = live(handle.timeline()).loc["representation/cosine"].xs(6, level="step").value[""]
    moved = {name for name, value in cosine.items() if value < 1 - 1e-6}
    written = {"layers.2.resid_post", "layers.2.attn_out", "layers.2.mlp_out"}
    assert moved == (written if use_lora else written - {"layers.2.attn_out"})


def trains_last(name: str, parameter: nn.Parameter, use_lora: bool) -> bool:
    """The last block's MLP; with LoRA, which is on the attention here, the last block's adapters."""
    if use_lora:
        return parameter.requires_grad and "layers.2." in name
    return "layers.2.mlp." in name
