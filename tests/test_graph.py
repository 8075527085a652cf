"""The graph's names and edges, selections against slow enumeration, views, and circuits on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_rlhf.circuits.graph import Circuit, Edge, Graph, check_graph, readers_of
from interp_rlhf.errors import FormatError, MeasurementError

GRAPHS = [
    Graph(1, 1, 1, False, "GPT2LMHeadModel"),
    Graph(3, 4, 4, False, "GPT2LMHeadModel"),
    Graph(3, 4, 2, False, "LlamaForCausalLM"),
    Graph(2, 6, 1, False, "Qwen3ForCausalLM"),
    Graph(3, 2, 2, True, "GPTNeoXForCausalLM"),
    Graph(2, 4, 2, True, "PhiForCausalLM"),
]
GROUPED = GRAPHS[2]
SETTINGS: dict[str, Any] = {"method": "eap-ig", "steps": 5, "ablation": "mean", "n": 12, "task": 'grüße "]\n}'}
each_graph = pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.architecture}-{g.n_heads}-{g.n_kv_heads}")


def made(graph: Graph, seed: int = 0, *, ties: bool = False) -> Circuit:
    drawn = torch.randn(graph.possible.shape, generator=torch.Generator().manual_seed(seed))
    if ties:
        drawn = drawn.round()
    return Circuit(graph, torch.where(graph.possible, drawn, 0.0), **SETTINGS)


# -- slow references, written from the names alone -------------------------------------------------------------------


def slow_names(graph: Graph) -> tuple[list[str], list[str]]:
    sources, targets = ["embed"], []
    for layer in range(graph.n_layers):
        for head in range(graph.n_heads):
            sources.append(f"a{layer}.h{head}")
            targets.append(f"a{layer}.h{head}.q")
        for head in range(graph.n_kv_heads):
            targets.append(f"a{layer}.h{head}.k")
        for head in range(graph.n_kv_heads):
            targets.append(f"a{layer}.h{head}.v")
        sources.append(f"m{layer}")
        targets.append(f"m{layer}")
    return sources, [*targets, "logits"]


def exists(graph: Graph, source: str, target: str) -> bool:
    if source == "embed" or target == "logits":
        return True
    from_layer, to_layer = int(source[1:].split(".")[0]), int(target[1:].split(".")[0])
    within = source[0] == "a" and target[0] == "m" and not graph.parallel
    return from_layer < to_layer or (from_layer == to_layer and within)


def fed(graph: Graph, target: str) -> set[str]:
    """Components that read through ``target``."""
    if not target.startswith("a"):
        return {target}
    layer, head, role = target.split(".")
    if role == "q":
        return {f"{layer}.{head}"}
    return {f"{layer}.h{h}" for h in range(graph.n_heads) if h // (graph.n_heads // graph.n_kv_heads) == int(head[1:])}


def pairs(circuit: Circuit) -> set[tuple[str, str]]:
    return {(edge.source, edge.target) for edge in circuit.edges()}


def listed(circuit: Circuit) -> list[Edge]:
    """Every edge there is, row by row."""
    sources, targets = slow_names(circuit.graph)
    return [
        Edge(source, target, float(circuit.scores[i, j]))
        for i, source in enumerate(sources)
        for j, target in enumerate(targets)
        if exists(circuit.graph, source, target)
    ]


def slow_greedy(circuit: Circuit, n: int, strength: Callable[[float], float]) -> set[tuple[str, str]]:
    """Looks through all edges at every step."""
    reached, taken = {"logits"}, list[Edge]()
    while len(taken) < n:
        ready = [e for e in listed(circuit) if e not in taken and fed(circuit.graph, e.target) & reached]
        taken.append(max(ready, key=lambda edge: strength(edge.score)))
        reached.add(taken[-1].source)
    return {(edge.source, edge.target) for edge in taken}


def slow_paths(circuit: Circuit) -> set[tuple[str, str]]:
    """Edges of all paths from embed to logits, walked one by one."""
    chosen, kept = [edge[:2] for edge in circuit.edges()], set[tuple[str, str]]()

    def walk(node: str, path: tuple[tuple[str, str], ...]) -> None:
        if node == "logits":
            kept.update(path)
        for source, target in chosen:
            if source == node:
                for reader in fed(circuit.graph, target):
                    walk(reader, (*path, (source, target)))

    walk("embed", ())
    return kept


# -- the graph -------------------------------------------------------------------------------------------------------


@each_graph
def test_names_counts_and_possible_edges_equal_the_enumeration(graph: Graph):
    sources, targets = slow_names(graph)
    assert (list(graph.sources), list(graph.targets)) == (sources, targets)
    assert len(sources) == 1 + graph.n_layers * (graph.n_heads + 1)
    assert len(targets) == graph.n_layers * (graph.n_heads + 2 * graph.n_kv_heads + 1) + 1
    expected = torch.tensor([[exists(graph, source, target) for target in targets] for source in sources])
    assert torch.equal(graph.possible, expected)
    assert graph.size == int(expected.sum())
    for target in targets:
        assert {node for node, _ in readers_of(graph, target)} == fed(graph, target)


def test_sizes_by_hand():
    assert Graph(1, 2, 1, False, "M").size == 5 + 2 + 4  # embed; the heads into the MLP; all four into the logits
    assert Graph(1, 2, 1, True, "M").size == 5 + 4
    assert Graph(12, 12, 12, False, "GPT2LMHeadModel").size == 32491  # as the authors of EAP-IG count GPT-2 small


def test_a_graph_hands_out_a_copy_of_its_edges():
    GROUPED.possible[:] = True
    assert not bool(GROUPED.possible.all())


# -- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "negative"])
@each_graph
def test_selections_equal_slow_ones(graph: Graph, absolute: bool, ties: bool):
    circuit, strength = made(graph, 1, ties=ties), abs if absolute else float.__neg__
    ranked = sorted(listed(circuit), key=lambda edge: -strength(edge.score))
    for n in {1, 2, min(7, graph.size), graph.size // 3, graph.size}:
        assert pairs(circuit.top(n, absolute=absolute)) == {edge[:2] for edge in ranked[:n]}
    for value in (0.0, 0.5, 2.0):
        strong = {edge[:2] for edge in ranked if strength(edge.score) >= value}
        assert pairs(circuit.threshold(value, absolute=absolute)) == strong
    for n in {1, 2, min(9, graph.size), min(23, graph.size)}:
        assert pairs(circuit.greedy(n, absolute=absolute)) == slow_greedy(circuit, n, strength)
    assert pairs(circuit.greedy(graph.size, absolute=absolute)) == {edge[:2] for edge in ranked}


def test_greedy_goes_through_the_key_value_group():
    scores = torch.zeros(GROUPED.possible.shape)
    rows, columns = GROUPED.sources.index, GROUPED.targets.index
    scores[rows("a2.h3"), columns("logits")] = 1.0
    scores[rows("a1.h0"), columns("a2.h1.k")] = -9.0  # group 1 is heads 2 and 3
    scores[rows("a1.h0"), columns("a2.h0.k")] = 10.0  # group 0 is not reached
    scores[rows("m0"), columns("a2.h3.q")] = 8.0
    scores[rows("m1"), columns("a2.h2.q")] = 20.0  # another head of the same group is not reached
    edges = Circuit(GROUPED, scores).greedy(3).edges()
    assert edges == [Edge("a1.h0", "a2.h1.k", -9.0), Edge("m0", "a2.h3.q", 8.0), Edge("a2.h3", "logits", 1.0)]


@each_graph
@pytest.mark.parametrize("choose", ["top", "greedy"])
def test_pruned_keeps_what_lies_on_a_path(graph: Graph, choose: str):
    for seed in range(5):
        circuit = getattr(made(graph, seed), choose)(max(1, graph.size // 7))
        pruned = circuit.pruned()
        assert pairs(pruned) == slow_paths(circuit)
        assert pruned.pruned().edges() == pruned.edges()
        assert torch.equal(pruned.scores, circuit.scores)


def test_edges_fall_by_strength_and_selecting_changes_nothing_else():
    circuit = made(GROUPED)
    chosen = circuit.top(9)
    assert circuit.selected is None
    assert torch.equal(chosen.scores, circuit.scores)
    assert {name: getattr(chosen, name) for name in SETTINGS} == SETTINGS
    strengths = [abs(edge.score) for edge in circuit.edges()]
    assert strengths == sorted(strengths, reverse=True)
    assert len(strengths) == GROUPED.size
    assert chosen.edges() == circuit.edges()[:9]


@pytest.mark.parametrize("n", [0, -1, GROUPED.size + 1])
@pytest.mark.parametrize("choose", ["top", "greedy"])
def test_a_number_of_edges_that_there_are_not_is_refused(choose: str, n: int):
    with pytest.raises(MeasurementError, match=rf"^circuit: expected 1 to {GROUPED.size} edges, found {n}$"):
        getattr(made(GROUPED), choose)(n)


def test_a_threshold_is_a_number():
    with pytest.raises(MeasurementError, match="threshold: expected a number, found nan"):
        made(GROUPED).threshold(float("nan"))


def test_pruning_needs_a_selection():
    with pytest.raises(MeasurementError, match="pruned: expected a selection, found none"):
        made(GROUPED).pruned()


# -- what is no circuit ----------------------------------------------------------------------------------------------


def spoiled(value: float, source: str, target: str) -> Tensor:
    scores = made(GROUPED).scores.clone()
    scores[GROUPED.sources.index(source), GROUPED.targets.index(target)] = value
    return scores


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (spoiled(float("nan"), "embed", "m0"), "scores: .* with 1 that are not finite"),
        (spoiled(float("-inf"), "embed", "m0"), "scores: .* with 1 that are not finite"),
        (torch.zeros(3, 4), r"expected finite float32 \[16, 28\], found torch.float32 \[3, 4\]"),
        (made(GROUPED).scores.double(), "found torch.float64"),
        (spoiled(0.1, "m1", "a0.h0.q"), "expected 0 for every edge that is not possible"),
    ],
)
def test_scores_that_are_none_are_refused(scores: Tensor, words: str):
    with pytest.raises(MeasurementError, match=words) as caught:
        Circuit(GROUPED, scores)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "selected",
    [torch.ones(16, 28, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool), torch.zeros(16, 28)],
    ids=["impossible", "shape", "type"],
)
def test_selections_that_are_none_are_refused(selected: Tensor):
    with pytest.raises(MeasurementError, match="circuit: selected: expected possible edges"):
        replace(made(GROUPED), selected=selected)


def test_a_circuit_of_another_model_is_refused():
    check_graph(made(GROUPED), replace(GROUPED))
    for name, value in {"n_layers": 4, "n_heads": 8, "n_kv_heads": 1, "parallel": True, "architecture": "Phi"}.items():
        other = replace(GROUPED, **{name: value})
        with pytest.raises(MeasurementError) as caught:
            check_graph(made(GROUPED), other)
        words = str(caught.value)
        assert "found one of LlamaForCausalLM with 3 layers of 4 heads (2 key-value)" in words
        assert ("parallel" if name == "parallel" else str(value)) in words.split(", found")[0]
        assert "\n" not in words


# -- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [None, 11])
def test_networkx_has_every_edge_at_each_of_its_readers(n: int | None):
    circuit = made(GROUPED) if n is None else made(GROUPED).top(n)
    view = circuit.to_networkx()
    assert set(view) == {*GROUPED.sources, "logits"}
    assert view.graph["architecture"] == "LlamaForCausalLM"
    expected = {
        (edge.source, reader, edge.target.rsplit(".", 1)[-1] if edge.target.startswith("a") else "in"): edge.score
        for edge in circuit.edges()
        for reader in fed(GROUPED, edge.target)
    }
    assert {(u, v, key): data["score"] for u, v, key, data in view.edges(keys=True, data=True)} == expected


def test_networkx_has_no_cycle():
    import networkx as nx

    for graph in GRAPHS:
        assert nx.is_directed_acyclic_graph(made(graph).to_networkx())


def test_frame_has_every_possible_edge_once():
    circuit = made(GROUPED).greedy(13)
    frame = circuit.to_frame()
    assert list(frame.columns) == ["source", "target", "score", "selected"]
    assert [Edge(*row) for row in frame[["source", "target", "score"]].itertuples(index=False)] == listed(circuit)
    chosen = frame[frame.selected]
    assert set(zip(chosen.source, chosen.target, strict=True)) == pairs(circuit)
    assert not made(GROUPED).to_frame().selected.any()


@each_graph
def test_per_query_head_shares_scores_and_repeats_selection(graph: Graph):
    circuit = made(graph).top(max(1, graph.size // 4))
    wide = circuit.per_query_head()
    assert wide.graph == replace(graph, n_kv_heads=graph.n_heads)
    torch.testing.assert_close(wide.scores.sum(1), circuit.scores.sum(1))
    each = graph.n_heads // graph.n_kv_heads
    for j, target in enumerate(wide.targets):
        layer, _, rest = target.partition(".")
        name, share = target, 1
        if rest[-1:] in ("k", "v") and rest:
            name, share = f"{layer}.h{int(rest[1:-2]) // each}.{rest[-1]}", each
        column = circuit.targets.index(name)
        torch.testing.assert_close(wide.scores[:, j] * share, circuit.scores[:, column])
        assert torch.equal(wide.selected[:, j], circuit.selected[:, column])
    assert made(graph).per_query_head().selected is None


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize("n", [None, 5])
@each_graph
def test_a_circuit_comes_back_exactly(graph: Graph, n: int | None, suffix: str, tmp_path: Path):
    circuit = made(graph, 3) if n is None else made(graph, 3).top(n)
    values = torch.tensor([1e-45, -0.0, 3.4028235e38, 1 / 3, -1e-30])  # denormal, signed zero, largest
    scores = circuit.scores.clone()
    scores[graph.possible] = torch.cat([values, scores[graph.possible][5:]])
    circuit = replace(circuit, scores=scores)
    path = tmp_path / f"circuit.{suffix}"
    circuit.save(path)
    back = Circuit.load(str(path))
    assert back.graph == graph
    assert {name: getattr(back, name) for name in SETTINGS} == SETTINGS
    assert back.scores.dtype == torch.float32
    assert torch.equal(back.scores.view(torch.int32), scores.view(torch.int32))
    assert (back.selected is None) == (n is None)
    assert n is None or torch.equal(back.selected, circuit.selected)


def test_a_selection_of_nothing_stays_one(tmp_path: Path):
    made(GROUPED).threshold(1e9).save(tmp_path / "circuit.json")
    back = Circuit.load(tmp_path / "circuit.json")
    assert back.selected is not None
    assert back.edges() == []


def test_json_is_for_people(tmp_path: Path):
    circuit = made(GROUPED).top(3)
    circuit.save(tmp_path / "circuit.json")
    text = (tmp_path / "circuit.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert found["graph"] == {
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "parallel": False,
        "architecture": "LlamaForCausalLM",
    }
    assert [Edge(*edge[:3]) for edge in found["edges"]] == listed(circuit)
    assert sum(line.strip().startswith('["') for line in text.splitlines()) == GROUPED.size


def test_parquet_has_typed_columns_and_a_header(tmp_path: Path):
    import pyarrow.parquet as pq

    made(GROUPED).top(3).save(tmp_path / "circuit.parquet")
    table = pq.read_table(tmp_path / "circuit.parquet")
    assert table.column_names == ["source", "target", "score", "selected"]
    assert [str(table.schema.field(name).type) for name in ("score", "selected")] == ["float", "bool"]
    header = json.loads(table.schema.metadata[b"interp_rlhf.circuit"])
    assert {name: header[name] for name in SETTINGS} == SETTINGS


def put(*where: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("version", to=2), "version: expected 1, found 2"),
        (lambda content: content.pop("version"), "version: expected 1, found None"),
        (lambda content: content.pop("graph"), "graph: expected n_layers"),
        (put("graph", "n_layers", to=0), "n_layers: expected a number from 1"),
        (put("graph", "n_layers", to=2), "edges: .*expected"),
        (put("graph", "n_kv_heads", to=3), "n_heads a multiple of n_kv_heads"),
        (put("graph", "parallel", to=True), "edges: expected the"),
        (put("edges", 0, 0, to="a9.h0"), "'a9.h0' → 'a0.h0.q': expected nodes"),
        (put("edges", 0, 1, to="a0.h0.o"), "'embed' → 'a0.h0.o': expected nodes"),
        (put("edges", 0, 2, to=float("nan")), "embed → a0.h0.q: expected a finite score"),
        (put("edges", 0, 2, to="1"), "embed → a0.h0.q: expected a finite score"),
        (put("edges", 0, 3, to=1), "embed → a0.h0.q: .* true or false"),
        (put("edges", 0, to=["embed", "m0"]), "edges: expected source, target, score, selected"),
        (put("edges", 0, to=["m1", "a0.h0.q", 0.5, False]), "not possible"),
        (put("edges", 0, to="embed"), "edges: expected lists"),
        (put("edges", to={}), "expected a circuit with a list of edges"),
        (lambda content: content["edges"].pop(), "edges: expected the possible ones"),
        (put("version", to=True), "version: expected 1, found True"),
        (put("graph", "n_layers", to=4096), "edges: expected the possible ones"),
        (put("graph", "architecture", to=5), "architecture: expected a name"),
        (put("edges", 0, 0, to=["embed"]), "expected nodes"),
        (put("edges", 0, to=["embed", "a0.h1.q", 0.5, False]), "every edge once"),
        (put("edges", 0, to=["m1", "a0.h0.q", 0.0, False]), "not possible"),
        (put("edges", 0, 2, to=1e300), "expected a finite score"),
        (put("edges", 0, 2, to=10**400), "expected a finite score"),
        (put("edges", 0, 2, to=True), "expected a finite score"),
        (put("has_selection", to=False), "has_selection: expected true"),
        (put("n", to="many"), "n: not found or of another type"),
        (lambda content: content.pop("task"), "task: not found or of another type"),
        (put("has_selection", to=None), "has_selection: not found"),
    ],
)
def test_a_json_file_with_another_content_is_refused(change: Callable[..., Any], words: str, tmp_path: Path):
    path = tmp_path / "circuit.json"
    made(GROUPED).top(3).save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(path, words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.json", b"", "not valid JSON"),
        ("c.json", b"\xff\xfe", "not valid JSON"),
        ("c.json", b"[]", "expected a circuit"),
        ("c.json", b"[" * 100_000, "not valid JSON"),
        ("c.json", None, "cannot be read"),
        ("c.parquet", b"PAR1", "not a circuit in Parquet"),
        ("c.parquet", None, "not a circuit in Parquet"),
        ("c.pt", b"{}", "expected a name that ends in .json or .parquet"),
    ],
)
def test_a_file_that_is_no_circuit_is_refused(name: str, content: bytes | None, words: str, tmp_path: Path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words)


def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "circuit.parquet"
    made(GROUPED).save(path)
    table = pq.read_table(path)
    for other in (
        table.replace_schema_metadata(None),
        table.replace_schema_metadata({b"interp_rlhf.circuit": b"\xff"}),
        table.drop_columns(["score"]),
        table.set_column(2, "score", pa.nulls(len(table))),
        table.slice(1),
    ):
        pq.write_table(other, path)
        refused(path, "expected|not a circuit")


def refused(path: Path, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        Circuit.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["circuit.pt", "circuit", "none/circuit.json", "none/circuit.parquet"])
def test_a_place_that_cannot_be_written_is_named(name: str, tmp_path: Path):
    with pytest.raises(FormatError) as caught:
        made(GROUPED).save(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)
