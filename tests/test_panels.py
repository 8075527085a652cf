"""From a plan to the probes of each concept: where they are fitted, what is refused, on which texts rows are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.table import causal_lm, preferences, tokenizer
from trainers.tiny_runs import HOOKPOINTS, small

from interp_rlhf.baseline import statistics
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World
from interp_rlhf.drift.panel import panel_estimates
from interp_rlhf.errors import ConfigError
from interp_rlhf.panels import panel_rows, start_panels
from interp_rlhf.plan import PREFERENCE, Plan, make_plan
from interp_rlhf.reading import read_table
from interp_rlhf.readouts.probes import LinearProbe

EVERYWHERE = {"order": HOOKPOINTS, PREFERENCE: HOOKPOINTS[:1]}


def planned(folder: Path, **probes: Any) -> tuple[InterpConfig, Plan]:
    settings = small(folder / "run", probes={"refits": 19, **probes})
    config = InterpConfig.from_mapping({**settings, "concepts": {**settings["concepts"], "bank": False}})
    return config, make_plan(config, causal_lm(), tokenizer(), train_dataset=preferences(48), eval_dataset=None)


def started(config: InterpConfig, plan: Plan, admitted: Any = EVERYWHERE) -> tuple[Any, Any, Any, Any]:
    table = plan.table(fit=True)
    reading = read_table(causal_lm(), table, plan, config, World())
    return table, reading, *start_panels(plan, table, reading, config, admitted, statistics(config))


def test_probes_where_a_concept_was_admitted_and_nowhere_else(tmp_path: Path) -> None:
    config, plan = planned(tmp_path)
    _, _, panels, refused = started(config, plan)
    assert set(panels) == {("order", HOOKPOINTS[0]), ("order", HOOKPOINTS[1]), (PREFERENCE, HOOKPOINTS[0])}
    assert {refusal.readout for refusal in refused} == {"order (recall)", f"{PREFERENCE} (recall)"}
    assert not started(replace(config, probes=replace(config.probes, enabled=False)), plan)[2]


def test_rows_are_of_the_concepts_own_texts(tmp_path: Path) -> None:
    """The fitted half first, on both sides, and the labelled texts by their ids."""
    lines = [{"prompt": f"w{i}", "completion": " w60 w3", "label": i % 3 == 0} for i in range(12)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config, plan = planned(tmp_path, on_domain={"order": str(tmp_path / "l.jsonl")})
    table, reading, panels, _ = started(config, plan)
    found: dict[Any, list[Any]] = {}
    for name, hookpoint, row in panel_rows(panels, plan, table, reading, statistics(config)):
        found.setdefault((name, hookpoint), []).append(row)
    assert set(found) == set(panels)
    by_text = {prompt.id: row for row, prompt in enumerate(table.prompts)}
    (order,) = (concept for concept in plan.concepts if concept.name == "order")
    pairs = [*order.fit, *order.held]
    means = reading.means[HOOKPOINTS[1]]
    positive, negative = (
        torch.stack([means[by_text[getattr(pair, side).id]] for pair in pairs]) for side in ("positive", "negative")
    )
    on = torch.stack([means[by_text[prompt.id]] for prompt in plan.on_domain[0].prompts])
    expected = panel_estimates(panels["order", HOOKPOINTS[1]], positive, negative, on_domain=on, **statistics(config))
    assert found["order", HOOKPOINTS[1]] == expected
    metrics = {metric for metric, _, _ in found["order", HOOKPOINTS[0]]}
    assert metrics - {metric for metric, _, _ in found[PREFERENCE, HOOKPOINTS[0]]} == {
        "probe/auc_on", "probe/auc_on_refit", "probe/concept_drift",
    }  # fmt: skip


def test_a_sealed_probe_is_read_at_its_place_or_refused(tmp_path: Path) -> None:
    LinearProbe("order", HOOKPOINTS[1], torch.ones(32), 0.0).save(tmp_path / "p.safetensors")
    config, plan = planned(tmp_path, sealed=str(tmp_path / "p.safetensors"))
    table, reading, panels, _ = started(config, plan)
    rows = panel_rows(panels, plan, table, reading, statistics(config))
    assert [(n, h) for n, h, row in rows if row[0] == "probe/sealed_auc"] == [("order", HOOKPOINTS[1])]
    *_, refused = started(config, plan, {"order": HOOKPOINTS[:1]})
    (refusal,) = (refusal for refusal in refused if "sealed" in refusal.readout)
    assert (refusal.readout, refusal.hookpoint) == ("order (sealed probe)", HOOKPOINTS[1])
    assert "not admitted" in refusal.reason


def test_what_one_concept_lacks_costs_no_other(tmp_path: Path) -> None:
    config, plan = planned(tmp_path)
    order, other = sorted(plan.concepts, key=lambda concept: concept.name != "order")
    lone = tuple(replace(pair, group="one") for pair in order.fit), tuple(replace(p, group="one") for p in order.held)
    plan = replace(plan, concepts=(replace(order, fit=lone[0], held=lone[1]), other))
    _, _, panels, refused = started(config, plan)
    assert set(panels) == {(PREFERENCE, HOOKPOINTS[0])}
    (refusal,) = (refusal for refusal in refused if refusal.readout == "order (probes)")
    assert "at least 2 folds and 2 groups" in refusal.reason


def test_a_pack_that_is_named_like_the_preference_direction(tmp_path: Path) -> None:
    settings = small(tmp_path / "run")
    path = Path(settings["concepts"]["packs"][0])
    path.write_text(path.read_text().replace('"pack": "order"', f'"pack": "{PREFERENCE}"'))
    config = InterpConfig.from_mapping(settings)
    with pytest.raises(ConfigError, match=f"found '{PREFERENCE}' twice"):
        make_plan(config, causal_lm(), tokenizer(), train_dataset=preferences(48), eval_dataset=None)
