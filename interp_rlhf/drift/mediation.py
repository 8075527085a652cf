"""How much of a change of behaviour goes through the drift along one direction.

Two interventions on the same texts, reported separately: in θ_t every token's component along v is put back to θ_0's
(*restored*: was the drift needed?), and in θ_0 it is set to θ_t's (*injected*: does the drift suffice?). Beside each
stand random directions moved by the same amounts. Here are the statistics; :mod:`interp_rlhf.causal` runs the models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.drift.control_runs import rank_place
from interp_rlhf.drift.estimates import Estimate, IntervalOptions, estimate
from interp_rlhf.drift.nulls import bootstrap_statistic, direction_band, finite, paired_bootstrap, rank_p
from interp_rlhf.errors import MeasurementError


@dataclass(frozen=True, slots=True, eq=False)
class CausalShare:
    """What :func:`interp_rlhf.causal.causal_share` found.

    Attributes:
        share: ``causal/share_restored``; ``None`` where there is none.
        injected: ``causal/share_injected``; ``None`` where there is none.
        reason: why there are no shares; empty where there are.
        nll_change: ``causal/nll_change``.
        change: ``B_t − B_0`` in the behaviour's unit, mean over sampling units.
        change_interval: its paired bootstrap interval.
        random_restored, random_injected: ``[k]`` shares of the random directions; empty where there are none.
        n: sampling units.
    """

    share: Estimate | None
    injected: Estimate | None
    reason: str
    nll_change: Estimate
    change: float
    change_interval: tuple[float, float]
    random_restored: Tensor
    random_injected: Tensor
    n: int

    def rows(self) -> dict[str, Estimate]:
        """Metric to estimate, ready for the timeline; without the shares where there are none."""
        named = {
            "causal/share_restored": self.share,
            "causal/share_injected": self.injected,
            "causal/nll_change": self.nll_change,
        }
        return {metric: value for metric, value in named.items() if value is not None}


def no_share(change: Float[Tensor, " n"], **options: Unpack[IntervalOptions]) -> str | None:
    """Why there is no share of this change of behaviour; ``None`` where there is one.

    Args:
        change: ``[n]`` behaviour at step t minus at step 0, one value per sampling unit.
        options: of the bootstrap.

    >>> options = {"resamples": 200, "confidence": 0.95, "seed": 0}
    >>> no_share(torch.tensor([1.0, 2.0, 3.0]), **options)
    >>> no_share(torch.tensor([1.0, -1.0]), **options)
    'behaviour changed by 0 [-1, 1], an interval that covers 0'
    """
    change = finite(change, "change of behaviour").double()
    low, high = paired_bootstrap(change, **options)
    if low <= 0 <= high:
        return f"behaviour changed by {float(change.mean()):.3g} [{low:.3g}, {high:.3g}], an interval that covers 0"
    everything: IntervalOptions = {**options, "confidence": 1.0}
    nearest, _ = bootstrap_statistic(lambda counts: (counts @ change).abs(), len(change), **everything)
    if nearest == 0:
        unchanged = int((change == 0).sum())
        return f"behaviour did not change at all in some resamples ({unchanged} of {len(change)} units unchanged)"
    return None


def share_estimate(
    metric: Literal["causal/share_restored", "causal/share_injected"],
    effect: Float[Tensor, " n"],
    change: Float[Tensor, " n"],
    random: Float[Tensor, "k n"],
    **options: Unpack[IntervalOptions],
) -> Estimate:
    """``mean effect / mean change`` with a bootstrap interval over units, beside random directions.

    Only where :func:`no_share` gives ``None``. The share is not confined to [0, 1]: what is moved can act against the
    change, or beyond it.

    Args:
        effect: ``[n]`` what the intervention did to each unit's behaviour: ``B_t − B_t^restored`` or
            ``B_0^injected − B_0``.
        change: ``[n]`` the same units' ``B_t − B_0``.
        random: ``[k, n]`` the effects of k random directions.
        options: of the bootstrap; its confidence also is the band's. No band where k is too small for it.

    >>> change, options = torch.tensor([1.0, 2.0, 3.0]), {"resamples": 200, "confidence": 0.95, "seed": 0}
    >>> found = share_estimate("causal/share_restored", 0.5 * change, change, torch.zeros(20, 3), **options)
    >>> found.value, found.ci_low, found.ci_high, found.null_high, round(found.p, 3)
    (0.5, 0.5, 0.5, 0.0, 0.048)
    """
    over, under = (finite(part, "causal share").double() for part in (effect, change))
    if over.shape != under.shape or random.shape[1:] != under.shape:
        raise MeasurementError(
            f"{metric}: expected effects [n], changes [n] and random effects [k, n], found {tuple(effect.shape)}, "
            f"{tuple(change.shape)} and {tuple(random.shape)}"
        )
    value = float(over.sum() / under.sum())
    interval = bootstrap_statistic(lambda counts: (counts @ over) / (counts @ under), len(under), **options)
    null = random_shares(random, change)
    band = None if rank_place(len(null), options["confidence"]) is None else direction_band(null, options["confidence"])
    p = rank_p(value, null)
    return estimate(metric, value, len(under), interval=interval, null_kind="random_directions", band=band, p=p)


def random_shares(random: Float[Tensor, "k n"], change: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
    """Share of each random direction, ``[k]`` float64: ``mean effect / mean change``.

    >>> random_shares(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.0000], dtype=torch.float64)
    """
    return finite(random, "random directions").double().sum(1) / finite(change, "change of behaviour").double().sum()


def nll_change_estimate(
    now: Float[Tensor, " n"],
    restored: Float[Tensor, " n"],
    tokens: Float[Tensor, " n"],
    **options: Unpack[IntervalOptions],
) -> Estimate:
    """``causal/nll_change``: mean negative log-probability per token with the component restored, minus without, nats.

    ``exp`` of it is the ratio of perplexities. Interval over sampling units, whose tokens are drawn as a whole.

    Args:
        now, restored: ``[n]`` summed negative log-probability of each unit's texts in θ_t, as it is and restored.
        tokens: ``[n]`` predicted tokens of each unit's texts; every unit has one at least.

    >>> options = {"resamples": 200, "confidence": 0.95, "seed": 0}
    >>> now, restored = torch.tensor([4.0, 8.0]), torch.tensor([5.0, 10.0])
    >>> nll_change_estimate(now, restored, torch.tensor([2.0, 4.0]), **options).value
    0.5
    """
    if not now.shape == restored.shape == tokens.shape or not bool((tokens > 0).all()):
        raise MeasurementError(
            f"causal/nll_change: expected at least one predicted token in each of {len(now)} units, found "
            f"{tokens.tolist() if now.shape == restored.shape == tokens.shape else tuple(tokens.shape)}"
        )
    change = finite(restored, "restored perplexity").double() - finite(now, "perplexity").double()
    weights = tokens.double()
    interval = bootstrap_statistic(lambda counts: (counts @ change) / (counts @ weights), len(change), **options)
    return estimate("causal/nll_change", float(change.sum() / weights.sum()), len(change), interval=interval)


def with_shares(
    change: Float[Tensor, " n"],
    restored: Float[Tensor, "n k1"],
    injected: Float[Tensor, "n k1"],
    nll_change: Estimate,
    **options: Unpack[IntervalOptions],
) -> CausalShare:
    """Both shares, where :func:`no_share` gives ``None``.

    Args:
        change: ``[n]`` each unit's ``B_t − B_0``.
        restored: ``[n, 1 + k]`` effects ``B_t − B_t^restored`` on each unit: along ``v``, then along k random
            directions.
        injected: ``[n, 1 + k]`` effects ``B_0^injected − B_0``, likewise.
        nll_change: ``causal/nll_change``.
    """
    return CausalShare(
        share=share_estimate("causal/share_restored", restored[:, 0], change, restored[:, 1:].T, **options),
        injected=share_estimate("causal/share_injected", injected[:, 0], change, injected[:, 1:].T, **options),
        reason="",
        nll_change=nll_change,
        change=float(change.mean()),
        change_interval=paired_bootstrap(change, **options),
        random_restored=random_shares(restored[:, 1:].T, change),
        random_injected=random_shares(injected[:, 1:].T, change),
        n=len(change),
    )


def without_shares(
    reason: str, change: Float[Tensor, " n"], nll_change: Estimate, **options: Unpack[IntervalOptions]
) -> CausalShare:
    """No shares, for the reason that :func:`no_share` gave."""
    none = torch.empty(0, dtype=torch.float64)
    interval = paired_bootstrap(change, **options)
    return CausalShare(None, None, reason, nll_change, float(change.mean()), interval, none, none, len(change))
