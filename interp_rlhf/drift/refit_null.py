"""What a refitted dictionary may claim: its number beside refits of the same recipe on frozen activations.

Dictionaries refitted with another seed differ, although nothing in the model did. A statistic of a refit on the changed
model means something only beyond the spread of the same statistic over refits on the start's own activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from interp_rlhf.errors import MeasurementError

#: Refits on frozen activations, at least.
LEAST_REFITS = 5


@dataclass(frozen=True, slots=True)
class RefitExcess:
    """A refit's number less what refits give where nothing changed.

    Attributes:
        excess: value minus the mean of the refits on frozen activations.
        low, high: prediction interval of the excess; covers 0 where the value is like another such refit.
        refits: number of refits on frozen activations.
        sd: their SD (n − 1 in it).
    """

    excess: float
    low: float
    high: float
    refits: int
    sd: float

    @property
    def changed(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def refit_excess(frozen: Sequence[float], value: float, *, confidence: float = 0.95) -> RefitExcess:
    """``value − mean(frozen)`` with the interval ``± t·sd·√(1 + 1/n)``, t with n − 1 degrees of freedom.

    The prediction interval of one more draw from a normal distribution (Hahn & Meeker 1991, section 4.7). Everything
    of the recipe must be equal but the seed, the data's order included; otherwise the spread is not that of refits.

    Args:
        frozen: the statistic of refits on frozen activations, one for each seed; at least :data:`LEAST_REFITS`.
        value: the statistic of a refit on the changed model's activations.
        confidence: of the interval, in (0, 1).

    Returns:
        Refits that agree to the last bit (a recipe without chance) leave no width but that of rounding.

    Raises:
        MeasurementError: too few refits, a number that is not finite, a confidence outside (0, 1).

    >>> found = refit_excess([1.0, 2.0, 3.0, 4.0, 5.0], 9.0)
    >>> found.excess, round(found.low, 3), round(found.high, 3), found.changed
    (6.0, 1.191, 10.809, True)
    """
    if len(frozen) < LEAST_REFITS:
        raise MeasurementError(f"refit null: expected at least {LEAST_REFITS} refits, found {len(frozen)}")
    if not all(map(math.isfinite, (*frozen, value))) or not 0 < confidence < 1:
        raise MeasurementError(
            f"refit null: expected finite numbers and a confidence in (0, 1), found {[*frozen, value]} and {confidence}"
        )
    n, sd = len(frozen), stdev(map(float, frozen))
    excess = float(value) - fmean(frozen)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd * math.sqrt(1 + 1 / n)
    half = max(half, 1e-12 * float(max(map(abs, (*frozen, value)))))
    return RefitExcess(excess, excess - half, excess + half, n, sd)
