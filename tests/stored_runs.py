"""Small stored runs for the tests of ``audit``: two checkpoints, retention, a resumed segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from interp_rlhf.audit.store import RunStore, load_run
from interp_rlhf.audit.verification import verify_run
from interp_rlhf.cli import main
from interp_rlhf.measurement import Measurement

INFO = {"config": {"seed": 0}, "versions": {"trl": "1.12.0"}}


def row(segment: int, step: int, value: float = 0.5, metric: str = "concept/drift") -> Measurement:
    """A timeline row."""
    return Measurement(
        segment=segment, step=step, metric=metric, readout="honesty", hookpoint="layers.1.resid_post",
        scope="completion", text="fixed", source="evaluation", reader="policy", value=value, ci_low=0.25, ci_high=None,
        null_kind="directions", null_low=-1.0, null_high=1.0, p=None, n=8, tier="B", unit="sd",
    )  # fmt: skip


def tensors(seed: int) -> dict[str, np.ndarray]:
    """Two arrays, one of them transposed in memory."""
    rng = np.random.default_rng(seed)
    return {
        "means/layers.1.resid_post": rng.normal(size=(4, 3)).astype(np.float32).T,
        "direction/honesty": rng.normal(size=3).astype(np.float32),
    }


def checkpoint(output: Path, step: int, weights: bytes | None = None) -> Path:
    """A checkpoint folder with weights, an adapter config and a trainer's states."""
    folder = output / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights or f"weights of step {step}".encode())
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / "optimizer.pt").write_bytes(b"moments")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def measure(store: RunStore, step: int, *, save: bool = True, keep: int | None = None) -> None:
    """What a trainer and its callback do at one step: the checkpoint, the rows, the snapshot beside the checkpoint."""
    weights = f"weights of step {step} in segment {store.segment}".encode()
    saved = checkpoint(store.output_dir, step, weights) if save and step else None
    rows = [row(store.segment, step, 0.01 * step), row(store.segment, step, 1.0, "representation/cka")]
    store.append(rows)
    store.snapshot(
        step,
        rows,
        tensors(step),
        checkpoint=saved,
        captured={"hookpoints": ["layers.1.resid_post"]},
        cost={"seconds": 0.5},
        keep=keep,
    )


def stored_run(output: Path, steps: tuple[int, ...] = (0, 10, 20), keep: int | None = None) -> RunStore:
    """A run of one segment."""
    store = RunStore(output)
    store.start(INFO, resumed_from=None)
    for step in steps:
        measure(store, step, keep=keep)
    store.texts("texts", [{"id": "a", "text": "Is it so?"}])
    return store


def resume(output: Path, resumed_from: int | None, steps: tuple[int, ...] = (), **changes: Any) -> RunStore:
    """A later start of a used folder."""
    store = RunStore(output)
    store.start({**INFO, **changes}, resumed_from=resumed_from)
    for step in steps:
        measure(store, step)
    return store


def notes(output: Path) -> list[str]:
    """Texts of the notes in the timeline."""
    return [event["text"] for event in load_run(output).events if event["event"] == "note"]


def with_tensors(output: Path) -> list[int]:
    """Steps whose snapshots still have their tensors."""
    return [int(path.parent.name[-6:]) for path in sorted(output.glob("interp/snapshots/*/tensors.safetensors"))]


def clean(output: Path) -> bool:
    """Verifies on the command line, without a warning."""
    return main(["verify", str(output)]) == 0 and not verify_run(output).problems
