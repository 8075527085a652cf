"""Tasks on a model: neither scores nor runs depend on how the pairs are batched."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model

from interp_rlhf import MeasurementError
from interp_rlhf.circuits.task_runs import TaskRuns, attribute_task
from interp_rlhf.circuits.tasks import Task, TaskPair
from interp_rlhf.circuits.wiring import find_wiring


def task(margin: bool = False) -> Task:
    def pair(i: int) -> TaskPair:
        tail = (1,) * (i % 3)
        ends = {"chosen": (5, 6), "rejected": (7,)} if margin else {"answers": (5,), "wrong": (7,)}
        return TaskPair(id=f"p{i}", clean=(8 + i, 2, *tail), corrupt=(8 + i, 3, *tail), **ends)  # pyrefly: ignore

    return Task("t", tuple(pair(i) for i in range(8)), "margin" if margin else "logit_diff")


@pytest.mark.parametrize("ablation", ["patching", "mean", "zero"])
@pytest.mark.parametrize("margin", [False, True])
def test_nothing_depends_on_the_batch_size(ablation, margin: bool):
    model = make_model("llama")
    wiring, some = find_wiring(model), range(8)
    drawn = torch.rand(wiring.graph.possible.shape, generator=torch.Generator().manual_seed(0))
    selected, found = wiring.graph.possible & (drawn < 0.5), []
    for size in (1, 4, 16):
        options = {"pad_token_id": 0, "batch_size": size, "ablation": ablation}
        scores = attribute_task(model, wiring, task(margin), some, steps=2, **options).scores
        runs = TaskRuns(model, wiring, task(margin), some, **options)
        found.append((scores, runs.clean, runs.corrupt, runs(selected)))
        assert runs.clean.shape == (8,)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):  # gradients at zeroed embeddings are large: ε of the norm rules
            assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))


def test_refusals():
    model = make_model("llama")
    wiring = find_wiring(model)
    runs = TaskRuns(model, wiring, task(), range(8), pad_token_id=0)
    with pytest.raises(MeasurementError, match="nothing is selected"):
        runs(attribute_task(model, wiring, task(), range(8), pad_token_id=0, method="eap"))
    with pytest.raises(MeasurementError, match="MiB for one pair"):
        TaskRuns(model, wiring, task(), range(8), pad_token_id=0, memory=0)
