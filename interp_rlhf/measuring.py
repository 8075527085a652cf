"""From a reading to rows: every metric of ``docs/metrics.md``, as a pure function of the baseline and the reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from interp_rlhf.baseline import Baseline, audit_readings, sides, statistics, unrelated
from interp_rlhf.config import InterpConfig
from interp_rlhf.drift.concepts import (
    auc_estimate,
    behaviour_change_estimate,
    behaviour_estimate,
    drift_estimate,
    drift_norm_estimate,
    refit_cosine_estimate,
    specificity_estimates,
    standardised_drift,
)
from interp_rlhf.drift.estimates import Estimate, estimate
from interp_rlhf.drift.nulls import numeric_band
from interp_rlhf.drift.representation import representation_estimates
from interp_rlhf.drift.sign_flips import drift_t_estimates
from interp_rlhf.measurement import Measurement, Reader, Source, Text
from interp_rlhf.panels import panel_rows
from interp_rlhf.plan import ConceptTexts
from interp_rlhf.reading import Reading
from interp_rlhf.readouts.directions import Direction


class _Row(NamedTuple):
    metric: str
    readout: str
    hookpoint: str
    estimate: Estimate
    reader: Reader = "policy"


def drift_rows(
    baseline: Baseline, reading: Reading, config: InterpConfig, segment: int, step: int
) -> tuple[Measurement, ...]:
    """All rows of one measurement of the weights at ``step``, compared with the baseline."""
    rows = [
        *_representation(baseline, reading, config),
        *_concepts(baseline, reading, config, at_start=False),
        *_claims(baseline, reading, config),
        *_panels(baseline, reading, config),
    ]
    return tuple(_measurement(row, baseline, config, segment, step) for row in rows)


def start_rows(baseline: Baseline, config: InterpConfig, segment: int, step: int) -> tuple[Measurement, ...]:
    """Rows of the start: the same weights read twice, so that every value shows what numerical noise alone does."""
    rows = [
        *_representation(baseline, baseline.again, config),
        *_concepts(baseline, baseline.again, config, at_start=True),
        *_panels(baseline, baseline.again, config),
    ]
    return tuple(_measurement(row, baseline, config, segment, step) for row in rows)


def cost_rows(
    baseline: Baseline, segment: int, step: int, *, seconds: float, fraction: float, tokens: int
) -> tuple[Measurement, ...]:
    """What a measurement cost: its seconds and tokens, and the share of the training's time spent measuring so far."""
    values = {"cost/seconds": seconds, "cost/tokens": float(tokens), "cost_fraction": fraction}
    return tuple(
        as_measurement(metric, "", "", estimate(metric, value, 0), "all", baseline.plan.audit.source, segment, step)
        for metric, value in values.items()
    )


def _representation(baseline: Baseline, reading: Reading, config: InterpConfig) -> Iterator[_Row]:
    if not config.representation:
        return
    for hookpoint, x0 in baseline.x0.items():
        xt = audit_readings(reading, baseline.table, baseline.plan, hookpoint)
        found = representation_estimates(x0, xt, floor=baseline.floor[hookpoint], **statistics(config))
        for metric, value in found.items():
            yield _Row(metric, "", hookpoint, value)


def _concepts(baseline: Baseline, reading: Reading, config: InterpConfig, *, at_start: bool) -> Iterator[_Row]:
    options = statistics(config)
    moved = {name: audit_readings(reading, baseline.table, baseline.plan, name) for name in baseline.plan.hookpoints}
    for concept in baseline.concepts:
        for hookpoint, direction in concept.directions.items():
            x0, xt, v = baseline.x0[hookpoint], moved[hookpoint], direction.vector
            comparison = None if at_start else baseline.comparison[hookpoint]
            yield _Row("concept/drift", concept.name, hookpoint, drift_estimate(x0, xt, v, comparison, **options))
            yield _Row("concept/drift_norm", concept.name, hookpoint, drift_norm_estimate(x0, xt, v, **options))
            if concept.texts is not None:
                yield from _separation(baseline, concept.texts, direction, reading, config)
        if concept.texts is not None and baseline.plan.behaviour:
            yield from _behaviour(baseline, concept.texts, reading, config)


def _claims(baseline: Baseline, reading: Reading, config: InterpConfig) -> Iterator[_Row]:
    """The other nulls of every drift: joint sign flips, comparable directions of two more kinds."""
    confidence, moved = config.statistics.confidence, {}
    for concept in baseline.concepts:
        for hookpoint, direction in concept.directions.items():
            x0, v = baseline.x0[hookpoint], direction.vector
            xt = audit_readings(reading, baseline.table, baseline.plan, hookpoint)
            moved[concept.name, hookpoint] = _beyond_noise(baseline, hookpoint, v, standardised_drift(x0, xt, v))
            bank = unrelated(baseline.bank[hookpoint], v)
            found = specificity_estimates(
                x0, xt, v, baseline.without_top.get(hookpoint), bank if len(bank) else None, confidence
            )
            for metric, value in found.items():
                yield _Row(metric, concept.name, hookpoint, value)
    if moved:
        together = torch.stack(list(moved.values()), dim=1)
        for (name, hookpoint), value in zip(
            moved, drift_t_estimates(together, confidence=confidence, seed=config.seed), strict=True
        ):
            yield _Row("concept/drift_t", name, hookpoint, value)


def _beyond_noise(baseline: Baseline, hookpoint: str, v: Tensor, d: Tensor) -> Tensor:
    """``d`` of one readout, zeros where its mean size is inside the numeric floor: t knows no size, noise has one too.

    The size is the same after any flip of signs, so that the test stays one.
    """
    again = audit_readings(baseline.again, baseline.table, baseline.plan, hookpoint)
    _, floor = numeric_band(0.0, standardised_drift(baseline.x0[hookpoint], again, v))
    return d if float(d.abs().mean()) > floor else torch.zeros_like(d)


def _panels(baseline: Baseline, reading: Reading, config: InterpConfig) -> Iterator[_Row]:
    rows = panel_rows(baseline.panels, baseline.plan, baseline.table, reading, statistics(config))
    for name, hookpoint, (metric, reader, value) in rows:
        yield _Row(metric, name, hookpoint, value, reader)


def _separation(
    baseline: Baseline, concept: ConceptTexts, direction: Direction, reading: Reading, config: InterpConfig
) -> Iterator[_Row]:
    """Does the step-0 direction still separate the held-out pairs, and where does a refit of it point?"""
    options, hookpoint = statistics(config), direction.hookpoint
    held = (direction.project(side) for side in sides(reading, baseline.table, concept, hookpoint, "held"))
    yield _Row("concept/auc", concept.name, hookpoint, auc_estimate(*held, **options))
    if config.concepts.refit:
        start = sides(baseline.start, baseline.table, concept, hookpoint, "fit")
        now = sides(reading, baseline.table, concept, hookpoint, "fit")
        yield _Row("concept/cosine", concept.name, hookpoint, refit_cosine_estimate(*start, *now, **options))


def _behaviour(baseline: Baseline, concept: ConceptTexts, reading: Reading, config: InterpConfig) -> Iterator[_Row]:
    options = statistics(config)
    start, now = _gaps(baseline, concept, baseline.start), _gaps(baseline, concept, reading)
    yield _Row("concept/behaviour", concept.name, "", behaviour_estimate(now, **options))
    yield _Row("concept/behaviour_change", concept.name, "", behaviour_change_estimate(start, now, **options))


def _gaps(baseline: Baseline, concept: ConceptTexts, reading: Reading) -> Tensor:
    """``log p(positive) − log p(negative)`` of each held-out pair, ``[n]`` nats."""
    positive = baseline.table.rows([pair.positive for pair in concept.held])
    negative = baseline.table.rows([pair.negative for pair in concept.held])
    return reading.log_probs[positive] - reading.log_probs[negative]


def _measurement(row: _Row, baseline: Baseline, config: InterpConfig, segment: int, step: int) -> Measurement:
    metric, readout, hookpoint, value, reader = row
    audit = baseline.plan.audit
    if metric.startswith("concept/behaviour"):
        scope = "completion"
    else:
        answered = any(prompt.completion_start < len(prompt.input_ids) for prompt in audit.prompts)
        scope = config.prompts.tokens if answered or config.prompts.tokens != "completion" else "all"
    on_pairs = metric.startswith(("concept/auc", "concept/cosine", "concept/behaviour", "probe/"))
    concept = next((c for c in baseline.concepts if c.name == readout), None)
    from_pack = on_pairs and concept is not None and concept.texts is not None and concept.texts.source == "named"
    source = "named" if from_pack else audit.source
    return as_measurement(metric, readout, hookpoint, value, scope, source, segment, step, reader=reader)


def as_measurement(
    metric: str,
    readout: str,
    hookpoint: str,
    value: Estimate,
    scope: str,
    source: Source,
    segment: int,
    step: int,
    *,
    reader: Reader = "policy",
    text: Text = "fixed",
) -> Measurement:
    """An estimate as a row of the timeline."""
    return Measurement(
        segment=segment,
        step=step,
        metric=metric,
        readout=readout,
        hookpoint=hookpoint,
        scope=scope,
        text=text,
        source=source,
        reader=reader,
        value=value.value,
        ci_low=value.ci_low,
        ci_high=value.ci_high,
        null_kind=value.null_kind,
        null_low=value.null_low,
        null_high=value.null_high,
        p=value.p,
        n=value.n,
        tier=value.tier,
        unit=value.unit,
    )
