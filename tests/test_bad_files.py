"""Damaged, forged and foreign files on the command line: one line, exit code 1 or 2, nothing written or executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input import SMALL, Executed, check_message, contents
from trainers.table import trainers

import interp_rlhf
from interp_rlhf import attach
from interp_rlhf.audit.sealing import seal, sha256_bytes
from interp_rlhf.audit.timeline import GENESIS, scan_timeline
from interp_rlhf.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a real attached run with two checkpoints; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer = trainers()["dpo"].build(folder, save_strategy="steps", save_steps=2, max_steps=4, use_lora=True)
    attach(trainer, SMALL)
    trainer.train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, list[str], list[str]]:
    """Exit code and lines on both streams; whatever else ``main`` raises is a traceback for a user."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    streams = capsys.readouterr()
    return code, streams.out.splitlines(), streams.err.splitlines()


def damages(data: bytes, executed: Path) -> dict[str, bytes | None]:
    middle = len(data) // 2
    return {
        "half": data[:middle],
        "last byte missing": data[:-1],
        "flipped": data[:middle] + bytes([data[middle] ^ 0x20]) + data[middle + 1 :],
        "pickle": pickle.dumps(Executed(executed)),
        "empty": b"",
        "missing": None,
        "other JSON": b"[]",
        "binary": b"\xff\xfe\x00" * 9,
    }


def sealed_by_us(name: str) -> bool:
    """Whether a changed byte in this file of an output folder has to be found."""
    return (name.startswith("interp/") and name != "interp/report.html") or any(
        part in name for part in ("/interp/", "_interp/", "adapter_model", "adapter_config")
    )


def test_every_file_of_a_run_damaged_in_every_way(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executed, out = tmp_path / "executed", tmp_path / "report.html"
    out.write_text("the report before", encoding="utf-8")
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name, data = path.relative_to(run).as_posix(), path.read_bytes()
        for what, bad in damages(data, executed).items():
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            before = contents(run)
            code, told, errors = call(capsys, "verify", run)
            assert code in (0, 1, 2), (name, what)
            if sealed_by_us(name) and not (what == "missing" and name.startswith("_interp/")):
                torn = (
                    name == "interp/timeline.jsonl" and code == 0 and any(line.startswith("warning") for line in told)
                )
                assert code in (1, 2) or torn, (name, what, told)
            if code == 1:
                found = [line for line in told if line.startswith("failure")]
                assert found and all(": found " in line and "; expected " in line for line in found)
            assert len(errors) == (code == 2), (name, what, errors)
            assert contents(run) == before, (name, what)
            if not name.startswith(("interp/", "_interp/")):
                path.write_bytes(data)
                continue  # the report reads nothing of a checkpoint
            code, told, errors = call(capsys, "report", run, "--texts", "--out", out)
            assert code in (0, 2), (name, what)
            assert len(errors) == (code == 2), (name, what, errors)
            if code == 2:
                assert out.read_text(encoding="utf-8") == "the report before" and str(run) in errors[0]
            out.write_text("the report before", encoding="utf-8")
            assert contents(run) == before, (name, what)
            path.write_bytes(data)
    assert not executed.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"], "no leftovers"
    assert call(capsys, "verify", run)[0] == 0


def rechained(records: list[dict[str, Any]]) -> bytes:
    """A timeline with a valid chain over any records, as someone who knows the format would forge it."""
    chain, found = GENESIS, []
    for record in records:
        body = json.dumps(record, separators=(",", ":")).encode()
        chain = sha256_bytes(chain.encode() + body)
        found.append(body[:-1] + f',"chain":"{chain}"}}\n'.encode())
    return b"".join(found)


FORGED: dict[str, dict[str, Any]] = {
    "traversal in a file": {"event": "note", "text": "x", "file": "../../secret", "sha256": "0" * 64},
    "absolute file": {"event": "note", "text": "x", "file": "/etc/passwd", "sha256": "0" * 64},
    "traversal in texts": {"event": "texts", "texts": "../../secret", "sha256": "0" * 64},
    "texts of no name": {"event": "texts", "texts": None, "sha256": "0" * 64},
    "texts with a surrogate": {"event": "texts", "texts": "\ud800", "sha256": "0" * 64},
    "refusal without fields": {"event": "refused"},
    "failure without fields": {"event": "failure"},
    "note without text": {"event": "note"},
    "event of no kind": {"event": 5},
    "file that is a list": {"event": "other", "file": []},
    "huge segment": {"event": "segment", "segment": 10**400, "resumed_from": None, "parent": None},
    "neither event nor row": {"value": 1.0},
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_events(what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("not for the report", encoding="utf-8")
    timeline = run / "interp" / "timeline.jsonl"
    records = list(scan_timeline(timeline.read_bytes(), timeline).records)
    timeline.write_bytes(rechained([*records, FORGED[what]]))
    check_forged(run, capsys)


@pytest.mark.parametrize("field", ["segment", "step", "metric", "hookpoint", "value", "ci_low", "n", "unit"])
@pytest.mark.parametrize("value", [None, "x", [], {}, float("nan"), 10**400, "\ud800"], ids=str)
def test_forged_rows(field: str, value: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline = run / "interp" / "timeline.jsonl"
    records = list(scan_timeline(timeline.read_bytes(), timeline).records)
    index = max(i for i, record in enumerate(records) if "event" not in record)
    records[index] = {**records[index], field: value}
    timeline.write_bytes(rechained(records))
    check_forged(run, capsys)


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "traversal in a file": lambda m: m["files"].update({"../../secret": m["files"]["rows.jsonl"]}),
    "traversal in the run file": lambda m: m["run"].update(name="../../secret"),
    "traversal in the parent": lambda m: m["parent"].update(name="../01-step-000000"),
    "traversal in the checkpoint": lambda m: m["checkpoint"].update(folder=".."),
    "traversal in the weights": lambda m: m["checkpoint"]["weights"].update(
        {"../../secret": {"bytes": 1, "sha256": "0" * 64}}
    ),
    "traversal in pruned": lambda m: m["pruned"].append("../../.."),
    "traversal in the name": lambda m: m.update(name="../01-step-000002"),
    "another version": lambda m: m.update(schema=99),
    "unknown field": lambda m: m.update(more=1),
    "missing field": lambda m: m.pop("run"),
    "another type": lambda m: m.update(files=[]),
    "no files": lambda m: m.update(files={}),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_forged_manifests(what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("stays", encoding="utf-8")
    path = run / "interp" / "snapshots" / "01-step-000002" / "snapshot.json"
    manifest = json.loads(path.read_bytes())
    MANIFESTS[what](manifest)
    path.write_bytes(seal(manifest))
    code, errors = check_forged(run, capsys)
    assert code == 2 and "01-step-000002/snapshot.json" in errors[0]
    assert (tmp_path / "secret").read_text(encoding="utf-8") == "stays"


@pytest.mark.parametrize("value", [None, "x", [], 5, "\ud800", 10**400], ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("field", ["schema", "segment", "config", "model", "versions", "prompts", "trainer"])
def test_forged_run_files(field: str, value: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "interp" / "run.json"
    path.write_bytes(seal({**json.loads(path.read_bytes()), field: value}))
    check_forged(run, capsys)


def check_forged(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """``verify`` finds the forgery (a snapshot sealed what came before it), ``report`` refuses or shows it."""
    before, out = contents(run), run.parent / "forged.html"
    code, _, errors = call(capsys, "verify", run)
    assert code in (0, 1, 2) and len(errors) == (code == 2)
    code, _, errors = call(capsys, "report", run, "--texts", "--out", out)
    assert code in (0, 2) and len(errors) == (code == 2)
    if code == 2:
        check_message(errors[0], (str(run),))
        assert not out.exists()
    else:
        assert "not for the report" not in out.read_text(encoding="utf-8")
    assert contents(run) == before
    return code, errors


PLANTED = (
    "interp/evil.pkl", "interp/run-02.json", "interp/timeline.torn-1", "interp/snapshots/evil.pt",
    "interp/snapshots/01-step-000002/tensors.pt", "interp/snapshots/01-step-000002/extra.json",
    "checkpoint-2/interp/evil.pkl", "checkpoint-2/pytorch_model.bin",
)  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_pickle_is_found_and_not_executed(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_bytes(pickle.dumps(Executed(tmp_path / "executed")))
    code, told, _ = call(capsys, "verify", run)
    assert code == 1 and any(line.startswith("failure") and name in line for line in told)
    assert call(capsys, "report", run, "--out", tmp_path / "r.html")[0] in (0, 2)
    assert not (tmp_path / "executed").exists()
    pickle.loads((run / name).read_bytes()).close()
    assert (tmp_path / "executed").exists(), "the pickle would have worked"


def test_links_out_of_the_run_are_not_followed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run / "interp" / "snapshots" / "01-step-000002" / "snapshot.json"
    shutil.move(place, tmp_path / "elsewhere.json")
    place.symlink_to(tmp_path / "elsewhere.json")
    assert call(capsys, "verify", run)[0] == 1
    code, _, errors = call(capsys, "report", run)
    assert code == 2 and "symbolic link" in errors[0]


MODELS: dict[str, Callable[[Path], Any]] = {
    "no folder": lambda folder: folder.rmdir(),
    "empty folder": lambda folder: None,
    "file": lambda folder: (folder.rmdir(), folder.write_text("x")),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "list": lambda folder: (folder / "config.json").write_text("[]"),
    "no model type": lambda folder: (folder / "config.json").write_text("{}"),
    "unknown model type": lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'),
    "model type of another type": lambda folder: (folder / "config.json").write_text('{"model_type": 5}'),
    "no language model": lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
    "no layers": lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 0}'),
    "words for numbers": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": "wide"}'
    ),
    "numbers that do not fit": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}'
    ),
    "code of its own": lambda folder: (
        (folder / "config.json").write_text(
            '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}'
        ),
        (folder / "code.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w')"),
    ),
    "pickle": lambda folder: (folder / "config.json").write_bytes(pickle.dumps(Executed(folder.parent / "executed"))),
}


@pytest.mark.parametrize("what", MODELS)
def test_doctor_on_what_is_no_model(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    MODELS[what](folder)
    before = contents(tmp_path)
    code, _, errors = call(capsys, "doctor", "--model", folder)
    assert code == 2 and len(errors) == 1
    check_message(errors[0], (str(folder),))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "missing"),
        ("verify", "broken"),
        ("report", "missing"),
        ("report", "broken"),
        ("report", "good", "--out", "missing/report.html"),
        ("doctor", "--model", "broken"),
    ],
    ids=" ".join,
)
def test_the_real_process_ends_with_two_and_one_line(words: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "good")
    shutil.move(run, tmp_path / "broken")
    timeline = tmp_path / "broken" / "interp" / "timeline.jsonl"
    if words[0] == "verify":
        (tmp_path / "broken" / "interp" / "run.json").unlink()
    timeline.write_bytes(timeline.read_bytes()[100:])
    before = contents(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(interp_rlhf.__file__).parents[1])}
    command = [sys.executable, "-m", "interp_rlhf.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    check_message(done.stderr.rstrip("\n"))
    assert done.stderr.startswith("interp-rlhf: ")
    assert contents(tmp_path) == before
