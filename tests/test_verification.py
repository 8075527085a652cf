"""``interp-rlhf verify``: an untouched run passes, every tampering is found, and what nobody can see needs a head."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import contents
from safetensors.numpy import save_file
from stored_runs import INFO, checkpoint, measure, resume, stored_run, tensors

from interp_rlhf.audit.sealing import seal
from interp_rlhf.audit.store import RunStore
from interp_rlhf.audit.verification import Verification, render, verify_run
from interp_rlhf.cli import main
from interp_rlhf.errors import FormatError

FIRST, SNAPSHOT, NEWEST = (
    f"interp/snapshots/{name}" for name in ("01-step-000000", "01-step-000010", "02-step-000030")
)
TIMELINE, COPY, WEIGHTS = "interp/timeline.jsonl", "checkpoint-20/interp", "checkpoint-10/model.safetensors"


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``: three snapshots, two checkpoints, a resumed segment with one more; ``other``: the same measurements."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("run", "other"):
        (folder / name).mkdir()
    stored_run(folder / "run")
    resume(folder / "run", 20, (30,))
    (folder / "run" / "interp" / "report.html").write_text("<html>")
    store = RunStore(folder / "other")
    store.start(INFO, resumed_from=None)
    store.event("note", text="another run")  # two runs of one second differ in nothing else
    for step in (0, 10, 20):
        measure(store, step)
    return folder


@pytest.fixture
def run(two_runs: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(two_runs / "run", tmp_path / "run"))


@pytest.fixture
def other(two_runs: Path, tmp_path: Path) -> Path:
    """A copy of another run with the same settings, steps and numbers."""
    return Path(shutil.copytree(two_runs / "other", tmp_path / "other"))


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, list[str]]:
    """Exit code and the lines that tell of anything but success."""
    capsys.readouterr()
    code = main(["verify", *map(str, words)])
    lines = capsys.readouterr().out.splitlines()
    return code, [line for line in lines if line.split()[0] in ("note", "warning", "failure")]


def flip(path: Path, position: int = -2) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(bytes(data))


def change_row(folder: Path) -> None:
    path = folder / SNAPSHOT / "rows.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"value":0.1', b'"value":0.2', 1))


def change_tensor(folder: Path) -> None:
    changed = {name: np.ascontiguousarray(array) for name, array in tensors(10).items()}
    changed["direction/honesty"] = -changed["direction/honesty"]
    save_file(changed, folder / SNAPSHOT / "tensors.safetensors", metadata={"interp_schema": "1"})


def reseal(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a sealed document as someone would who knows the format."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(seal(document))


def reseal_rows(folder: Path) -> None:
    """A row changed, hash and seal recomputed: the next snapshot and the event still name the old manifest."""
    change_row(folder)
    data = (folder / SNAPSHOT / "rows.jsonl").read_bytes()
    named = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(folder / SNAPSHOT / "snapshot.json", lambda manifest: manifest["files"].update({"rows.jsonl": named}))


def change_line(folder: Path) -> None:
    path = folder / "interp" / "timeline.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"value":0.1', b'"value":0.2', 1))


def drop_line(folder: Path, number: int) -> None:
    path = folder / "interp" / "timeline.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))


def flipped(name: str, position: int = -2) -> tuple[Callable[[Path], Any], str]:
    """One changed byte, found in that file."""
    return lambda folder: flip(folder / name, position), name


def removed(name: str, told: str = "") -> tuple[Callable[[Path], Any], str]:
    """A file or folder is gone, and that file is missed."""

    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove, told or name


def added(name: str, data: bytes = b"{}") -> tuple[Callable[[Path], Any], str]:
    return lambda folder: (folder / name).write_bytes(data), name


def swapped(one: str, two: str, told: str) -> tuple[Callable[[Path], Any], str]:
    def exchange(folder: Path) -> None:
        (folder / one).rename(folder / "x")
        (folder / two).rename(folder / one)
        (folder / "x").rename(folder / two)

    return exchange, told


def resealed(name: str, change: Callable[[dict[str, Any]], Any]) -> tuple[Callable[[Path], Any], str]:
    return lambda folder: reseal(folder / name, change), name


def linked(name: str) -> tuple[Callable[[Path], Any], str]:
    def link(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to(folder / "elsewhere")

    return link, name


def link_to_nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nowhere")


def copy_another_step(folder: Path) -> None:
    shutil.rmtree(folder / COPY)
    shutil.copytree(folder / SNAPSHOT, folder / COPY)


#: What is done to a run, and the file that a ``failure`` line names.
TAMPERINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one byte of a weight file": flipped(WEIGHTS),
    "the adapter's config": flipped("checkpoint-10/adapter_config.json"),
    "a weight file added": added("checkpoint-10/model-00002-of-00002.safetensors"),
    "a weight file removed": removed(WEIGHTS),
    "a weight file that leads nowhere": (link_to_nothing, "checkpoint-10"),
    "two checkpoints swapped": swapped("checkpoint-10", "checkpoint-20", "checkpoint-10/interp/snapshot.json"),
    "rows of a copy": flipped(f"{COPY}/rows.jsonl"),
    "tensors of a copy": flipped(f"{COPY}/tensors.safetensors"),
    "manifest of a copy": flipped(f"{COPY}/snapshot.json"),
    "rows of a copy removed": removed(f"{COPY}/rows.jsonl"),
    "a file beside a copy": added(f"{COPY}/x.json"),
    "a copy of another step": (copy_another_step, f"{COPY}/snapshot.json"),
    "a copy that is a link": linked(COPY),
    "rows": (change_row, f"{SNAPSHOT}/rows.jsonl"),
    "rows, resealed": (reseal_rows, f"{SNAPSHOT}/snapshot.json"),
    "tensors": (change_tensor, f"{SNAPSHOT}/tensors.safetensors"),
    "tensors removed": removed(f"{SNAPSHOT}/tensors.safetensors"),
    "a manifest": flipped(f"{SNAPSHOT}/snapshot.json"),
    "a manifest, resealed": resealed(f"{SNAPSHOT}/snapshot.json", lambda m: m["cost"].update(seconds=0.1)),
    "the newest manifest, resealed": resealed(f"{NEWEST}/snapshot.json", lambda m: m["cost"].update(seconds=0.1)),
    "the first snapshot removed": removed(FIRST, f"{FIRST}/snapshot.json"),
    "a snapshot in the middle removed": removed(SNAPSHOT, f"{SNAPSHOT}/snapshot.json"),
    "the newest snapshot, not its lines": removed(NEWEST, f"{NEWEST}/snapshot.json"),
    "a snapshot renamed": (
        lambda folder: (folder / SNAPSHOT).rename(folder / "interp/snapshots/01-step-000011"),
        "interp/snapshots/01-step-000011/snapshot.json",
    ),
    "two snapshots swapped": swapped(SNAPSHOT, FIRST, f"{SNAPSHOT}/snapshot.json"),
    "a line changed": (change_line, TIMELINE),
    "a line removed": (lambda folder: drop_line(folder, 3), TIMELINE),
    "the first line removed": (lambda folder: drop_line(folder, 0), TIMELINE),
    "the settings": flipped("interp/run.json", 20),
    "the settings, resealed": resealed("interp/run.json", lambda d: d["config"].update(seed=1)),
    "the settings of a later start": resealed("interp/run-02.json", lambda d: d["config"].update(seed=1)),
    "settings removed": removed("interp/run-02.json"),
    "settings of the wrong start": (
        lambda folder: shutil.copy(folder / "interp/run.json", folder / "interp/run-03.json"),
        "interp/run-03.json",
    ),
    "a file more": added("interp/readme.txt"),
    "a folder more": (lambda folder: (folder / "interp/cache").mkdir(), "interp/cache"),
    "a link": linked("interp/run-02.json"),
    "a pickle": added("interp/report.pkl", b"\x80\x04N."),
    "texts": flipped("_interp/01-texts.jsonl", 10),
}


def test_an_untouched_run_passes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    code, told = call(capsys, run)
    assert (code, told) == (0, [])
    assert call(capsys, run / "interp") == (0, [])
    assert contents(run) == before, "verify writes nothing"
    assert {finding.severity for finding in verify_run(run).findings} == {"ok"}


def test_every_file_is_covered(run: Path) -> None:
    """Each file under ``interp`` and each weight file is named by a finding."""
    named = {finding.file for finding in verify_run(run).findings}
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    outside = {name for name in files if name.endswith(("optimizer.pt", "trainer_state.json"))}
    assert files - outside - {"interp/report.html"} <= named


@pytest.mark.parametrize("what", TAMPERINGS)
def test_tampering_is_found(what: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tamper, file = TAMPERINGS[what]
    tamper(run)
    before = contents(run)
    code, told = call(capsys, run)
    assert code == 1
    failures = [line for line in told if line.startswith("failure")]
    assert any(line.removeprefix("failure  ").startswith(f"{file}: found ") for line in failures), told
    assert all("; expected " in line for line in told)
    assert contents(run) == before


def test_weights_beside_the_trainers_own_states(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Optimizer and trainer state are the trainer's business."""
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state.pth", "README.md"):
        (run / "checkpoint-20" / name).write_bytes(b"changed")
    assert call(capsys, run) == (0, [])


def test_what_cannot_be_checked_any_more_is_noted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoint-10")
    shutil.rmtree(run / "_interp")
    (run / "interp" / "report.html").unlink()
    code, told = call(capsys, run)
    assert code == 0
    assert [line.split(":")[0] for line in told] == ["note     checkpoint-10", "note     _interp/01-texts.jsonl"]


def test_what_a_killed_writer_left_is_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "interp" / "snapshots" / f".interp-1-{'0' * 32}").mkdir()
    with open(run / "interp" / "timeline.jsonl", "ab") as file:
        file.write(b'{"half')
    shutil.rmtree(run / "checkpoint-30" / "interp")
    code, told = call(capsys, run)
    assert code == 0
    left = (f"interp/snapshots/.interp-1-{'0' * 32}", TIMELINE, "checkpoint-30/interp")
    assert [line.split(":")[0] for line in told] == [f"warning  {name}" for name in left]


def test_weights_of_an_abandoned_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that went back to step 10 and was killed may have written over the checkpoints after it: no failure."""
    resume(run, 10)
    checkpoint(run, 20, b"written over")
    code, told = call(capsys, run)
    assert code == 0
    assert [line.split(": found ")[0] for line in told] == ["warning  checkpoint-20/model.safetensors"]
    checkpoint(run, 10, b"not this one")
    assert call(capsys, run)[0] == 1


# -- two runs ----------------------------------------------------------------------------------------------------------


def swap(one: Path, two: Path, name: str) -> None:
    one.joinpath(name).rename(one / "swapped")
    two.joinpath(name).rename(one / name)
    one.joinpath("swapped").rename(two / name)


@pytest.mark.parametrize("name", [SNAPSHOT, "interp/snapshots/01-step-000020", "interp/snapshots"])
def test_snapshots_of_two_runs_swapped(name: str, run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, other) == (0, [])
    shutil.rmtree(run / "interp" / "snapshots" / "02-step-000030")
    swap(run, other, name)
    for folder in (run, other):
        code, told = call(capsys, folder)
        assert code == 1 and any(line.startswith(f"failure  {SNAPSHOT[:20]}") for line in told)


def test_the_whole_run_of_another(run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything of ours exchanged at once: the weights and the copies beside them belong to the other run."""
    swap(run, other, "interp")
    for folder in (run, other):
        code, told = call(capsys, folder)
        assert code == 1 and any(line.startswith("failure  checkpoint-20/interp/snapshot.json") for line in told)


def test_a_checkpoint_of_another_run(run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(other / "checkpoint-20", run / "checkpoint-99")
    code, told = call(capsys, run)
    assert code == 0, "it is no part of this run"
    assert [line.split(";")[0] for line in told] == [
        "warning  checkpoint-99/interp: found 01-step-000020 of another run"
    ]
    (run / "checkpoint-99" / "interp" / "snapshot.json").write_bytes(b"{}")
    assert call(capsys, run)[1][0].startswith("warning  checkpoint-99/interp: found ")


# -- a head noted elsewhere --------------------------------------------------------------------------------------------


def cut_end(run: Path) -> None:
    """Remove the second segment: its lines, its run file, its snapshot. What is left is a run of its own."""
    path = run / "interp" / "timeline.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    begun = max(number for number, line in enumerate(lines) if b'"event":"segment"' in line)
    path.write_bytes(b"".join(lines[:begun]))
    (run / "interp" / "run-02.json").unlink()
    shutil.rmtree(run / "interp" / "snapshots" / "02-step-000030")


def test_a_cut_end_is_seen_against_a_noted_head_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = verify_run(run).head
    cut_end(run)
    code, told = call(capsys, run)
    assert code == 1 and told[0].startswith("failure  checkpoint-30/interp: found 02-step-000030"), "its copy tells"

    shutil.rmtree(run / "checkpoint-30")
    assert call(capsys, run) == (0, []), "nothing in the folder can tell"
    code, told = call(capsys, run, "--head", head)
    assert code == 1
    assert [line.split(": found ")[0] for line in told] == ["failure  interp/timeline.jsonl"] and head in told[0]


def test_heads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every head noted along the way stays good; one of another chain, or no head at all, is none."""
    lines = (run / "interp" / "timeline.jsonl").read_bytes().splitlines()
    heads = ["0" * 64, *(json.loads(line)["chain"] for line in lines)]
    assert verify_run(run).head == heads[-1] and not verify_run(run).anchored
    for head in heads:
        verified = verify_run(run, head=head)
        assert verified.ok and verified.anchored and verified.head == heads[-1]
    measure(resume(run, 30), 40)
    assert call(capsys, run, "--head", heads[-1])[0] == 0
    for head in ("f" * 64, "", heads[-1].upper() if heads[-1].upper() != heads[-1] else "x", heads[-1][:-1]):
        verified = verify_run(run, head=head)
        assert not verified.ok and not verified.anchored


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_counts_and_the_head_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoint-10")
    verified = verify_run(run)
    passed = sum(finding.severity == "ok" for finding in verified.findings)
    lines = render(verified).splitlines()
    assert lines[1] == (
        f"verified: {(run / 'interp').resolve()}: checks passed: {passed}, notes: 1, warnings: 0, failures: 0"
    )
    assert lines[2] == f"head     {verified.head}" and "note the head elsewhere" in lines[3]
    assert "is part of this chain" in render(verify_run(run, head=verified.head)).splitlines()[3]
    flip(run / "checkpoint-20" / "model.safetensors")
    broken = render(verify_run(run)).splitlines()
    assert broken[2].startswith("FAILED: ") and broken[2].endswith("failures: 1")
    assert main(["verify", str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[:3] == broken[:3]


def test_ok_and_problems() -> None:
    from interp_rlhf.audit.verification import Finding

    levels = [Finding(level, "f", "x", "y") for level in ("ok", "note", "warning", "failure")]
    assert Verification(Path(), tuple(levels[:3]), "", False).ok
    assert not Verification(Path(), tuple(levels), "", False).ok
    assert Verification(Path(), tuple(levels), "", False).problems == tuple(levels[2:])


def test_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FormatError, match="found no run"):
        verify_run(tmp_path)
    assert main(["verify", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
