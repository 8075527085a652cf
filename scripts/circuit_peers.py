"""Other packages' edge attribution, beside the passes it needs and beside ``attribute_edges``, where installed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: Layers, width, heads (as many key-value heads: nothing is grouped), rows, tokens.
LAYERS, WIDTH, HEADS, ROWS, TOKENS = 4, 256, 8, 8, 64
HEAD = ["peer", "version", "model", "over its own passes", "over attribute_edges", "converted copy", "note"]


def peers(rounds: int) -> list[list[str]]:
    """The table: a row per peer, with figures or with the reason why there are none."""
    rows = [HEAD]
    for package, build, note in (
        (
            "auto-circuit",
            auto_circuit_eap,
            "`mask_gradient_prune_scores`, q, k, v apart; needs transformer-lens below 4 and attrs besides",
        ),
        (
            "transformer-lens",
            hooked_eap,
            "below 4, for HookedTransformer; its hooks, split q, k, v, `use_attn_result`; our einsum",
        ),
    ):
        rows.append(peer(package, build, note, rounds))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def peer(package: str, build: Callable[[], Callable[[], object]], note: str, rounds: int) -> list[str]:
    """One row."""
    shape = f"{LAYERS} × {WIDTH}, {HEADS}/{HEADS} heads, {ROWS} × {TOKENS}"
    try:
        found = version(package)
    except PackageNotFoundError:
        return [package, "none", shape, "", "", "yes", "not installed"]
    try:
        theirs, passes, ours = median_seconds([build(), own_passes(), our_eap()], rounds)
    except Exception as error:  # whatever it met is the row
        reason = (str(error).splitlines() or [""])[0][:120].replace("|", "/")
        return [package, found, shape, "", "", "yes", f"does not run: {type(error).__name__}: {reason}"]
    return [package, found, shape, f"{theirs / passes:.2f}", f"{theirs / ours:.2f}", "yes", note]


def median_seconds(work: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each, in turn, round after round, after one call that does not count."""
    for each in work:
        each()
    taken: list[list[float]] = [[] for _ in work]
    for _ in range(rounds):
        for each, seconds in zip(work, taken, strict=True):
            began = time.perf_counter()
            each()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(each) for each in taken]


def batch() -> tuple[Any, Any]:
    """Clean and corrupt tokens."""
    import torch

    torch.manual_seed(0)
    return torch.randint(5, 1024, (ROWS, TOKENS)), torch.randint(5, 1024, (ROWS, TOKENS))


def our_eap() -> Callable[[], object]:
    """``attribute_edges`` on a Llama of these sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from interp_rlhf import attribute_edges

    config = LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=WIDTH * 8 // 3, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    clean, corrupt = ({"input_ids": each} for each in batch())
    return lambda: attribute_edges(model, clean, corrupt, lambda now, _: now[:, -1, 3] - now[:, -1, 4], memory=64)


def hooked(split: bool) -> Any:
    """A HookedTransformer of these sizes, its inputs and heads split or as it computes by itself."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=LAYERS, d_model=WIDTH, n_ctx=TOKENS, d_head=WIDTH // HEADS, n_heads=HEADS, d_vocab=1024,
        d_mlp=WIDTH * 8 // 3, act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True,
        positional_embedding_type="rotary", rotary_dim=WIDTH // HEADS, device="cpu", seed=0,
        use_attn_result=split, use_split_qkv_input=split, use_hook_mlp_in=split,
    )  # fmt: skip
    return HookedTransformer(config).eval()


def own_passes() -> Callable[[], None]:
    """Two forward passes and one backward pass of the HookedTransformer, nothing split."""
    import torch

    model, clean = hooked(False), batch()[0]

    def run() -> None:
        with torch.no_grad():
            model(clean)
        logits = model(clean)
        (logits[:, -1, 3] - logits[:, -1, 4]).sum().backward()
        model.zero_grad()

    return run


def auto_circuit_eap() -> Callable[[], object]:
    """AutoCircuit's fast edge attribution patching: the gradient to the masks at the clean input."""
    import torch
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model

    model = hooked(True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    clean, corrupt = batch()
    right, wrong = [torch.tensor([3])] * ROWS, [torch.tensor([4])] * ROWS
    data = PromptDataset(list(clean), list(corrupt), right, wrong)
    loader = PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=ROWS, shuffle=False)
    wrapped = patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True)
    return lambda: mask_gradient_prune_scores(wrapped, loader, None, "logit", "avg_diff", mask_val=0.0)


def hooked_eap() -> Callable[[], object]:
    """Attribution patching of edges with TransformerLens' own hooks: two cached passes, gradients, an einsum."""
    import torch

    model = hooked(True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    clean, corrupt = batch()
    sources = ("hook_embed", "attn.hook_result", "hook_mlp_out")
    targets = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", f"{LAYERS - 1}.hook_resid_post")

    def stacked(cache: dict[str, Any]) -> Any:
        """Nodes ``[B, T, N, d]``."""
        return torch.cat([each if each.dim() == 4 else each.unsqueeze(2) for each in cache.values()], 2)

    def run() -> Any:
        written: list[dict[str, Any]] = [{}, {}]
        gradients: dict[str, Any] = {}

        def keep(into: dict[str, Any]) -> Callable[..., None]:
            return lambda value, hook: into.__setitem__(hook.name, value.detach().clone())

        reads, writes = (lambda name: name.endswith(targets)), (lambda name: name.endswith(sources))
        with torch.no_grad(), model.hooks(fwd_hooks=[(writes, keep(written[1]))]):
            model(corrupt)
        start = [("hook_embed", lambda value, hook: value.requires_grad_())]
        hooks = [*start, (writes, keep(written[0]))]
        with model.hooks(fwd_hooks=hooks, bwd_hooks=[(reads, keep(gradients))]):
            logits = model(clean)
            (logits[:, -1, 3] - logits[:, -1, 4]).sum().backward()
        delta = stacked(written[1]) - stacked(written[0])
        return torch.einsum("btsd,btrd->sr", delta, stacked(gradients)) / ROWS

    return run
