"""Hashes, canonical JSON and atomic writes."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
import torch

from interp_rlhf.audit import sealing
from interp_rlhf.errors import FormatError


def test_file_hash_is_the_hash_of_the_bytes(tmp_path):
    data = os.urandom(3 * (1 << 20) + 17)
    (tmp_path / "a").write_bytes(data)
    assert sealing.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest() == sealing.sha256_bytes(data)
    with pytest.raises(FormatError, match="missing: cannot be read"):
        sealing.sha256_file(tmp_path / "missing")


def test_tensor_hash_is_of_dtype_shape_and_values():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [array, torch.from_numpy(array), torch.from_numpy(array.T.copy()).T, array.astype(">f4")]
    assert len({sealing.tensor_hash(x) for x in same}) == 1
    other = [array, array.reshape(3, 2), array.astype(np.float64), array.view(np.int32), array + 1, array.ravel()]
    assert len({sealing.tensor_hash(x) for x in other}) == len(other)
    assert sealing.tensor_hash(np.ones((), np.float32)) != sealing.tensor_hash(np.ones(1, np.float32))
    assert sealing.tensor_hash(torch.ones(2, requires_grad=True)) == sealing.tensor_hash(np.ones(2, np.float32))


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.bfloat16), np.array(["a"]), np.array([object()])])
def test_what_has_no_place_in_the_format_is_refused(value):
    with pytest.raises(FormatError, match="dtype"):
        sealing.as_array(value)


def test_canonical_json_has_one_spelling():
    assert sealing.canonical_json({"b": 1, "a": "é"}) == sealing.canonical_json({"a": "é", "b": 1})
    for bad in (float("nan"), {"a": [float("inf")]}, {"a": {1, 2}}, object()):
        with pytest.raises(FormatError, match="JSON"):
            sealing.canonical_json(bad)


def test_every_flipped_byte_of_a_sealed_document_is_found():
    data = sealing.seal({"name": "é", "step": 10, "nested": {"x": [1.5, None, True]}, "wide": 10**20})
    assert sealing.unseal(data, "file")["nested"] == {"x": [1.5, None, True]}
    for position in range(len(data)):
        for mask in (0x01, 0x20, 0x80):
            flipped = data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]
            with pytest.raises(FormatError, match=r"^file: [^\n]+$"):
                sealing.unseal(flipped, "file")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"seal": 1}', b"[" * 100_000, b"\xff\xfe", b'{"seal": "x"} {}'])
def test_foreign_documents_are_refused_in_one_line(data):
    with pytest.raises(FormatError, match=r"^file: [^\n]+$"):
        sealing.unseal(data, "file")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/etc", "a\\b", ".hidden", "a\n", "a\0", "C:", "é", "x" * 300]
)
def test_unsafe_names_are_refused(name):
    with pytest.raises(FormatError):
        sealing.safe_name(name)


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\\b", "a/\n", "a/\0"])
def test_unsafe_paths_are_refused(path):
    with pytest.raises(FormatError):
        sealing.safe_relative(path)


def test_safe_names_and_paths_come_back():
    assert sealing.safe_name("01-step-000100") == "01-step-000100"
    assert sealing.safe_relative("pytorch_model_fsdp_0/.metadata") == "pytorch_model_fsdp_0/.metadata"


def test_atomic_folder_is_complete_or_absent(tmp_path):
    with pytest.raises(RuntimeError), sealing.atomic_folder(tmp_path / "a") as building:
        (building / "x").write_bytes(b"1")
        assert building.parent == tmp_path and building.name.startswith(".interp-")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with sealing.atomic_folder(tmp_path / "a") as building:
        (building / "x").write_bytes(b"1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "x").read_bytes() == b"1"
    with pytest.raises(FormatError, match="exists already"), sealing.atomic_folder(tmp_path / "a"):
        pass
    with sealing.atomic_folder(tmp_path / "a", replace=True) as building:
        (building / "y").write_bytes(b"2")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_atomic_folder_does_not_follow_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(FormatError), sealing.atomic_folder(tmp_path / "link", replace=True):
        pass


def test_write_atomic_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    sealing.write_atomic(tmp_path / "a", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        sealing.write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead, alive = "2147483646", str(os.getppid())
    (tmp_path / f".interp-{dead}-{'0' * 32}").mkdir()
    (tmp_path / f".interp-{os.getpid()}-{'1' * 32}").write_bytes(b"")
    (tmp_path / ".interp-abc").write_bytes(b"")
    (tmp_path / f".interp-{alive}-{'2' * 32}").mkdir()
    (tmp_path / "mine").write_bytes(b"")
    assert len(sealing.clean_leftovers(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".interp-{alive}-{'2' * 32}", "mine"]
