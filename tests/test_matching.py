"""Nodes are matched by what they output: exact permutations come back, ties stay, circuits move with their nodes."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from shape_checked import checked
from tiny_models import make_model

from interp_rlhf.circuits.graph import Graph
from interp_rlhf.errors import MeasurementError

plain = importlib.import_module("interp_rlhf.circuits.matching")
matching = checked("interp_rlhf.circuits.matching")


def graph(n_layers: int = 3, n_heads: int = 4, n_kv_heads: int = 2) -> Graph:
    return Graph(n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, parallel=False, architecture="llama")


def outputs(seed: int, n: int, p: int = 6, k: int = 5) -> torch.Tensor:
    return torch.randn(n, p, k, generator=torch.Generator().manual_seed(seed))


def permutation(seed: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------------- nodes


@pytest.mark.parametrize("seed", range(4))
def test_exact_permutations_come_back(seed: int) -> None:
    start, order = outputs(seed, 12), permutation(seed, 12)
    now = torch.empty_like(start)
    now[order] = start  # node i is found at order[i]
    assert matching.match_nodes(start, now).tolist() == order.tolist()
    moved = now * torch.linspace(0.2, 5, 12)[:, None, None] + 7 * outputs(9, 12, 1)  # other scales and constants
    assert matching.match_nodes(start, moved).tolist() == order.tolist()
    assert matching.match_nodes(start, now + 0.1 * outputs(seed + 50, 12)).tolist() == order.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_assignment_is_the_best_of_all(seed: int) -> None:
    """By brute force over all permutations, with NumPy's cosines of centred outputs."""
    a, b = outputs(seed, 6), outputs(seed + 10, 6) + 0.1 * outputs(seed, 6)
    x, y = ((o - o.mean(1, keepdim=True)).flatten(1).numpy().astype(float) for o in (a, b))
    cosine = (x @ y.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
    best = max(itertools.permutations(range(6)), key=lambda to: sum(cosine[i, j] for i, j in enumerate(to)))
    assert tuple(matching.match_nodes(a, b).tolist()) == best
    assert best != tuple(range(6))


def test_nodes_that_are_alike_stay_where_they_are() -> None:
    start = outputs(0, 9)
    start[[2, 5]] = start[1].clone()  # three of one
    start[[3, 7]] = 0  # two dead, and one that is the same on every prompt
    start[8] = torch.arange(5.0)
    assert matching.match_nodes(start, start).tolist() == list(range(9))
    order = torch.tensor([4, 1, 2, 3, 0, 5, 6, 7, 8])  # two others change places
    assert matching.match_nodes(start, start[order]).tolist() == order.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_rounding_does_not_move_nodes_that_are_alike(seed: int) -> None:
    """Six copies of one output and four constants, each read twice with float32 rounding of its own."""
    exact = torch.cat([outputs(seed, 1).expand(6, 6, 5), outputs(seed, 4, 1).expand(4, 6, 5)])
    start, now = (exact * (1 + 3e-7 * outputs(seed + i, 10)) for i in (20, 40))
    assert not torch.equal(start[0], start[1]) and not torch.equal(start[6], exact[6])
    assert matching.match_nodes(start, now).tolist() == list(range(10))


def test_dead_nodes_are_matched_with_dead_ones() -> None:
    start = outputs(1, 6)
    start[0] = 0
    now = start[[5, 1, 2, 3, 4, 0]]
    now[0] = 1.7 * outputs(7, 1)[0] - start[5]  # a live one turned round, less like itself than like a dead one
    assert matching.match_nodes(start, now).tolist() == [5, 1, 2, 3, 4, 0]
    assert matching.match_nodes(torch.zeros(4, 3, 2), torch.zeros(4, 3, 2)).tolist() == [0, 1, 2, 3]


def test_multiples_of_one_output_are_told_apart_by_scale() -> None:
    start = outputs(2, 1) * torch.tensor([1.0, 2.0, 4.0, 0.5])[:, None, None]
    assert matching.match_nodes(start, start[[1, 2, 3, 0]]).tolist() == [3, 0, 1, 2]


def test_models_with_other_numbers_of_nodes() -> None:
    start, order = outputs(3, 5), permutation(3, 8)
    now = torch.cat([start, outputs(4, 3)])[order]
    there = {int(node): place for place, node in enumerate(order)}
    assert matching.match_nodes(start, now).tolist() == [there[i] for i in range(5)]
    back = matching.match_nodes(now, start).tolist()
    assert back == [int(node) if node < 5 else -1 for node in order]


@pytest.mark.parametrize(
    ("bad", "found"),
    [((3, 4, 5), "(3, 6, 5)"), ((3, 6, 4), "(3, 6, 4)"), ((3, 6), "(3, 6)"), ((0, 6, 5), "(0, 6, 5)")],
)
def test_outputs_of_other_prompts_or_widths_are_refused(bad: tuple[int, ...], found: str) -> None:
    with pytest.raises(MeasurementError, match=f"expected outputs.*{re.escape(found)}"):
        plain.match_nodes(outputs(0, 3), torch.zeros(bad))


def test_a_single_prompt_and_nan_are_refused() -> None:
    with pytest.raises(MeasurementError, match="2 or more prompts"):
        plain.match_nodes(torch.ones(3, 1, 2), torch.ones(3, 1, 2))
    with pytest.raises(MeasurementError, match="finite outputs"):
        plain.match_nodes(torch.ones(3, 2, 2), torch.full((3, 2, 2), math.nan))


# ----------------------------------------------------------------------------------------------------- groups, circuits


def renamed(name: str, heads: list[int], groups: list[int], mlps: list[int], g: Graph) -> str:
    """Where a node goes, by its name alone."""
    head = re.fullmatch(r"a(\d+)\.h(\d+)(\.[qkv])?", name)
    if head:
        width, to = (g.n_kv_heads, groups) if head[3] in (".k", ".v") else (g.n_heads, heads)
        place = to[int(head[1]) * width + int(head[2])]
        return f"a{place // width}.h{place % width}{head[3] or ''}"
    mlp = re.fullmatch(r"m(\d+)", name)
    return f"m{mlps[int(mlp[1])]}" if mlp else name


def by_name(selected: torch.Tensor, g: Graph, *places: list[int]) -> torch.Tensor:
    mapped = torch.zeros_like(selected)
    for s, t in selected.nonzero().tolist():
        names = renamed(g.sources[s], *places, g), renamed(g.targets[t], *places, g)
        if names[0] in g.sources and names[1] in g.targets:
            place = g.sources.index(names[0]), g.targets.index(names[1])
            mapped[place] = g.possible[place]
    return mapped


def within_layers(seed: int, g: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    """Key-value heads permuted within each layer, their query heads with them and among themselves."""
    each = g.n_heads // g.n_kv_heads
    heads, groups = [], []
    for layer in range(g.n_layers):
        to = permutation(seed + layer, g.n_kv_heads)
        groups.append(layer * g.n_kv_heads + to)
        for group in range(g.n_kv_heads):
            heads.append(layer * g.n_heads + to[group] * each + permutation(seed + 31 * layer + group, each))
    return torch.cat(heads), torch.cat(groups)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_groups_and_circuits_move_with_their_heads(kv_heads: int) -> None:
    g = graph(n_kv_heads=kv_heads)
    heads, groups = within_layers(5, g)
    start, mlps = outputs(0, 12), outputs(1, 3)
    now = torch.empty_like(start)
    now[heads] = start
    found = matching.NodeMatching.of_outputs(g, start, now, mlps, mlps)
    assert (found.heads.tolist(), found.groups.tolist()) == (heads.tolist(), groups.tolist())
    assert found.mlps.tolist() == [0, 1, 2]
    selected = g.possible & (torch.rand(g.possible.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    mapped, dropped = found.map_edges(selected, g)
    assert dropped == 0 and mapped.sum() == selected.sum() > 20
    assert torch.equal(mapped, by_name(selected, g, heads.tolist(), groups.tolist(), [0, 1, 2]))
    assert kv_heads == 1 or not torch.equal(mapped, selected)
    everything, none = found.map_edges(g.possible, g)
    assert torch.equal(everything, g.possible) and none == 0


def test_edges_that_became_impossible_are_dropped_and_counted() -> None:
    g = graph()
    heads, groups, mlps = permutation(1, 12).tolist(), permutation(2, 6).tolist(), [2, 0, 1]
    found = matching.NodeMatching(*(torch.tensor(places) for places in (heads, groups, mlps)))
    selected = g.possible & (torch.rand(g.possible.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    mapped, dropped = found.map_edges(selected, g)
    expected = by_name(selected, g, heads, groups, mlps)
    assert torch.equal(mapped, expected)
    assert dropped == int(selected.sum()) - int(expected.sum()) > 0
    assert bool((mapped <= g.possible).all())


def test_nodes_without_a_match_lose_their_edges() -> None:
    g = graph()
    same = matching.NodeMatching(torch.arange(12), torch.arange(6), torch.arange(3))
    none = matching.NodeMatching(torch.full((12,), -1), torch.arange(6), torch.arange(3))
    kept, dropped = same.map_edges(g.possible, g)
    assert torch.equal(kept, g.possible) and dropped == 0
    selected = g.possible & (torch.rand(g.possible.shape, generator=torch.Generator().manual_seed(2)) < 0.3)
    kept, dropped = none.map_edges(selected, g)
    lost = torch.tensor([".h" in name for name in g.sources])[:, None]
    lost = lost | torch.tensor([name.endswith(".q") for name in g.targets])
    assert torch.equal(kept, selected & ~lost)
    assert dropped == int((selected & lost).sum()) > 0


def test_groups_go_where_most_of_their_query_heads_went_and_one_to_one() -> None:
    g = graph(n_layers=2, n_heads=6, n_kv_heads=2)
    start, mlps = outputs(0, 12), outputs(1, 2)

    def groups(order: list[int]) -> list[int]:
        now = torch.empty_like(start)
        now[torch.tensor(order)] = start
        return matching.NodeMatching.of_outputs(g, start, now, mlps, mlps).groups.tolist()

    assert groups([3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11]) == [1, 0, 2, 3]
    assert groups([0, 1, 3, 2, 4, 5, 6, 7, 8, 9, 10, 11]) == [0, 1, 2, 3]
    assert groups([6, 7, 0, 3, 4, 5, 1, 2, 8, 9, 10, 11]) == [2, 1, 0, 3]
    split = groups([0, 3, 6, 1, 4, 7, 2, 5, 8, 9, 10, 11])  # a head of each of three groups in each: ties stay
    assert split == [0, 1, 2, 3]
    # 3, 1, 0, 2 keeps as many query heads with their group, but moves one group more
    assert groups([10, 9, 1, 6, 4, 11, 3, 7, 2, 0, 8, 5]) == [3, 1, 2, 0]


def test_a_circuit_or_outputs_of_another_model_are_refused() -> None:
    g = graph()
    same = plain.NodeMatching(torch.arange(12), torch.arange(6), torch.arange(3))
    with pytest.raises(MeasurementError, match=r"edges of the graph .*, found \(2, 2\)"):
        same.map_edges(torch.ones(2, 2, dtype=torch.bool), g)
    with pytest.raises(MeasurementError, match="expected a selection among"):
        same.map_edges(torch.ones_like(g.possible), g)
    for heads, groups, mlps in ((8, 6, 3), (12, 3, 3), (12, 6, 2)):
        other = plain.NodeMatching(torch.arange(heads), torch.arange(groups), torch.arange(mlps))
        with pytest.raises(MeasurementError, match=f"of {heads} heads, {groups} key-value heads and {mlps} MLPs"):
            other.map_edges(g.possible, g)
    for counts in ((8, 12, 3, 3), (12, 12, 3, 2)):
        with pytest.raises(MeasurementError, match=r"expected (12|3) on both sides"):
            plain.NodeMatching.of_outputs(g, *(outputs(0, n) for n in counts))


# --------------------------------------------------------------------------------------------------------- live model


def head_outputs(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What every head ``[L·H, p, d]`` and every MLP ``[L, p, d]`` adds to the residual stream of a Llama."""
    read: dict[str, list[torch.Tensor]] = {"heads": [], "mlps": []}
    handles = []
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj

        def take(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            parts = args[0].unflatten(-1, (4, -1)), module.weight.unflatten(1, (4, -1))
            read["heads"] += list(torch.einsum("bthk,dhk->hbtd", *parts).flatten(1, 2))

        handles.append(projection.register_forward_pre_hook(take))
        handles.append(layer.mlp.register_forward_hook(lambda _m, _a, out: read["mlps"].append(out.flatten(0, 1))))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return torch.stack(read["heads"]), torch.stack(read["mlps"])


def test_heads_of_a_live_model_with_grouped_queries_are_found_again() -> None:
    start = make_model("llama")
    now, g = copy.deepcopy(start), graph()
    heads, groups = within_layers(3, g)
    assert heads.tolist() != list(range(12)) and groups.tolist() != list(range(6))
    with torch.no_grad():
        for i, (old, new) in enumerate(zip(start.model.layers, now.model.layers, strict=True)):
            to_heads, to_groups = heads[4 * i : 4 * i + 4] - 4 * i, groups[2 * i : 2 * i + 2] - 2 * i
            for name, to, dim in (
                ("q_proj", to_heads, 0), ("k_proj", to_groups, 0), ("v_proj", to_groups, 0), ("o_proj", to_heads, 1)
            ):  # fmt: skip
                was, weight = (getattr(block.self_attn, name).weight for block in (old, new))
                parts = was.unflatten(dim, (len(to), -1))
                weight.copy_(torch.zeros_like(parts).index_copy_(dim, to, parts).flatten(dim, dim + 1))
    tokens = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(start(tokens).logits, now(tokens).logits, atol=1e-5)
    (heads_0, mlps_0), (heads_t, mlps_t) = (head_outputs(model, tokens) for model in (start, now))
    found = plain.NodeMatching.of_outputs(g, heads_0, heads_t, mlps_0, mlps_t)
    assert found.heads.tolist() == heads.tolist()
    assert (found.groups.tolist(), found.mlps.tolist()) == (groups.tolist(), [0, 1, 2])
