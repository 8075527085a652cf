"""Chunks of tokens: the memory that they take is bounded, and they add up to what one einsum over everything gives."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model
from torch import Tensor

from interp_rlhf.activations.engines import measuring
from interp_rlhf.circuits.contraction import Weights, attention_readers, chunk_size, edge_scores, mlp_reader
from interp_rlhf.circuits.passes import GradientPass, Pass, Sources, paired_inputs, read_gradients, written_on
from interp_rlhf.circuits.wiring import Wiring, find_wiring
from scripts.memory_meter import MemoryMeter


def passes(model_type: str, rows: int, width: int, **changes: int) -> tuple[Wiring, Sources, GradientPass]:
    model = make_model(model_type, **changes)
    wiring = find_wiring(model)
    ids = torch.randint(3, 64, (2, rows, width), generator=torch.Generator().manual_seed(0))
    clean, corrupt = paired_inputs({"input_ids": ids[0]}, {"input_ids": ids[1]}, torch.device("cpu"))
    with measuring(model):
        found = read_gradients(Pass(wiring, clean), lambda now: now[:, -1, 3] - now[:, -1, 4], sources=True)
        deltas = written_on(wiring, corrupt).minus(found.sources)  # pyrefly: ignore
    return wiring, deltas, found


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2", "gpt2"])
def test_scores_equal_one_product_over_all_tokens(model_type: str):
    wiring, deltas, found = passes(model_type, 5, 40)
    weights, everything = Weights(wiring, 2**30), slice(None)
    written: list[Tensor] = [deltas.embed]
    read: list[Tensor] = []
    for layer, block in enumerate(wiring.blocks):
        gradients = found.layers[layer]
        read += attention_readers(block.attention_norm, [gradients], weights[layer].readers, everything)
        z = deltas.heads[layer].unflatten(1, (wiring.graph.n_heads, -1))
        written += torch.einsum("nhk,hkd->hnd", z, weights[layer].output)
        read.append(mlp_reader(block, [gradients], everything))
        written.append(deltas.mlps[layer])
    read.append(found.end)
    expected = torch.einsum("snd,tnd->st", torch.stack(written).double(), torch.stack(read).double())
    expected = torch.where(wiring.graph.possible, expected, 0.0)
    scores = edge_scores(deltas, [found], wiring, weights, 2**30)
    assert chunk_size(wiring, weights, 2**30)[0] < 5 * 40
    assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("mebibytes", [1, 2, 4])
def test_chunks_and_weights_stay_within_the_memory_they_may_take(mebibytes: int):
    wiring, deltas, found = passes("llama", 8, 64, hidden_size=128, num_attention_heads=8, num_key_value_heads=4)
    memory = mebibytes * 2**20
    with MemoryMeter() as meter:
        edge_scores(deltas, [found], wiring, Weights(wiring, memory), memory)
    assert meter.peak <= memory
    assert meter.peak >= memory // 8  # what may be had is used, and the meter sees it


def test_the_meter_counts_storages_once_and_forgets_the_dead():
    with MemoryMeter() as meter:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        c = b + 1
        assert meter.live == 8000
        del a, b
        assert meter.live == 4000
        del c
    assert (meter.live, meter.peak) == (0, 8000)
