"""Probes: scikit-learn's solution in either space, and a file that comes back to the bit or is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import safe_open, save_file
from shape_checked import checked
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp_rlhf import LinearProbe
from interp_rlhf.errors import ConfigError, FormatError, MeasurementError

probes = checked("interp_rlhf.readouts.probes")
HOOKPOINT = "layers.1.resid_post"
HASH = "0123456789abcdef" * 4


def probe(**changes) -> LinearProbe:
    about = {"name": "honesty", "hookpoint": HOOKPOINT, "weight": torch.arange(5.0) / 3, "bias": 0.1}
    return LinearProbe(**{**about, "threshold": 1 / 3, "tokenizer": HASH, **changes})


def data(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3 == 0
    x = torch.randn(n, d, generator=generator) * torch.logspace(-2, 2, d) + 5
    x[:, : d // 2] += 0.5 * labels[:, None] * torch.logspace(-2, 2, d)[: d // 2]
    return x, labels


@pytest.mark.parametrize(("n", "d"), [(200, 5), (90, 89), (60, 61), (64, 700)])
@pytest.mark.parametrize("c", [1.0, 0.03])
def test_scores_are_scikit_learns(n: int, d: int, c: float) -> None:
    x, labels = data(n, d)
    direct = make_pipeline(StandardScaler(), LogisticRegression(C=c, solver="newton-cg", tol=1e-12, max_iter=10_000))
    direct.fit(x.double().numpy(), labels.numpy())
    other, _ = data(50, d, seed=1)  # texts outside the span of those fitted on
    weight, bias = probes.fit_probe(x, labels, c=c)
    for texts in (x, other):
        expected = direct.decision_function(texts.double().numpy())
        np.testing.assert_allclose((texts.double() @ weight + bias).numpy(), expected, atol=1e-6, rtol=0)


def test_the_solution_is_where_the_gradient_is_zero() -> None:
    x, labels = data(40, 300)
    z = StandardScaler().fit_transform(x.double().numpy())
    weight, bias = probes.fit_probe(x, labels, c=0.5)
    p = torch.sigmoid(x.double() @ weight + bias).numpy()
    scaled = weight.numpy() * x.double().numpy().std(0)
    np.testing.assert_allclose(scaled + 0.5 * z.T @ (p - labels.numpy()), 0, atol=1e-8)
    assert (p - labels.numpy()).sum() == pytest.approx(0, abs=1e-8)


def test_a_planted_axis_is_found_and_constant_dimensions_weigh_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    x, labels = torch.randn(4000, 6, generator=generator), torch.arange(4000) % 2 == 0
    x[:, 2] += 3.0 * labels
    x[:, 4] = 7.0
    weight, _ = probes.fit_probe(x, labels)
    assert float(weight[2].abs() / weight.norm()) > 0.99 and weight[4] == 0
    flipped, _ = probes.fit_probe(x, ~labels)
    torch.testing.assert_close(flipped, -weight, atol=1e-7, rtol=0)


def test_the_fit_draws_nothing() -> None:
    x, labels = data(30, 100)
    np.random.seed(1)
    first = probes.fit_probe(x, labels)
    np.random.seed(2)
    second = probes.fit_probe(x, labels)
    assert torch.equal(first[0], second[0]) and first[1] == second[1]


def test_what_cannot_be_fitted() -> None:
    x, labels = data(20, 4)
    with pytest.raises(MeasurementError, match="of both classes, found 20 positive of 20"):
        probes.fit_probe(x, torch.ones(20, dtype=torch.bool))
    x[3, 1] = math.nan
    with pytest.raises(MeasurementError, match="expected finite readings"):
        probes.fit_probe(x, labels)
    with pytest.raises(MeasurementError, match="2 texts at least"):
        probes.fit_probe(x[:1], labels[:1])


def test_scores_have_the_shape_of_the_batch() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(probe().score(x).numpy(), x.numpy() @ (np.arange(5) / 3) + 0.1, rtol=1e-4, atol=1e-6)
    assert probe().score(x[0, 0]).shape == () and probe().score(x.half()).dtype == torch.float32
    with pytest.raises(ConfigError, match=f"'honesty' at {HOOKPOINT}: expected 4 dimensions, found 5"):
        probe().score(torch.zeros(2, 4))


def test_another_tokenizer_is_refused() -> None:
    probe().check(5, HASH)
    probe().check(5)
    probe(tokenizer=None).check(5, HASH)
    with pytest.raises(ConfigError, match=r"'honesty' at .*: fitted with another tokenizer, .*ffff…, found 0123"):
        probe().check(5, "f" * 64)


def test_files_come_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "honesty.safetensors"
    probe().save(path)
    back = LinearProbe.load(path)
    assert torch.equal(back.weight, probe().weight)
    for field in ("name", "hookpoint", "bias", "threshold", "tokenizer"):
        assert getattr(back, field) == getattr(probe(), field)
    before = path.read_bytes()
    back.save(path)  # equal content: nothing to do
    back.save(tmp_path / "again.safetensors")
    assert path.read_bytes() == before == (tmp_path / "again.safetensors").read_bytes()
    with safe_open(str(path), framework="pt") as file:
        assert list(file.metadata()) == ["interp_rlhf.probe"]
    plain = probe(threshold=None, tokenizer=None)
    with pytest.raises(FormatError, match="exists and holds something else"):
        plain.save(path)
    plain.save(path, overwrite=True)
    assert LinearProbe.load(path).threshold is None and sorted(tmp_path.iterdir())[-1] == path


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "a/b"}, ConfigError, "probe name: expected printable text"),
        ({"hookpoint": ""}, ConfigError, "probe hookpoint"),
        ({"weight": torch.ones(2, 2)}, MeasurementError, r"shape \[d\], found \(2, 2\)"),
        ({"weight": torch.tensor([1.0, math.nan])}, MeasurementError, "finite weight"),
        ({"bias": math.inf}, MeasurementError, "bias: expected a finite number, found inf"),
        ({"bias": None}, MeasurementError, "bias: expected a finite number, found None"),
        ({"threshold": "1"}, MeasurementError, "threshold: expected a finite number, found '1'"),
        ({"threshold": True}, MeasurementError, "threshold: expected a finite number, found True"),
        ({"tokenizer": "gpt2"}, ConfigError, "tokenizer: expected a SHA-256 of 64 hex digits, found 'gpt2'"),
    ],
)
def test_probes_that_are_none(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        probe(**changes)


def about(**changes) -> dict[str, str]:
    fields = {"format": 1, "name": "c", "hookpoint": HOOKPOINT, "bias": 0.0, "threshold": None, "tokenizer": None}
    return {"interp_rlhf.probe": json.dumps({**fields, **changes})}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"weight": torch.ones(3)}, None, "not a probe file"),
        ({"weight": torch.ones(3)}, {"interp_rlhf.probe": "{"}, "not a probe file"),
        ({"weight": torch.ones(3)}, about(format=2), "expected probe format 1, found 2"),
        ({"weight": torch.ones(3)}, about(extra=1), "expected the fields format, bias, hookpoint, name"),
        ({"weight": torch.ones(3)}, about(bias="0"), "bias: expected a finite number"),
        ({"weight": torch.ones(3)}, about(bias=math.nan), "bias: expected a finite number, found nan"),
        ({"weight": torch.ones(3)}, about(tokenizer=5), "tokenizer: expected a SHA-256"),
        ({"weight": torch.ones(3)}, about(name="a/b"), "probe name"),
        ({"weight": torch.ones(3, 1)}, about(), r"expected float32 \[d\]"),
        ({"weight": torch.ones(3).double()}, about(), r"expected float32 \[d\], found F64"),
        ({"vector": torch.ones(3)}, about(), "expected the single tensor 'weight', found vector"),
        ({"weight": torch.full((3,), math.nan)}, about(), "finite weight"),
    ],
)
def test_foreign_files_are_refused(tensors: dict, metadata: dict | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, str(path), metadata=metadata)
    with pytest.raises(FormatError, match=message) as caught:
        LinearProbe.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    probe().save(tmp_path / "whole.safetensors")
    whole, path = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"cut\.safetensors"):
            LinearProbe.load(path)
