"""Running the model as a circuit: all edges are the clean run, none the corrupt one, others a plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_llama import PlainLlama
from tiny_models import make_batch, make_model
from torch import Tensor

from interp_rlhf import MeasurementError
from interp_rlhf.activations.engines import measuring
from interp_rlhf.circuits.faithfulness import faithfulness_curve, random_circuits
from interp_rlhf.circuits.graph import Circuit, Graph
from interp_rlhf.circuits.interventions import Intervention
from interp_rlhf.circuits.passes import paired_inputs
from interp_rlhf.circuits.wiring import find_wiring

ARCHITECTURES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "phi3", "olmo2"]


def metric(logits: Tensor, clean_logits: Tensor) -> Tensor:
    return (logits[:, 3:5, 5] - logits[:, 3:5, 7]).mean(1)


def make(model: Any, **options: Any) -> Intervention:
    clean = make_batch(side="right")
    corrupt = {**clean, "input_ids": make_batch(side="right", seed=5)["input_ids"]}
    wiring = find_wiring(model)
    with measuring(model):
        return Intervention(wiring, paired_inputs(clean, corrupt, torch.device("cpu")), metric, **options)


def some(run: Intervention, share: float, seed: int = 0) -> Tensor:
    possible = run.graph.possible
    return possible & (torch.rand(possible.shape, generator=torch.Generator().manual_seed(seed)) < share)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_edges_are_the_clean_run_and_none_the_corrupt_one(model_type: str):
    model = make_model(model_type)
    run = make(model)
    clean = make_batch(side="right")
    expected = []
    for seed in (1, 5):
        inputs = {**clean, "input_ids": make_batch(side="right", seed=seed)["input_ids"]}
        with torch.no_grad():
            expected.append(metric(model(**inputs).logits, None))  # pyrefly: ignore
    with measuring(model):
        everything = run(run.graph.possible)
    assert (expected[0] - expected[1]).abs().min() > 1e-3
    assert torch.allclose(everything, expected[0], atol=1e-5)
    assert torch.allclose(run.clean, expected[0], atol=1e-5)
    assert torch.allclose(run.corrupt, expected[1], atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_circuit_equals_a_plain_reference(share: float):
    model = make_model("llama")
    run, plain = make(model), PlainLlama.of(model)
    selected = some(run, share)
    with measuring(model):
        found = run(selected)
    kept = {(run.graph.sources[i], run.graph.targets[j]) for i, j in selected.nonzero().tolist()}
    ids = [make_batch(side="right", seed=seed)["input_ids"] for seed in (1, 5)]
    logits = plain.run_circuit(*ids, lambda source, target: (source, target) in kept)
    assert torch.allclose(found.double(), metric(logits, logits), atol=1e-5)
    assert (found - run.clean).abs().min() > 1e-3


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_corrupted_node_equals_patching_its_output(model_type: str):
    """Activation patching by hooks of its own: the MLP's output replaced by that of the corrupt run."""
    model = make_model(model_type)
    run = make(model)
    block = find_wiring(model).blocks[1]
    clean = make_batch(side="right")
    kept: list[Tensor] = []
    handle = block.mlp_end.register_forward_hook(lambda m, a, o: kept.append(o))
    with torch.no_grad():
        model(**{**clean, "input_ids": make_batch(side="right", seed=5)["input_ids"]})
    handle.remove()
    handle = block.mlp_end.register_forward_hook(lambda m, a, o: kept[0])
    with torch.no_grad():
        expected = metric(model(**clean).logits, None)  # pyrefly: ignore
    handle.remove()
    with measuring(model):
        assert torch.allclose(run.node("m1"), expected, atol=1e-5)
        assert (run.node("m1") - run.clean).abs().max() > 1e-3
    with pytest.raises(MeasurementError, match="no component 'm9'"):
        run.node("m9")


def test_ablations_differ_and_zero_writes_nothing():
    model = make_model("llama")
    found = {}
    for ablation in ("patching", "mean", "zero"):
        run = make(model, ablation=ablation)
        with measuring(model):
            found[ablation] = run.node("m1")
    handle = model.model.layers[1].mlp.register_forward_hook(lambda m, a, o: torch.zeros_like(o))
    with torch.no_grad():
        expected = metric(model(**make_batch(side="right")).logits, None)  # pyrefly: ignore
    handle.remove()
    assert torch.allclose(found["zero"], expected, atol=1e-5)
    assert len({round(float(values.sum()), 4) for values in found.values()}) == 3


def test_a_circuit_of_another_model_is_refused():
    run = make(make_model("llama"))
    with pytest.raises(MeasurementError, match=r"expected a selection of shape \[16, 28\].*found \[3, 3\]"):
        run(torch.ones(3, 3, dtype=torch.bool))


def test_a_circuit_is_run_by_its_selection_on_its_own_model_only():
    run, other = make(make_model("llama")), make(make_model("qwen3"))
    circuit = Circuit(run.graph, torch.where(run.graph.possible, 1.0, 0.0))
    with pytest.raises(MeasurementError, match="nothing is selected"):
        run(circuit)
    with measuring(make_model("llama")):
        assert torch.equal(run(circuit.top(20)), run(circuit.top(20).selected))  # pyrefly: ignore
    with pytest.raises(MeasurementError, match=r"one of Qwen3ForCausalLM with 3 layers .* one of LlamaForCausalLM"):
        other(circuit.top(20))


def test_the_faithfulness_curve_ends_at_one_and_areas_are_trapezoids():
    model = make_model("llama")
    run = make(model)
    scores = torch.where(run.graph.possible, torch.randn(run.graph.possible.shape), 0.0)
    circuit = Circuit(run.graph, scores)
    with measuring(model):
        curve = faithfulness_curve(run, circuit, run.clean, run.corrupt, shares=(0.1, 0.5, 1.0))
    assert curve.faithfulness[-1] == pytest.approx(1.0, abs=1e-4)
    assert curve.shares[-1] == 1.0
    x, y = [0.0, *curve.shares], [0.0, *curve.faithfulness]
    steps = list(zip(x, x[1:], y, y[1:], strict=False))
    assert curve.cpr == pytest.approx(sum((b - a) * (c + d) / 2 for a, b, c, d in steps))
    assert curve.cmd == pytest.approx(sum((b - a) * (abs(1 - c) + abs(1 - d)) / 2 for a, b, c, d in steps))


@pytest.mark.parametrize(
    ("full", "shares", "words"),
    [
        (0.0, (0.5,), r"M\(full\) − M\(∅\) is 0,"),
        (float("nan"), (0.5,), r"M\(full\) − M\(∅\) is nan"),
        (1.0, (), "increasing ones"),
        (1.0, (0.5, 0.1), "increasing ones"),
        (1.0, (0.0, 0.1), "increasing ones"),
        (1.0, (0.5, 1.5), "increasing ones"),
        (1.0, (0.5, float("nan")), "increasing ones"),
    ],
)
def test_a_curve_of_nothing_is_refused(full: float, shares: tuple[float, ...], words: str):
    graph = Graph(1, 2, 1, False, "M")
    circuit = Circuit(graph, torch.zeros(graph.possible.shape))
    with pytest.raises(MeasurementError, match=words):
        faithfulness_curve(lambda _: torch.ones(2), circuit, torch.full((2,), full), torch.zeros(2), shares=shares)


def test_random_circuits_have_the_size_and_are_possible():
    graph = make(make_model("llama")).graph
    drawn = random_circuits(graph, 17, 50, seed=0)
    assert all(int(one.sum()) == 17 and not (one & ~graph.possible).any() for one in drawn)
    assert len({one.numpy().tobytes() for one in drawn}) == 50
    used = torch.stack(drawn).float().mean(0)[graph.possible]
    assert used.mean() == pytest.approx(17 / graph.size)
    assert used.max() < 0.35
