"""What a direction's reading is made of: the contribution of every component, each activations times weights.

The residual stream is a sum of what the embedding, the heads and the MLPs write (Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits"), so that a projection on a direction ``v`` is a sum too, and its change splits::

    h_L·v = Σ_c o_c·v      o_c·v = Σ_k a_k w_k      Δ(o_c·v) = Σ_k w̄_k Δa_k + Σ_k ā_k Δw_k      (bars: midpoints)

``a`` is what goes into a component's last linear layer (a head's output before ``W_O``, an MLP's hidden units), ``w``
is that layer's weight seen along ``v``. A norm after the component (Gemma 2/3) is linear once its ``r`` is given: ``r``
goes into ``a``, its scale into ``w``. Everything is linear in means over tokens and texts: only those are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interp_rlhf.activations.capturing import masked_mean
from interp_rlhf.activations.engines import measuring
from interp_rlhf.activations.hookpoints import layer_index, parse_hookpoint
from interp_rlhf.activations.prompts import Prompt, Tokens, batches
from interp_rlhf.circuits.linear_outputs import last_linears, weight_along
from interp_rlhf.circuits.norms import Norm
from interp_rlhf.circuits.passes import Pass, input_hook, output_hook
from interp_rlhf.circuits.wiring import Wiring, find_wiring
from interp_rlhf.errors import HookpointError, MeasurementError

#: The component of the residual stream that enters layer 0, and that of the output projections' biases (where a norm
#: follows, of its shift too).
EMBED, BIAS = "embed", "bias"


def component_names(n_layers: int, n_heads: int) -> tuple[str, ...]:
    """The components of the first layers, in order.

    >>> component_names(2, 1)
    ('embed', 'bias', 'a0.h0', 'm0', 'a1.h0', 'm1')
    """
    layers = ((*(f"a{layer}.h{head}" for head in range(n_heads)), f"m{layer}") for layer in range(n_layers))
    return (EMBED, BIAS, *(name for layer in layers for name in layer))


@dataclass(frozen=True, slots=True, eq=False)
class ComponentReading:
    """P directions read on one set of weights: U sampling units, C components, K coordinates. Float32 on the CPU.

    Attributes:
        n_heads: heads of a layer; :func:`component_names` names the components.
        owner: ``[K]`` the component of each coordinate, int64.
        opaque: ``[C]`` components whose activations and weights are not told apart (an MLP that does not end in a
            linear layer, such as a mixture of experts).
        activation: ``[K]`` mean over units of ``a``.
        weight: ``[P, K]`` the weights along each direction, 0 in layers after its hookpoint.
        parts: ``[P, U, C]`` contribution of each component on each unit.
        total: ``[P, U]`` projection of the residual stream, read at the hookpoint itself.
    """

    n_heads: int
    owner: Tensor
    opaque: Tensor
    activation: Tensor
    weight: Tensor
    parts: Tensor
    total: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The components in order."""
        return component_names((len(self.opaque) - 2) // (self.n_heads + 1), self.n_heads)


@dataclass(frozen=True, slots=True, eq=False)
class ComponentChanges:
    """From one reading to the next, float64.

    Attributes:
        change: ``[P, U, C]`` of each component's contribution on each unit.
        activation, weight: ``[P, C]`` mean over units of the part that goes with activations and with weights; NaN for
            a component that is opaque. Of ``embed`` all goes with weights, since the tokens are fixed.
        total: ``[P, U]`` change of the projection itself.
    """

    change: Tensor
    activation: Tensor
    weight: Tensor
    total: Tensor


def component_changes(start: ComponentReading, now: ComponentReading) -> ComponentChanges:
    """What moved each component's contribution, float64. Zeros, exactly, where the readings are equal.

    Raises:
        MeasurementError: readings of different models, directions or texts.

    >>> def head(a, w):  # one layer of one head, whose MLP writes nothing
    ...     a, w = torch.tensor(a), torch.tensor([w])
    ...     parts = torch.tensor([[[0.0, 0.0, float((a * w).sum()), 0.0]]])
    ...     return ComponentReading(1, torch.tensor([2, 2]), torch.zeros(4) > 0, a, w, parts, parts.sum(-1))
    >>> found = component_changes(head([1.0, 2.0], [1.0, 0.0]), head([3.0, 2.0], [1.0, 1.0]))
    >>> found.change[0, 0, 2].item(), found.activation[0, 2].item(), found.weight[0, 2].item()
    (4.0, 2.0, 2.0)
    """
    for what in ("weight", "parts"):
        shapes = [tuple(getattr(reading, what).shape) for reading in (start, now)]
        if shapes[0] != shapes[1] or not torch.equal(start.owner, now.owner):
            raise MeasurementError(f"components: {what}: found shape {shapes[1]}, expected {shapes[0]} as at the start")
    change = now.parts.double() - start.parts.double()
    a0, a1 = start.activation.double(), now.activation.double()
    w0, w1 = start.weight.double(), now.weight.double()
    by_activation = _by_owner((w0 + w1) / 2 * (a1 - a0), now)
    by_weight = _by_owner((w1 - w0) * (a0 + a1) / 2, now)
    opaque = start.opaque | now.opaque
    by_activation[:, opaque] = by_weight[:, opaque] = float("nan")
    by_activation[:, 0], by_weight[:, 0] = 0.0, change[..., 0].mean(1)
    return ComponentChanges(change, by_activation, by_weight, now.total.double() - start.total.double())


def _by_owner(values: Tensor, reading: ComponentReading) -> Tensor:
    """Sum of ``[P, K]`` within components, ``[P, C]``."""
    return values.new_zeros(len(values), len(reading.names)).index_add_(1, reading.owner, values)


# ------------------------------------------------------------------------------------------------------- the reading


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the P directions lie: ``vectors [P, d]`` float32, ``layers`` the layer whose end each reads."""

    vectors: Tensor
    layers: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Layers that have to be run."""
        return max(self.layers) + 1


def read_components(
    model: nn.Module,
    prompts: Sequence[Prompt],
    directions: Sequence[tuple[str, Tensor]],
    *,
    batch_size: int,
    pad_token_id: int,
    tokens: Tokens = "completion",
    skip_ids: frozenset[int] = frozenset(),
    layers: str | None = None,
) -> ComponentReading:
    """Read every text once, for all directions together, without leaving a trace.

    Args:
        model: plain or wrapped, with whole weights.
        prompts: the texts; those of one sampling unit are averaged first.
        directions: hookpoint ``layers.<l>.resid_post`` and vector ``[d]`` of each, at least one.
        batch_size, pad_token_id, tokens, skip_ids: as for
            :func:`~interp_rlhf.activations.capturing.read_prompts`.
        layers: path of the decoder layers, for architectures that are not recognised.

    Raises:
        HookpointError: a hookpoint is no residual stream, or the architecture is not supported
            (:func:`~interp_rlhf.circuits.wiring.find_wiring`).
        MeasurementError: the weights are not whole or not floating point, or a reading is not finite.
    """
    wiring = find_wiring(model, layers=layers)
    places = _places(directions, wiring)
    with measuring(model):
        linears = last_linears(wiring, places.depth)
        sums = _Sums(prompts, wiring.graph.n_heads, _weights(wiring, linears, places), places)
        for batch in batches(
            prompts, batch_size=batch_size, pad_token_id=pad_token_id, tokens=tokens, skip_ids=skip_ids
        ):
            arguments = ("input_ids", "attention_mask", "position_ids")
            inputs = {name: getattr(batch, name).to(wiring.engine.device) for name in arguments}
            sums.add(batch.rows, _Recorder(wiring, linears, inputs, batch.content_mask, places.layers).run())
    return sums.reading([f"m{index}" for index, linear in enumerate(linears) if linear is None])


def _places(directions: Sequence[tuple[str, Tensor]], wiring: Wiring) -> _Places:
    if not directions:
        raise MeasurementError("components: expected at least one direction, found none")
    found = []
    for name, _ in directions:
        point = parse_hookpoint(name)
        layer = layer_index(point, wiring.parts.n_layers)
        if point.site != "resid_post" or layer is None or not 0 <= layer < wiring.parts.n_layers:
            expected = f"layers.0.resid_post to layers.{wiring.parts.n_layers - 1}.resid_post"
            raise HookpointError(f"components: hookpoint {name!r}: expected one of {expected}")
        found.append(layer)
    vectors = torch.stack([vector.detach().float().cpu() for _, vector in directions])
    if vectors.shape[1] != wiring.parts.d_model:
        raise MeasurementError(f"components: expected directions [{wiring.parts.d_model}], found [{vectors.shape[1]}]")
    return _Places(vectors, tuple(found))


def _owners(depth: int, n_heads: int) -> dict[str, list[str]]:
    """The components whose coordinates each recorded value holds, side by side and equally many of each."""
    owners = {"embed": [EMBED]}
    for index in range(depth):
        heads = [f"a{index}.h{head}" for head in range(n_heads)]
        owners |= {f"a{index}": heads, f"b{index}": [BIAS], f"m{index}": [f"m{index}"]}
    return owners


class _Sums:
    """Sums over texts, each weighted so that they become means within sampling units; float64 on the CPU."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        n_heads: int,
        weights: Mapping[str, Tensor],
        places: _Places,
    ) -> None:
        self._n_heads, self._weights, self._places = n_heads, weights, places
        self._owners, self._names = _owners(places.depth, n_heads), component_names(places.depth, n_heads)
        place = {unit: index for index, unit in enumerate(dict.fromkeys(prompt.unit for prompt in prompts))}
        self._unit = torch.tensor([place[prompt.unit] for prompt in prompts])
        self._share = 1 / torch.bincount(self._unit).double()
        p, u = len(places.layers), len(place)
        self._activation = torch.zeros(sum(w.shape[1] for w in weights.values()), dtype=torch.float64)
        self._parts = torch.zeros(u, p, len(self._names), dtype=torch.float64)
        self._total = torch.zeros(u, p, dtype=torch.float64)

    def add(self, rows: Sequence[int], means: Mapping[str, Tensor]) -> None:
        """Add a batch: the texts' indices and what was recorded of them."""
        unit = self._unit[list(rows)]
        share = self._share[unit]
        parts = torch.zeros(len(rows), *self._parts.shape[1:], dtype=torch.float64)
        for key, mine in self._owners.items():
            a, w = (value.double().unflatten(1, (len(mine), -1)) for value in (means[key], self._weights[key]))
            parts[:, :, [self._names.index(name) for name in mine]] += torch.einsum("bck,pck->bpc", a, w)
        reads = torch.stack([means[f"h{layer}"] for layer in self._places.layers], 1).double()
        total = torch.einsum("bpd,pd->bp", reads, self._places.vectors.double())
        self._activation += share @ torch.cat([means[key] for key in self._owners], 1).double()
        self._parts.index_add_(0, unit, parts * share[:, None, None])
        self._total.index_add_(0, unit, total * share[:, None])

    def reading(self, opaque: Sequence[str]) -> ComponentReading:
        """What was read, once every text was added."""
        sizes = [(mine, self._weights[key].shape[1] // len(mine)) for key, mine in self._owners.items()]
        owner = [self._names.index(name) for mine, size in sizes for name in mine for _ in range(size)]
        reading = ComponentReading(
            n_heads=self._n_heads,
            owner=torch.tensor(owner),
            opaque=torch.tensor([name in opaque for name in self._names]),
            activation=(self._activation / len(self._share)).float(),
            weight=torch.cat([self._weights[key] for key in self._owners], 1),
            parts=self._parts.transpose(0, 1).float().contiguous(),
            total=self._total.T.float().contiguous(),
        )
        for value in (reading.activation, reading.weight, reading.parts, reading.total):
            if not bool(value.isfinite().all()):
                raise MeasurementError("components: found a reading that is not finite, expected numbers")
        return reading


# ------------------------------------------------------------------------------------------------- what goes through


class _Recorder:
    """One pass over a batch: the mean over content tokens of everything that an owner needs, float32 on the CPU.

    ``embed``, and ``h<l>`` after the layers that are read: ``[B, d]``. ``a<l>``: ``r·z`` ``[B, H·dh]``; ``b<l>``: ``r``
    and 1 ``[B, 2]``; ``m<l>``: ``r`` times the hidden units, ``r`` and 1 ``[B, k + 2]``; or what the MLP adds.
    """

    def __init__(
        self,
        wiring: Wiring,
        linears: Sequence[nn.Module | None],
        inputs: Mapping[str, Tensor],
        content: Tensor,
        reads: Sequence[int],
    ) -> None:
        self._wiring, self._linears, self._inputs, self._reads = wiring, linears, inputs, reads
        self._content = content.to(wiring.engine.device)
        self._means: dict[str, Tensor] = {}

    def run(self) -> dict[str, Tensor]:
        """Run the pass; the means by key."""
        blocks = self._wiring.blocks[: len(self._linears)]
        with ExitStack() as hooks:
            hooks.enter_context(input_hook(blocks[0].layer, lambda x: self._keep("embed", x)))
            for index, (block, linear) in enumerate(zip(blocks, self._linears, strict=True)):
                key = f"m{index}"
                self._watch(hooks, block.output, block.attention_post, (f"a{index}", f"b{index}"))
                if linear is None:
                    hooks.enter_context(output_hook(block.mlp_end, lambda x, key=key: self._keep(key, x)))
                else:
                    self._watch(hooks, linear, block.mlp_post, (key, key))
                if index in self._reads:
                    hooks.enter_context(output_hook(block.layer, lambda x, i=index: self._keep(f"h{i}", x)))
            Pass(self._wiring, self._inputs, f"layers.{len(blocks) - 1}.resid_post").run()
        return self._means

    def _watch(self, hooks: ExitStack, module: nn.Module, norm: Norm | None, keys: tuple[str, str]) -> None:
        """Keep the input of a linear module under the first key and what goes with its bias under the second."""
        given: list[Tensor] = []

        def after(output: Tensor) -> None:
            x, r = self._tokens(given.pop()).float(), None if norm is None else norm.inverse_rms(self._tokens(output))
            self._keep(keys[0], x if r is None else x * r)
            ones = self._means[keys[0]].new_ones(len(x), 1)
            scale = ones if r is None else self._mean(r)
            before = [self._means[keys[0]]] if keys[0] == keys[1] else []
            self._means[keys[1]] = torch.cat([*before, scale, ones], 1)

        hooks.enter_context(input_hook(module, given.append))
        hooks.enter_context(output_hook(module, after))

    def _keep(self, key: str, value: Tensor) -> None:
        self._means[key] = self._mean(self._tokens(value))

    def _mean(self, value: Tensor) -> Tensor:
        return masked_mean(value, self._content).cpu()

    def _tokens(self, value: Tensor) -> Tensor:
        """``[B, T, w]`` of a value whose tokens may be flattened."""
        return value.detach().reshape(*self._content.shape, -1)


def _weights(wiring: Wiring, linears: Sequence[nn.Module | None], places: _Places) -> dict[str, Tensor]:
    """Weights along the directions for each recorded value, ``[P, k]`` float32 on the CPU."""
    vectors = places.vectors.to(wiring.engine.device)
    found = {"embed": places.vectors}
    for index, linear in enumerate(linears):
        block = wiring.blocks[index]
        reached = torch.tensor([[float(layer >= index)] for layer in places.layers])
        output = weight_along(block.output, block.attention_post, vectors).cpu() * reached
        found[f"a{index}"], found[f"b{index}"] = output[:, :-2], output[:, -2:]
        mlp = vectors if linear is None else weight_along(linear, block.mlp_post, vectors)
        found[f"m{index}"] = mlp.cpu() * reached
    return found
