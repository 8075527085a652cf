"""Offline, quiet and single-threaded before anything is imported; the real data beside the repository as fixtures."""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_DISABLE_CODE="true",
    WANDB_ERROR_REPORTING="false",
    DO_NOT_TRACK="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    DS_ACCELERATOR="cpu",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # trackio reads it once, when first imported
os.environ.pop("INTERP_RLHF", None)

import atexit
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return REPOSITORY


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of the real pretrained stories model (5 layers, d = 64)."""
    return _shared("stories260k")


@pytest.fixture(scope="session")
def real_pairs() -> list[dict[str, str]]:
    """Real human preference pairs: rows with ``chosen`` and ``rejected`` dialogues."""
    path = _shared("hh_rlhf_harmless_test.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} is not beside the repository")
    return path
