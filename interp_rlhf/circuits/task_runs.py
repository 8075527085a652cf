"""A task on a model: edge scores over some of its pairs, and the metric when the model runs as a circuit on others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from interp_rlhf.activations.engines import measuring
from interp_rlhf.circuits.attribution import Method, attribute_pair
from interp_rlhf.circuits.graph import Circuit
from interp_rlhf.circuits.interventions import Ablation, Intervention, RunWeights
from interp_rlhf.circuits.passes import Sources, paired_inputs, written_on
from interp_rlhf.circuits.tasks import Task, TaskBatch
from interp_rlhf.circuits.wiring import Wiring
from interp_rlhf.errors import MeasurementError


def attribute_task(
    model: nn.Module,
    wiring: Wiring,
    task: Task,
    pairs: Sequence[int],
    *,
    pad_token_id: int,
    batch_size: int = 16,
    method: Method = "eap-ig",
    steps: int = 5,
    ablation: Ablation = "patching",
    memory: int = 512,
    baseline: Sources | None = None,
) -> Circuit:
    """Edge scores of a task, mean over the rows of the ``pairs`` (indices); arguments as in ``attribute_edges``.

    ``baseline``: what the ablation ``mean`` puts in (:func:`task_mean`); of these pairs when not given.
    """
    if ablation == "mean" and baseline is None:
        baseline = task_mean(model, wiring, task, pairs, pad_token_id=pad_token_id, batch_size=batch_size)
    total, rows = torch.zeros(wiring.graph.possible.shape, dtype=torch.float64), 0
    with measuring(model):
        for batch in _batches(task, pairs, pad_token_id, batch_size):
            inputs = paired_inputs(batch.clean, batch.corrupt, wiring.engine.device)
            scores = attribute_pair(
                wiring,
                inputs,
                batch.metric,
                method=method,
                steps=steps,
                ablation=ablation,
                reads=batch.reads,
                memory=memory,
                baseline=baseline,
            )
            total += scores.double() * len(batch.ids)
            rows += len(batch.ids)
    return Circuit(
        graph=wiring.graph,
        scores=(total / rows).float(),
        selected=None,
        method=method,
        steps=steps if method == "eap-ig" else 1,
        ablation=ablation,
        n=len(pairs),
        task=task.name,
    )


def _batches(task: Task, pairs: Sequence[int], pad_token_id: int, size: int) -> Iterator[TaskBatch]:
    if not pairs:
        raise MeasurementError(f"task {task.name!r}: expected at least one pair, found none")
    for start in range(0, len(pairs), size):
        yield task.batch(pairs[start : start + size], pad_token_id)


def task_mean(
    model: nn.Module, wiring: Wiring, task: Task, pairs: Sequence[int], *, pad_token_id: int, batch_size: int = 16
) -> Sources:
    """What every component writes on the corrupt texts of the ``pairs``, mean over all their tokens, ``[1, ...]``."""
    sums: list[Tensor] = []
    layers, tokens = 0, 0
    with measuring(model):
        for batch in _batches(task, pairs, pad_token_id, batch_size):
            _, corrupt = paired_inputs(batch.clean, batch.corrupt, wiring.engine.device)
            written = written_on(wiring, corrupt, batch.reads)
            found = [x.double().sum(0, keepdim=True) for x in (written.embed, *written.heads, *written.mlps)]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
            layers, tokens = len(written.heads), tokens + len(written.embed)
    embed, *rest = [(value / tokens).float() for value in sums]
    return Sources(embed, tuple(rest[:layers]), tuple(rest[layers:]))


def _fitting(
    task: Task, pairs: Sequence[int], pad_token_id: int, size: int, wiring: Wiring, memory: int
) -> Iterator[TaskBatch]:
    """Batches of at most ``size`` pairs whose differences, ``4·S·rows·T·d`` bytes, fit into ``memory`` MiB."""
    start = 0
    while start < len(pairs):
        chosen = pairs[start : start + size]
        batch = task.batch(chosen, pad_token_id)
        needed = 4 * len(wiring.graph.sources) * batch.clean["input_ids"].numel() * wiring.parts.d_model / 2**20
        if needed <= memory:
            yield batch
            start += len(chosen)
        elif len(chosen) == 1:
            raise MeasurementError(
                f"memory: task {task.name!r}: expected at least {math.ceil(needed)} MiB for one pair, found {memory}"
            )
        else:
            size = len(chosen) // 2


class TaskRuns:
    """Runs a model as any circuit on some pairs of a task. Holds for the weights of now: make a new one after a step.

    Attributes:
        clean: M(full), the metric of each pair on its clean text, ``[n]`` float64 on the CPU.
        corrupt: M(∅), with every component corrupted, likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        wiring: Wiring,
        task: Task,
        pairs: Sequence[int],
        *,
        pad_token_id: int,
        batch_size: int = 16,
        ablation: Ablation = "patching",
        memory: int = 512,
        baseline: Sources | None = None,
    ) -> None:
        if not pairs:
            raise MeasurementError(f"task {task.name!r}: expected at least one pair, found none")
        if ablation == "mean" and baseline is None:
            baseline = task_mean(model, wiring, task, pairs, pad_token_id=pad_token_id, batch_size=batch_size)
        weights = RunWeights(wiring, memory)
        self._model = model
        self._runs: list[tuple[TaskBatch, Intervention]] = []
        with measuring(model):
            for batch in _fitting(task, pairs, pad_token_id, batch_size, wiring, memory):
                inputs = paired_inputs(batch.clean, batch.corrupt, wiring.engine.device)
                run = Intervention(
                    wiring, inputs, batch.metric, ablation, batch.reads, baseline=baseline, weights=weights
                )
                self._runs.append((batch, run))
        self.clean = self._per_pair([run.clean for _, run in self._runs])
        self.corrupt = self._per_pair([run.corrupt for _, run in self._runs])

    def __call__(self, circuit: Tensor | Circuit) -> Tensor:
        """The metric of each pair, ``[n]``, when only the circuit's edges carry what their source writes."""
        with measuring(self._model):
            return self._per_pair([run(circuit) for _, run in self._runs])

    def node(self, name: str) -> Tensor:
        """The metric of each pair, ``[n]``, when the component ``name`` is corrupted for all readers."""
        with measuring(self._model):
            return self._per_pair([run.node(name) for _, run in self._runs])

    def _per_pair(self, values: Sequence[Tensor]) -> Tensor:
        """Mean over the rows of each pair (a preference margin has two), in the order of the pairs."""
        sums: dict[str, list[float]] = {}
        for (batch, _), found in zip(self._runs, values, strict=True):
            for name, value in zip(batch.ids, found.double().tolist(), strict=True):
                sums.setdefault(name, []).append(value)
        return torch.tensor([sum(rows) / len(rows) for rows in sums.values()], dtype=torch.float64)
