"""A plan comes back from its JSON lines as it was, and damaged lines are refused by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from trainers.table import causal_lm, preferences, tokenizer

from interp_rlhf import Direction, InterpConfig, LinearProbe
from interp_rlhf.activations.labelled import LabelledTexts
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.errors import FormatError
from interp_rlhf.plan import Plan, Refusal, make_plan
from interp_rlhf.stored_plan import load_plan, plan_lines, read_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    settings = {"prompts": {"n": 16}, "concepts": {"n_pairs": 32, "packs": []}}
    config = InterpConfig.from_mapping(settings)
    data = preferences(32)
    made = make_plan(config, causal_lm(), tokenizer(), train_dataset=data, eval_dataset=None)
    saved = Direction("saved", made.hookpoints[0], torch.randn(32, generator=torch.Generator().manual_seed(0)))
    twin = replace(made.audit.prompts[0], unit="the same text of another unit")
    audit = replace(made.audit, prompts=(*made.audit.prompts, twin), skipped=3)
    refused = (*made.refused, Refusal("a", "", "because"))
    words = tuple(prompt for prompt in made.audit.prompts[:2])
    labelled = LabelledTexts(name="order", prompts=words, labels=(True, False))
    bank = (replace(made.concepts[0], name="unrelated", held=()),)
    probe = LinearProbe("order", made.hookpoints[0], torch.randn(32, generator=torch.Generator().manual_seed(1)), 0.1)
    made = replace(made, bank=bank, on_domain=(labelled,), sealed=probe)
    return replace(made, directions=(saved,), audit=audit, refused=refused)


def stored(plan: Plan) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(line)) for line in plan_lines(plan)]


def assert_same(found: Plan, plan: Plan) -> None:
    for part in fields(Plan):
        if part.name not in ("directions", "sealed"):
            assert getattr(found, part.name) == getattr(plan, part.name), part.name
    for a, b in zip(found.directions, plan.directions, strict=True):
        assert (a.name, a.hookpoint) == (b.name, b.hookpoint) and torch.equal(a.vector, b.vector)
    a, b = found.sealed, plan.sealed
    assert a is not None and b is not None and torch.equal(a.weight, b.weight)
    assert (a.name, a.bias, a.threshold, a.tokenizer) == (b.name, b.bias, b.threshold, b.tokenizer)


def test_a_plan_comes_back_as_it_was(plan: Plan) -> None:
    assert plan.concepts and plan.directions and plan.refused
    found = read_plan(stored(plan))
    assert_same(found, plan)
    assert isinstance(found.skip_ids, frozenset) and isinstance(found.concepts[0].fit, tuple)
    assert found.table(fit=True) == plan.table(fit=True)


def test_each_text_is_written_once_and_found_by_its_id(plan: Plan) -> None:
    lines = stored(plan)
    texts = [line for line in lines if "text" in line]
    prompts = [Prompt(tuple(t["input_ids"]), t["completion_start"], t["unit"]) for t in texts]
    assert len(set(prompts)) == len(prompts)
    assert {prompt.id for prompt in prompts} == {prompt.id for prompt in plan.table(fit=True).prompts}
    assert [line["field"] for line in lines if "field" in line] == [part.name for part in fields(Plan)]


def test_a_file_is_read_and_a_damaged_one_named_with_its_line(plan: Plan, tmp_path: Any) -> None:
    path = tmp_path / "01-plan.jsonl"
    lines = [json.dumps(line) for line in plan_lines(plan)]
    path.write_text("\n".join(lines) + "\n")
    assert_same(load_plan(path), plan)
    path.write_text("\n".join([*lines[:2], lines[2][:-3], *lines[3:]]))
    with pytest.raises(FormatError, match=r"01-plan.jsonl, line 3: not valid JSON"):
        load_plan(path)
    with pytest.raises(FormatError, match="cannot be read"):
        load_plan(tmp_path / "absent.jsonl")


def change(**values: Any) -> Callable[[list[dict[str, Any]]], Any]:
    def apply(lines: list[dict[str, Any]]) -> None:
        for name, value in values.items():
            next(line for line in lines if line.get("field") == name)["value"] = value

    return apply


def drop(name: str) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda lines: lines.remove(next(line for line in lines if line.get("field") == name))


def direction(digits: str) -> dict[str, Any]:
    return {"name": "a", "hookpoint": "b", "vector": {"shape": [1], "float32": digits}}


def text(**values: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda lines: lines[1].update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: lines[0].update(plan=2), "plan, line 1: expected {'plan': 1}"),
        (lambda lines: lines.pop(0), "plan, line 1: expected {'plan': 1}"),
        (text(unit=3), "line 2: text .* expected token ids and a unit"),
        (text(input_ids=[1, -2]), "line 2: text .* expected token ids"),
        (text(input_ids=[1, 2, 3, 4, 5, 6]), "line 2: text .* its tokens have the id"),
        (text(completion_start=999), "line 2: text .* completion_start: expected 0 to"),
        (text(more=1), "line 2: expected the fields text"),
        (lambda lines: lines.pop(2), "expected a text named above"),
        (change(pad_token_id=True), "pad_token_id: expected int"),
        (change(behaviour=1), "behaviour: expected bool"),
        (change(hookpoints=[1]), r"hookpoints\[0\]: expected str"),
        (change(concepts=[{"name": "a"}]), r"concepts\[0\]: expected the fields name, source, fit, held"),
        (change(directions=[direction("00")]), "expected the hex digits of a float32 tensor"),
        (change(directions=[direction("00000000")]), "length 0"),
        (drop("behaviour"), "ends without the field 'behaviour'"),
        (lambda lines: lines.append(lines[-1]), "found twice"),
        (lambda lines: lines.append({"field": "more", "value": 1}), "field: expected one of hookpoints"),
        (lambda lines: lines.append({"other": 1}), "expected a text, or field and value, found other"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(plan: Plan, spoil: Callable[[Any], Any], message: str) -> None:
    lines = stored(plan)
    spoil(lines)
    with pytest.raises(FormatError, match=message):
        read_plan(lines)
