"""Tiny random models of every architecture that the tests run, 3 layers and width 32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from interp_rlhf.activations.prompts import Prompt

LAYERS = 3
_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4, "final_logit_softcapping": 0.5}
_MOE = {**_COMMON, "num_experts_per_tok": 2}

#: Settings of each model type. Caps and scales of logits are strong enough to matter.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 4},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 16},
    "gemma": {**_COMMON, "head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT,
    "gpt_neox": {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"},
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi": _COMMON,
    "phi3": _COMMON,
    "mixtral": {**_MOE, "num_local_experts": 4},
    "qwen3_moe": {**_MOE, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {**_MOE, "num_experts": 4},
    "gpt_oss": {
        **_MOE,
        "num_local_experts": 4,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "bloom": {**_GPT, "hidden_size": 32},
    "falcon": _COMMON,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neo": {
        **{name: value for name, value in _GPT.items() if not name.startswith("n_")},
        "hidden_size": 32,
        "num_layers": LAYERS,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 4,
        "max_position_embeddings": 64,
    },
    "olmo2": _COMMON,
    "granite": {**_COMMON, "logits_scaling": 0.25, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "cohere": {**_COMMON, "logit_scale": 5.0},
    "stablelm": _COMMON,
    "starcoder2": _COMMON,
    "smollm3": _COMMON,
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
}

#: Architectures in which each block adds attention and MLP outputs to the stream as they are.
PLAIN_RESIDUAL = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "bloom",
    "falcon",
    "gptj",
    "gpt_neo",
    "cohere",
    "stablelm",
    "starcoder2",
    "smollm3",
    "mpt",
]


def make_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode whose parameters are all large enough to matter, biases and norms included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_batch(rows: int = 3, width: int = 9, *, side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens of which row r has ``width - 2r``, padded on ``side``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, width), generator=generator)
    mask = torch.zeros(rows, width, dtype=torch.long)
    for row in range(rows):
        length = width - 2 * row
        mask[row, :length] = 1
    ids = ids * mask
    if side == "left":
        lengths = mask.sum(1).tolist()
        ids = torch.stack([r.roll(width - n) for r, n in zip(ids, lengths, strict=True)])
        mask = mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}


def make_prompts(n: int = 7, *, seed: int = 2, longest: int = 14) -> list[Prompt]:
    """Random texts of different lengths, half prompt, half completion."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for index in range(n):
        length = 4 + int(torch.randint(0, longest - 3, (1,), generator=generator))
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        prompts.append(Prompt(tuple(ids), length // 2, f"unit-{index}"))
    return prompts


@contextmanager
def counting(module: nn.Module) -> Iterator[list[int]]:
    """Count the calls of a module inside the block."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()
