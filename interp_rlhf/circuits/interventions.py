"""Running the model as a circuit: edges outside it carry what their source writes on the corrupt text.

In one forward pass every reader v gets its own input ``in_v = x + Σ_{u → v not in the circuit} (ã_u − a_u)``, where
``x`` is the residual stream of that same pass, ``a_u`` what u wrote in it and ``ã_u`` what it writes when corrupted.
With all edges that is the clean run, with none the corrupt one, with all but one exact edge patching, and with all but
a component's it is activation patching of that component (Conmy et al. 2023, arXiv 2304.14997).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn

from interp_rlhf.circuits.graph import Circuit, Graph, check_graph
from interp_rlhf.circuits.linear import constant
from interp_rlhf.circuits.norms import Norm
from interp_rlhf.circuits.passes import Metric, Pair, Pass, SourceRecorder, Sources, input_hook, written_on
from interp_rlhf.circuits.wiring import Block, Projection, Wiring, replaced_input
from interp_rlhf.errors import MeasurementError

Ablation = Literal["patching", "mean", "zero"]

#: A projection, its first column among the targets, and its place in :class:`RunWeights`.
_Role = tuple[Projection, int, int]


def ablated(
    wiring: Wiring,
    corrupt: Mapping[str, Tensor],
    ablation: Ablation,
    reads: str | None = None,
    baseline: Sources | None = None,
) -> Sources | None:
    """What corrupted components write, ``None`` for nothing at all; a ``mean`` is ``[1, ...]``, of ``corrupt``."""
    if ablation == "zero":
        return None
    if ablation == "mean" and baseline is not None:
        return baseline
    written = written_on(wiring, corrupt, reads)
    return written.map(lambda value: value.mean(0, keepdim=True)) if ablation == "mean" else written


def difference(baseline: Sources | None, written: Sources | None) -> Sources:
    """Corrupted minus clean, component by component."""
    if written is None:
        raise MeasurementError("circuit: the clean pass recorded nothing, expected what its components write")
    return written.map(torch.neg) if baseline is None else baseline.minus(written)


def checked(values: Tensor, rows: int) -> Tensor:
    """The metric's values if they are finite numbers ``[B]``.

    Raises:
        MeasurementError: they are anything else; names the first bad row.
    """
    if not isinstance(values, Tensor) or values.shape != (rows,) or not values.is_floating_point():
        found = f"shape {list(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise MeasurementError(
            f"metric: expected a floating tensor of shape [{rows}], one value per row; found {found}"
        )
    bad = (~values.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        raise MeasurementError(
            f"metric: row {bad[0]}: expected finite values, found {values[bad[0]].item()} ({len(bad)} of {rows} rows)"
        )
    return values


def measured(metric: Metric, now: Tensor, clean: Tensor) -> Tensor:
    """The metric's values ``[B]`` of a result ``now`` beside the clean run's; neither may be written into.

    Raises:
        MeasurementError: values that are no finite ``[B]``, or a metric that changes what it is given.
    """
    before = now._version, clean._version
    values = checked(metric(now, clean), len(now))
    if before != (now._version, clean._version):
        raise MeasurementError("metric: expected its arguments to stay as they are, found them written into in place")
    return values


class RunWeights:
    """Each layer's weights in float32, kept where all fit into half of ``memory`` MiB, else only the last layer's."""

    def __init__(self, wiring: Wiring, memory: float) -> None:
        parts, graph = wiring.parts, wiring.graph
        size = 8 * parts.n_layers * (graph.n_heads + graph.n_kv_heads) * parts.head_dim * parts.d_model
        self._wiring, self._keep = wiring, size <= memory * 2**19
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def __getitem__(self, layer: int) -> tuple[Tensor, ...]:
        """``W_O`` per head ``[H, dh, d]``, then rows of query, key and value per head ``[n, dh, d]``."""
        if layer not in self._kept:
            if not self._keep:
                self._kept.clear()
            block = self._wiring.blocks[layer]
            roles = (role.weight() for role in (block.q, block.k, block.v))
            self._kept[layer] = (block.output_weight(), *roles)
        return self._kept[layer]


class Intervention:
    """Runs a model as any circuit over one batch. Use it inside :func:`~interp_rlhf.activations.engines.measuring`.

    Holds every component's difference between corrupt and current run, ``S·N·d`` float32 numbers, while a run lasts:
    nothing bounds that but the batch (:class:`~interp_rlhf.circuits.task_runs.TaskRuns` splits batches by it).

    Attributes:
        graph: the model's.
        clean: metric ``[B]`` of the clean run, M(full).
        corrupt: metric ``[B]`` with nothing but corrupted components, M(∅).
        baseline: what corrupted components write; ``None``: nothing.
        weights: the layers' weights, which interventions on one model may share.
    """

    def __init__(
        self,
        wiring: Wiring,
        pair: Pair,
        metric: Metric,
        ablation: Ablation = "patching",
        reads: str | None = None,
        *,
        baseline: Sources | None = None,
        weights: RunWeights | None = None,
    ) -> None:
        self._wiring, self._pair, self._reads = wiring, pair, reads
        self._metric = metric
        self.graph = wiring.graph
        with torch.no_grad():
            self._clean_result = Pass(wiring, pair[0], reads).run()
            self.baseline = ablated(wiring, pair[1], ablation, reads, baseline)
        self.weights = RunWeights(wiring, 512) if weights is None else weights
        self.clean = self._values(self._clean_result)
        self.corrupt = self(torch.zeros_like(wiring.graph.possible))

    def _values(self, result: Tensor) -> Tensor:
        return measured(self._metric, result, self._clean_result).detach()

    def __call__(self, circuit: Tensor | Circuit) -> Tensor:
        """Metric ``[B]`` of the run in which only the circuit's edges carry what their source writes.

        Args:
            circuit: its selected edges, or a selection ``[S, T]`` bool of this model's edges.

        Raises:
            MeasurementError: a circuit of another model or without a selection.
        """
        graph = self._wiring.graph
        selected = circuit if isinstance(circuit, Tensor) else selection(circuit, graph)
        if selected.shape != graph.possible.shape:
            raise MeasurementError(
                f"circuit: expected a selection of shape {list(graph.possible.shape)} (sources by targets of this "
                f"model), found {list(selected.shape)}"
            )
        missing = (graph.possible & ~selected).to(self._wiring.engine.device)
        one = Pass(self._wiring, self._pair[0], self._reads)
        with torch.no_grad():
            return self._values(_Run(self, one, missing.float()).result())

    def node(self, name: str) -> Tensor:
        """Metric ``[B]`` when the component ``name`` (a source) is corrupted for all its readers: activation patching.

        Raises:
            MeasurementError: no such component.
        """
        graph = self._wiring.graph
        if name not in graph.sources:
            raise MeasurementError(f"circuit: no component {name!r}, expected one of {', '.join(graph.sources)}")
        kept = graph.possible.clone()
        kept[graph.sources.index(name)] = False
        return self(kept)


def selection(circuit: Circuit, graph: Graph) -> Tensor:
    """The edges ``[S, T]`` of a circuit that is to run on a model with this graph.

    Raises:
        MeasurementError: it is of another model, or nothing is selected.
    """
    check_graph(circuit, graph)
    if circuit.selected is None:
        raise MeasurementError("circuit: nothing is selected, expected a circuit after top, greedy or threshold")
    return circuit.selected


class _Run:
    """One forward pass with every reader's input corrected by what is ``missing`` ``[S, T]`` (1: edge is corrupted)."""

    def __init__(self, owner: Intervention, one: Pass, missing: Tensor) -> None:
        self._owner, self._one, self._missing, self._wiring = owner, one, missing, one.wiring
        self._recorder = SourceRecorder(one)
        self._buffer: Tensor | None = None
        self._filled = 0
        self._x: dict[int, Tensor] = {}

    def result(self) -> Tensor:
        """The pass's result (logits, or what the metric reads) under the corrections."""
        graph, end = self._wiring.graph, len(self._wiring.graph.targets) - 1
        readers = graph.n_heads + 2 * graph.n_kv_heads
        finish: Callable[[Tensor], Tensor] | None = None
        with ExitStack() as hooks:
            hooks.enter_context(self._recorder.on())
            for index, block in enumerate(self._wiring.blocks[: self._one.depth]):
                column = index * (readers + 1)
                if self._missing[:, column : column + readers].any():
                    self._correct_attention(hooks, index, block, column)
                if self._missing[:, column + readers].any():
                    self._correct_mlp(hooks, index, block, column + readers)
            if self._missing[:, end].any():
                finish = self._plus(self._known(self._one.depth), end)
                if self._one.reads is None and self._wiring.final is not None:
                    hooks.enter_context(replaced_input(self._wiring.final, finish))
                    finish = None
            return self._one.run(finish)

    def _known(self, layer: int) -> int:
        """How many sources are computed before ``layer``."""
        return 1 + layer * (self._wiring.graph.n_heads + 1)

    def _differences(self, known: int) -> Tensor:
        """Corrupted minus current of the first ``known`` sources, ``[known, N, d]``."""
        now, then, heads = self._recorder.sources, self._owner.baseline, self._wiring.graph.n_heads
        if self._buffer is None:
            self._buffer = now.embed.new_empty(len(self._wiring.graph.sources), *now.embed.shape)
            self._buffer[0] = -now.embed if then is None else then.embed - now.embed
            self._filled = 1
        while self._filled < known:
            layer, is_mlp = (self._filled - 1) // (heads + 1), (self._filled - 1) % (heads + 1) == heads
            mine = (now.mlps if is_mlp else now.heads)[layer]
            gone = -mine if then is None else (then.mlps if is_mlp else then.heads)[layer] - mine
            if is_mlp:
                gone = gone[None]
            else:
                gone = torch.bmm(gone.unflatten(1, (heads, -1)).transpose(0, 1), self._owner.weights[layer][0])
            self._buffer[self._filled : self._filled + len(gone)] = gone
            self._filled += len(gone)
        return self._buffer[:known]

    def _correction(self, known: int, columns: slice | int) -> Tensor:
        """``Σ_u missing·(ã_u − a_u)`` for some readers, ``[t, N, d]``."""
        missing = self._missing[:known, columns].reshape(known, -1)
        differences = self._differences(known)
        return (missing.T @ differences.flatten(1)).unflatten(1, differences.shape[1:])

    def _plus(self, known: int, column: int) -> Callable[[Tensor], Tensor]:
        """Adds one reader's correction to a residual stream ``[B, T, d]``."""

        def add(stream: Tensor) -> Tensor:
            changed, mask = stream.clone(), self._one.mask
            changed[mask] = (changed[mask].float() + self._correction(known, column)[0]).to(stream.dtype)
            return changed

        return add

    def _correct_mlp(self, hooks: ExitStack, index: int, block: Block, column: int) -> None:
        known = self._known(index) + (0 if self._wiring.graph.parallel else self._wiring.graph.n_heads)
        if block.mlp_norm is None:
            hooks.enter_context(replaced_input(block.mlp, self._plus(known, column)))
            return
        stream = block.layer if self._wiring.graph.parallel or block.mlp_reader is None else block.mlp_reader
        hooks.enter_context(input_hook(stream, lambda x: self._x.update({-1 - index: self._one.flat(x)})))

        def renormed(value: Tensor, norm: Norm = block.mlp_norm) -> Tensor:
            changed = value.clone()
            stream = self._x.pop(-1 - index) + self._correction(known, column)[0]
            changed[self._one.mask] = norm(stream).to(value.dtype)
            return changed

        hooks.enter_context(replaced_input(block.mlp, renormed))

    def _correct_attention(self, hooks: ExitStack, index: int, block: Block, column: int) -> None:
        graph = self._wiring.graph
        hooks.enter_context(input_hook(block.layer, lambda x: self._x.update({index: self._one.flat(x)})))
        starts = (column, column + graph.n_heads, column + graph.n_heads + graph.n_kv_heads)
        roles = tuple(zip((block.q, block.k, block.v), starts, (1, 2, 3), strict=True))
        for module in dict.fromkeys(role.module for role, _, _ in roles):
            mine = [entry for entry in roles if entry[0].module is module]

            def after(_: nn.Module, args: object, output: Tensor, mine: list[_Role] = mine) -> Tensor:
                return self._projected(index, block, output, mine)

            hooks.callback(module.register_forward_hook(after).remove)

    def _projected(self, index: int, block: Block, output: Tensor, roles: Sequence[_Role]) -> Tensor:
        """A projection's output ``[B, T, out]`` with the heads whose input lacks something computed from that input."""
        changed, mask, norm = output.clone(), self._one.mask, block.attention_norm
        values = changed[mask]
        for role, column, which in roles:
            n = len(role.columns)
            lacking = self._missing[:, column : column + n].any(0)
            if not lacking.any():
                continue
            stream = self._x[index] + self._correction(self._known(index), slice(column, column + n))[lacking]
            stream = stream if norm is None else norm(stream)
            weight, bias = (
                self._owner.weights[index][which][lacking],
                constant(role.module, self._wiring.parts.d_model)[role.columns[lacking]],
            )
            heads = torch.bmm(stream, weight.transpose(1, 2)) + bias[:, None]
            values[:, role.columns[lacking].flatten()] = heads.transpose(0, 1).flatten(1).to(values.dtype)
        changed[mask] = values
        return changed
