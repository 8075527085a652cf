"""Edge attribution: exact on a linear stack, equal to a plain reference, right for every wiring, without a trace."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_llama import PlainLlama
from tiny_models import make_batch, make_model
from torch import Tensor, nn

from interp_rlhf import HookpointError, MeasurementError, attribute_edges
from interp_rlhf.activations.capturing import first_tensor
from interp_rlhf.activations.engines import measuring
from interp_rlhf.circuits.contraction import Weights, attention_readers, chunk_size, edge_scores, mlp_reader
from interp_rlhf.circuits.passes import Pass, paired_inputs, read_gradients, read_sources
from interp_rlhf.circuits.wiring import Block, find_wiring

SUPPORTED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "phi3"]
SUPPORTED += ["olmo2", "mixtral", "starcoder2", "smollm3", "cohere", "gpt_neo"]
UNSUPPORTED = ["opt", "bloom", "falcon", "granite", "mpt"]


def logit_diff(logits: Tensor, clean_logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def divergence(logits: Tensor, clean_logits: Tensor) -> Tensor:
    now, then = logits[:, -1].log_softmax(-1), clean_logits[:, -1].log_softmax(-1)
    return (then.exp() * (then - now)).sum(-1)


def pair(rows: int = 3, width: int = 6, vocabulary: int = 64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, vocabulary, (rows, width), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2:] = torch.randint(3, vocabulary, (rows, width - 2), generator=generator)
    return {"input_ids": clean}, {"input_ids": corrupt}


# ------------------------------------------------------------------------------------------------- a plain reference


@pytest.mark.parametrize(
    ("method", "steps", "metric"),
    [  # the divergence from the clean run has no gradient at the clean run
        ("eap", 0, logit_diff), ("eap-ig", 1, logit_diff), ("eap-ig", 4, logit_diff),
        ("eap-ig", 1, divergence), ("eap-ig", 4, divergence),
    ],
)  # fmt: skip
def test_scores_equal_a_plain_reference_on_the_stories_model(stories, method: str, steps: int, metric):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    clean, corrupt = pair(vocabulary=512)
    circuit = attribute_edges(model, clean, corrupt, metric, method=method, steps=max(steps, 1))
    expected = PlainLlama.of(model).edge_scores(
        clean["input_ids"],
        corrupt["input_ids"],
        metric,
        steps,
        circuit.sources,
        circuit.targets,
        circuit.graph.possible,
    )
    assert circuit.scores.dtype == torch.float32
    assert not circuit.scores[~circuit.graph.possible].any()
    largest = expected.abs().max()
    assert largest > 1e-4
    assert (circuit.scores - expected).abs().max() <= 1e-5 * largest


def test_exact_patching_equals_a_plain_reference():
    model = make_model("llama", num_hidden_layers=2)
    clean, corrupt = pair()
    circuit = attribute_edges(model, clean, corrupt, logit_diff, method="exact")
    plain = PlainLlama.of(model)
    everything = plain.run_circuit(clean["input_ids"], corrupt["input_ids"], lambda u, v: True)
    for i, j in circuit.graph.possible.nonzero()[::7].tolist():
        edge = (circuit.sources[i], circuit.targets[j])
        logits = plain.run_circuit(clean["input_ids"], corrupt["input_ids"], lambda u, v, edge=edge: (u, v) != edge)
        expected = (logit_diff(logits, logits) - logit_diff(everything, everything)).mean()
        assert abs(circuit.scores[i, j] - expected) < 1e-5, edge


# -------------------------------------------------------------------------------------------------- the linear stack


def linear_stack(model_type: str = "llama") -> Any:
    """Norms that do nothing, attention that looks everywhere alike (q = k = 0), a linear MLP: every edge is linear."""
    model = make_model(model_type, num_hidden_layers=2)
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        if name.endswith(("q_proj", "k_proj")):
            nn.init.zeros_(module.weight)
        if name.endswith(".mlp"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear(module.down_proj.weight[:, :32].detach() * 0.3))
    return model


class Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize(("method", "steps"), [("eap", 1), ("eap-ig", 3)])
def test_attribution_equals_exact_patching_on_a_linear_stack(method: str, steps: int):
    model = linear_stack()
    clean, corrupt = pair()
    found = attribute_edges(model, clean, corrupt, logit_diff, method=method, steps=steps)
    exact = attribute_edges(model, clean, corrupt, logit_diff, method="exact")
    assert exact.scores.abs().max() > 0.01
    assert (found.scores - exact.scores).abs().max() <= 1e-6 * max(1.0, float(exact.scores.abs().max()))


# -------------------------------------------------------------------------------------------------- every architecture


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_heads_sum_to_the_attention_and_components_to_the_stream(model_type: str):
    model = make_model(model_type)
    wiring = find_wiring(model)
    inputs, _ = paired_inputs(make_batch(), make_batch(), wiring.engine.device)
    one = Pass(wiring, inputs)
    caught: dict[int, Tensor] = {}
    ends: list[Tensor] = []
    handles = [
        block.attention_end.register_forward_hook(lambda m, a, o, i=i: caught.update({i: one.flat(o)}))
        for i, block in enumerate(wiring.blocks)
    ]
    handles.append(
        wiring.blocks[-1].layer.register_forward_hook(lambda m, a, o: ends.append(one.flat(first_tensor(o))))
    )
    with measuring(model):
        sources, _ = read_sources(one)
    for handle in handles:
        handle.remove()
    total = sources.embed + sum(sources.mlps)
    for index, block in enumerate(wiring.blocks):
        z = sources.heads[index].unflatten(1, (wiring.graph.n_heads, -1))
        heads = torch.einsum("nhk,hkd->nhd", z, block.output_weight())
        bias = caught[index] - heads.sum(1)
        own = getattr(block.output, "bias", None)
        if own is None:
            assert bias.abs().max() < 1e-5
        elif block.attention_post is None:
            assert (bias - own.detach()).abs().max() < 1e-5
        total = total + caught[index]
    assert (total - ends[0]).abs().max() < 1e-5 * ends[0].abs().max().clamp(min=1)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_head_gradients_equal_an_explicit_replication_of_the_stream(model_type: str):
    """Each head gets a copy of the stream of its own, and autograd goes through the model's own modules."""
    model = make_model(model_type)
    wiring = find_wiring(model)
    inputs, _ = paired_inputs(make_batch(), make_batch(), wiring.engine.device)
    metric = lambda logits: logit_diff(logits, logits)  # noqa: E731
    weights = Weights(wiring, 2**30)
    with measuring(model):
        found = read_gradients(Pass(wiring, inputs), metric)
        for index, block in enumerate(wiring.blocks):
            expected = replicated(wiring, inputs, index, metric)
            norm = block.attention_norm
            mine = attention_readers(norm, [found.layers[index]], weights[index].readers, slice(None))
            assert (mine - expected["heads"]).abs().max() <= 1e-5 * expected["heads"].abs().max(), index
            mlp = mlp_reader(block, [found.layers[index]], slice(None))
            assert (mlp - expected["mlp"]).abs().max() <= 1e-5 * expected["mlp"].abs().max(), index


def replicated(wiring, inputs: dict[str, Tensor], index: int, metric: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients at copies of the stream: each head's, ``[H + 2G, N, d]``, and the MLP's ``[N, d]``."""
    block, mask = wiring.blocks[index], inputs["attention_mask"].bool()
    norms = [m for m in block.layer.children() if hasattr(m, "eps") or hasattr(m, "variance_epsilon")]
    copies: dict[str, list[Tensor]] = {"heads": [], "mlp": []}
    streams: dict[str, Tensor] = {}
    handles = []

    def remember(name: str):
        def hook(module, args, kwargs):
            streams[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def through(given: Tensor, stream: Tensor, copied: Tensor) -> Tensor:
        """The reader's input computed from the copy, by whichever norm gives what the model gave it."""
        for norm in norms:
            if torch.allclose(norm.forward(stream), given, atol=1e-6):
                return norm.forward(copied)
        assert torch.allclose(stream, given, atol=1e-6)
        return copied

    def project(roles):
        def hook(module, args, output):
            rows = output.clone()
            for role in roles:
                for columns in role.columns:
                    copies["heads"].append(torch.zeros_like(streams["x"], requires_grad=True))
                    copied = streams["x"] + copies["heads"][-1]
                    rows[..., columns] = module.forward(through(args[0], streams["x"], copied))[..., columns]
            return rows

        return hook

    def mlp(module, args, kwargs):
        given = args[0] if args else kwargs["hidden_states"]
        name = "x" if wiring.graph.parallel else "x_mlp"
        if name == "x_mlp" and block.mlp_reader is None:
            streams[name] = given
        copies["mlp"].append(torch.zeros_like(given, requires_grad=True))
        new = through(given, streams[name], streams[name] + copies["mlp"][-1])
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    handles.append(block.layer.register_forward_pre_hook(remember("x"), with_kwargs=True))
    if block.mlp_reader is not None:
        handles.append(block.mlp_reader.register_forward_pre_hook(remember("x_mlp"), with_kwargs=True))
    roles = (block.q, block.k, block.v)
    for module in dict.fromkeys(role.module for role in roles):
        mine = [role for role in roles if role.module is module]
        handles.append(module.register_forward_hook(project(mine)))
    handles.append(block.mlp.register_forward_pre_hook(mlp, with_kwargs=True))
    try:
        with torch.enable_grad():
            values = metric(Pass(wiring, inputs).run())
            gradients = torch.autograd.grad(values.sum(), [*copies["heads"], *copies["mlp"]])
    finally:
        for handle in handles:
            handle.remove()
    return {"heads": torch.stack([g[mask] for g in gradients[:-1]]), "mlp": gradients[-1][mask]}


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_an_architecture_that_is_no_such_sum_is_refused(model_type: str):
    with pytest.raises(HookpointError, match=r"layers\.0"):
        find_wiring(make_model(model_type))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3"])
def test_padding_and_the_order_of_rows_change_nothing(model_type: str):
    model = make_model(model_type)
    clean = make_batch(side="left")
    corrupt = {**clean, "input_ids": make_batch(side="left", seed=5)["input_ids"]}
    whole = attribute_edges(model, clean, corrupt, logit_diff)
    single = [
        attribute_edges(
            model,
            *(
                {"input_ids": each["input_ids"][row : row + 1, clean["attention_mask"][row].bool()]}
                for each in (clean, corrupt)
            ),
            logit_diff,
        ).scores
        for row in range(3)
    ]
    expected = torch.stack(single).mean(0)
    assert (whole.scores - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_memory_bounds_the_chunks_and_changes_nothing(method: str):
    model = make_model("llama", hidden_size=64, num_attention_heads=8)
    clean, corrupt = pair(rows=8, width=40)
    circuit = attribute_edges(model, clean, corrupt, logit_diff, method=method)
    small = attribute_edges(model, clean, corrupt, logit_diff, method=method, memory=1)
    assert (circuit.scores - small.scores).abs().max() <= 5e-6 * circuit.scores.abs().max()
    with pytest.raises(MeasurementError, match=r"memory: expected at least 1 MiB for this model, found 0$"):
        attribute_edges(model, clean, corrupt, logit_diff, method=method, memory=0)


@pytest.mark.parametrize(("mebibytes", "most"), [(1, 1), (3, 2), (512, 7)])
def test_passes_wait_for_each_other_as_memory_allows(mebibytes: int, most: int, monkeypatch: pytest.MonkeyPatch):
    model = make_model("llama", hidden_size=64, num_attention_heads=8)
    clean, corrupt = pair(rows=8, width=40)
    together: list[int] = []

    def watched(deltas: Any, found: Any, wiring: Any, weights: Any, memory: int) -> Tensor:
        together.append(len(found))
        _, left = chunk_size(wiring, weights, memory)
        assert sum(one.bytes for one in found[1:]) <= left or len(found) == 1
        return edge_scores(deltas, found, wiring, weights, memory)

    monkeypatch.setattr("interp_rlhf.circuits.attribution.edge_scores", watched)
    attribute_edges(model, clean, corrupt, logit_diff, method="eap-ig", steps=7, memory=mebibytes)
    assert sum(together) == 7 and max(together) == most


@pytest.mark.parametrize("mebibytes", [0, 512])
def test_exact_patching_keeps_weights_only_as_memory_allows(mebibytes: int, monkeypatch: pytest.MonkeyPatch):
    model = make_model("llama")
    clean, corrupt = pair()
    made: list[int] = []
    weight = Block.output_weight
    monkeypatch.setattr(Block, "output_weight", lambda block: made.append(1) or weight(block))
    attribute_edges(model, clean, corrupt, logit_diff, method="exact", memory=mebibytes)
    assert (len(made) <= 2 * model.config.num_hidden_layers) == bool(mebibytes)


@pytest.mark.parametrize("ablation", ["patching", "mean", "zero"])
def test_ablations_agree_with_exact_patching_on_the_linear_stack(ablation: str):
    model = linear_stack()
    clean, corrupt = pair()
    options: dict[str, Any] = {"ablation": ablation}
    found = attribute_edges(model, clean, corrupt, logit_diff, **options)
    exact = attribute_edges(model, clean, corrupt, logit_diff, method="exact", **options)
    assert exact.scores.abs().max() > 0.01
    assert (found.scores - exact.scores).abs().max() <= 2e-6 * exact.scores.abs().max().clamp(min=1)


def test_a_lora_adapter_counts_as_merged():
    from peft import LoraConfig, get_peft_model

    model = make_model("llama")
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    clean, corrupt = pair()
    found = attribute_edges(adapted, clean, corrupt, logit_diff)
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = attribute_edges(merged, clean, corrupt, logit_diff)
    base = attribute_edges(model, clean, corrupt, logit_diff)
    assert (found.scores - expected.scores).abs().max() <= 1e-5 * expected.scores.abs().max()
    assert (base.scores - expected.scores).abs().max() > 1e-2 * expected.scores.abs().max()


def test_a_metric_can_read_a_layer_and_later_layers_are_not_run():
    model = make_model("llama")
    clean, corrupt = pair()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    calls: list[int] = []
    handle = model.model.layers[2].register_forward_hook(lambda m, a, o: calls.append(1))
    circuit = attribute_edges(
        model, clean, corrupt, lambda h, clean_h: h[:, -1] @ direction, reads="layers.1.resid_post"
    )
    handle.remove()
    assert len(calls) == 1  # the pass on which the wiring is traced
    inside = [name.startswith(("embed", "a0.", "a1.", "m0", "m1")) for name in circuit.sources]
    written = circuit.scores[:, circuit.targets.index("logits")]
    assert written[torch.tensor(inside)].abs().min() > 0
    assert not circuit.scores[~torch.tensor(inside)].any()
    with measuring(model):
        wiring = find_wiring(model)
        found = [read_sources(Pass(wiring, each))[0] for each in paired_inputs(clean, corrupt, torch.device("cpu"))]
    delta = (found[1].mlps[1] - found[0].mlps[1]).view(3, 6, 32)[:, -1] @ direction
    assert written[circuit.sources.index("m1")] == pytest.approx(float(delta.mean()), abs=1e-5)


# ------------------------------------------------------------------------------------------------- traces and bad input


@pytest.mark.parametrize("method", ["eap", "eap-ig", "exact"])
def test_nothing_is_left_behind(method: str):
    model = make_model("llama", num_hidden_layers=1).train()
    clean, corrupt = pair()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    attribute_edges(model, clean, corrupt, logit_diff, method=method)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda now, then: now[:, -1, 0] * float("nan"), "row 0: expected finite values, found nan"),
        (lambda now, then: now.mean(), r"shape \[3\], one value per row; found shape \[\]"),
        (lambda now, then: now[:, -1, :2], r"shape \[3\].*found shape \[3, 2\]"),
        (lambda now, then: 1.0, r"shape \[3\].*found float"),
        (lambda now, then: now[:, -1].argmax(-1), r"shape \[3\].*int64"),
        (lambda now, then: now[:, -1, 0].detach(), "do not depend on what it reads"),
        (lambda now, then: now[:, -1, 0] - then.mul_(0.5)[:, -1, 0], "written into in place"),
        (lambda now, then: now.sub_(now.mean())[:, -1, 0], "written into in place"),
    ],
)
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_a_bad_metric_is_named(metric, words: str, method: str):
    clean, corrupt = pair()
    with pytest.raises(MeasurementError, match=words):
        attribute_edges(make_model("llama"), clean, corrupt, metric, method=method)


def test_bad_inputs_are_named():
    model = make_model("llama")
    clean, corrupt = pair()
    longer = {"input_ids": torch.ones(3, 7, dtype=torch.long)}
    mask = torch.ones(3, 6, dtype=torch.long)
    shorter = {**corrupt, "attention_mask": mask.index_fill(1, torch.tensor([5]), 0)}
    for bad, words in [
        (longer, "expected shape [3, 6] like clean, found [3, 7]"),
        (shorter, "row 0: expected the same tokens to be padding as in clean (6 tokens), found 5 tokens"),
        ({**corrupt, "labels": mask}, "expected input_ids and attention_mask, found input_ids, labels"),
    ]:
        with pytest.raises(MeasurementError, match=re.escape(words)):
            attribute_edges(model, clean, bad, logit_diff)
    with pytest.raises(MeasurementError, match="'acdc'"):
        attribute_edges(model, clean, corrupt, logit_diff, method="acdc")  # pyrefly: ignore


# ------------------------------------------------------------------------------------------ what the wiring is sure of


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 1.5}, "steps of at least 1; found 'eap', 'patching', 1.5"),
        ({"metric": None}, "a metric to call"),
        ({"memory": float("nan")}, "a memory of MiB"),
        ({"clean": {"input_ids": [[3, 4]]}}, "clean: input_ids: expected a tensor, found list"),
        ({"clean": {"input_ids": torch.full((3, 6), 64)}}, "clean: input_ids: expected ids below 64, the model's"),
        (
            {"clean": {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)}},
            "clean: row 0: expected a token that is no padding",
        ),
    ],
)
def test_arguments_that_cannot_be_are_named(changes: dict[str, Any], words: str):
    clean, corrupt = pair()
    with pytest.raises(MeasurementError, match=words):
        attribute_edges(make_model("llama"), **({"clean": clean, "corrupt": corrupt, "metric": logit_diff} | changes))


def test_a_hook_that_changes_a_projection_or_a_norm_is_refused():
    clean, corrupt = pair()
    for place in ("self_attn.v_proj", "self_attn.o_proj", "input_layernorm"):
        model = make_model("llama")
        model.model.layers[1].get_submodule(place).register_forward_hook(lambda m, a, o: 3 * o)
        with pytest.raises(HookpointError, match="found another one: is there a hook"):
            attribute_edges(model, clean, corrupt, logit_diff)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_branches_are_refused_in_any_precision(dtype: torch.dtype):
    with pytest.raises(HookpointError, match=r"layers\.0"):
        find_wiring(make_model("granite").to(dtype))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_give_the_same_scores_up_to_rounding(model_type: str, dtype: torch.dtype):
    model = make_model(model_type)
    clean, corrupt = pair()
    expected = attribute_edges(model, clean, corrupt, logit_diff).scores
    found = attribute_edges(model.to(dtype), clean, corrupt, logit_diff).scores
    assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float64 else 0.1) * expected.abs().max()


def test_an_adapter_on_a_projection_with_a_large_bias_loses_no_weight_in_bf16():
    from peft import LoraConfig, get_peft_model

    model = make_model("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.mul_(300)
    model = model.to(torch.bfloat16)
    clean, corrupt = pair()
    expected = attribute_edges(model, clean, corrupt, logit_diff).scores
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"]))  # B = 0: the same function
    found = attribute_edges(adapted, clean, corrupt, logit_diff).scores
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_norms_that_an_adapter_trains_are_read_as_trained():
    from peft import LoraConfig, get_peft_model

    model = make_model("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm", "model.norm"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    clean, corrupt = pair()
    found = attribute_edges(adapted, clean, corrupt, logit_diff).scores
    expected = attribute_edges(adapted.merge_and_unload(), clean, corrupt, logit_diff).scores
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_inference_mode_around_the_call_changes_nothing():
    model = make_model("llama")
    clean, corrupt = pair()
    expected = attribute_edges(model, clean, corrupt, logit_diff).scores
    with torch.inference_mode():
        inside = [{"input_ids": each["input_ids"] + 0} for each in (clean, corrupt)]
        assert torch.equal(attribute_edges(model, *inside, logit_diff).scores, expected)
