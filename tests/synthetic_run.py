"""A run made of Measurement rows only: what the report reads, without a model, a trainer or files."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_rlhf.audit.store import RunStore
from interp_rlhf.measurement import COLUMNS, Measurement
from interp_rlhf.report.controls import Controls, ControlTable
from interp_rlhf.report.rows import current

#: What every run read at its start.
START = {"text_ids": np.arange(4), "start/layers.0.resid_post": np.ones((4, 2), dtype=np.float32)}
HOOKPOINTS = tuple(f"layers.{layer}.resid_post" for layer in (0, 1, 2, 3))


@dataclass(frozen=True)
class SyntheticSnapshot:
    """The fields of a snapshot that the report shows."""

    name: str
    segment: int
    step: int
    digest: str
    parent: str | None

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(START)


@dataclass
class SyntheticRun:
    """The protocol of ``audit.store.Run`` that the report relies on."""

    path: Path
    info: Mapping[str, Any]
    rows: Sequence[Measurement]
    superseded: Sequence[bool]
    events: list[dict[str, Any]] = field(default_factory=list)
    snapshots: Sequence[SyntheticSnapshot] = ()

    def timeline(self) -> pd.DataFrame:
        table = pd.DataFrame([[getattr(row, name) for name in COLUMNS] for row in self.rows], columns=list(COLUMNS))
        table["superseded"] = list(self.superseded)
        return table


def row(metric: str, readout: str, hookpoint: str, step: int, value: float, **changes: Any) -> Measurement:
    """One Measurement with the usual values in the fields that a test does not care about."""
    numeric = metric.startswith("representation/") or (metric == "concept/drift" and step == 0)
    fields: dict[str, Any] = {
        "segment": 1, "scope": "completion", "text": "fixed", "source": "evaluation", "reader": "policy",
        "ci_low": None, "ci_high": None, "null_kind": "numeric" if numeric else "none",
        "null_low": None, "null_high": None, "p": None, "n": 64, "tier": "B" if readout else "A", "unit": "1",
    }  # fmt: skip
    return Measurement(
        **(
            fields
            | {"step": step, "metric": metric, "readout": readout, "hookpoint": hookpoint, "value": value}
            | changes
        )
    )


def drift_row(readout: str, hookpoint: str, step: int, value: float, **changes: Any) -> Measurement:
    """A ``concept/drift`` row with interval ±0.05 and the comparison band ±0.4."""
    band = (
        {"null_kind": "directions", "null_low": -0.4, "null_high": 0.4}
        if step
        else {"null_low": -1e-6, "null_high": 1e-6}
    )
    usual = {"ci_low": value - 0.05, "ci_high": value + 0.05, "p": 0.02 if step else None, "unit": "sd"} | band
    return row("concept/drift", readout, hookpoint, step, value, **(usual | changes))


def make_run(
    path: Path,
    *,
    concepts: Sequence[str] = ("agreeing with the user", "refusal", "hedging", "politeness"),
    hookpoints: Sequence[str] = HOOKPOINTS,
    steps: Sequence[int] = (0, 10, 20, 30, 40),
    resumed_at: int | None = None,
    events: Sequence[Mapping[str, Any]] = (),
) -> SyntheticRun:
    """A run whose first concept moves most, each further one half as much; the second changes no behaviour."""
    rng, rows, superseded = random.Random(7), [], []
    for step in steps:
        part = step / max(*steps, 1)
        fresh = _step_rows(rng, concepts, hookpoints, step, part)
        if resumed_at is not None and step > resumed_at:
            rows += fresh
            superseded += [True] * len(fresh)
            fresh = [Measurement(**(r.as_row() | {"segment": 2, "value": r.value + 0.01})) for r in fresh]
        rows += fresh
        superseded += [False] * len(fresh)
    return SyntheticRun(path, _info(), rows, superseded, [dict(event) for event in events], _chain(steps))


def _step_rows(
    rng: random.Random, concepts: Sequence[str], hookpoints: Sequence[str], step: int, part: float
) -> list[Measurement]:
    rows = []
    for depth, hookpoint in enumerate(hookpoints):
        share = (depth + 1) / len(hookpoints) * part
        rows += [
            row("representation/cka", "", hookpoint, step, 1 - 0.2 * share),
            row("representation/cosine", "", hookpoint, step, 1 - 0.05 * share),
            row("representation/norm_ratio", "", hookpoint, step, 1 + 0.1 * share),
            row("representation/effective_rank", "", hookpoint, step, 12 - 3 * share),
        ]
        for index, concept in enumerate(concepts):
            value = 1.5 * (-0.5) ** index * share + rng.gauss(0, 0.02) * part
            rows += [
                drift_row(concept, hookpoint, step, value),
                row("concept/drift_norm", concept, hookpoint, step, value / 9),
                row("concept/auc", concept, hookpoint, step, 0.9 - 0.1 * share, ci_low=0.8 - 0.1 * share, ci_high=0.95),
                row("concept/cosine", concept, hookpoint, step, math.cos(share), ci_low=None, ci_high=None),
            ]
    for index, concept in enumerate(concepts):
        change = 0.0 if index == 1 else 2.0 * (-0.5) ** index * part
        rows.append(row("concept/behaviour", concept, "", step, 0.3 + change, unit="nats", n=32))
        rows.append(
            row("concept/behaviour_change", concept, "", step, change, unit="nats", n=32, ci_low=change - 0.2 * part,
                ci_high=change + 0.2 * part)
        )  # fmt: skip
    rows.append(row("cost_fraction", "", "", step, 0.02 - 0.01 * part))
    return rows


def _info() -> dict[str, Any]:
    return {
        "config": {"hookpoints": ["layers.25%.resid_post"], "statistics": {"tolerance": 0.1, "confidence": 0.95}},
        "versions": {"trl": "1.12.0", "transformers": "5.23.0", "torch": "2.13.0"},
        "model": {"class": "LlamaForCausalLM", "name": "a-tiny-model", "config_sha256": "cd" * 32},
        "trainer": "DPOTrainer",
        "hookpoints": list(HOOKPOINTS),
        "prompts": {"name": "evaluation", "source": "evaluation", "n": 64, "skipped": 0, "sha256": "ab" * 32},
        "chat_template_sha256": None,
    }


def _chain(steps: Sequence[int]) -> list[SyntheticSnapshot]:
    names = [f"01-step-{step:06d}" for step in steps]
    return [
        SyntheticSnapshot(name, 1, step, f"{step:064x}", parent)
        for name, step, parent in zip(names, steps, [None, *names[:-1]], strict=False)
    ]


def with_panels(run: SyntheticRun) -> SyntheticRun:
    """The run with rows of every further kind at its last step: nulls, probes, sampled completions, quadrant.

    The bank holds concept 2 as like it; θ_0 was not kept for concept 3, whose representation part is missing.
    """
    last = max(r.step for r in run.rows)
    drifts = [r for r in run.rows if r.metric == "concept/drift" and r.step == last]
    rows: list[Measurement] = []
    concepts = list(dict.fromkeys(r.readout for r in drifts))
    for drift in drifts:
        index, at = concepts.index(drift.readout), (drift.readout, drift.hookpoint, last)
        wide = 9.0 if index == 2 else 0.3
        rows += [
            row("specificity/directions_without_top", *at, drift.value, unit="sd",
                null_kind="directions_without_top", null_low=-0.25, null_high=0.25, p=0.01),
            row("specificity/concept_bank", *at, drift.value, unit="sd", null_kind="concept_bank", null_low=-wide,
                null_high=wide, p=0.03),
            row("concept/drift_t", *at, 9 * drift.value, null_kind="sign_flip", null_low=-3.0, null_high=3.0, p=0.002),
        ]  # fmt: skip
        rows += _probe_rows(at, 0.2 * abs(drift.value)) + _rollout_rows(at, drift.value, reference=index != 3)
    for name in concepts:
        for share, part in (("honest", 0.5), ("blatant", 0.25), ("obfuscated_policy", 0.125),
                            ("obfuscated_activations", 0.0625), ("unknown", 0.0625)):  # fmt: skip
            rows.append(row(f"quadrant/{share}", name, HOOKPOINTS[-1], last, part, text="rollout", tier="C"))
    run.rows, run.superseded = [*run.rows, *rows], [*run.superseded, *[False] * len(rows)]
    return run


def _probe_rows(at: tuple[str, str, int], lost: float) -> list[Measurement]:
    def probe(name: str, value: float, **changes: Any) -> Measurement:
        return row(f"probe/{name}", *at, value, **({"tier": "C"} | changes))

    return [
        probe("auc", 0.9 - lost, ci_low=0.8 - lost, ci_high=0.95 - lost),
        probe("auc", 0.9, ci_low=0.8, ci_high=0.95, reader="reference"),
        probe("auc_refit", 0.88, ci_low=0.8, ci_high=0.95),
        probe("staleness", lost - 0.02, null_kind="refit", null_low=-0.03, null_high=0.03),
        probe("obfuscation_gap", lost),
        probe("obfuscation_excess", lost - 0.02),
        probe("recall", 0.8 - lost),
        probe("baseline_tokens", 0.6),
        probe("baseline_length", 0.55),
        probe("baseline_shuffled", 0.5),
    ]


def _rollout_rows(at: tuple[str, str, int], value: float, *, reference: bool) -> list[Measurement]:
    def shift(name: str, part: float) -> Measurement:
        interval = {"ci_low": part - 0.1, "ci_high": part + 0.1}
        return row(f"shift/{name}", *at, part, text="rollout", unit="sd", n=32, **interval)

    parts = [shift("total", value), shift("text", 0.4 * value)]
    kept = [shift("representation", 0.6 * value), shift("representation_on_start", 0.5 * value),
            shift("interaction", 0.1 * value)]  # fmt: skip
    return parts + (kept if reference else [])


def circuit_rows(task: str, step: int, **values: float | None) -> list[Measurement]:
    """The ``circuit/*`` rows of one task at one step; ``None`` leaves a metric out."""
    usual = {"metric": 2.0, "metric_corrupt": -1.0, "effect_ratio": 1.0, "structure_change": 0.3 * (step > 0)}
    usual |= dict.fromkeys(("faithfulness_index", "faithfulness_matched", "faithfulness_own"), 0.9)
    usual |= {"faithfulness_control": 0.1, "seconds": 2.5}
    rows = []
    for name, value in (usual | values).items():
        if value is not None:
            bounds = {} if name == "seconds" else {"ci_low": value - 0.06, "ci_high": value + 0.05}
            if name.startswith("faithfulness"):
                bounds |= {"null_kind": "random_circuits", "null_low": -0.05, "null_high": 0.12, "p": 0.05}
            kind = {"source": "named", "scope": "all", "tier": "B" if "faith" in name else "A", "n": 24}
            rows.append(row(f"circuit/{name}", task, "", step, value, **(bounds | kind)))
    return rows


def circuit_event(
    task: str,
    step: int,
    *,
    layers: int = 5,
    heads: int = 8,
    kv_heads: int = 8,
    n: int = 150,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """A ``circuit`` event with ``n`` random edges of a model of this size; equal seeds share most of their edges."""
    rng = random.Random(seed)
    sources = ["embed", *(f"a{i}.h{h}" for i in range(layers) for h in range(heads)), *(f"m{i}" for i in range(layers))]
    depth = {"embed": -1.0} | {f"m{i}": i + 0.5 for i in range(layers)}
    depth |= {f"a{i}.h{h}": float(i) for i in range(layers) for h in range(heads)}
    targets = {f"a{i}.h{h}.q": float(i) for i in range(layers) for h in range(heads)}
    targets |= {f"a{i}.h{h}.{x}": float(i) for i in range(layers) for h in range(kv_heads) for x in "kv"}
    targets |= {f"m{i}": i + 0.5 for i in range(layers)} | {"logits": float(layers)}
    possible = [(u, v) for u in sources for v, reads in targets.items() if depth[u] < reads]
    chosen = {edge: rng.choice((-1, 1, 1)) * rng.paretovariate(1.5) / 10 for edge in rng.sample(possible, n)}
    moved = random.Random(f"{seed} {step}")
    spare = [edge for edge in possible if edge not in chosen]
    for edge, other in zip(
        moved.sample(sorted(chosen), n // 3 * (step > 0)), moved.sample(spare, n // 3), strict=False
    ):
        del chosen[edge]
        chosen[other] = moved.uniform(-0.5, 0.5)
    edges = [[u, v, score * (1 + 0.2 * (step > 0))] for (u, v), score in chosen.items()]
    return {
        "event": "circuit", "task": task, "step": step, "architecture": "LlamaForCausalLM", "layers": layers,
        "heads": heads, "kv_heads": kv_heads, "parallel": False, "size": n, "possible": len(possible), "dropped": 0,
        "edges": sorted(edges, key=lambda e: -abs(e[2])),
    } | more  # fmt: skip


def components_event(readout: str, hookpoint: str, step: int, total: float = 0.8, n: int = 14) -> dict[str, Any]:
    """A ``components`` event: heads and MLPs, each bringing less than the one before, the embedding not split."""
    parts: list[list[Any]] = []
    for i in range(n):
        change = total * 0.5 * (-0.75) ** i
        split = [None, None] if i == 3 else [0.7 * change, 0.3 * change] if i % 2 else [1.3 * change, -0.3 * change]
        name = "embed" if i == 3 else f"m{i}" if i % 2 else f"a{i}.h{i}"
        parts.append([name, change, change - 0.04, change + 0.05, *split])
    rest = total - sum(part[1] for part in parts)
    return {"event": "components", "step": step, "readout": readout, "hookpoint": hookpoint, "total": total,
            "parts": parts, "rest": rest}  # fmt: skip


#: Faithfulness and effect at the end that lead to each verdict.
ENDINGS: Mapping[str, Mapping[str, float | None]] = {
    "same": {},
    "relocated": {"faithfulness_index": 0.3},
    "different": {"faithfulness_index": 0.3, "faithfulness_matched": 0.35},
    "diffuse": {"faithfulness_index": 0.3, "faithfulness_matched": 0.35, "faithfulness_own": 0.4},
    "lost": {"effect_ratio": 0.05} | dict.fromkeys(
        ("faithfulness_index", "faithfulness_matched", "faithfulness_own", "faithfulness_control")
    ),
    "undetermined": {"faithfulness_index": 0.3, "faithfulness_matched": None},
}  # fmt: skip


def with_circuits(run: SyntheticRun, tasks: Mapping[str, str], steps: Sequence[int] = (0, 10, 20, 40)) -> SyntheticRun:
    """``run`` with the rows and events of tasks whose mechanism ends as told (:data:`ENDINGS`)."""
    rows, last = [], max(steps)
    for seed, (task, word) in enumerate(tasks.items()):
        for step in steps:
            end = {name: value for name, value in ENDINGS[word].items() if step == last or (value is not None and step)}
            part = step / last
            usual = {"effect_ratio": 1.0} | dict.fromkeys(ENDINGS["diffuse"], 0.9)
            between = {k: v if v is None else usual[k] + part * (v - usual[k]) for k, v in end.items()}
            rows += circuit_rows(task, step, **between)
            run.events.append(circuit_event(task, step, seed=seed))
        if word in ("different", "diffuse", "lost"):
            run.events.append({"event": "alarm", "step": last, "task": task, "word": word, "reason": f"{word} now."})
    run.rows, run.superseded = [*run.rows, *rows], [*run.superseded, *[False] * len(rows)]
    return run


def control_rows(
    run: SyntheticRun, *, scale: float = 0.2, seed: int = 0, metrics: Sequence[str] = ("concept/drift",)
) -> list[Measurement]:
    """Rows of a control run of ``run``: its drifts, shrunk to random numbers of about ``scale`` SD."""
    rng = random.Random(seed)
    factor = {name: rng.gauss(0, scale) for name in sorted({r.readout for r in run.rows})}
    last, found = max(r.step for r in run.rows), []
    for r in run.rows:
        if r.metric in metrics:
            value = factor[r.readout] * r.step / last + rng.gauss(0, 0.01) * (r.step > 0)
            found.append(replace(r, value=value, ci_low=value - 0.05, ci_high=value + 0.05))
    return found


def controls_of(run: SyntheticRun, k: int, **changes: Any) -> Controls:
    """``k`` control runs of ``run`` that may be compared, without files."""
    tables = []
    for number in range(1, k + 1):
        rows = control_rows(run, seed=number, **changes)
        table = current(SyntheticRun(Path("control"), {}, rows, [False] * len(rows)).timeline())
        tables.append(ControlTable(f"{number:02d}", "pairs swapped", table))
    return Controls(tuple(tables))


def store_run(
    folder: Path, info: Mapping[str, Any], rows: Sequence[Measurement], events: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write rows and events as a run of ``folder``, with a run file and a timeline."""
    store = RunStore(folder)
    store.start(info, resumed_from=None)
    store.append(rows)
    store.snapshot(0, [], START)
    for event in events:
        store.event(event["event"], **{name: part for name, part in event.items() if name != "event"})


def store_controls(run: SyntheticRun, k: int, folder: Path, **changes: Any) -> None:
    """Write ``k`` control runs of ``run`` below ``folder/_controls``."""
    for number in range(1, k + 1):
        info = {**run.info, "control": {"number": number, "kind": "pairs swapped", "changed": 12}}
        store_run(folder / "_controls" / f"{number:02d}", info, control_rows(run, seed=number, **changes))
