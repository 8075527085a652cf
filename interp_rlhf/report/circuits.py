"""What a timeline says about circuits: a verdict per task, circuits to draw, parts of a direction's drift. Pure.

Events come from files, perhaps of another version: one that lacks a field is told of in ``problems``, never drawn.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from interp_rlhf.audit.timeline import live_events
from interp_rlhf.drift.circuit_verdict import (
    ALARMS,
    HIGH_FROM,
    CircuitEvidence,
    Word,
    circuit_evidence,
    circuit_verdict,
)
from interp_rlhf.errors import FormatError, MeasurementError
from interp_rlhf.measurement import Measurement
from interp_rlhf.report.rows import measurements

if TYPE_CHECKING:
    import pandas as pd

    from interp_rlhf.report.controls import ControlTable

#: The faithfulness of these circuits, in the order they are shown.
FAITHFULNESS: tuple[str, ...] = (
    "circuit/faithfulness_index",
    "circuit/faithfulness_matched",
    "circuit/faithfulness_own",
    "circuit/faithfulness_control",
)
#: Words in the order their tasks are listed.
WORDS: tuple[Word, ...] = ("different", "diffuse", "lost", "relocated", "undetermined", "same")
_ONLY_START = "Only the start was read, so there is nothing to compare yet."
#: Layers and heads up to which an event is believed.
_LARGEST = 1024

_NODE = re.compile(r"embed|logits|m(\d+)|a(\d+)\.h(\d+)(?:\.([qkv]))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What became of the mechanism behind one task.

    Attributes:
        task: its name.
        start_step, step: when it was read first and last.
        word: the verdict, ``None`` where only the start was read or the rows make no verdict.
        why: the sentence behind it.
        alarm: whether the verdict is an alarm.
        start, now: metric to row at those steps.
        evidence: what the verdict was made from.
        controls: the verdicts of control runs about the same task at the same step.
        uncompared: control runs that have none to compare.
    """

    task: str
    start_step: int
    step: int
    word: Word | None
    why: str
    alarm: bool
    start: Mapping[str, Measurement]
    now: Mapping[str, Measurement]
    evidence: CircuitEvidence
    controls: tuple[Word, ...] = ()
    uncompared: int = 0

    @property
    def alarmed_controls(self) -> int:
        """How many of :attr:`controls` end with an alarm."""
        return sum(word in ALARMS for word in self.controls)

    @property
    def against_controls(self) -> str:
        """What became of the mechanism with scrambled preferences, in one sentence; empty without control runs.

        Of an alarm with the rank p of an alarm among the control runs: 1/(k + 1) where none of k has one.
        """
        if self.word is None or not (self.controls or self.uncompared):
            return ""
        k, alarmed = len(self.controls), self.alarmed_controls
        words = ", ".join(f"{word} {self.controls.count(word)}" for word in WORDS if word in self.controls)
        rank = f"; an alarm in {alarmed} of {k}, p {(1 + alarmed) / (k + 1):.2g}" if self.alarm and k else ""
        left = f"{self.uncompared} not compared: other tasks, settings or steps" if self.uncompared else ""
        return f"With scrambled preferences: {'; '.join(part for part in (words + rank, left) if part)}."

    @property
    def high_from(self) -> float | None:
        """The F from which a circuit's faithfulness is high, unless random circuits reach it."""
        first = self.evidence.f_index_start
        return None if first is None else HIGH_FROM * first


@dataclass(frozen=True, slots=True)
class Edge:
    """One edge of a circuit; ``score`` in the unit of the task's metric."""

    source: str
    target: str
    score: float


@dataclass(frozen=True, slots=True)
class DrawnCircuit:
    """A ``circuit`` event: the graph's size and the strongest edges of the circuit, strongest first.

    Attributes:
        task, step: whose circuit, and when.
        layers, heads, kv_heads: of the model.
        parallel: whether an MLP reads what the attention of its layer reads.
        size: edges of the circuit; the event may hold fewer.
        possible: edges of the graph.
        dropped: edges of the start's circuit that have no place after matching.
        edges: the strongest.
    """

    task: str
    step: int
    layers: int
    heads: int
    kv_heads: int
    parallel: bool
    size: int
    possible: int
    dropped: int
    edges: tuple[Edge, ...]

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """What two circuits must have in common to be drawn side by side."""
        return (self.layers, self.heads, self.kv_heads, self.parallel)


@dataclass(frozen=True, slots=True)
class Part:
    """What one component contributes to a drift; ``activation + weight = change`` where it could be split."""

    name: str
    change: float
    ci_low: float | None
    ci_high: float | None
    activation: float | None
    weight: float | None


@dataclass(frozen=True, slots=True)
class Attribution:
    """A ``components`` event: a direction's drift by components, strongest first; ``rest`` is of those not listed."""

    step: int
    readout: str
    hookpoint: str
    total: float
    parts: tuple[Part, ...]
    rest: float


@dataclass(frozen=True, slots=True)
class Alarm:
    """An ``alarm`` event."""

    step: int
    task: str
    word: str
    reason: str


@dataclass(frozen=True, slots=True)
class CircuitEvents:
    """The events about circuits of the line of runs that counts.

    Attributes:
        circuits: task to its circuits, one per step, in order of steps.
        attributions: of each concept at its last step, largest total first.
        alarms: in the order they were written.
        problems: one line per event that cannot be shown.
    """

    circuits: Mapping[str, tuple[DrawnCircuit, ...]]
    attributions: tuple[Attribution, ...]
    alarms: tuple[Alarm, ...]
    problems: tuple[str, ...]


def mechanisms_of(table: pd.DataFrame, controls: Sequence[ControlTable] = ()) -> tuple[Mechanism, ...]:
    """One per task with ``circuit/*`` rows, alarms first.

    Args:
        table: current rows (Measurement columns), all steps.
        controls: control runs that may be compared.
    """
    others = [{m.task: m for m in _judged(one.table)} for one in controls if one.circuits]
    found = []
    for mine in _judged(table):
        theirs = [m[mine.task] for m in others if mine.task in m]
        words = tuple(m.word for m in theirs if m.word and (m.start_step, m.step) == (mine.start_step, mine.step))
        found.append(replace(mine, controls=words, uncompared=len(controls) - len(words)))
    place = {word: index for index, word in enumerate(WORDS)}
    return tuple(sorted(found, key=lambda m: (place.get(m.word, len(WORDS)) if m.word else len(WORDS), m.task)))


def _judged(table: pd.DataFrame) -> list[Mechanism]:
    rows: dict[str, dict[int, dict[str, Measurement]]] = defaultdict(lambda: defaultdict(dict))
    for row in measurements(table[table["metric"].str.startswith("circuit/")]):
        rows[row.readout][row.step][row.metric] = row
    return [_mechanism(task, steps) for task, steps in rows.items()]


def _mechanism(task: str, steps: Mapping[int, Mapping[str, Measurement]]) -> Mechanism:
    first, last = min(steps), max(steps)
    evidence = circuit_evidence(steps[first], steps[last])
    word: Word | None
    try:
        verdict = circuit_verdict(evidence)
        word, why, alarm = verdict.word, verdict.why, verdict.alarm
    except MeasurementError as error:
        word, why, alarm = None, f"There is no verdict: {error}.", False
    if first == last and word != "undetermined":
        word, why, alarm = None, _ONLY_START, False
    return Mechanism(task, first, last, word, why, alarm, steps[first], steps[last], evidence)


def circuit_events(events: Iterable[Mapping[str, Any]]) -> CircuitEvents:
    """Read a run's events about circuits; those that a later start left behind do not count."""
    circuits: dict[str, dict[int, DrawnCircuit]] = defaultdict(dict)
    attributions: dict[tuple[str, str], Attribution] = {}
    alarms: list[Alarm] = []
    problems: list[str] = []
    mine = [event for event in events if event["event"] in ("segment", "circuit", "components", "alarm")]
    dated = [event for event in mine if type(event.get("step", 0)) is int]
    for event in (*(event for event in mine if event not in dated), *live_events(dated)):
        try:
            if event["event"] == "circuit":
                circuit = read_circuit(event)
                circuits[circuit.task][circuit.step] = circuit
            elif event["event"] == "components":
                attribution = read_attribution(event)
                attributions[attribution.readout, attribution.hookpoint] = attribution
            elif event["event"] == "alarm":
                alarms.append(Alarm(_whole(event, "step"), *(_text(event, k) for k in ("task", "word", "reason"))))
        except FormatError as error:
            problems.append(f"{event['event']} event{_whose(event)}: {error}")
    ordered = {task: tuple(steps[step] for step in sorted(steps)) for task, steps in sorted(circuits.items())}
    newest = {
        readout: max(a.step for a in attributions.values() if a.readout == readout) for readout, _ in attributions
    }
    current = [a for a in attributions.values() if a.step == newest[a.readout]]
    largest = sorted(current, key=lambda a: (-abs(a.total), a.readout, a.hookpoint))
    return CircuitEvents(ordered, tuple(largest), tuple(alarms), tuple(dict.fromkeys(problems)))


def read_circuit(event: Mapping[str, Any]) -> DrawnCircuit:
    """A ``circuit`` event.

    Raises:
        FormatError: names the field, what was found and what was expected.
    """
    layers, heads, kv_heads = (_whole(event, key, least=1, most=_LARGEST) for key in ("layers", "heads", "kv_heads"))
    edges = []
    for place, edge in enumerate(_list(event, "edges")):
        if not isinstance(edge, list | tuple) or len(edge) != 3 or not all(isinstance(x, str) for x in edge[:2]):
            raise FormatError(f"edges[{place}]: found {_seen(edge)}, expected a source, a target and a score")
        _check_node(edge[0], place, layers, heads, None)
        _check_node(edge[1], place, layers, heads, kv_heads)
        edges.append(Edge(edge[0], edge[1], _finite(edge[2], f"edges[{place}]")))
    return DrawnCircuit(
        task=_text(event, "task"),
        step=_whole(event, "step"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        parallel=event.get("parallel") is True,
        size=_whole(event, "size", least=len(edges)),
        possible=_whole(event, "possible"),
        dropped=_whole(event, "dropped"),
        edges=tuple(sorted(edges, key=lambda e: (-abs(e.score), e.source, e.target))),
    )


def read_attribution(event: Mapping[str, Any]) -> Attribution:
    """A ``components`` event; errors of :func:`read_circuit`."""
    parts = []
    for place, part in enumerate(_list(event, "parts")):
        if not isinstance(part, list | tuple) or len(part) != 6 or not isinstance(part[0], str):
            raise FormatError(f"parts[{place}]: found {_seen(part)}, expected a name and five numbers")
        where = f"parts[{place}]"
        change = _finite(part[1], where)
        parts.append(Part(part[0], change, *(None if x is None else _finite(x, where) for x in part[2:])))
    return Attribution(
        step=_whole(event, "step"),
        readout=_text(event, "readout"),
        hookpoint=_text(event, "hookpoint"),
        total=_finite(event.get("total"), "total"),
        parts=tuple(sorted(parts, key=lambda p: (-abs(p.change), p.name))),
        rest=_finite(event.get("rest"), "rest"),
    )


@dataclass(frozen=True, slots=True)
class Node:
    """A name taken apart.

    Attributes:
        kind: ``embed``, ``logits``, ``mlp`` or ``head``.
        layer, index: ``-1`` where it has none.
        port: ``q``, ``k`` or ``v`` for an input of a head (``k`` and ``v`` count key-value heads), else empty.
    """

    kind: str
    layer: int = -1
    index: int = -1
    port: str = ""


def parse_node(name: str) -> Node | None:
    """Take a node's name apart; ``None`` where it is none.

    >>> parse_node("a2.h3.k")
    Node(kind='head', layer=2, index=3, port='k')
    """
    match = _NODE.fullmatch(name) if len(name) <= 30 else None
    if match is None:
        return None
    mlp, layer, head, port = match.groups()
    if mlp is not None:
        return Node("mlp", int(mlp))
    return Node(name) if layer is None else Node("head", int(layer), int(head), port or "")


def _check_node(name: str, place: int, layers: int, heads: int, kv_heads: int | None) -> None:
    """A source (no number of key-value heads) or a target of a model of this size."""
    node, target = parse_node(name), kv_heads is not None
    if node is not None:
        count = heads if kv_heads is None or node.port == "q" else kv_heads
        wrong_end = node.kind == ("embed" if target else "logits") or (
            node.kind == "head" and bool(node.port) != target
        )
        if node.layer < layers and node.index < count and not wrong_end:
            return
    what = "target" if target else "source"
    raise FormatError(f"edges[{place}]: found {_seen(name)}, expected a {what} of a model of {layers} × {heads} heads")


def _whose(event: Mapping[str, Any]) -> str:
    """As much of an event's origin as it tells."""
    named = next((event[key] for key in ("task", "readout") if isinstance(event.get(key), str)), None)
    of = "" if named is None else f" of {named}"
    return f"{of} at step {event['step']}" if type(event.get("step")) is int else of


def _text(event: Mapping[str, Any], key: str) -> str:
    if not isinstance(event.get(key), str):
        raise FormatError(f"{key}: found {_seen(event.get(key))}, expected text")
    return event[key]


def _whole(event: Mapping[str, Any], key: str, least: int = 0, most: int = 2**53) -> int:
    value = event.get(key)
    if type(value) is not int or not least <= value <= most:
        raise FormatError(f"{key}: found {_seen(value)}, expected a whole number from {least} on")
    return value


def _list(event: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = event.get(key)
    if not isinstance(value, list | tuple):
        raise FormatError(f"{key}: found {_seen(value)}, expected a list")
    return value


def _finite(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e300:  # NaN is not
        raise FormatError(f"{where}: found {_seen(value)}, expected a finite number")
    return float(value)


def _seen(value: Any) -> str:
    return "nothing" if value is None else ascii(value)[:40]


def signed(value: float) -> str:
    """Three digits with a sign, as the page writes numbers that are in no row."""
    return f"{value:+.3g}".replace("-", "−")
