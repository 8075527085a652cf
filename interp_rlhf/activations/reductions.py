"""From a value per token to one per text: means over marked tokens, and the last of them."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over marked tokens, in float32: ``[B, T, ...]`` and ``[B, T]`` give ``[B, ...]``.

    What stands at unmarked positions does not matter, not even NaN. Rows without a marked token give NaN.
    """
    mask = mask.bool()
    weights = mask.reshape(*mask.shape, *([1] * (values.dim() - 2)))
    total = torch.where(weights, values.float(), 0.0).sum(1)
    return total / mask.sum(1).reshape(-1, *([1] * (values.dim() - 2)))


def last_marked(values: Tensor, mask: Tensor) -> Tensor:
    """Value at the last marked token of each row: ``[B, T, ...]`` and ``[B, T]`` give ``[B, ...]``."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), positions, -1).amax(1)
    return values[torch.arange(values.shape[0], device=values.device), last]
