"""The one record that travels from the measurements to the log, the timeline, the snapshots and the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Text = Literal["fixed", "rollout"]
Source = Literal["evaluation", "training", "named"]
Reader = Literal["policy", "reference"]
NullKind = Literal[
    "directions",
    "directions_without_top",
    "concept_bank",
    "sign_flip",
    "control_run",
    "refit",
    "numeric",
    "random_circuits",
    "random_directions",
    "none",
]
Tier = Literal["A", "B", "C", "D", "E"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number, with what it was compared with. Already a row of the timeline table.

    Attributes:
        segment: 1 for the first run of an output folder, one more after every resume.
        step: optimizer steps done when the weights that were read existed.
        metric: a name from ``docs/metrics.md`` (for example ``concept/drift``).
        readout: what was read, a concept's name, or ``""`` for metrics of the whole representation.
        hookpoint: resolved name (``layers.3.resid_post``), or ``""`` for metrics without one (behaviour).
        scope: which tokens entered: ``all``, ``prompt`` or ``completion``.
        text: ``fixed`` audit text or the policy's own ``rollout``.
        source: where the audit text came from.
        reader: whose activations were read.
        value: the number, in ``unit``.
        ci_low, ci_high: confidence interval (95 % unless configured), ``None`` where there is none.
        null_kind: what ``null_low``/``null_high`` are the band of.
        null_low, null_high: the comparison band, same unit as ``value``.
        p: rank-based p-value against that null, ``None`` where there is none.
        n: sampling units (prompts or pairs) behind the number.
        tier: comparability tier A to E (METHODS: A no fit, B closed form, C convex fit, D, E).
        unit: unit of ``value`` (``sd``, ``nats``, ``1`` …).
    """

    segment: int
    step: int
    metric: str
    readout: str
    hookpoint: str
    scope: str
    text: Text
    source: Source
    reader: Reader
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

    def as_row(self) -> dict[str, Any]:
        """The record as a JSON-ready mapping, in field order."""
        return asdict(self)


#: Column names of the timeline table, in order.
COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(Measurement))
