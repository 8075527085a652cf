"""Gauges of single features against NumPy and SciPy, from the definitions and all at once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from shape_checked import checked

from interp_rlhf.errors import ConfigError, MeasurementError
from interp_rlhf.readouts.directions import Direction

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from memory_meter import MemoryMeter

gauges = checked("interp_rlhf.readouts.feature_gauges")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("subtracts_mean", [False, True])
@pytest.mark.parametrize("block", [2**20, 40])
def test_logit_attribution_is_the_centred_direct_path(
    block: int, subtracts_mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "_BLOCK", block)
    row, unembedding, weight = normal(16), normal(50, 16, seed=1) + 0.2, normal(16, seed=2) + 1
    w = row.double().numpy()
    w = w - w.mean() if subtracts_mean else w
    for scale in (weight, None):
        logits = unembedding.double().numpy() @ (w * (1 if scale is None else scale.double().numpy()))
        found = gauges.logit_attribution(row, unembedding, scale, subtracts_mean=subtracts_mean)
        np.testing.assert_allclose(found.numpy(), logits - logits.mean(), atol=1e-6)


@pytest.mark.parametrize("kind", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_logit_attribution_is_what_a_final_norm_lets_through(kind: type) -> None:
    """Added to a stream whose length it leaves nearly as it is, a feature moves the logits in proportion."""
    norm, head = kind(64), torch.nn.Linear(64, 30, bias=False)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(3))
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(4))
    model, stream = torch.nn.Sequential(norm, head).double(), normal(64, seed=5).double() * 10
    row = normal(64, seed=6).double()
    base = stream - stream.mean() if kind is torch.nn.LayerNorm else stream
    row = row - base * (row @ base) / (base @ base)  # across the stream
    moved = (model(stream + 1e-4 * row) - model(stream)).detach().numpy() / 1e-4
    found = gauges.logit_attribution(row, head.weight, norm.weight, subtracts_mean=kind is torch.nn.LayerNorm)
    assert stats.pearsonr(moved - moved.mean(), found.numpy()).statistic > 1 - 1e-6


def test_half_precision_is_added_up_in_double() -> None:
    row, unembedding = normal(512).bfloat16(), normal(40, 512, seed=1).bfloat16()
    logits = unembedding.double().numpy() @ row.double().numpy()
    found = gauges.logit_attribution(row, unembedding)
    np.testing.assert_allclose(found.numpy(), logits - logits.mean(), rtol=1e-5, atol=1e-5)


def test_extreme_tokens_are_ranked_with_ties_by_id() -> None:
    values = (normal(300) * 2).round() / 2
    up, down = gauges.extreme_tokens(values, n=20)
    order = sorted(range(300), key=lambda i: (-float(values[i]), i))
    assert [token for token, _ in up] == order[:20]
    assert [token for token, _ in down] == sorted(range(300), key=lambda i: (float(values[i]), i))[:20]
    assert all(value == float(values[token]) for token, value in (*up, *down))
    assert gauges.extreme_tokens(values[:3], n=9) == gauges.extreme_tokens(values[:3], n=3)


@pytest.mark.parametrize("block", [2**20, 7, 100])
def test_interference_is_what_the_whole_matrix_of_cosines_says(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "_BLOCK", block)
    decoder = normal(60, 12) * torch.linspace(0.1, 9, 60)[:, None]
    decoder[41], decoder[23], decoder[7] = -3 * decoder[5], 2 * decoder[5], 0.0
    chosen = [59, 5, 0, 7, 23]
    rows = decoder.double().numpy()
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    cosines = np.abs(unit @ unit.T)
    np.fill_diagonal(cosines, 0)
    found = gauges.interference(decoder, chosen)
    np.testing.assert_allclose(found.largest.numpy(), cosines[chosen].max(1), atol=1e-6)
    np.testing.assert_allclose(found.total.numpy(), (cosines[chosen] ** 2).sum(1), rtol=1e-6)
    clear = [0, 2]  # one nearest each
    np.testing.assert_array_equal(found.nearest.numpy()[clear], cosines[chosen].argmax(1)[clear])
    assert found.nearest[1].item() in (23, 41) and found.nearest[4].item() in (5, 41)
    assert float(found.total[3]) == 0 and found.nearest[3].item() != 7


def test_interference_of_orthogonal_and_of_random_features() -> None:
    assert gauges.interference(torch.eye(9), range(9)).total.tolist() == [0.0] * 9
    total = gauges.interference(normal(5000, 50), range(200)).total
    np.testing.assert_allclose(total.mean(), 4999 / 50, rtol=0.02)


def test_interference_of_a_wide_dictionary_takes_little_memory() -> None:
    decoder = normal(65_536, 8)
    with MemoryMeter() as meter:
        found = gauges.interference(decoder, range(64))
    assert meter.peak < 40 * 2**20  # the matrix of all features would be 32 GiB
    np.testing.assert_allclose(found.total.mean(), 65_535 / 8, rtol=0.02)


def test_participation_ratio_is_that_of_the_eigenvalues() -> None:
    for rows in (normal(5, 20), normal(30, 6), normal(4, 4) + 3):
        unit = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True)
        values = np.linalg.eigvalsh(unit @ unit.T)
        np.testing.assert_allclose(gauges.participation_ratio(rows), values.sum() ** 2 / (values**2).sum())
    assert gauges.participation_ratio(torch.zeros(3, 4)) is None


def test_effective_tokens_count_equal_codes() -> None:
    z = normal(400).relu()
    reference = z.double().numpy()
    np.testing.assert_allclose(gauges.effective_tokens(z), reference.sum() ** 2 / (reference**2).sum())
    assert gauges.effective_tokens(-z) == gauges.effective_tokens(z * normal(400, seed=1).sign())
    z = torch.zeros(1000)
    z[::50] = 0.3
    np.testing.assert_allclose(gauges.effective_tokens(z), 20, rtol=1e-6)


def test_context_entropy_is_scipys() -> None:
    mass = normal(64).relu()
    found = gauges.context_entropy(mass)
    np.testing.assert_allclose(found.entropy, stats.entropy(mass.double().numpy()))
    np.testing.assert_allclose(found.effective, np.exp(stats.entropy(mass.double().numpy())))
    one = gauges.context_entropy(torch.tensor([0.0, 4.0, 0.0]))
    assert (one.entropy, one.effective) == (0.0, 1.0)
    assert gauges.context_entropy(torch.zeros(4)) is None and gauges.context_entropy(torch.zeros(0)) is None


def test_nearest_directions_are_cosines_by_size() -> None:
    row = normal(10) * 7
    vectors = {"same": normal(10, seed=4), **{name: normal(10, seed=seed) for seed, name in enumerate("dbca", start=1)}}
    found = gauges.nearest_directions(row, [Direction(name, "layers.0.mlp_out", v) for name, v in vectors.items()])
    truth = {n: float(row @ v / row.norm() / v.norm()) for n, v in vectors.items()}
    assert [name for name, _ in found] == sorted(truth, key=lambda n: (-round(abs(truth[n]), 6), n))
    for name, cosine in found:
        np.testing.assert_allclose(cosine, truth[name], atol=1e-6)
    zero = gauges.nearest_directions(torch.zeros(10), [Direction("a", "layers.0.mlp_out", row)])
    assert zero == (("a", 0.0),) and gauges.nearest_directions(row, []) == ()


def test_what_cannot_be_gauged() -> None:
    unembedding = normal(5, 4)
    with pytest.raises(MeasurementError, match="decoder row: expected width 4, found 3"):
        gauges.logit_attribution(torch.ones(3), unembedding)
    with pytest.raises(MeasurementError, match="expected finite logits"):
        gauges.logit_attribution(torch.full((4,), torch.nan), unembedding)
    for decoder, features in ((normal(1, 4), [0]), (unembedding, [5]), (unembedding, [0, -1])):
        with pytest.raises(MeasurementError, match=r"interference: expected features 0\.\."):
            gauges.interference(decoder, features)
    broken = unembedding.clone()
    broken[2, 1] = torch.inf
    with pytest.raises(MeasurementError, match="expected a finite decoder"):
        gauges.interference(broken, [0])
    with pytest.raises(MeasurementError, match="expected finite directions"):
        gauges.participation_ratio(broken)
    for bad in (-0.5, torch.nan, torch.inf):
        with pytest.raises(MeasurementError, match="expected finite sums of codes of at least 0"):
            gauges.context_entropy(torch.tensor([1.0, bad]))
    with pytest.raises(ConfigError, match="expected 3 dimensions, found 4"):
        gauges.nearest_directions(torch.ones(3), [Direction("a", "layers.0.mlp_out", torch.ones(4))])
