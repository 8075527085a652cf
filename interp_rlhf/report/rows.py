"""Which timeline rows count, and what one row says by itself. Pure; pandas at use."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, cast

from interp_rlhf.measurement import COLUMNS, Measurement

if TYPE_CHECKING:
    import pandas as pd

#: Representation metrics in the order they are shown.
REPRESENTATION: tuple[str, ...] = (
    "representation/cka",
    "representation/cosine",
    "representation/norm_ratio",
    "representation/effective_rank",
)
#: Share of the wall-clock time since the start of training that measuring took.
COST = "cost_fraction"
#: The metric that verdicts are about.
DRIFT = "concept/drift"


def live(timeline: pd.DataFrame) -> pd.DataFrame:
    """The rows that no resumed segment left behind, of every text and reader."""
    return timeline[~timeline["superseded"].astype(bool)]


def current(timeline: pd.DataFrame) -> pd.DataFrame:
    """The rows that count for verdicts: not superseded, the policy on fixed text."""
    kept = live(timeline)
    return kept[(kept["text"] == "fixed") & (kept["reader"] == "policy")]


def latest(timeline: pd.DataFrame, family: str) -> list[Measurement]:
    """Live rows of the metrics ``family/…``, any text and reader, at the last step that has some."""
    rows = live(timeline)
    rows = rows[rows["metric"].str.startswith(f"{family}/")]
    return measurements(rows[rows["step"] == rows["step"].max()])


def measurements(table: pd.DataFrame) -> list[Measurement]:
    """Table rows as records, missing numbers as ``None``; the inverse of ``Measurement.as_row``."""
    optional = ("ci_low", "ci_high", "null_low", "null_high", "p")
    rows = cast("list[dict[str, Any]]", table[list(COLUMNS)].to_dict("records"))
    for row in rows:
        row.update({name: None for name in optional if math.isnan(number(row[name]))})
    return [Measurement(**row) for row in rows]


def band(row: Measurement) -> tuple[float, float] | None:
    """The row's comparison band, ``None`` where it has none."""
    if row.null_low is None or row.null_high is None:
        return None
    return (row.null_low, row.null_high)


def direction_band(row: Measurement) -> tuple[float, float] | None:
    """The band of comparable directions of a row, ``None`` where its band is of another kind or absent."""
    return band(row) if row.null_kind == "directions" else None


def outside_band(row: Measurement) -> bool | None:
    """Whether the value lies outside the band of comparable directions, ``None`` without such a band."""
    limits = direction_band(row)
    return None if limits is None else not limits[0] <= row.value <= limits[1]


def beyond(row: Measurement, tolerance: float) -> bool:
    """Whether the whole interval lies beyond ±tolerance, on one side."""
    return (row.ci_low is not None and row.ci_low > tolerance) or (row.ci_high is not None and row.ci_high < -tolerance)


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name))


def number(value: float | None) -> float:
    """The value, NaN where there is none."""
    return math.nan if value is None else value
