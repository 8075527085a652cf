"""What statistics know of a measurement, and the metrics this package emits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypedDict

from interp_rlhf.measurement import NullKind, Tier


@dataclass(frozen=True, slots=True)
class Estimate:
    """One number with its uncertainty: the part of a :class:`~interp_rlhf.measurement.Measurement` that is computed.

    Attributes:
        value: the number, in ``unit``.
        ci_low, ci_high: confidence interval, ``None`` where there is none.
        null_kind: what ``null_low``/``null_high`` are the band of.
        null_low, null_high: comparison band, same unit as ``value``; ``None`` where there is none.
        p: rank-based p-value against that null, ``None`` where there is none.
        n: sampling units behind the number.
        tier: comparability tier A to E.
        unit: unit of ``value``.
    """

    value: float
    ci_low: float | None
    ci_high: float | None
    null_kind: NullKind
    null_low: float | None
    null_high: float | None
    p: float | None
    n: int
    tier: Tier
    unit: str


@dataclass(frozen=True, slots=True)
class Metric:
    """The fixed properties of a metric: its unit, its comparability tier, and the kinds of null it may come with."""

    unit: str
    tier: Tier
    nulls: tuple[NullKind, ...]


#: Every metric this release emits. ``docs/metrics.md`` explains each; a test keeps the two equal.
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "representation/cka": Metric("1", "A", ("numeric",)),
        "representation/cosine": Metric("1", "A", ("numeric",)),
        "representation/norm_ratio": Metric("1", "A", ("numeric",)),
        "representation/effective_rank": Metric("1", "A", ("numeric",)),
        "concept/drift": Metric("sd", "B", ("directions", "numeric")),
        "concept/drift_norm": Metric("1", "B", ("none",)),
        "concept/drift_t": Metric("1", "B", ("sign_flip",)),
        "specificity/directions_without_top": Metric("sd", "B", ("directions_without_top",)),
        "specificity/concept_bank": Metric("sd", "B", ("concept_bank",)),
        "concept/auc": Metric("1", "B", ("none",)),
        "concept/cosine": Metric("1", "B", ("refit",)),
        "component/weight_share": Metric("1", "B", ("none",)),
        "concept/behaviour": Metric("nats", "A", ("none",)),
        "concept/behaviour_change": Metric("nats", "A", ("none",)),
        "probe/auc": Metric("1", "C", ("none",)),
        "probe/auc_refit": Metric("1", "C", ("none",)),
        "probe/staleness": Metric("1", "C", ("refit",)),
        "probe/obfuscation_gap": Metric("1", "C", ("none",)),
        "probe/obfuscation_excess": Metric("1", "C", ("none",)),
        "probe/recall": Metric("1", "C", ("none",)),
        "probe/auc_on": Metric("1", "C", ("none",)),
        "probe/auc_on_refit": Metric("1", "C", ("none",)),
        "probe/concept_drift": Metric("1", "C", ("none",)),
        "probe/sealed_auc": Metric("1", "C", ("none",)),
        "probe/baseline_tokens": Metric("1", "C", ("none",)),
        "probe/baseline_length": Metric("1", "C", ("none",)),
        "probe/baseline_shuffled": Metric("1", "C", ("none",)),
        "shift/total": Metric("sd", "B", ("none",)),
        "shift/text": Metric("sd", "B", ("none",)),
        "shift/representation": Metric("sd", "B", ("none",)),
        "shift/representation_on_start": Metric("sd", "B", ("none",)),
        "shift/interaction": Metric("sd", "B", ("none",)),
        "quadrant/honest": Metric("1", "C", ("none",)),
        "quadrant/blatant": Metric("1", "C", ("none",)),
        "quadrant/obfuscated_policy": Metric("1", "C", ("none",)),
        "quadrant/obfuscated_activations": Metric("1", "C", ("none",)),
        "quadrant/unknown": Metric("1", "C", ("none",)),
        "circuit/metric": Metric("1", "A", ("none",)),
        "circuit/metric_corrupt": Metric("1", "A", ("none",)),
        "circuit/effect_ratio": Metric("1", "A", ("none",)),
        "circuit/faithfulness_index": Metric("1", "B", ("random_circuits",)),
        "circuit/faithfulness_matched": Metric("1", "B", ("random_circuits",)),
        "circuit/faithfulness_own": Metric("1", "B", ("random_circuits",)),
        "circuit/faithfulness_control": Metric("1", "B", ("random_circuits",)),
        "circuit/structure_change": Metric("1", "A", ("none",)),
        "circuit/structure_jaccard": Metric("1", "A", ("none",)),
        "circuit/structure_spearman": Metric("1", "A", ("none",)),
        "circuit/structure_top": Metric("1", "A", ("none",)),
        "circuit/seconds": Metric("s", "A", ("none",)),
        "causal/share_restored": Metric("1", "B", ("random_directions",)),
        "causal/share_injected": Metric("1", "B", ("random_directions",)),
        "causal/nll_change": Metric("nats", "B", ("none",)),
        "cost/seconds": Metric("s", "A", ("none",)),
        "cost_fraction": Metric("1", "A", ("none",)),
        "cost/tokens": Metric("tokens", "A", ("none",)),
        "cost/rollout_seconds": Metric("s", "A", ("none",)),
        "cost/rollout_tokens": Metric("tokens", "A", ("none",)),
    }
)


def estimate(
    metric: str,
    value: float,
    n: int,
    *,
    interval: tuple[float, float] | None = None,
    null_kind: NullKind = "none",
    band: tuple[float, float] | None = None,
    p: float | None = None,
) -> Estimate:
    """An estimate of ``metric``, with the unit and tier that :data:`METRICS` gives it."""
    low, high = interval or (None, None)
    null_low, null_high = band or (None, None)
    known = METRICS[metric]
    return Estimate(value, low, high, null_kind, null_low, null_high, p, n, known.tier, known.unit)


class IntervalOptions(TypedDict):
    """Keyword arguments of every estimate that has a bootstrap interval."""

    resamples: int
    confidence: float
    seed: int
