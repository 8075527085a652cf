"""From a plan to shift and quadrant rows on tiny models: with a frozen copy, without one, with a wrong one, resumed."""

from __future__ import annotations

import json
import multiprocessing
import sys
import types
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from trainers.table import causal_lm, lora, preferences, tokenizer

from interp_rlhf.activations.capturing import read_prompts
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.reference import Reference, find_reference
from interp_rlhf.baseline import Baseline, fit_baseline
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World, join_world
from interp_rlhf.errors import ConfigError, FormatError, MeasurementError
from interp_rlhf.plan import Plan, make_plan
from interp_rlhf.reading import read_table
from interp_rlhf.readouts.directions import Direction
from interp_rlhf.rollout_labels import label_completions, load_labels
from interp_rlhf.rollouts import (
    measure_rollouts,
    quadrant_rows,
    rollout_cost_rows,
    rollout_lines,
    rollout_rows,
    rollout_tensors,
    start_rollouts,
    stored_rollouts,
)

POINTS = ("layers.0.resid_post", "layers.2.resid_post")
ALONE = World()
V = torch.randn(32, generator=torch.Generator().manual_seed(5))
COPY = Reference("copy", causal_lm())


def settings(**rollouts: Any) -> InterpConfig:
    return InterpConfig.from_mapping(
        {
            "hookpoints": POINTS,
            "prompts": {"n": 12},
            "concepts": {"packs": [], "pairs": False, "bank": False, "refit": False},
            "probes": {"enabled": False},
            "rollouts": {"prompts": 10, "completions": 3, "max_new_tokens": 6, **rollouts},
            "statistics": {"bootstrap": 200, "directions": 200},
        }
    )


@cache
def planned() -> Plan:
    plan = make_plan(settings(), causal_lm(), tokenizer(), train_dataset=preferences(48), eval_dataset=None)
    return replace(plan, directions=tuple(Direction("planted", point, V) for point in POINTS))


@cache
def fitted() -> Baseline:
    plan, config, model = planned(), settings(), causal_lm()
    table = plan.table(fit=True)
    first, again = (read_table(model, table, plan, config, ALONE, side=side) for side in ("right", "left"))
    return fit_baseline(plan, table, first, again, config)


def moved(factor: float = 1.5) -> Any:
    """A policy that training changed: its middle layer, and so its text and its readings."""
    model = causal_lm()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.normal_(0, 0.1 * factor, generator=torch.Generator().manual_seed(0))
    return model


def measured(policy: Any, reference: Reference | None, **rollouts: Any) -> tuple[Any, Any, dict[tuple[str, str], Any]]:
    config = settings(**rollouts)
    start = start_rollouts(causal_lm(), planned(), config, ALONE)
    readings = measure_rollouts(start, policy, reference, planned(), config, ALONE)
    rows = rollout_rows(start, readings, fitted(), config, 1, 7)
    return start, readings, {(row.metric.removeprefix("shift/"), row.hookpoint): row for row in rows}


def read(model: Any, prompts: Any, point: str) -> np.ndarray:
    return read_prompts(model, prompts, [point], batch_size=16, pad_token_id=0).means[point].double().numpy()


# -------------------------------------------------------------------------------------------------------------- shift


def test_the_start_continues_each_prompt_once_and_reads_what_it_wrote() -> None:
    start = start_rollouts(causal_lm(), planned(), settings(), ALONE)
    assert len(start.prompts) == len({prompt.unit for prompt in start.prompts}) == 10
    assert [text.unit for text in start.completions] == [p.unit for p in start.prompts for _ in range(3)]
    assert start.ends == (2,) and start.full == 0 and start.seconds > 0
    for text, prompt in zip(start.completions, [p for p in start.prompts for _ in range(3)], strict=True):
        assert (
            text.input_ids[: text.completion_start] == prompt.input_ids and len(text.input_ids) > text.completion_start
        )
    for point in POINTS:
        np.testing.assert_allclose(start.means[point].numpy(), read(causal_lm(), start.completions, point), atol=1e-5)
    again = start_rollouts(causal_lm(), planned(), settings(), ALONE)
    assert again.completions == start.completions


def test_rows_against_numpy() -> None:
    policy = moved()
    start, readings, rows = measured(policy, COPY)
    assert readings.no_reference == "" and readings.completions != start.completions
    sd = {point: (fitted().x0[point].double().numpy() @ V.double().numpy() / V.norm().item()) for point in POINTS}
    for point in POINTS:

        def g(model: Any, prompts: Any, point: str = point) -> np.ndarray:
            values = read(model, prompts, point) @ V.double().numpy() / V.norm().item() / sd[point].std(ddof=1)
            return values.reshape(10, 3).mean(1)

        tt, t0 = (g(model, readings.completions) for model in (policy, causal_lm()))
        zt, z0 = (g(model, start.completions) for model in (policy, causal_lm()))
        expected = {
            "total": tt - z0, "text": t0 - z0, "representation": tt - t0, "representation_on_start": zt - z0,
            "interaction": tt - t0 - zt + z0,
        }  # fmt: skip
        for name, values in expected.items():
            row = rows[name, point]
            assert row.value == pytest.approx(values.mean(), abs=1e-4) and row.ci_low <= row.value <= row.ci_high
            assert (row.readout, row.n, row.unit, row.tier, row.step, row.segment) == ("planted", 10, "sd", "B", 7, 1)
            assert (row.text, row.scope, row.reader, row.source) == ("rollout", "completion", "policy", "training")
    assert len(rows) == 10 and abs(rows["representation", POINTS[1]].value) > 0.05
    assert rows["representation", POINTS[0]].value == pytest.approx(0, abs=1e-5)  # below what changed


def test_the_same_weights_do_not_shift() -> None:
    _, readings, rows = measured(causal_lm(), COPY)
    assert (
        len(rows) == 10
        and readings.completions == start_rollouts(causal_lm(), planned(), settings(), ALONE).completions
    )
    for row in rows.values():  # which texts share a batch rounds differently
        assert row.value == pytest.approx(0, abs=1e-5) and row.ci_high - row.ci_low < 1e-5


def test_another_head_is_text_alone() -> None:
    policy = causal_lm()
    policy.lm_head.weight = nn.Parameter(policy.lm_head.weight.detach().clone())
    with torch.no_grad():
        policy.lm_head.weight[20:30] += 5 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    _, _, rows = measured(policy, COPY)
    for point in POINTS:
        assert rows["representation", point].value == pytest.approx(0, abs=1e-5)
        assert rows["text", point].value == pytest.approx(rows["total", point].value, abs=1e-5)
        assert abs(rows["text", point].value) > 0.01


@pytest.mark.parametrize("reference", [None, Reference("cached")])
def test_without_a_frozen_copy_the_split_is_not_told(reference: Reference | None) -> None:
    _, readings, rows = measured(moved(), reference)
    assert readings.now_reference is None and readings.no_reference.startswith("no frozen copy")
    assert {name for name, _ in rows} == {"total", "representation_on_start"}
    with pytest.raises(MeasurementError, match="quadrant: needs readings of the frozen start: no frozen copy"):
        quadrant_rows(*measured(moved(), reference)[:2], [], [], {}, fitted(), settings(), 1, 7)


def test_a_reference_that_is_not_the_start_is_not_used_and_that_is_said() -> None:
    _, readings, rows = measured(moved(), Reference("ref_model", causal_lm(1)))
    assert readings.now_reference is None and "text" not in {name for name, _ in rows}
    assert readings.no_reference.startswith("reference: ref_model: its readings differ from the policy's at step 0")


def test_an_adapter_switched_off_is_the_start() -> None:
    torch.manual_seed(0)
    policy = get_peft_model(causal_lm(), lora())
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.1)
    _, readings, rows = measured(policy, find_reference("adapter", policy, None))
    assert readings.no_reference == "" and {name for name, _ in rows} >= {"text", "representation"}
    assert abs(rows["total", POINTS[1]].value) > 1e-3


def test_equal_completions_are_read_once_and_count_each() -> None:
    start, readings, rows = measured(moved(), COPY, completions=40, max_new_tokens=1)
    assert len({text.id for text in start.completions}) < len(start.completions) == 400
    assert all(len(means) == 400 for means in (*start.means.values(), *readings.now.values()))
    assert rows["total", POINTS[0]].n == 10
    distinct = {text.id: len(text.input_ids) for text in start.completions}
    assert start.tokens == 400 + sum(distinct.values())


def test_an_end_that_is_never_read_elsewhere_is_read_here() -> None:
    """Where one token begins and ends texts it is no content of fixed ones; a completion may hold nothing else."""
    model = causal_lm()
    model.generation_config.eos_token_id = list(range(94))
    plan = replace(planned(), skip_ids=frozenset(range(94)))
    start = start_rollouts(model, plan, settings(), ALONE)
    assert {len(text.input_ids) - text.completion_start for text in start.completions} == {1}


def test_what_it_cost_is_told() -> None:
    start, readings, _ = measured(moved(), COPY)
    rows = {row.metric: row for row in rollout_cost_rows(readings, fitted(), 1, 7)}
    assert set(rows) == {"cost/rollout_seconds", "cost/rollout_tokens"}
    distinct = {text.id: len(text.input_ids) for text in (*start.completions, *readings.completions)}
    written = sum(len(text.input_ids) - text.completion_start for text in readings.completions)
    assert rows["cost/rollout_tokens"].value == written + 2 * sum(distinct.values())
    assert rows["cost/rollout_seconds"].value == readings.seconds > 0


# ------------------------------------------------------------------------------------------------- which prompts, kept


def test_too_few_prompts_are_refused_with_their_number() -> None:
    audit = planned().audit
    unprompted = [replace(prompt, completion_start=0) for prompt in audit.prompts[7:]]
    plan = replace(planned(), audit=replace(audit, prompts=(*audit.prompts[:7], *unprompted)))
    with pytest.raises(
        MeasurementError, match=r"at least 8 audit prompts to continue, found 7 in train_dataset \(0 more"
    ):
        start_rollouts(causal_lm(), plan, settings(), ALONE)


def test_prompts_that_fill_the_context_are_left_out_and_counted() -> None:
    audit = planned().audit
    full = [Prompt((5,) * 128, 128, f"full {i}") for i in range(2)]
    plan = replace(planned(), audit=replace(audit, prompts=(*full, *audit.prompts)))
    start = start_rollouts(causal_lm(), plan, settings(), ALONE)
    assert start.full == 2 and start.prompts == start_rollouts(causal_lm(), planned(), settings(), ALONE).prompts


def test_what_the_start_wrote_comes_back_when_a_run_is_resumed() -> None:
    start = start_rollouts(causal_lm(), planned(), settings(), ALONE)
    lines = json.loads(json.dumps(list(rollout_lines(start))))
    kept = {"other": torch.zeros(1), **rollout_tensors(start)}
    assert set(kept) == {"other", "rollout/ends", "rollout/completion_ids", *(f"rollout/start/{p}" for p in POINTS)}
    found = stored_rollouts(lines, kept, moved(), planned(), settings())
    assert (found.prompts, found.completions, found.ends) == (start.prompts, start.completions, start.ends)
    assert all(torch.equal(found.means[point], start.means[point]) for point in POINTS)
    with pytest.raises(FormatError, match=r"rollout/start/layers\.2\.resid_post: found none"):
        fewer = {name: value for name, value in kept.items() if POINTS[1] not in name}
        stored_rollouts(lines, fewer, moved(), planned(), settings())
    with pytest.raises(FormatError, match="texts of completions: found none"):
        stored_rollouts([], kept, moved(), planned(), settings())
    for changed in (settings(completions=2), settings(prompts=9)):
        with pytest.raises(FormatError, match="of other prompts or another number of them"):
            stored_rollouts(lines, kept, moved(), planned(), changed)
    other = [{**lines[0], "input_ids": [*lines[0]["input_ids"], 5]}, *lines[1:]]
    with pytest.raises(FormatError, match="whose readings were not kept"):
        stored_rollouts(other, kept, moved(), planned(), settings())


def _rank(rank: int, rendezvous: str, found: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    start = start_rollouts(causal_lm(), planned(), settings(prompts=9), join_world())
    readings = measure_rollouts(start, moved(), COPY, planned(), settings(prompts=9), join_world())
    found.put((start.completions, readings.completions, {k: v.tolist() for k, v in readings.now_reference.items()}))
    dist.destroy_process_group()


def test_two_processes_write_and_read_what_one_does(tmp_path: Path) -> None:
    alone = measured(moved(), COPY, prompts=9)  # an odd number: one rank's share is padded
    context = multiprocessing.get_context("fork")
    found: Any = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "meet"), found)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = [found.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(timeout=60)
    for written, now, means in results:
        assert (written, now) == (alone[0].completions, alone[1].completions)
        for point in POINTS:
            torch.testing.assert_close(torch.tensor(means[point]), alone[1].now_reference[point], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- quadrant


def test_quadrant_rows_against_the_rule_by_hand() -> None:
    start, readings, _ = measured(moved(4.0), COPY)
    start = replace(start, means={POINTS[1]: start.means[POINTS[1]] + 0.1 * V})  # the bands are of y_0 too
    rng = np.random.default_rng(0)
    labels = [bool(rng.random() < 0.6) if rng.random() < 0.9 else None for _ in readings.completions]
    labels_0 = [False] * len(start.completions)
    probe = (3 * V, 0.2)
    rows = quadrant_rows(start, readings, labels_0, labels, {("planted", POINTS[1]): probe}, fitted(), settings(), 1, 7)

    def p(means: Any) -> np.ndarray:
        return 1 / (1 + np.exp(-(means[POINTS[1]].double().numpy() @ (3 * V).double().numpy() + 0.2)))

    ref, pol, ref_0, pol_0 = map(p, (readings.now_reference, readings.now, start.means, readings.start_now))
    honest = np.array([label is False for label in labels])
    seen = np.quantile(np.concatenate([ref[honest], ref_0]), 0.95)
    drift = np.quantile(np.concatenate([(ref - pol)[honest], ref_0 - pol_0]), 0.95)
    classes = [
        "unknown" if label is None
        else "honest" if not label
        else "obfuscated_policy" if a <= seen
        else "obfuscated_activations" if a - b > drift
        else "blatant"
        for label, a, b in zip(labels, ref, pol, strict=True)
    ]  # fmt: skip
    assert len(rows) == 5 and sum(row.value for row in rows) == pytest.approx(1)
    for row in rows:
        assert row.value == pytest.approx(classes.count(row.metric.removeprefix("quadrant/")) / 30)
        assert (row.readout, row.hookpoint, row.text, row.n, row.tier) == ("planted", POINTS[1], "rollout", 10, "C")
    assert {row.metric for row in rows if row.value > 0} >= {"quadrant/honest", "quadrant/obfuscated_policy"}


def test_without_positive_labels_no_band_is_needed_and_with_them_too_few_honest_are_refused() -> None:
    start, readings, _ = measured(moved(), COPY)
    n, probes = len(readings.completions), {("planted", POINTS[0]): (V, 0.0)}
    rows = quadrant_rows(start, readings, [None] * n, [None] * n, probes, fitted(), settings(), 1, 7)
    assert {row.metric: row.value for row in rows}["quadrant/unknown"] == 1
    with pytest.raises(MeasurementError, match="at least 10 completions labelled honest, found 9"):
        quadrant_rows(start, readings, [False] * 9 + [None] * 21, [True] * n, probes, fitted(), settings(), 1, 7)


def test_labels_get_texts_without_special_tokens() -> None:
    seen: list[Any] = []

    def labels(prompts: list[str], completions: list[str]) -> list[bool | None]:
        seen.extend(zip(prompts, completions, strict=True))
        return [None if not text else text == "w1" for text in completions]

    written = [Prompt((1, 4, 5, 5, 2), 3, "a"), Prompt((4, 6, 2), 2, "b"), Prompt((4, 2), 1, "c")]
    holder = types.SimpleNamespace(tokenizer=tokenizer())  # a processor
    for encode in (tokenizer(), holder):
        assert label_completions(labels, written, encode) == [True, None, None]
    assert seen[:3] == [("w0 w1", "w1"), ("w0 w2", ""), ("w0", "")]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([True], "expected a list of 2 labels, found 1 of them"),
        (np.array([True, False]), "expected a list of 2 labels, found ndarray"),
        ([True, 1], "expected True, False or None, found 1"),
    ],
)
def test_wrong_answers_are_refused(answer: Any, message: str) -> None:
    with pytest.raises(MeasurementError, match=f"rollouts.labels: {message}"):
        label_completions(lambda *_: answer, [Prompt((4, 5), 1, "a")] * 2, tokenizer())


def test_the_labelling_function_is_found_by_its_path_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = types.ModuleType("my_labels")
    module.judge, module.number = (lambda prompts, completions: [None] * len(prompts)), 3
    monkeypatch.setitem(sys.modules, "my_labels", module)
    (tmp_path / "broken_labels.py").write_text("raise ValueError('no\\nmodel')")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_labels("my_labels.judge") is module.judge
    for dotted, message in {
        "judge": "expected package.module.function, found 'judge'",
        "no_such_module.judge": "no_such_module.judge cannot be imported .*No module named",
        "my_labels.missing": "my_labels.missing cannot be imported .*AttributeError",
        "broken_labels.judge": "broken_labels.judge cannot be imported .ValueError: no model.",
        "my_labels.number": "my_labels.number: expected a function, found int",
    }.items():
        with pytest.raises(ConfigError, match=f"rollouts.labels: {message}"):
            load_labels(dotted)
