"""Directions: difference in means, projection, and a file that comes back to the bit or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import safe_open, save_file

from interp_rlhf import Direction
from interp_rlhf.errors import ConfigError, FormatError, MeasurementError

HOOKPOINT = "layers.1.resid_post"
RNG = np.random.default_rng(0)


def direction() -> Direction:
    return Direction("honesty", HOOKPOINT, torch.arange(1.0, 6.0))


def test_difference_in_means_is_numpys() -> None:
    positive, negative = RNG.normal(size=(2, 40, 7))
    found = Direction.from_means("c", HOOKPOINT, torch.from_numpy(positive), torch.from_numpy(negative))
    expected = positive.mean(0) - negative.mean(0)
    np.testing.assert_allclose(found.vector.numpy(), expected / np.linalg.norm(expected), rtol=1e-6)
    assert found.vector.dtype == torch.float32 and float(found.vector.norm()) == pytest.approx(1, abs=1e-6)


def test_a_planted_direction_is_found() -> None:
    planted = torch.nn.functional.normalize(torch.from_numpy(RNG.normal(size=16)), dim=0)
    noise = torch.from_numpy(RNG.normal(size=(2, 4000, 16)))
    found = Direction.from_means("c", HOOKPOINT, noise[0] + planted, noise[1] - planted)
    assert float(found.vector.double() @ planted) > 0.995
    swapped = Direction.from_means("c", HOOKPOINT, noise[1] - planted, noise[0] + planted)
    assert torch.equal(swapped.vector, -found.vector)


def test_projection_has_the_shape_of_the_batch() -> None:
    x = torch.from_numpy(RNG.normal(size=(3, 4, 5)))
    found = direction().project(x)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ (np.arange(1, 6) / np.sqrt(55)), rtol=1e-5)
    with pytest.raises(ConfigError, match=f"'honesty' at {HOOKPOINT}: expected 4 dimensions, found 5"):
        direction().project(torch.zeros(2, 4))


def test_the_vector_is_a_copy() -> None:
    own = torch.tensor([3.0, 4.0])
    found = Direction("c", HOOKPOINT, own)
    own.zero_()
    torch.testing.assert_close(found.vector, torch.tensor([0.6, 0.8]))


def test_files_come_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "honesty.safetensors"
    direction().save(path)
    back = Direction.load(path)
    assert (back.name, back.hookpoint) == ("honesty", HOOKPOINT) and torch.equal(back.vector, direction().vector)
    before = path.read_bytes()
    back.save(path)  # equal content: nothing to do
    back.save(tmp_path / "again.safetensors")
    assert path.read_bytes() == before == (tmp_path / "again.safetensors").read_bytes()
    with safe_open(str(path), framework="pt") as file:
        assert json.loads(file.metadata()["interp_rlhf.direction"])["name"] == "honesty"


def test_another_direction_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    direction().save(path)
    before = path.read_bytes()
    other = Direction("other", HOOKPOINT, torch.ones(5))
    with pytest.raises(FormatError, match=r"d\.safetensors: exists and holds something else"):
        other.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    other.save(path, overwrite=True)
    assert Direction.load(path).name == "other"
    with pytest.raises(FormatError, match="cannot be written"):
        other.save(tmp_path / "no folder" / "d.safetensors")


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.zeros(4), "non-zero"),
        (torch.tensor([1.0, float("nan")]), "finite"),
        (torch.tensor([1.0, float("inf")]), "finite"),
        (torch.ones(2, 2), r"expected shape \[d\], found \(2, 2\)"),
        (torch.ones(0), r"found \(0,\)"),
    ],
)
def test_vectors_that_are_none(vector: torch.Tensor, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        Direction("c", HOOKPOINT, vector)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", "a\nb", 5])
def test_names_that_could_be_paths(name: str) -> None:
    with pytest.raises(ConfigError, match="expected printable text"):
        Direction(name, HOOKPOINT, torch.ones(2))


def test_means_of_different_shapes() -> None:
    with pytest.raises(MeasurementError, match=r"found \(3, 2\) and \(4, 2\)"):
        Direction.from_means("c", HOOKPOINT, torch.ones(3, 2), torch.ones(4, 2))


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"vector": torch.ones(3)}, None, "not a direction file"),
        ({"vector": torch.ones(3)}, {"interp_rlhf.direction": "{"}, "not a direction file"),
        ({"vector": torch.ones(3)}, {"interp_rlhf.direction": '{"format": 99}'}, "expected direction format"),
        ({"weight": torch.ones(3)}, None, "direction"),
    ],
)
def test_foreign_files_are_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, str(path), metadata=metadata)
    with pytest.raises(FormatError, match=message) as caught:
        Direction.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    direction().save(tmp_path / "whole.safetensors")
    whole, path = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"cut\.safetensors"):
            Direction.load(path)
