"""Control runs of a run: which lie in its output folder, which of them may be compared with it, and what they say.

A control run is the same training with its preferences scrambled. It counts only where everything else that its run
file records is the same, so that the preferences are what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_rlhf.audit.layout import CONTROLS, differences, find_run
from interp_rlhf.audit.store import load_run
from interp_rlhf.audit.timeline import live_events
from interp_rlhf.errors import FormatError
from interp_rlhf.report.rows import DRIFT, current, measurements

if TYPE_CHECKING:
    import pandas as pd

    from interp_rlhf.audit.store import Run

#: Names of a step-0 snapshot's tensors, and the relative difference up to which two starts are the same.
START, TEXT_IDS, SAME_START = "start/", "text_ids", 1e-3
#: Keys of ``run.json`` and settings that may differ: what makes it a control run, what is done with the numbers, how
#: often they are taken, and what is measured besides drift (measuring leaves no trace, and only drift is compared).
_FREE = ("control", "versions", "world_size", "circuits", "sealed_probe")
_FREE_SETTINGS = (
    "control",
    "control_within",
    "representation",
    "components",
    "causal",
    "circuits",
    "probes",
    "rollouts",
    "schedule",
    "snapshots",
    "headline",
    "on_error",
    "report",
)
#: Of these a failure at the last step leaves drift what it is.
_BESIDE = ("circuit", "components", "causal shares", "sampled completions", "what the start writes", "the quadrant")
#: What is noted where it differs.
_NOTED = ("versions", "world_size")


@dataclass(frozen=True, eq=False)
class ControlTable:
    """One control run that may be compared.

    Attributes:
        name: its folder below ``_controls``.
        kind: what was scrambled, for example ``pairs swapped``.
        table: its current rows (Measurement columns), all steps.
        notes: what differs and is no reason to leave it out.
        circuits: whether its circuits were read on the run's tasks with the run's settings.
    """

    name: str
    kind: str
    table: pd.DataFrame = field(repr=False)
    notes: tuple[str, ...] = ()
    circuits: bool = True

    def drifts(self) -> dict[tuple[str, str], float]:
        """``concept/drift`` (SD) by concept and hookpoint at its last measured step."""
        rows = self.table[(self.table["metric"] == DRIFT) & (self.table["step"] == self.table["step"].max())]
        return {(r.readout, r.hookpoint): r.value for r in measurements(rows)}


@dataclass(frozen=True)
class Controls:
    """What there is to compare a run with.

    Attributes:
        used: control runs that may be compared.
        left_out: name and reason of those that may not.
        itself: what the run itself is where it is a control run (``control run 3: pairs swapped``), else empty.
    """

    used: tuple[ControlTable, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    itself: str = ""


def find_controls(run: Run, given: Sequence[tuple[str, Path]] = ()) -> Controls:
    """The control runs in ``_controls`` beside the run's ``interp`` folder, sorted into usable and left out.

    Args:
        given: names and output folders of further control runs, under the same rules; none is counted twice.

    Nothing is raised for a control run that cannot be read: the reason is in ``left_out``.
    """
    itself = _itself(run.info.get("control"))
    root = Path(run.path).resolve().parent / CONTROLS  # as errors spell it
    own = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    known = {path.resolve() for path in own}
    folders = [(path.name, path) for path in own]
    for name, path in given:
        if path.resolve() not in known:
            known.add(path.resolve())
            folders.append((name, path))
    used: list[ControlTable] = []
    left_out: list[tuple[str, str]] = []
    seen: dict[int, str] = {}
    step = _last_step(current(run.timeline())) if folders else None
    for name, folder in folders:
        try:
            control = load_run(find_run(folder))
        except FormatError as error:
            place, _, what = str(error).partition(": ")
            left_out.append((name, what if Path(place) == folder else str(error).replace(f"{folder}/", "")))
            continue
        if reason := _unusable(run, control, step, seen):
            left_out.append((name, reason))
        else:
            used.append(_table(run, control, name))
            seen[control.info["control"]["number"]] = name
    return Controls(tuple(used), tuple(left_out), itself)


def _itself(control: Any) -> str:
    if not isinstance(control, Mapping):
        return ""
    return f"control run {control.get('number')}: {control.get('kind')}"


def _unusable(run: Run, control: Run, step: int | None, seen: Mapping[int, str]) -> str:
    """Why a control run cannot be compared; empty where it can."""
    what = control.info.get("control")
    if not isinstance(what, Mapping) or type(what.get("number")) is not int:
        return "run.json does not say that it is a control run"
    if what["number"] in seen:
        return f"control run {what['number']} was counted already, as {seen[what['number']]}"
    if not what.get("changed") and what.get("kind") != "rewards permuted":
        return "nothing was changed in its data"
    if changed := differences(_compared(run.info), _compared(control.info)):
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return f"run.json differs in {changed[0]}{more}"
    if reason := _another_start(run, control):
        return reason
    table = current(control.timeline())
    last = _last_step(table)
    if step is None or last != step:
        return f"its last measured step is {last}, expected {step}"
    failures = (e for e in live_events(control.events) if e["event"] == "failure" and e["step"] == last)
    failed = next((e for e in failures if not str(e["what"]).startswith(_BESIDE)), None)
    if failed is not None:
        return f"{failed['what']} failed at its last step: {failed['reason']}"
    missing = sorted(_read(current(run.timeline()), step) - _read(table, step))
    return f"it has no drift of {missing[0][0]} at {missing[0][1]}" if missing else ""


def _another_start(run: Run, control: Run) -> str:
    """Why two runs did not begin at the same weights, by their readings of step 0; empty where they did."""
    starts = []
    for one, what in ((run, "the run"), (control, "it")):
        begun = [snapshot for snapshot in one.snapshots if snapshot.parent is None]
        if not begun:
            return f"{what} has kept no readings of its start"
        try:
            arrays = begun[-1].arrays()
        except FormatError as error:
            return f"the readings of the start cannot be compared: {str(error).partition(': ')[2]}"
        starts.append({name: array for name, array in arrays.items() if name.startswith(START) or name == TEXT_IDS})
    mine, theirs = starts
    if {name: array.shape for name, array in mine.items()} != {name: array.shape for name, array in theirs.items()}:
        return "it read other texts or hookpoints at its start"
    if not (mine[TEXT_IDS] == theirs[TEXT_IDS]).all():
        return "it read other texts at its start"
    for name in (name for name in mine if name != TEXT_IDS):
        scale = float((mine[name].astype(float) ** 2).sum(1).mean() ** 0.5)
        difference = float(abs(mine[name].astype(float) - theirs[name]).max())
        if difference > SAME_START * max(scale, 1e-30):
            return f"it began at other weights: {name.removeprefix(START)} reads otherwise at step 0"
    return ""


def _compared(info: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in info.items() if key not in _FREE}
    config = kept.get("config")
    if isinstance(config, Mapping):
        kept["config"] = {key: value for key, value in config.items() if key not in _FREE_SETTINGS}
    return kept


def _table(run: Run, control: Run, name: str) -> ControlTable:
    old, new = ({key: info.get(key) for key in _NOTED} for info in (run.info, control.info))
    kind = str(control.info["control"].get("kind"))
    mine, theirs = (_circuits(info) for info in (run.info, control.info))
    return ControlTable(name, kind, current(control.timeline()), tuple(differences(old, new)), mine == theirs)


def _circuits(info: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks and the settings of circuits, without how often they are read: a verdict is about the last reading."""
    config = info.get("config")
    settings = config.get("circuits") if isinstance(config, Mapping) else None
    kept = {key: value for key, value in settings.items() if key != "every"} if isinstance(settings, Mapping) else {}
    return kept | {"with": info.get("circuits")}


def _last_step(table: pd.DataFrame) -> int | None:
    return int(table["step"].max()) if len(table) else None


def _read(table: pd.DataFrame, step: int) -> set[tuple[str, str]]:
    rows = table[(table["metric"] == DRIFT) & (table["step"] == step)]
    return set(zip(rows["readout"], rows["hookpoint"], strict=True))


def statistics(
    controls: Sequence[ControlTable], hookpoints: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, ...]]:
    """Per concept the statistic of every control run: the largest |drift| (SD) over the concept's hookpoints.

    Args:
        controls: those that may be compared.
        hookpoints: the hookpoints of each concept in the real run; a control run without one of them is a
            programming error of the caller and raises ``KeyError``.
    """
    read = [control.drifts() for control in controls]
    return {
        concept: tuple(max(abs(drifts[concept, place]) for place in places) for drifts in read)
        for concept, places in hookpoints.items()
    }
