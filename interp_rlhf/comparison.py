"""Runs and checkpoints side by side: what each moved, and whether the difference between two is more than chance.

Runs that were attached are compared by what they recorded. Where a model folder is among the arguments, the first one
is θ_0 (of a run: its step 0) and every other is read on the same texts. The difference of two drifts is taken prompt by
prompt, in standard deviations of the first's step 0, so that what prompts have in common cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from interp_rlhf.activations.engines import unchanged_random_states
from interp_rlhf.activations.reference import SAME_READING, reading_difference
from interp_rlhf.audit.store import Run, load_run
from interp_rlhf.audit.timeline import to_frame
from interp_rlhf.baseline import FIRST, Baseline, audit_readings, statistics
from interp_rlhf.checkpoints import checkpoint_step, names_its_base
from interp_rlhf.comparison_lines import comparison_lines
from interp_rlhf.config import InterpConfig
from interp_rlhf.drift.nulls import paired_bootstrap
from interp_rlhf.errors import ConfigError, FormatError
from interp_rlhf.measurement import Measurement
from interp_rlhf.offline import summary_of
from interp_rlhf.plan import TextTable
from interp_rlhf.reading import Reading
from interp_rlhf.report.controls import Controls, ControlTable, find_controls
from interp_rlhf.report.tables import Summary, current, natural, summarise
from interp_rlhf.starts import (
    MEANS,
    Place,
    Start,
    circuit_rows_of,
    component_rows_of,
    first_snapshot,
    is_run,
    last_snapshot,
    load_for,
    own_run,
    read_model,
    start_of_model,
    start_of_run,
    stored_reading,
)

if TYPE_CHECKING:
    import pandas as pd

#: Drift per sampling unit, ``[U]`` in step-0 SD, by concept and hookpoint.
Changes = Mapping[tuple[str, str], Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """How much further one moved along a concept than another, on the same prompts.

    Attributes:
        first, other: their names.
        readout, hookpoint: concept and where it was read.
        value: mean over prompts of other's drift minus first's, in standard deviations of step 0.
        ci_low, ci_high: paired bootstrap interval over prompts.
        n: prompts.
    """

    first: str
    other: str
    readout: str
    hookpoint: str
    value: float
    ci_low: float
    ci_high: float
    n: int

    @property
    def leaves_out_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.ci_low > 0 or self.ci_high < 0


@dataclass(frozen=True, eq=False)
class Comparison:
    """What :func:`compare` found; ``print`` it to read it.

    Attributes:
        start: name of the θ_0 that all were compared with; ``None`` where each run has its own.
        timelines: rows (columns of a run's timeline) of each that was compared, by name.
        summaries: what moved in each, by name.
        differences: other minus first, per concept and hookpoint.
        not_compared: pairs and concepts for which there is no difference, with the reason.
        controls: rows of each control run, by name.
    """

    start: str | None
    timelines: Mapping[str, pd.DataFrame] = field(repr=False)
    summaries: Mapping[str, Summary] = field(repr=False)
    differences: tuple[Difference, ...]
    not_compared: tuple[str, ...]
    controls: Mapping[str, pd.DataFrame] = field(repr=False)

    def table(self) -> pd.DataFrame:
        """Drift of each at its last step, concept × hookpoint down, ``(name, value)`` across.

        The values are ``drift`` (SD), its interval ``low``, ``high`` and the band of comparable directions
        ``band_low``, ``band_high``; NaN where it was not read.
        """
        import pandas as pd

        values = {
            "value": "drift",
            "ci_low": "low",
            "ci_high": "high",
            "null_low": "band_low",
            "null_high": "band_high",
        }
        parts = {
            name: _last_drifts(rows).set_index(["readout", "hookpoint"])[list(values)].rename(columns=values)
            for name, rows in self.timelines.items()
        }
        found = pd.concat(parts, axis=1)
        order = sorted(found.index, key=lambda place: (place[0], natural(place[1])))
        return found.reindex(pd.MultiIndex.from_tuples(order, names=["readout", "hookpoint"])) if order else found

    def difference_table(self) -> pd.DataFrame:
        """The differences, one a row: the fields of :class:`Difference` and ``leaves_out_zero``."""
        import pandas as pd

        columns = [*Difference.__dataclass_fields__, "leaves_out_zero"]
        return pd.DataFrame([[getattr(d, name) for name in columns] for d in self.differences], columns=columns)

    def control_tables(self) -> list[pd.DataFrame]:
        """``|drift|`` (SD) per concept and hookpoint at the last step of each control run."""
        tables = [_last_drifts(rows)[["readout", "hookpoint", "value"]] for rows in self.controls.values()]
        return [table.assign(value=table["value"].abs()).reset_index(drop=True) for table in tables]

    def __str__(self) -> str:
        """What moved and what did not, for each, then the differences."""
        return "\n".join(comparison_lines(self))


def compare(
    first: Place, *others: Place, controls: Sequence[Place] = (), config: Any = None, data: Place | None = None
) -> Comparison:
    """Compare attached runs, models and checkpoints.

    Args:
        first: output folder of an attached run, or folder of a model: then it is the θ_0 of all others.
        others: output folders, model folders, adapters, checkpoints.
        controls: control runs (or checkpoints of such) that every verdict is judged against; those in a run's own
            ``_controls`` folder are found by themselves. Beside runs they are held to the same rules as those; beside
            models only that they were read on the same texts is checked.
        config: settings as for ``attach``, where no run is among the arguments.
        data: JSON lines of prompts or preference pairs, where no run is among the arguments. A checkpoint that lies in
            an attached run brings the texts of that run where neither is given.

    Raises:
        InterpError: a folder, setting or text that is wrong or missing; another tokenizer than the first's.
    """
    places = (first, *others)
    if not others:
        raise ConfigError(f"compare: expected two runs or checkpoints at least, found only {first}")
    names = _names([*places, *controls])
    runs = [place for place in places if is_run(place)]
    if runs and (config is not None or data is not None):
        raise ConfigError(f"{runs[0]}: a run brings its own settings and texts, found config or data beside it")
    named = list(zip(names, (*places, *controls), strict=True))
    with unchanged_random_states():
        start = None if len(runs) == len(places) else _common_start(places, runs, config, data)
        given = named[len(places) :]
        _check_controls(given)
        beside = dict(_control_rows(given, start, first))
        if start is None:
            found = _compare_runs([(name, load_run(place)) for name, place in named[: len(places)]], given)
        else:
            tables = tuple(ControlTable(name, "given, not checked", rows) for name, rows in beside.items())
            found = _compare_readings(start, named[: len(places)], tables)
    return Comparison(None if start is None else start.name, *found, controls=beside)


def compare_command(
    places: Sequence[Place], *, controls: Sequence[Place] = (), config: Any = None, data: Place | None = None
) -> str:
    """What ``interp-rlhf compare`` prints; arguments and errors of :func:`compare`."""
    if not places:
        raise ConfigError("compare: expected two runs or checkpoints at least, found none")
    return str(compare(*places, controls=controls, config=config, data=data))


_Found = tuple[dict[str, Any], dict[str, Summary], tuple[Difference, ...], tuple[str, ...]]


# ---------------------------------------------------------------------------------------------------- attached runs


def _check_controls(given: Sequence[tuple[str, Place]]) -> None:
    seen: set[Path] = set()
    for name, place in given:
        if (folder := Path(place).resolve()) in seen:
            raise ConfigError(f"controls: {name}: named twice, and one control run counts once")
        seen.add(folder)
        if is_run(place) and not load_run(place).info.get("control"):
            raise ConfigError(f"controls: {name}: its run.json does not say that it is a control run")


def _compare_runs(runs: Sequence[tuple[str, Run]], given: Sequence[tuple[str, Place]]) -> _Found:
    timelines = {name: run.timeline() for name, run in runs}
    summaries = {name: _own_summary(run, timelines[name], given) for name, run in runs}
    (first, reference), differences, reasons = runs[0], [], []
    try:
        start = start_of_run(reference.path)
        changes = _changes_of_run(reference, start)
    except (ConfigError, FormatError) as error:
        return timelines, summaries, (), (f"{first} and the others: {error}",)
    for name, run in runs[1:]:
        try:
            _check_same_texts(run, start)
            theirs = _changes_of_run(run, start)
        except FormatError as error:
            reasons.append(f"{first} and {name}: {error}")
            continue
        same = {place: found for place, found in theirs.items() if _same_concept(place[0], reference, run)}
        others = sorted({readout for readout, _ in changes} - {readout for readout, _ in same})
        reasons += [f"{first} and {name}: {readout}: not read on the same pairs in {name}" for readout in others]
        differences += _differences((first, changes), (name, same), start.config)
    return timelines, summaries, tuple(differences), tuple(reasons)


def _own_summary(run: Run, timeline: pd.DataFrame, given: Sequence[tuple[str, Place]]) -> Summary:
    config = InterpConfig.from_mapping(run.info["config"], where=str(run.path))
    options = {"tolerance": config.statistics.tolerance, "confidence": config.statistics.confidence}
    found = find_controls(run, [(name, Path(place)) for name, place in given])
    return summarise(timeline, run.events, controls=found, **options)


def _check_same_texts(run: Run, start: Start) -> None:
    if run.info["prompts"]["sha256"] != start.plan.audit.hash:
        raise FormatError(f"{run.path.parent.name} was read on other prompts than {start.name}")


def _same_concept(name: str, first: Run, other: Run) -> bool:
    """Whether both planned a concept on the same pairs, or loaded the same direction."""
    hashes = [
        sorted((item.get("hookpoint", ""), item["sha256"]) for item in items if item["name"] == name)
        for items in ([*run.info["concepts"], *run.info["directions"]] for run in (first, other))
    ]
    return hashes[0] == hashes[1]


def _changes_of_run(run: Run, start: Start) -> Changes:
    """Drifts of a run's last snapshot, in the SD of ``start``, along the directions of ``start``.

    Raises:
        FormatError: the run began elsewhere, or has no readings of its last step.
    """
    first, last = first_snapshot(run), last_snapshot(run)
    rows = current(run.timeline())
    if last.parent is None or last.step != rows["step"].max():
        raise FormatError(f"{run.path.parent.name} has no snapshot of its last step, {int(rows['step'].max())}")
    table = TextTable(start.plan.audit.prompts, frozenset())
    known = set(run.info["hookpoints"])
    hookpoints = [name for name in start.plan.hookpoints if name in known]
    began = stored_reading(first, table, hookpoints, FIRST)
    rows_of_start = start.table.rows(table.prompts)
    expected = {name: start.first.means[name][rows_of_start] for name in hookpoints}
    shapes = any(expected[name].shape != began.means[name].shape for name in hookpoints)
    difference = float("inf") if shapes else reading_difference(expected, began.means)
    if not difference <= SAME_READING:
        found = f"they differ by {difference:.2g} of the mean norm, expected at most {SAME_READING:g}"
        raise FormatError(f"{run.path.parent.name} began with other readings than {start.name} ({found})")
    now = stored_reading(last, table, hookpoints, MEANS)
    readings = [{n: audit_readings(r, table, start.plan, n) for n in hookpoints} for r in (began, now)]
    return _changes(start.baseline, *readings)


# ---------------------------------------------------------------------------------------------------- models, one θ_0


def _common_start(places: Sequence[Place], runs: Sequence[Place], config: Any, data: Place | None) -> Start:
    if is_run(places[0]):
        return start_of_run(places[0])
    source = runs[0] if runs else None
    if source is None and config is None and data is None:
        source = next((found for place in places if (found := own_run(place)) is not None), None)
    return start_of_model(places[0], config=config, data=data, like=None if source is None else start_of_run(source))


def _compare_readings(start: Start, places: Sequence[tuple[str, Place]], given: tuple[ControlTable, ...]) -> _Found:
    timelines, summaries, changes = {}, {}, {}
    first = places[0][1]
    for name, place in places if is_run(first) else places[1:]:
        reading, step, circuits = _read(start, place, first)
        timelines[name] = _timeline(start, reading, step, circuits)
        summaries[name] = summary_of(timelines[name], start, Controls(given))
        table, plan = start.baseline.table, start.baseline.plan
        now = {point: audit_readings(reading, table, plan, point) for point in plan.hookpoints}
        changes[name] = _changes(start.baseline, start.baseline.x0, now)
    differences = [
        found for pair in combinations(changes.items(), 2) for found in _differences(pair[0], pair[1], start.config)
    ]
    return timelines, summaries, tuple(differences), ()


def _read(start: Start, place: Place, first: Place) -> tuple[Reading, int, tuple[Measurement, ...]]:
    """The reading of a run's last step from its files, or of a checkpoint by reading it; its step; rows of circuits."""
    if is_run(place):
        run = load_run(place)
        _check_same_texts(run, start)
        last = last_snapshot(run)
        return stored_reading(last, start.baseline.table, start.baseline.plan.hookpoints, MEANS), last.step, ()
    base = None if is_run(first) or names_its_base(place) else first
    model, step = load_for(start, place, base=base), max(checkpoint_step(place) or 1, start.step + 1)
    components = component_rows_of(start, model, step, start.segment)
    return read_model(start, model), step, (*components, *circuit_rows_of(start, model, step, start.segment))


def _timeline(start: Start, reading: Reading, step: int, circuits: tuple[Measurement, ...]) -> pd.DataFrame:
    rows = (*start.rows(), *start.compare(reading, step), *circuits)
    return to_frame([row.as_row() | {"superseded": False} for row in rows])


def _control_rows(
    places: Sequence[tuple[str, Place]], start: Start | None, first: Place
) -> Iterator[tuple[str, pd.DataFrame]]:
    for name, place in places:
        if is_run(place) and start is None:
            yield name, current(load_run(place).timeline())
        else:
            start = start or start_of_run(first)
            yield name, _timeline(start, *_read(start, place, first))


# ------------------------------------------------------------------------------------------------------- differences


def _changes(baseline: Baseline, x0: Mapping[str, Tensor], xt: Mapping[str, Tensor]) -> Changes:
    """``(X_t − X_0)·v`` of each sampling unit over the SD of the baseline's ``X_0·v``."""
    found = {}
    for concept in baseline.concepts:
        for hookpoint, direction in concept.directions.items():
            if hookpoint in x0:
                v = direction.vector.double()
                spread = (baseline.x0[hookpoint].double() @ v).std()
                found[concept.name, hookpoint] = (xt[hookpoint].double() - x0[hookpoint].double()) @ v / spread
    return found


def _differences(first: tuple[str, Changes], other: tuple[str, Changes], config: InterpConfig) -> Iterator[Difference]:
    for place, change in first[1].items():
        if place in other[1]:
            values = other[1][place] - change
            low, high = paired_bootstrap(values, **statistics(config))
            yield Difference(first[0], other[0], *place, float(values.mean()), low, high, len(values))


# ------------------------------------------------------------------------------------------------------------- names


def _last_drifts(timeline: pd.DataFrame) -> pd.DataFrame:
    """``concept/drift`` at the last step, without the start's own rows."""
    rows = current(timeline)
    rows = rows[(rows["metric"] == "concept/drift") & (rows["null_kind"] != "numeric")]
    return rows[rows["step"] == rows["step"].max()]


def _names(places: Sequence[Place]) -> list[str]:
    """As much of each path's end as tells them apart; the same path twice is numbered."""
    parts = [(path.resolve() if path.exists() else path).parts for path in map(Path, places)]
    names = []
    for mine in parts:
        others = [theirs for theirs in parts if theirs != mine]
        depth = next((k for k in range(1, len(mine)) if all(o[-k:] != mine[-k:] for o in others)), len(mine))
        names.append("/".join(mine[-depth:]))
    again = [names[:i].count(name) for i, name in enumerate(names)]
    return [name if not k else f"{name} ({k + 1})" for name, k in zip(names, again, strict=True)]
