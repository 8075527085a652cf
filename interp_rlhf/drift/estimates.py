"""What statistics know of a measurement, and the metrics this package emits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

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
        "concept/auc": Metric("1", "B", ("none",)),
        "concept/cosine": Metric("1", "B", ("none",)),
        "concept/behaviour": Metric("nats", "A", ("none",)),
        "concept/behaviour_change": Metric("nats", "A", ("none",)),
        "cost/seconds": Metric("s", "A", ("none",)),
        "cost_fraction": Metric("1", "A", ("none",)),
        "cost/tokens": Metric("tokens", "A", ("none",)),
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
