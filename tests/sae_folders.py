"""Folders of dictionaries as sparsify and dictionary_learning write them, with random weights, and their formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, WIDTH, K = 12, 40, 5

#: The tensors of each kind of folder: shapes by name. Numbers that stand alone are given by ``numbers``.
LINEAR = {"encoder.weight": (WIDTH, D), "encoder.bias": (WIDTH,), "decoder.weight": (D, WIDTH)}
FLAT = {"W_enc": (D, WIDTH), "b_enc": (WIDTH,), "W_dec": (WIDTH, D), "b_dec": (D,)}
SPARSIFY = {"encoder.weight": (WIDTH, D), "encoder.bias": (WIDTH,), "W_dec": (WIDTH, D), "b_dec": (D,)}
CLASSES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": {**LINEAR, "bias": (D,)},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": (D,)},
    "GatedAutoEncoder": {
        "encoder.weight": (WIDTH, D), "r_mag": (WIDTH,), "gate_bias": (WIDTH,), "mag_bias": (WIDTH,),
        "decoder.weight": (D, WIDTH), "decoder_bias": (D,),
    },
    "JumpReluAutoEncoder": {**FLAT, "threshold": (WIDTH,)},
    "AutoEncoderTopK": {**LINEAR, "b_dec": (D,)},
    "BatchTopKSAE": {**LINEAR, "b_dec": (D,)},
    "MatryoshkaBatchTopKSAE": FLAT,
}  # fmt: skip


def numbers(kind: str) -> dict[str, Tensor]:
    """Buffers of a dictionary_learning class besides its weights."""
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        return {}
    found = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
    if kind == "MatryoshkaBatchTopKSAE":
        found["group_sizes"] = torch.tensor([10, 30])
    return found


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors; thresholds are above 0."""
    rng = np.random.default_rng(seed)
    found = {name: torch.from_numpy(rng.normal(size=shape)).float() for name, shape in shapes.items()}
    return {name: tensor.abs() if name == "threshold" else tensor for name, tensor in found.items()}


def sparsify_folder(folder: Path, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Write one; returns its tensors."""
    folder.mkdir(parents=True)
    tensors = weights(SPARSIFY, seed)
    about = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": WIDTH, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D, **changes,
    }  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(about), encoding="utf-8")
    return tensors


def learned_folder(folder: Path, kind: str, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Write one of dictionary_learning's; returns its tensors."""
    folder.mkdir(parents=True)
    tensors = weights(CLASSES[kind], seed) | numbers(kind)
    trainer = {
        "dict_class": kind, "trainer_class": "Trainer", "activation_dim": D, "dict_size": WIDTH, "layer": 3,
        "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3",
        **({"k": K} if "k" in tensors else {}), **changes,
    }  # fmt: skip
    torch.save(tensors, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}), encoding="utf-8")
    return tensors


def top(values: np.ndarray, k: int) -> np.ndarray:
    """All but the k largest of each row set to 0."""
    kept = np.zeros_like(values)
    for row, line in zip(kept, values, strict=True):
        best = np.argsort(line)[-k:]
        row[best] = line[best]
    return kept


def formula(kind: str, tensors: Mapping[str, Tensor], x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Feature activations ``[n, F]`` and reconstructions ``[n, d]`` in NumPy, float64, from the library's own names."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    v = x.double().numpy()
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        if kind == "MatryoshkaBatchTopKSAE":
            z = np.maximum((v - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
            z = np.where(z > w["threshold"], z, 0)
            return z, z @ w["W_dec"] + w["b_dec"]
        p = v @ w["W_enc"] + w["b_enc"]
        f = np.where(p > w["threshold"], np.maximum(p, 0), 0)
        return f, f @ w["W_dec"] + w["b_dec"]
    if kind == "sparsify":
        z = top(np.maximum((v - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0), K)
        return z, z @ w["W_dec"] + w["b_dec"]
    out = w["decoder.weight"].T
    if kind == "GatedAutoEncoder":
        e = (v - w["decoder_bias"]) @ w["encoder.weight"].T
        f = (e + w["gate_bias"] > 0) * np.maximum(np.exp(w["r_mag"]) * e + w["mag_bias"], 0)
        return f, f @ out + w["decoder_bias"]
    if kind == "AutoEncoderNew":
        z = np.maximum(v @ w["encoder.weight"].T + w["encoder.bias"], 0)
        return z, z @ out + w["decoder.bias"]
    bias = w["bias"] if kind == "AutoEncoder" else w["b_dec"]
    z = np.maximum((v - bias) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    if kind == "AutoEncoderTopK":
        z = top(z, K)
    if kind == "BatchTopKSAE":
        z = np.where(z > w["threshold"], z, 0)
    return z, z @ out + bias
