"""Verdicts about mechanisms where the truth is planted, on models read and judged as a run does it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from toy_circuits import (
    RELAY,
    SPREAD,
    Judge,
    gone,
    length,
    permute_heads,
    planted,
    rebuilt,
    scale_heads,
    tasks,
    trained_apart,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return planted(0)


@pytest.fixture(scope="module")
def judge(model: Any) -> Judge:
    return Judge(model, *tasks())


def test_the_planted_circuit_is_found_on_one_half_and_holds_on_the_other(judge: Judge):
    start = judge.start
    assert not set(start.select) & set(start.evaluate)
    assert sorted((*start.select, *start.evaluate)) == list(range(len(start.task.pairs)))
    edges = {(start.graph.sources[i], start.graph.targets[j]) for i, j in start.reading.own.nonzero().tolist()}
    assert {("a1.h2", "logits"), ("a0.h1", "a1.h1.k")} <= edges  # the looking head, and what it finds its place by
    assert judge.before["circuit/faithfulness_index"].value > 0.8
    assert judge.before["circuit/faithfulness_control"].value < 0.1
    assert judge.before["circuit/faithfulness_index"].p == pytest.approx(1 / 21)


def test_nothing_changed_is_the_same_exactly(judge: Judge, model: Any):
    found = judge(model)
    assert found.verdict.word == "same" and not found.verdict.alarm
    assert found["structure_change"] == 0.0
    assert found["effect_ratio"] == 1.0
    assert found["faithfulness_index"] == judge.before["circuit/faithfulness_index"].value


def test_permuted_heads_compute_the_same_and_are_relocated(judge: Judge, model: Any):
    moved = permute_heads(model, 1)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(moved(ids).logits, model(ids).logits, atol=1e-5)
    found = judge(moved)
    assert found.verdict.word == "relocated" and not found.verdict.alarm
    assert found["faithfulness_matched"] == pytest.approx(judge.before["circuit/faithfulness_index"].value, abs=1e-5)
    assert found["faithfulness_index"] < 0.2


def test_a_deleted_head_that_carries_the_task_is_lost(judge: Judge, model: Any):
    found = judge(scale_heads(model, [(1, 2)], 0.0))
    assert found.verdict.word == "lost" and found.verdict.alarm
    assert judge(scale_heads(model, [(1, 0)], 0.0)).verdict.word == "same"


def test_another_solution_is_different_and_many_heads_together_are_no_small_circuit(judge: Judge, model: Any):
    found = judge(rebuilt(model, RELAY, 0))
    assert found.verdict.word == "different" and found.verdict.alarm
    assert found["faithfulness_own"] > 0.8 > 0.2 > max(found["faithfulness_index"], found["faithfulness_matched"])
    assert judge(rebuilt(model, SPREAD, 0)).verdict.word in ("diffuse", "different")


def test_training_on_a_control_task_as_far_leaves_it_the_same(judge: Judge, model: Any):
    words: Counter[str] = Counter()
    for seed in range(6):
        task, control = trained_apart(model, seed, 10, (3e-4, 1e-3, 3e-3)[seed % 3])
        words[judge(gone(model, control, length(task))).verdict.word] += 1
    assert words["same"] >= 5  # the full count is scripts/stress_circuits
