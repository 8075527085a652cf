"""Causal share of a drift: which part of a change of behaviour goes through one direction of one layer.

The passes, each over the same texts: θ_0 and θ_t as they are, which also gives every token's component along v
(``[N, T]``, never whole residual streams); θ_t with θ_0's components; θ_0 with θ_t's; and both again along random
directions. Nothing else is kept of a model, so that θ_0 may be the policy with its adapter switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_rlhf.activations.prompts import ContrastPair, Prompt
from interp_rlhf.activations.reference import Reference
from interp_rlhf.activations.restoring import Behaviour, read_moved, summed_log_probs
from interp_rlhf.drift.concepts import by_unit
from interp_rlhf.drift.estimates import IntervalOptions
from interp_rlhf.drift.mediation import CausalShare, nll_change_estimate, no_share, with_shares, without_shares
from interp_rlhf.errors import MeasurementError, PromptError

#: Fewest random directions that a share is compared with.
LEAST_DIRECTIONS = 20


def causal_share(
    policy: nn.Module,
    reference: Reference | nn.Module,
    texts: Sequence[ContrastPair] | Sequence[Prompt],
    hookpoint: str,
    v: Float[Tensor, " d"],
    behaviour: Behaviour = summed_log_probs,
    *,
    batch_size: int,
    pad_token_id: int,
    directions: int = LEAST_DIRECTIONS,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    layers: str | None = None,
) -> CausalShare:
    """Share of the behaviour's change from θ_0 to θ_t that goes through the component along ``v``.

    Costs ``4 + 2·directions`` forward passes over the texts, 3 where there is no share. The model is left as it was.
    That both models are what they are taken for is the caller's to check
    (:func:`~interp_rlhf.activations.reference.check_is_start`).

    Args:
        policy: θ_t, wrapped or not.
        reference: θ_0: a model, or a :class:`~interp_rlhf.activations.reference.Reference` that can be read.
        texts: contrast pairs, each a sampling unit with the behaviour of its positive minus that of its negative text;
            or prompts, whose behaviour is averaged over the texts of a unit. Held out from the fit of ``v``.
        hookpoint: a ``resid_post``, resolved on both models.
        v: ``[d]`` direction; its length does not matter.
        behaviour: a number for each text, by default its completion's summed log-probability (nats).
        batch_size, pad_token_id: of the passes.
        directions: random directions, 20 at least.
        bootstrap: resamples over sampling units.
        confidence: of intervals and bands, in (0, 1).
        seed: seeds resampling and random directions.
        layers: path of the decoder layers, for architectures that are not recognised.

    Returns:
        Both shares beside random directions, and the change of perplexity; without shares, but with the reason, where
        the behaviour's change cannot be told from none.

    Raises:
        MeasurementError: fewer than 2 sampling units, fewer than 20 directions, or what :func:`read_moved` raises.
        PromptError: pairs and prompts are mixed.
        ReferenceMismatch: the reference holds cached readings only.
    """
    if directions < LEAST_DIRECTIONS:
        raise MeasurementError(f"directions: expected at least {LEAST_DIRECTIONS}, found {directions}")
    units = _Units.of(texts)
    read = partial(
        read_moved, prompts=units.prompts, hookpoint=hookpoint, v=v, batch_size=batch_size,
        pad_token_id=pad_token_id, behaviour=behaviour, layers=layers,
    )  # fmt: skip
    options: IntervalOptions = {"resamples": bootstrap, "confidence": confidence, "seed": seed}
    start = reference if isinstance(reference, Reference) else Reference("copy", reference)
    with start.reading() as frozen:
        then = read(frozen)
    now = read(policy, nll=True)
    restored = read(policy, target=then.components, nll=True)
    change = units.gaps(now.values - then.values)[:, 0]
    nll_change = nll_change_estimate(*map(units.totals, (now.nll, restored.nll, units.predicted)), **options)
    reason = no_share(change, **options)
    if reason is not None:
        return without_shares(reason, change, nll_change, **options)
    sideways = random_directions(directions, len(v), seed)
    undone = [restored.values, *(read(policy, target=then.components, along=w).values for w in sideways)]
    with start.reading() as frozen:
        done = [read(frozen, target=now.components, along=w).values for w in (None, *sideways)]
    return with_shares(
        change,
        units.gaps(now.values[:, None] - torch.stack(undone, dim=1)),
        units.gaps(torch.stack(done, dim=1) - then.values[:, None]),
        nll_change,
        **options,
    )


def random_directions(k: int, d: int, seed: int) -> Float[Tensor, "k d"]:
    """Unit vectors drawn alike in all directions, ``[k, d]`` float32; the global generators are not touched.

    >>> random_directions(2, 3, seed=0).shape
    torch.Size([2, 3])
    """
    drawn = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn / drawn.norm(dim=1, keepdim=True)).float()


@dataclass(frozen=True, slots=True)
class _Units:
    """The texts to read, and how their values become one per sampling unit."""

    prompts: tuple[Prompt, ...]
    pairs: bool

    @classmethod
    def of(cls, texts: Sequence[ContrastPair] | Sequence[Prompt]) -> _Units:
        pairs = [text for text in texts if isinstance(text, ContrastPair)]
        prompts = [text for text in texts if isinstance(text, Prompt)]
        if bool(pairs) == bool(prompts):
            raise PromptError(f"texts: expected pairs or prompts, found {len(pairs)} pairs and {len(prompts)} prompts")
        sides = [*(pair.positive for pair in pairs), *(pair.negative for pair in pairs)]
        return cls(tuple(sides if pairs else prompts), bool(pairs))

    def gaps(self, values: Tensor) -> Tensor:
        """Values of texts ``[N]`` or ``[N, k]`` to one row per unit ``[n, k]``: a pair's gap, a prompt's mean."""
        columns = values.reshape(len(self.prompts), -1)
        if self.pairs:
            positive, negative = columns.chunk(2)
            return positive - negative
        return by_unit(columns, [prompt.unit for prompt in self.prompts])

    def totals(self, values: Tensor) -> Tensor:
        """Values of texts ``[N]`` summed over the texts of each unit, ``[n]``."""
        if self.pairs:
            positive, negative = values.chunk(2)
            return positive + negative
        units = [prompt.unit for prompt in self.prompts]
        sizes = torch.tensor([units.count(unit) for unit in dict.fromkeys(units)])
        return by_unit(values[:, None], units)[:, 0] * sizes

    @property
    def predicted(self) -> Tensor:
        """Predicted tokens of each text, ``[N]`` float64: all but the first."""
        return torch.tensor([len(prompt.input_ids) - 1.0 for prompt in self.prompts], dtype=torch.float64)
