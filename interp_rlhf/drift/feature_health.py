"""Does a frozen dictionary still describe the model? Only then do its features say what changed.

A dictionary is fitted to the activations of one model. Training moves activations, in part along directions that the
dictionary does not have; its codes then still come out, of a reconstruction that has become worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from interp_rlhf.activations.feature_sums import FeatureReading
from interp_rlhf.errors import MeasurementError

#: Unreliable where FVU rises above ``max(FVU_RATIO·FVU_0, FVU_0 + FVU_RISE)``.
FVU_RATIO, FVU_RISE = 1.25, 0.02
#: Unreliable where FVU reaches this at either time: a ratio cannot tell that a dictionary never fitted.
FVU_MOST = 1.0
#: Unreliable where L0 shifts by more than this share of its start.
L0_SHIFT = 0.25


@dataclass(frozen=True, slots=True)
class Health:
    """How well a dictionary describes the activations, at the start and now.

    Attributes:
        fvu_start, fvu_now: fraction of variance unexplained (:func:`fraction_unexplained`).
        l0_start, l0_now: codes that are not 0, per token.
        dead_start, dead_now: share of the features that fired on no token of these texts, in [0, 1].
        residual_share: share of the texts' change that the reconstruction does not follow (:func:`residual_share`).
        reliable: whether the gate is open: features may be listed as drifted.
        why: one sentence with the numbers that closed it; "" where it is open.
    """

    fvu_start: float
    fvu_now: float
    l0_start: float
    l0_now: float
    dead_start: float
    dead_now: float
    residual_share: float
    reliable: bool
    why: str


def dictionary_health(start: FeatureReading, now: FeatureReading) -> Health:
    """Health of one dictionary on the same texts at two times, and the gate.

    Args:
        start, now: readings of all features.

    Raises:
        MeasurementError: readings of some features only, of other texts or another width, or activations that do not
            vary.

    >>> x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0]])
    >>> def reading(x, x_hat, codes):
    ...     return FeatureReading(
    ...         indptr=torch.arange(4),
    ...         columns=torch.tensor([0, 0, 1]).int(),
    ...         means=torch.ones(3),
    ...         fired=torch.ones(3),
    ...         tokens=torch.ones(3).long(),
    ...         x_mean=x,
    ...         x_hat_mean=x_hat,
    ...         x_sum=x.double().sum(0),
    ...         error=float((x - x_hat).square().sum()),
    ...         power=float(x.square().sum()),
    ...         l0=codes,
    ...         width=4,
    ...     )
    >>> found = dictionary_health(reading(x, x + 0.25, 3), reading(x + torch.tensor([0.0, 1.0]), x + 0.25, 3))
    >>> found.why
    'FVU rose from 0.028 to 0.141, above the 0.048 allowed'
    >>> found.dead_now, found.residual_share
    (0.5, 1.0)
    """
    for reading in (start, now):
        if reading.x_hat_mean is None or math.isnan(reading.error):
            raise MeasurementError("dictionary health: expected readings of all features, found only some of them read")
    fvu = [fraction_unexplained(reading) for reading in (start, now)]
    l0 = [reading.l0 / int(reading.tokens.sum()) for reading in (start, now)]
    dead = [1 - float(reading.alive.double().mean()) for reading in (start, now)]
    share = residual_share(start, now)
    reasons = [reason for reason in (_fvu_reason(*fvu), _l0_reason(*l0)) if reason]
    return Health(*fvu, *l0, *dead, residual_share=share, reliable=not reasons, why="; ".join(reasons))


def fraction_unexplained(reading: FeatureReading) -> float:
    """``Σ‖x − x̂‖² / Σ‖x − mean‖²`` over all tokens: 0 for a perfect reconstruction, 1 for the mean itself, or worse.

    The mean is over the tokens of the same reading; ``Σ‖x − mean‖² = Σ‖x‖² − ‖Σx‖²/tokens``, from float64 sums.

    Raises:
        MeasurementError: activations that do not vary, or sums that are not finite.

    >>> from interp_rlhf.drift.features import reading_of
    >>> from dataclasses import replace
    >>> sums = {"x_sum": torch.tensor([4.0, 0.0]).double(), "power": 20.0, "error": 4.0}
    >>> fraction_unexplained(replace(reading_of(torch.ones(4, 1)), **sums))  # 4/(20 − 4²/4)
    0.25
    """
    tokens = int(reading.tokens.sum())
    centred = reading.power - float(reading.x_sum.double().square().sum()) / max(tokens, 1)
    if not (math.isfinite(reading.error) and centred > 1e-12 * reading.power):
        raise MeasurementError(
            f"dictionary health: expected activations that vary, found squares of {centred:.3g} about the mean of "
            f"{tokens} tokens and an error of {reading.error:.3g}"
        )
    return reading.error / centred


def residual_share(start: FeatureReading, now: FeatureReading) -> float:
    """``Σ_i ‖Δx_i − Δx̂_i‖² / Σ_i ‖Δx_i‖²``, Δ the change of text i's mean activation and mean reconstruction.

    0 where the reconstruction follows every change, 1 where it does not move at all; above 1 where it moves elsewhere.
    0 where nothing changed.

    Raises:
        MeasurementError: readings of other texts or another width, or without reconstruction.

    >>> from interp_rlhf.drift.features import reading_of
    >>> from dataclasses import replace
    >>> start = replace(reading_of(torch.ones(1, 1)), x_mean=torch.zeros(1, 2), x_hat_mean=torch.zeros(1, 2))
    >>> moved = replace(start, x_mean=torch.tensor([[3.0, 1.0]]), x_hat_mean=torch.tensor([[3.0, 0.0]]))
    >>> residual_share(start, moved)
    0.1
    """
    if start.x_hat_mean is None or now.x_hat_mean is None:
        raise MeasurementError("dictionary health: expected readings with reconstructions, found none")
    shapes = tuple(start.x_mean.shape), tuple(now.x_mean.shape)
    if shapes[0] != shapes[1] or start.width != now.width or not bool((start.tokens == now.tokens).all()):
        raise MeasurementError(
            f"dictionary health: expected one dictionary on the same texts, found means {shapes[0]} and {shapes[1]}, "
            f"{int(start.tokens.sum())} and {int(now.tokens.sum())} tokens, widths {start.width} and {now.width}"
        )
    moved = now.x_mean.double() - start.x_mean.double()
    missed = moved - (now.x_hat_mean.double() - start.x_hat_mean.double())
    total = float(moved.square().sum())
    return float(missed.square().sum()) / total if total else 0.0


def _fvu_reason(start: float, now: float) -> str:
    worst, when = max((now, "now"), (start, "at the start"))
    if worst >= FVU_MOST:
        return f"FVU is {worst:.3f} {when}: the mean activation describes the texts as well"
    most = max(FVU_RATIO * start, start + FVU_RISE)
    return f"FVU rose from {start:.3f} to {now:.3f}, above the {most:.3f} allowed" if now > most else ""


def _l0_reason(start: float, now: float) -> str:
    if abs(now - start) <= L0_SHIFT * start:
        return ""
    share = f"by {abs(now - start) / start:.0%}" if start else "from none"
    return f"L0 shifted {share}, from {start:.1f} to {now:.1f} codes a token, above the {L0_SHIFT:.0%} allowed"
