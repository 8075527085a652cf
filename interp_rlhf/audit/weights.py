"""Which files of a checkpoint folder are its weights, and their hashes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from interp_rlhf.audit.sealing import is_leftover, sha256_file

#: Name of the folder inside a checkpoint that holds the copy of its snapshot: never part of the weights.
COPY = "interp"

_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|distcp|index\.json)|adapter_config\.json|\.metadata")
_STATES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)([._-].*)?")
_WHOLE = re.compile(r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_OPTIMIZER_SHARD = re.compile(r".*optim_states\.pt")


def weight_files(checkpoint: str | Path) -> tuple[str, ...]:
    """Files of a checkpoint folder that decide what the model computes, as sorted relative POSIX paths.

    Safetensors and PyTorch weights, adapters with their config, shard indices, and sharded folders (DeepSpeed's
    ``global_step*``, FSDP's ``pytorch_model_fsdp*``). DeepSpeed's optimizer shards count where they are the only
    complete weights (ZeRO without a gathered model). Not: the trainer's optimizer, scheduler, random states and
    arguments. Only files that this machine sees.
    """
    checkpoint = Path(checkpoint)
    found: list[str] = []
    for parent, folders, files in os.walk(checkpoint):
        relative = Path(parent).relative_to(checkpoint)
        top = relative == Path(".")
        folders[:] = [name for name in folders if not (top and (name == COPY or _STATES.fullmatch(name)))]
        folders[:] = [name for name in folders if not is_leftover(name)]
        found += [
            (relative / name).as_posix() for name in files if _WEIGHTS.fullmatch(name) and not _STATES.fullmatch(name)
        ]
    whole = any(_WHOLE.fullmatch(name) for name in found)
    return tuple(sorted(name for name in found if not (whole and _OPTIMIZER_SHARD.fullmatch(name))))


def weight_hashes(checkpoint: str | Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each of :func:`weight_files`.

    Raises:
        FormatError: a file cannot be read.
    """
    checkpoint, found = Path(checkpoint), {}
    for name in weight_files(checkpoint):
        digest = sha256_file(checkpoint / name)
        found[name] = {"bytes": (checkpoint / name).stat().st_size, "sha256": digest}
    return found
