"""Snapshots: what lies on disk, read without the package; complete or absent; damaged ones refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import check_message, contents
from safetensors import safe_open
from stored_runs import checkpoint, row, stored_run, tensors

from interp_rlhf import Snapshot
from interp_rlhf.audit import snapshots
from interp_rlhf.audit.snapshots import copy_to_checkpoint, parse_name, snapshot_name, write_snapshot
from interp_rlhf.errors import FormatError, MeasurementError
from interp_rlhf.measurement import COLUMNS

FILES = {"snapshot.json", "rows.jsonl", "tensors.safetensors"}
NAME = "01-step-000010"


def write(folder: Path, step: int = 10, *, segment: int = 1, **changes: Any) -> Snapshot:
    """A snapshot of a run of no other files."""
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "rows": [row(segment, step), row(segment, step, 1.0, "representation/cka")],
        "tensors": tensors(step),
        "parent": None,
        "run": {"name": "run.json", "sha256": "a" * 64},
        "timeline": {"bytes": 9, "lines": 1, "sha256": "b" * 64, "chain": "c" * 64},
        "checkpoint": None,
        "captured": {"hookpoints": ["layers.1.resid_post"]},
        "cost": {"seconds": 0.5},
    }
    return write_snapshot(folder, segment=segment, step=step, **{**given, **changes})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def independent_tensor_hash(array: np.ndarray) -> str:
    """As docs/formats.md defines it, value by value."""
    values = b"".join(value.astype(value.dtype.newbyteorder("<")).tobytes() for value in array.flat)
    return sha256(f"{array.dtype}|{','.join(map(str, array.shape))}|".encode() + values)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_lies_beside_it(tmp_path: Path) -> None:
    store = stored_run(tmp_path)
    folder = tmp_path / "interp" / "snapshots" / NAME
    assert {path.name for path in folder.iterdir()} == FILES
    document = json.loads((folder / "snapshot.json").read_bytes())
    assert (document["schema"], document["name"], document["segment"], document["step"]) == (1, NAME, 1, 10)

    parent = folder.parent / "01-step-000000" / "snapshot.json"
    assert document["parent"] == {"name": "01-step-000000", "sha256": sha256(parent.read_bytes())}
    assert document["run"] == {"name": "run.json", "sha256": sha256((tmp_path / "interp" / "run.json").read_bytes())}
    for name in ("rows.jsonl", "tensors.safetensors"):
        data = (folder / name).read_bytes()
        assert document["files"][name] == {"bytes": len(data), "sha256": sha256(data)}
    assert set(document["files"]) == FILES - {"snapshot.json"}

    timeline, prefix = (tmp_path / "interp" / "timeline.jsonl").read_bytes(), document["timeline"]
    sealed = timeline[: prefix["bytes"]]
    assert (prefix["sha256"], prefix["lines"]) == (sha256(sealed), sealed.count(b"\n"))
    assert sealed.endswith(f',"chain":"{prefix["chain"]}"}}\n'.encode())
    assert json.loads(sealed.splitlines()[-1])["step"] == 10, "the step's own rows are sealed"

    weights = document["checkpoint"]["weights"]
    assert document["checkpoint"]["folder"] == "checkpoint-10"
    assert set(weights) == {"model.safetensors", "adapter_config.json"}
    for name, value in weights.items():
        data = (tmp_path / "checkpoint-10" / name).read_bytes()
        assert value == {"bytes": len(data), "sha256": sha256(data)}
    assert document["captured"] == {"hookpoints": ["layers.1.resid_post"]} and document["cost"] == {"seconds": 0.5}
    assert document["pruned"] == []
    assert document["versions"]["numpy"] == np.__version__ and document["versions"]["torch"] == torch.__version__
    assert store.newest is not None and store.newest.parent == NAME


def test_the_seal_is_the_hash_of_the_rest(tmp_path: Path) -> None:
    document = json.loads((write(tmp_path).path / "snapshot.json").read_bytes())
    seal = document.pop("seal")
    assert seal == sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii"))


def test_the_tensors_are_plain_safetensors(tmp_path: Path) -> None:
    given = {
        **tensors(3),
        "torch": torch.arange(6.0).reshape(2, 3).T,
        "scalar": np.array(2.5),
        "ids": np.array([-(2**63), 2**63 - 1]),
        "empty": np.zeros((0, 4), np.float32),
        "mask": np.array([True, False]),
        "big endian": np.arange(3, dtype=">f4"),
        "grad": torch.ones(2, requires_grad=True),
    }
    written = write(tmp_path, tensors=given)
    expected = {name: np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for name, x in given.items()}
    with safe_open(written.path / "tensors.safetensors", framework="np") as file:
        assert file.metadata() == {"interp_schema": "1"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a mapping
    described = json.loads((written.path / "snapshot.json").read_bytes())["tensors"]
    assert set(found) == set(expected) == set(described)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("=") and found[name].shape == array.shape
        assert described[name]["dtype"] == found[name].dtype.name and described[name]["shape"] == list(array.shape)
        assert described[name]["sha256"] == independent_tensor_hash(found[name])
    for name, array in written.arrays().items():
        np.testing.assert_array_equal(array, expected[name])
    for name, tensor in written.tensors().items():
        assert isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        np.testing.assert_array_equal(tensor.numpy(), expected[name])


def test_the_rows_are_canonical_json_lines(tmp_path: Path) -> None:
    given = [row(1, 10), dataclasses.replace(row(1, 10), value=np.float32(0.5), n=np.int64(3), p=0.25)]
    written = write(tmp_path, rows=given)
    lines = (written.path / "rows.jsonl").read_text("ascii").splitlines()
    assert lines == [json.dumps(json.loads(line), sort_keys=True, separators=(",", ":")) for line in lines]
    assert [set(json.loads(line)) for line in lines] == [set(COLUMNS)] * 2
    assert list(written.rows) == [json.loads(line) for line in lines]
    assert written.rows[0] == row(1, 10).as_row() and written.rows[1]["value"] == 0.5 and written.rows[1]["n"] == 3
    assert write(tmp_path, 20, rows=[]).rows == ()


def test_a_snapshot_comes_back_as_it_was_written(tmp_path: Path) -> None:
    first = write(tmp_path, 0)
    second = write(tmp_path, 10, parent=first, pruned=["01-step-000005"])
    for loaded in (second, Snapshot.load(second.path), Snapshot.load(str(second.path))):
        assert (loaded.path, loaded.name, loaded.segment, loaded.step) == (tmp_path / NAME, NAME, 1, 10)
        assert (loaded.parent, loaded.parent_hash) == ("01-step-000000", first.digest)
        assert loaded.digest == sha256((tmp_path / NAME / "snapshot.json").read_bytes())
        assert loaded.manifest["pruned"] == ["01-step-000005"]
    assert (first.parent, first.parent_hash) == (None, None)
    with pytest.raises(TypeError):
        second.manifest["step"] = 11


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    reversed_ = dict(reversed(tensors(10).items()))
    as_torch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors(10).items()}
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder, given in zip(folders, (tensors(10), reversed_, as_torch), strict=True):
        write(folder, tensors=given)
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    changed = tensors(10)
    changed["direction/honesty"] = np.nextafter(changed["direction/honesty"], np.float32(9))
    assert write(tmp_path / "d", tensors=changed).digest != Snapshot.load(folders[0] / NAME).digest


@pytest.mark.parametrize(
    ("segment", "step", "name"),
    [(1, 0, "01-step-000000"), (12, 34, "12-step-000034"), (100, 10**7, "100-step-10000000")],
)
def test_names(segment: int, step: int, name: str) -> None:
    assert snapshot_name(segment, step) == name and parse_name(name) == (segment, step)


@pytest.mark.parametrize("name", ["1-step-000001", "01-step-1", "001-step-000001", "01-step-0000001", "", "x" * 300])
def test_other_names_are_none_of_ours(name: str) -> None:
    assert parse_name(name) is None


# -- complete or absent ------------------------------------------------------------------------------------------------


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FormatError) as caught:
        write(tmp_path, tensors=tensors(99))
    check_message(str(caught.value), (NAME, "exists already"))
    assert contents(tmp_path) == before


REFUSED: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "a row that is not finite": (MeasurementError, {"rows": [dataclasses.replace(row(1, 10), value=math.nan)]}),
    "bfloat16": (FormatError, {"tensors": {"x": torch.ones(2, dtype=torch.bfloat16)}}),
    "text in an array": (FormatError, {"tensors": {"x": np.array(["a"])}}),
    "NaN in what was captured": (FormatError, {"captured": {"x": math.nan}}),
    "a set in the cost": (FormatError, {"cost": {"x": {1}}}),
    "a run file elsewhere": (FormatError, {"run": {"name": "../run.json", "sha256": "a" * 64}}),
    "a checkpoint without a name": (FormatError, {"checkpoint": Path("nowhere/..")}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_place_leaves_nothing(what: str, tmp_path: Path) -> None:
    error, changes = REFUSED[what]
    with pytest.raises(error) as caught:
        write(tmp_path / "snapshots", **changes)
    check_message(str(caught.value))
    assert contents(tmp_path) == {"snapshots": None}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the calls fails, the folder is complete (the failure came after the rename) or absent."""
    real, seen = getattr(os, call), []
    outcomes = set()
    for fatal in range(20):
        seen.clear()

        def failing(*words: Any, fatal: int = fatal) -> Any:
            seen.append(words)
            if len(seen) == fatal + 1:
                raise OSError(28, "No space left on device")
            return real(*words)

        folder = tmp_path / str(fatal)
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                write(folder)
                outcomes.add("written")
            except OSError:
                outcomes.add("failed")
        assert set(contents(folder)) in (set(), {NAME, *(f"{NAME}/{name}" for name in FILES)})
        for path in folder.iterdir():
            assert Snapshot.load(path).tensors().keys() == tensors(0).keys()
        if len(seen) <= fatal:
            break
    assert outcomes == {"written", "failed"} and fatal >= 1


# -- reading what is damaged -------------------------------------------------------------------------------------------


def everything(snapshot: Snapshot) -> Any:
    return snapshot.rows, snapshot.arrays(), snapshot.tensors()


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_changed_byte_is_found_by_the_reader(name: str, tmp_path: Path) -> None:
    place = write(tmp_path).path / name
    data = place.read_bytes()
    for position in range(0, len(data), 3):
        place.write_bytes(data[:position] + bytes([data[position] ^ 0x01]) + data[position + 1 :])
        with pytest.raises(FormatError) as caught:
            everything(Snapshot.load(place.parent))
        check_message(str(caught.value), (name,))
    place.write_bytes(data)
    everything(Snapshot.load(place.parent))


LOST: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "cannot be read"),
    "no manifest": (lambda folder: (folder / "snapshot.json").unlink(), "cannot be read"),
    "no rows": (lambda folder: (folder / "rows.jsonl").unlink(), "rows.jsonl: cannot be read"),
    "no tensors": (lambda folder: (folder / "tensors.safetensors").unlink(), "snapshots.keep, or lost"),
    "link": (
        lambda folder: ((folder / "rows.jsonl").unlink(), (folder / "rows.jsonl").symlink_to("snapshot.json")),
        "symbolic link",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_what_is_lost_is_named(what: str, tmp_path: Path) -> None:
    lose, words = LOST[what]
    folder = write(tmp_path).path
    lose(folder)
    with pytest.raises(FormatError) as caught:
        everything(Snapshot.load(folder))
    check_message(str(caught.value), (str(folder), words))


def test_a_moved_snapshot_is_refused(tmp_path: Path) -> None:
    written = write(tmp_path)
    moved = written.path.rename(tmp_path / "01-step-000020")
    with pytest.raises(FormatError, match="found name '01-step-000010', expected '01-step-000020'"):
        Snapshot.load(moved)


def test_a_payload_the_manifest_does_not_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="found no file 'other'"):
        write(tmp_path).payload("other")


# -- the copy in a checkpoint ------------------------------------------------------------------------------------------


def test_the_copy_has_the_same_bytes_and_the_checkpoint_its_age(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    written = write(tmp_path / "snapshots", checkpoint=folder)
    os.utime(folder, (1_000_000, 1_000_000))
    place = copy_to_checkpoint(written, folder)
    assert place == folder / "interp" and contents(place) == contents(written.path)
    assert folder.stat().st_mtime == 1_000_000, "the trainer rotates checkpoints by it"
    copy = Snapshot.load(place)
    assert copy.digest == written.digest and copy.tensors().keys() == written.tensors().keys()

    again = write(tmp_path / "snapshots", segment=2, checkpoint=folder)
    copy_to_checkpoint(again, folder)
    assert Snapshot.load(place).name == "02-step-000010" and contents(place) == contents(again.path)
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


def test_a_damaged_snapshot_is_not_copied(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    first, second = write(tmp_path / "snapshots", 10), write(tmp_path / "snapshots", 20)
    copy_to_checkpoint(first, folder)
    (second.path / "rows.jsonl").write_bytes(b"{}\n")
    with pytest.raises(FormatError, match="other bytes"):
        copy_to_checkpoint(second, folder)
    assert Snapshot.load(folder / "interp").name == first.name, "the older copy is still there"
    with pytest.raises(FormatError, match="found no folder"):
        copy_to_checkpoint(first, tmp_path / "checkpoint-99")


def test_versions_of_what_is_not_installed_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise snapshots.PackageNotFoundError(name)

    monkeypatch.setattr(snapshots, "version", missing)
    snapshots._versions.cache_clear()
    try:
        assert set(snapshots._versions().values()) == {None}
    finally:
        snapshots._versions.cache_clear()
