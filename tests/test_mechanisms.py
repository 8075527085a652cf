"""Mechanisms whose fate is known, read as a session reads them: permuted, deleted, rebuilt, trained past. Small."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from interp_rlhf import mechanisms
from interp_rlhf.circuits.graph import strongest
from interp_rlhf.circuits.tasks import Task
from interp_rlhf.mechanisms import start_mechanism
from scripts.toy_circuits import (
    PLANTED,
    RELAY,
    Judge,
    gone,
    length,
    lookups,
    permute_heads,
    planted,
    rebuilt,
    scale_heads,
    tasks,
    trained_apart,
)

LOOKUP, PREVIOUS = (1, 2), (0, 1)


@cache
def model() -> Any:
    """Both tasks learned by the planted heads; no test changes it."""
    return planted(1, steps=220)


@cache
def judge(size: float | str = "auto") -> Judge:
    return Judge(model(), *tasks(), size=size, steps=2, random=19)


def test_the_toy_has_what_was_planted() -> None:
    ids, follows, _ = lookups(torch.Generator().manual_seed(5), 64)
    asked = follows >= 0
    assert (model()(ids).logits.argmax(-1) == follows)[asked].float().mean() > 0.95
    before, graph = judge().before, judge().start.graph
    assert before["circuit/metric"].value > 5 > -5 > before["circuit/metric_corrupt"].value
    index, control = (before[f"circuit/faithfulness_{which}"].value for which in ("index", "control"))
    assert index > 0.8 > 0.2 > control, "the circuit carries the task, the control task's does not"
    chosen = judge().start.reading.own
    edges = {(graph.sources[s], graph.targets[t]) for s, t in chosen.nonzero().tolist()}
    lookup_key = f"a1.h{LOOKUP[1] // 2}.k"  # of the key-value head that the lookup head reads
    assert {("a0.h1", lookup_key), ("a1.h2", "logits")} <= edges


def test_nothing_changed() -> None:
    found = judge()(model())
    assert found.verdict.word == "same" and not found.verdict.alarm
    assert found["structure_change"] == 0 and found.reading.dropped == 0
    for metric, value in judge().before.items():
        if metric != "circuit/seconds":
            assert found.rows[metric] == value
    assert found["faithfulness_index"] == found["faithfulness_matched"] == found["faithfulness_own"]


@pytest.mark.parametrize("layer", [PREVIOUS[0], LOOKUP[0]])
def test_permuted_heads_are_relocated(layer: int) -> None:
    other = permute_heads(model(), layer)
    ids, _, _ = lookups(torch.Generator().manual_seed(6), 16)
    torch.testing.assert_close(other(ids).logits, model()(ids).logits, rtol=0, atol=1e-4)
    found, start = judge()(other), judge().before["circuit/faithfulness_index"].value
    assert found.verdict.word == "relocated" and not found.verdict.alarm
    assert found["faithfulness_index"] < 0.2
    assert found["faithfulness_matched"] == pytest.approx(start, abs=1e-5)
    assert found["faithfulness_own"] == pytest.approx(start, abs=1e-5)
    assert found["effect_ratio"] == pytest.approx(1, abs=1e-5) and found["structure_change"] > 0.2


@pytest.mark.parametrize("layer", [PREVIOUS[0], LOOKUP[0]])
def test_heads_that_write_nothing_do_not_say_where_a_key_value_head_went(layer: int) -> None:
    """Only the planted heads write anything: each shares its key-value head with one that has no output."""
    silent = [(at, head) for at in range(3) for head in range(4) if (at, head) not in PLANTED]
    bare = scale_heads(model(), silent, 0)
    before = Judge(bare, *tasks(), steps=2, random=19)
    found = before(permute_heads(bare, layer))
    start = before.before["circuit/faithfulness_index"].value
    assert found.verdict.word == "relocated"
    assert found["faithfulness_matched"] == pytest.approx(start, abs=1e-5)


@pytest.mark.parametrize("head", [PREVIOUS, LOOKUP])
def test_a_mechanism_without_its_head_is_lost(head: tuple[int, int]) -> None:
    found = judge()(scale_heads(model(), [head], 0))
    assert found.verdict.word == "lost" and found.verdict.alarm
    assert found["effect_ratio"] < 0.2


def test_a_head_of_no_part_in_it_is_not_missed() -> None:
    spare = next((layer, head) for layer in (1, 2) for head in (0, 3) if (layer, head) not in PLANTED)
    found = judge()(scale_heads(model(), [spare], 0))
    assert found.verdict.word == "same" and found["effect_ratio"] > 0.9


def test_the_opposite_effect_of_the_same_circuit_is_told() -> None:
    found = judge()(scale_heads(model(), [LOOKUP], -1))
    assert found["metric"] < 0 < found["metric_corrupt"]
    assert found.verdict.word == "same" and "opposite sign" in found.verdict.why


def test_another_computation_is_different() -> None:
    """Two copies and a lookup one place further on, in other heads: no edge of the start's circuit carries it."""
    found = judge(0.2)(rebuilt(model(), RELAY, 1001, steps=120))
    assert found["effect_ratio"] > 0.5, "it learned the task again"
    assert found.verdict.word == "different" and found.verdict.alarm
    assert max(found["faithfulness_index"], found["faithfulness_matched"]) < 0.3 < 0.8 < found["faithfulness_own"]


def test_training_on_the_control_task_is_the_same() -> None:
    before = model()
    for seed in range(3):
        own, other = trained_apart(before, seed, 10, 5e-3)
        moved = gone(before, other, length(own))
        step = torch.cat([(a - b).flatten() for a, b in zip(moved.parameters(), before.parameters(), strict=True)])
        assert float(step.detach().norm()) == pytest.approx(length(own), rel=1e-4)
        assert length(own) > 1
        assert judge()(moved).verdict.word == "same"


# ------------------------------------------------------------------------------------------------------ the two halves


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[set[int]]]:
    """Pairs that edges were scored on and that circuits were run on, call by call."""
    used: dict[str, list[set[int]]] = {"scored": [], "run": []}
    score, runs = mechanisms.attribute_task, mechanisms.TaskRuns

    def attribute(*args: Any, **options: Any) -> Any:
        used["scored"].append(set(args[3]))
        return score(*args, **options)

    def run(*args: Any, **options: Any) -> Any:
        used["run"].append(set(args[3]))
        return runs(*args, **options)

    monkeypatch.setattr(mechanisms, "attribute_task", attribute)
    monkeypatch.setattr(mechanisms, "TaskRuns", run)
    return used


def test_circuits_are_selected_on_one_half_and_run_on_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    start = judge().start  # before calls are recorded
    used = recorded(monkeypatch)
    select, evaluate = set(start.select), set(start.evaluate)
    assert not select & evaluate and select | evaluate == set(range(64)) and len(select) == 32
    start_mechanism(judge()._reader(model()), start.task, None)
    assert used["run"] == [select, evaluate], "the size is found on the half that selects"
    assert set.union(*used["scored"][:8]) == select
    used["run"].clear(), used["scored"].clear()
    found = judge()(model()).reading
    assert used["run"] == [evaluate]
    assert [pairs <= select for pairs in used["scored"]] == [True] * 8 + [False] * 8
    assert [pairs <= evaluate for pairs in used["scored"]] == [False] * 8 + [True] * 8
    scores = torch.zeros(start.graph.possible.shape)
    scores[start.graph.possible] = found.blocks_a.mean(0)
    assert torch.equal(found.own, strongest(start.graph, scores, start.size))


def swapped(task: Task, other: Task, places: tuple[int, ...]) -> Task:
    """The task with other pairs at some places."""
    pairs = list(task.pairs)
    for place in places:
        pairs[place] = other.pairs[place]
    return replace(task, pairs=tuple(pairs))


def test_the_half_that_circuits_run_on_has_no_say_in_the_circuit() -> None:
    """Other pairs there leave circuit, size and selecting scores; other pairs in the selecting half leave M(full)."""
    whole, start = judge(), judge().start
    other = Task("induction", tasks(128)[0].pairs[64:])
    reader = whole._reader(model())
    elsewhere = start_mechanism(reader, swapped(start.task, other, start.evaluate), None)
    assert (elsewhere.select, elsewhere.evaluate, elsewhere.size) == (start.select, start.evaluate, start.size)
    assert torch.equal(elsewhere.reading.own, start.reading.own)
    assert torch.equal(elsewhere.reading.blocks_a, start.reading.blocks_a)
    assert not torch.equal(elsewhere.reading.blocks_b, start.reading.blocks_b)
    assert not torch.equal(elsewhere.reading.full, start.reading.full)
    chosen_elsewhere = start_mechanism(reader, swapped(start.task, other, start.select), None)
    assert torch.equal(chosen_elsewhere.reading.full, start.reading.full)
    assert not torch.equal(chosen_elsewhere.reading.blocks_a, start.reading.blocks_a)
