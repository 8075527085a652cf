"""A run made of Measurement rows only: what the report reads, without a model, a trainer or files."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from interp_rlhf.measurement import COLUMNS, Measurement

HOOKPOINTS = tuple(f"layers.{layer}.resid_post" for layer in (0, 1, 2, 3))


@dataclass(frozen=True)
class SyntheticSnapshot:
    """The fields of a snapshot that the report shows."""

    name: str
    segment: int
    step: int
    digest: str
    parent: str | None


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
