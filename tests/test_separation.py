"""AUC against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shape_checked import checked
from sklearn.metrics import roc_auc_score

from interp_rlhf.errors import MeasurementError

separation = checked("interp_rlhf.readouts.separation")


@pytest.mark.parametrize("levels", [3, 1000])  # with many ties and with hardly any
@pytest.mark.parametrize("sizes", [(1, 1), (30, 17), (200, 200)])
def test_auc_equals_scikit_learn(levels: int, sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(levels)
    positive, negative = (generator.integers(0, levels, size).astype(float) for size in sizes)
    expected = roc_auc_score([1] * sizes[0] + [0] * sizes[1], np.concatenate([positive, negative]))
    assert separation.auc(torch.from_numpy(positive), torch.from_numpy(negative)) == pytest.approx(expected, abs=1e-12)


def test_auc_of_separated_reversed_and_equal_scores() -> None:
    high, low = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])
    assert (separation.auc(high, low), separation.auc(low, high), separation.auc(low, low)) == (1.0, 0.0, 0.5)


@pytest.mark.parametrize("bad", [torch.empty(0), torch.tensor([float("nan")])])
def test_no_scores_and_nan_are_errors(bad: torch.Tensor) -> None:
    with pytest.raises(MeasurementError, match="finite positive scores"):
        separation.auc(bad, torch.ones(2))
    with pytest.raises(MeasurementError, match="finite negative scores"):
        separation.auc(torch.ones(2), bad)
