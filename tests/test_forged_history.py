"""History rewritten by someone who recomputes every hash on the way: what came later still names what was there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stored_runs import resume, stored_run

from interp_rlhf.audit.sealing import seal
from interp_rlhf.audit.verification import verify_run
from interp_rlhf.cli import main

NEWEST, MIDDLE = "snapshots/02-step-000030/snapshot.json", "snapshots/01-step-000020/snapshot.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four snapshots in two segments; no checkpoint is left that would tell."""
    stored_run(tmp_path)
    resume(tmp_path, 20, (30,))
    for folder in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return tmp_path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rewrite(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The timeline with changed lines and a chain computed anew."""
    path, chain, lines = run / "interp" / "timeline.jsonl", "0" * 64, []
    for line in path.read_bytes().splitlines():
        record = json.loads(line)
        del record["chain"]
        change(record)
        body = json.dumps(record, separators=(",", ":")).encode()
        chain = sha256(chain.encode() + body)
        lines.append(body[:-1] + f',"chain":"{chain}"}}\n'.encode())
    path.write_bytes(b"".join(lines))


def reseal(run: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """A sealed document with changed fields, and its event in the timeline with the new hash."""
    path = run / "interp" / name
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(seal(document))
    new = sha256(path.read_bytes())
    rewrite(run, lambda record: record.update(sha256=new) if record.get("file") == name else None)


def failures(run: Path) -> dict[str, str]:
    found = {finding.file: finding.found for finding in verify_run(run).findings if finding.severity == "failure"}
    assert main(["verify", str(run)]) == bool(found)
    return found


def test_a_rewrite_that_changes_nothing_passes(run: Path) -> None:
    before, head = (run / "interp" / "timeline.jsonl").read_bytes(), verify_run(run).head
    rewrite(run, lambda record: None)
    assert (run / "interp" / "timeline.jsonl").read_bytes() == before
    assert failures(run) == {} and verify_run(run, head=head).ok


def test_a_measurement(run: Path) -> None:
    """The snapshots after it sealed the timeline as it was."""
    rewrite(run, lambda record: record.update(value=0.0) if record.get("step") == 10 and "metric" in record else None)
    assert failures(run).keys() == {"interp/timeline.jsonl"}


def test_an_added_measurement_at_the_end(run: Path) -> None:
    """Nothing came after it: only a head that was noted before tells, and it still is part of a longer chain."""
    head = verify_run(run).head
    path = run / "interp" / "timeline.jsonl"
    last = path.read_bytes().splitlines(keepends=True)[-3]
    path.write_bytes(path.read_bytes() + last)
    rewrite(run, lambda record: None)
    assert failures(run) == {}
    assert verify_run(run, head=head).ok
    rewrite(run, lambda record: record.update(time="2020-01-01T00:00:00+00:00") if "time" in record else None)
    assert not verify_run(run, head=head).ok


def test_settings(run: Path) -> None:
    """Event and run file agree again; the snapshots of that start do not."""
    reseal(run, "run-02.json", lambda document: document["config"].update(seed=9))
    assert "interp/run-02.json" in failures(run)


def test_a_snapshot_that_another_follows(run: Path) -> None:
    reseal(run, MIDDLE, lambda manifest: manifest["cost"].update(seconds=9))
    assert f"interp/{MIDDLE}" in failures(run)


def test_the_description_of_a_tensor(run: Path) -> None:
    """Nothing follows the newest snapshot, and the bytes are as named: the tensor itself is hashed."""
    reseal(run, NEWEST, lambda manifest: manifest["tensors"]["direction/honesty"].update(sha256="0" * 64))
    found = failures(run)
    assert found == {"interp/snapshots/02-step-000030/tensors.safetensors": "another tensor 'direction/honesty'"}


def test_a_tensor_that_is_not_there(run: Path) -> None:
    reseal(run, NEWEST, lambda manifest: manifest["tensors"].pop("direction/honesty"))
    assert failures(run).keys() == {"interp/snapshots/02-step-000030/tensors.safetensors"}


def test_the_last_line_end(run: Path) -> None:
    """A changed last byte is no torn line: the line is whole without it."""
    path = run / "interp" / "timeline.jsonl"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-1] + b" "):
        path.write_bytes(data)
        assert failures(run)["interp/timeline.jsonl"] == "a last line whose line end was changed"
    path.write_bytes(whole[:-30])
    (problem,) = verify_run(run).problems
    assert problem.severity == "warning" and problem.found.startswith("a torn last line of ")
