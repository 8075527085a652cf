"""Tables of the report: rows by concept and hookpoint, one column per metric and reader. Numbers stay rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from interp_rlhf.measurement import Measurement
from interp_rlhf.report.rows import natural


@dataclass(frozen=True, slots=True)
class Column:
    """One column: a metric read by somebody.

    Attributes:
        metric: a name from ``docs/metrics.md``.
        title: the heading.
        anchor: element id of the metric's explanation on the page.
        reader: ``policy`` or ``reference``; empty takes whoever read it.
        format: printf format of its numbers.
        band: show the band of its null and p too.
        value: show the value; off where it is another column's.
    """

    metric: str
    title: str
    anchor: str
    reader: str = ""
    format: str = "%.3f"
    band: bool = False
    value: bool = True


@dataclass(frozen=True, slots=True)
class Line:
    """One line: a concept, a hookpoint (empty where the metrics have none), a row or nothing per column."""

    concept: str
    hookpoint: str
    cells: tuple[Measurement | None, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table. ``step`` is when its numbers were measured, ``None`` for an empty one."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    step: int | None

    def __bool__(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.lines)


#: All readings of a concept, with everything they are compared with.
READINGS: tuple[Column, ...] = (
    Column("concept/drift", "drift (SD); directions", "metric-drift", format="%+.3f", band=True),
    Column("specificity/directions_without_top", "without top", "metric-specificity", "", "%+.3f", True, False),
    Column("specificity/concept_bank", "concept bank", "metric-specificity", "", "%+.3f", True, False),
    Column("concept/drift_t", "t; maxT", "metric-drift_t", format="%+.2f", band=True),
    Column("concept/drift_norm", "drift / ‖h‖", "metric-drift_norm", format="%+.3f"),
    Column("concept/auc", "held-out AUC", "metric-auc"),
    Column("concept/cosine", "cosine, refitted", "metric-refit", band=True),
)
PROBES: tuple[Column, ...] = (
    Column("probe/auc", "AUC, frozen", "metric-probe", "policy"),
    Column("probe/auc", "AUC, frozen, on the start", "metric-probe", "reference"),
    Column("probe/auc_refit", "AUC, refitted", "metric-probe"),
    Column("probe/staleness", "staleness", "metric-staleness", format="%+.3f", band=True),
    Column("probe/obfuscation_gap", "obfuscation gap", "metric-gap", format="%+.3f"),
    Column("probe/obfuscation_excess", "beyond a refit's loss", "metric-gap", format="%+.3f"),
    Column("probe/recall", "recall", "metric-recall"),
    Column("probe/sealed_auc", "AUC, sealed", "metric-sealed"),
    Column("probe/baseline_tokens", "tokens only", "metric-baselines"),
    Column("probe/baseline_length", "length only", "metric-baselines"),
    Column("probe/baseline_shuffled", "sides shuffled", "metric-baselines"),
    Column("probe/auc_on", "AUC on-domain", "metric-on"),
    Column("probe/auc_on_refit", "on-domain, refitted", "metric-on"),
    Column("probe/concept_drift", "on- minus off-domain", "metric-on", format="%+.3f"),
)
SHIFT: tuple[Column, ...] = (
    Column("shift/total", "total", "metric-shift", format="%+.3f"),
    Column("shift/text", "text", "metric-shift", format="%+.3f"),
    Column("shift/representation", "representation", "metric-shift", format="%+.3f"),
    Column("shift/representation_on_start", "representation, on the start's text", "metric-shift", format="%+.3f"),
    Column("shift/interaction", "interaction", "metric-shift", format="%+.3f"),
)
QUADRANT: tuple[Column, ...] = (
    Column("quadrant/honest", "honest", "metric-quadrant"),
    Column("quadrant/blatant", "blatant", "metric-quadrant"),
    Column("quadrant/obfuscated_policy", "obfuscated policy", "metric-quadrant"),
    Column("quadrant/obfuscated_activations", "obfuscated activations", "metric-quadrant"),
    Column("quadrant/unknown", "no label", "metric-quadrant"),
)
CAUSES: tuple[Column, ...] = (
    Column("component/weight_share", "share through weights", "metric-components", format="%.2f"),
    Column("causal/share_restored", "behaviour undone by restoring", "metric-causal", format="%+.2f", band=True),
    Column("causal/share_injected", "behaviour brought by injecting", "metric-causal", format="%+.2f", band=True),
    Column("causal/nll_change", "damage of restoring (nats)", "metric-causal", format="%+.3f"),
)


def grid(
    rows: Sequence[Measurement], columns: Sequence[Column], concepts: Sequence[str], *, keep: bool = False
) -> Grid:
    """The rows of one step as a table.

    Args:
        rows: rows of one step; those of other metrics are left out.
        columns: in order; those without any row are dropped.
        concepts: in order; others follow by name.
        keep: keep columns without rows, so that what was not measured is seen.
    """
    found: dict[tuple[str, str, str, str], Measurement] = {}
    for row in sorted(rows, key=lambda r: r.reader == "policy"):  # where anybody's will do, the policy's
        for reader in ("", row.reader):
            found[row.readout, row.hookpoint, row.metric, reader] = row
    wanted = {column.metric for column in columns}
    have = {(row.metric, reader) for row in rows for reader in ("", row.reader)}
    shown = tuple(column for column in columns if keep or (column.metric, column.reader) in have)
    places = {(row.readout, row.hookpoint) for row in rows if row.metric in wanted}
    order = {name: place for place, name in enumerate(concepts)}
    lines = tuple(
        Line(name, place, tuple(found.get((name, place, c.metric, c.reader)) for c in shown))
        for name, place in sorted(places, key=lambda p: (order.get(p[0], len(order)), p[0], natural(p[1])))
    )
    return Grid(shown, lines, rows[0].step if lines else None)
