"""How well scores separate two classes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.errors import MeasurementError


def auc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    Mann & Whitney 1947, U / (n·m). 0.5 is chance, below it the scores point the wrong way.

    Raises:
        MeasurementError: an empty side or a score that is not finite.

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    for side, scores in (("positive", positive), ("negative", negative)):
        if scores.numel() == 0 or not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).sum())
            raise MeasurementError(
                f"AUC: expected finite {side} scores, found {scores.numel()}, of them {bad} not finite"
            )
    low = negative.detach().sort().values
    high = positive.detach().contiguous()
    below = torch.searchsorted(low, high, right=False).sum()
    up_to = torch.searchsorted(low, high, right=True).sum()
    return float(below + up_to) / (2 * len(high) * len(low))
