"""cli.py: exit codes 0, 1 and 2; errors are one line on standard error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import interp_rlhf
from interp_rlhf import cli
from interp_rlhf.errors import FormatError


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a shell would start it."""
    root = Path(interp_rlhf.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-m", "interp_rlhf.cli", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=cwd,
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["verify"],
        ["demo", "--trainer", "sft"],
        ["demo", "--seed", "one"],
        ["report", "a", "--bogus"],
        ["fit"],
        ["fit", "probe", "--model", "m", "--hookpoint", "embed", "--out", "o"],
        ["fit", "direction", "--model", "m", "--hookpoint", "embed", "--out", "o", "--pack", "p", "--labels", "l"],
        ["measure"],
        ["compare"],
    ],
)
def test_wrong_words_are_bad_input_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert len(streams.err.splitlines()) == 1


@pytest.mark.parametrize("verb", ["verify", "report"])
@pytest.mark.parametrize("kind", ["missing", "empty", "file", "foreign"])
def test_runs_that_are_none_are_bad_input(verb: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    if kind == "file":
        folder.write_text("not a folder", encoding="utf-8")
    elif kind != "missing":
        (folder / "interp").mkdir(parents=True)
    if kind == "foreign":
        (folder / "interp" / "run.json").write_text("{", encoding="utf-8")
    assert cli.main([verb, str(folder)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(folder) in error
    assert not list(tmp_path.rglob("report.html"))


def test_bad_input_prints_no_traceback(tmp_path: Path):
    done = run("report", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("interp-rlhf: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_a_failed_check_is_one(ok: bool, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from interp_rlhf.audit import verification

    monkeypatch.setattr(verification, "verify_run", lambda path, head: SimpleNamespace(ok=ok))
    monkeypatch.setattr(verification, "render", lambda result: "checked")
    assert cli.main(["verify", str(tmp_path)]) == code


def test_messages_of_several_lines_become_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from interp_rlhf.audit import store

    def fail(path: Path) -> None:
        raise FormatError("first\nsecond")

    monkeypatch.setattr(store, "load_run", fail)
    assert cli.main(["report", "anywhere"]) == 2
    assert capsys.readouterr().err == "interp-rlhf: first second\n"


def test_doctor_ends_with_zero_and_version_prints(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor"]) == 0
    assert "trainers" in capsys.readouterr().out
    assert cli.main(["doctor", "--model", "no/such/model"]) == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert interp_rlhf.__version__ in capsys.readouterr().out


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch):
    from interp_rlhf.audit import store

    def fail(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(store, "load_run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "anywhere"])


def test_fit_measure_and_compare_on_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from trainers.tiny_runs import small, train

    folder = tmp_path / "run"
    config = small(folder, probes={"enabled": False})
    train("dpo", folder, config, max_steps=2)
    capsys.readouterr()
    checkpoint, (pack,) = str(folder / "checkpoint-2"), config["concepts"]["packs"]
    out = str(tmp_path / "probe.safetensors")
    words = ["fit", "probe", "--model", checkpoint, "--pack", pack, "--hookpoint", "layers.1.resid_post", "--out", out]
    assert cli.main(words) == 0 and "held-out AUC" in capsys.readouterr().out
    assert cli.main(words) == 2 and "exists" in capsys.readouterr().err
    assert cli.main(["measure", checkpoint]) == 0
    assert "checkpoint-2 (step 2) against run (step 0)" in capsys.readouterr().out
    assert cli.main(["compare", str(folder), checkpoint]) == 0
    assert "No control runs were compared" in capsys.readouterr().out
    assert cli.main(["compare", str(folder), str(tmp_path / "nowhere")]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert cli.main(["compare", str(folder)]) == 2
