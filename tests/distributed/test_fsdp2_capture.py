"""FSDP2 on two CPU processes reads what one process reads, and training does not notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fsdp2_worker import TYPES, readings, train
from tiny_models import make_model

WORKER = Path(__file__).with_name("fsdp2_worker.py")


def test_two_processes_read_what_one_reads(tmp_path: Path) -> None:
    root = WORKER.parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for model_type in TYPES:
        model = make_model(model_type)
        check(ranks, model_type, model)
        train(model, measure_between=False, rank=0, world=1)
        check(ranks, f"{model_type} trained", model)


def check(ranks: list[dict[str, dict[str, torch.Tensor]]], key: str, model: torch.nn.Module) -> None:
    """Each rank's share of the texts against the same texts read alone."""
    for rank, saved in enumerate(ranks):
        for name, value in readings(model, rank, 2).items():
            tolerance = 1e-5 if name != "log_probs" else 1e-4
            torch.testing.assert_close(saved[key][name], value, atol=tolerance, rtol=1e-5, msg=f"{key} {name}")
