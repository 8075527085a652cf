"""Circuits before and after, drawn as the shapes of an inline SVG.

Both circuits have one layout: layers upwards between the embedding and the logits, a column per head, the MLPs in the
last. An MLP that reads its own layer's attention sits above it. Where a model has more nodes than :data:`ALL_NODES`
only those in one of the circuits are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from interp_rlhf.errors import FormatError
from interp_rlhf.report.circuits import DrawnCircuit, Edge, Node, parse_node, signed

#: Heads and MLPs up to which a model is drawn whole.
ALL_NODES = 130
#: Edges drawn of a circuit.
MOST_EDGES = 300
_GUTTER, _PLOT, _TOP = 46.0, 500.0, 36.0
_LEAST_WIDTH, _WIDTH = 0.8, 5.5

#: What becomes of an edge: in both circuits, only before, only after, or there is no other circuit.
Fate = Literal["both", "gone", "new", "alone"]


@dataclass(frozen=True, slots=True)
class Line:
    """An edge as drawn: SVG path, stroke width, hover text, and the boxes that it joins."""

    edge: str
    start: str
    end: str
    path: str
    width: float
    fate: Fate
    positive: bool
    title: str

    @property
    def dash(self) -> str:
        """Dashes that survive printing without colour: long ones only before, short ones only after."""
        return {"gone": "7 4", "new": "2.5 2.5"}.get(self.fate, "")


@dataclass(frozen=True, slots=True)
class Box:
    """A node as drawn: centre, size, text inside (may be empty), hover text, and whether the circuit has it."""

    name: str
    x: float
    y: float
    width: float
    height: float
    text: str
    title: str
    inside: bool


@dataclass(frozen=True, slots=True)
class Side:
    """One circuit."""

    title: str
    step: int
    lines: tuple[Line, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """One or two circuits in the same layout.

    Attributes:
        width, height: of the SVG's coordinates.
        sides: before and after, or one.
        rows: name, y and height of each layer's row.
        columns: name and x of each column, where boxes are too small for text.
        edges: each edge of either with its score on each side (``None``: not there), strongest first.
        notes: what the reader must know of it.
    """

    width: float
    height: float
    sides: tuple[Side, ...]
    rows: tuple[tuple[str, float, float], ...]
    columns: tuple[tuple[str, float], ...]
    edges: tuple[tuple[Edge, tuple[float | None, ...]], ...]
    notes: tuple[str, ...]


def draw_circuits(circuits: Sequence[DrawnCircuit]) -> Drawing:
    """Draw the first and the last circuit of a task.

    Raises:
        FormatError: they are of models of different shape.
    """
    shown = list(circuits[:1]) if len(circuits) == 1 else [circuits[0], circuits[-1]]
    first, last = shown[0], shown[-1]
    if first.shape != last.shape:
        one, other = (f"{c.layers} layers of {c.heads} heads" for c in (first, last))
        raise FormatError(f"circuits of {first.task}: {one} before, {other} after: not one model's, so not compared")
    edges = [c.edges[:MOST_EDGES] for c in shown]
    layout = _Layout.of(first, edges)
    scores = [{(e.source, e.target): e.score for e in some} for some in edges]
    largest = max((abs(e.score) for some in edges for e in some), default=0.0) or 1.0
    sides = []
    for place, circuit in enumerate(shown):
        other = None if len(shown) == 1 else (shown[1 - place], scores[1 - place])
        fate: Fate = "gone" if place == 0 else "new"
        lines = tuple(_line(e, layout, largest, other, fate) for e in reversed(edges[place]))
        title = "before" if place == 0 and other else "now" if other else "at the start"
        sides.append(Side(title, circuit.step, lines, layout.boxes({n for x in lines for n in (x.start, x.end)})))
    return Drawing(
        layout.width,
        layout.height,
        tuple(sides),
        tuple((f"layer {layer}", y, layout.band) for layer, y in layout.rows.items()),
        layout.columns(),
        _edge_table(scores),
        _notes(shown, edges),
    )


def _edge_table(scores: Sequence[Mapping[tuple[str, str], float]]) -> tuple[tuple[Edge, tuple[float | None, ...]], ...]:
    names = {name for some in scores for name in some}
    lines = []
    for name in names:
        values = tuple(some.get(name) for some in scores)
        lines.append((Edge(*name, max((v for v in values if v is not None), key=abs)), values))
    return tuple(sorted(lines, key=lambda line: (-abs(line[0].score), line[0].source, line[0].target)))


def _notes(circuits: Sequence[DrawnCircuit], edges: Sequence[Sequence[Edge]]) -> tuple[str, ...]:
    notes = []
    size, drawn = circuits[-1].size, [len(some) for some in edges]
    if any(len(some) < c.size for some, c in zip(edges, circuits, strict=True)):
        notes.append(
            f"Drawn are the {max(drawn)} strongest of the circuit's {size} edges; one that is only on one side may be "
            "among the weaker ones of the other."
        )
    if circuits[-1].dropped:
        n = circuits[-1].dropped
        notes.append(f"{n} edge{'' if n == 1 else 's'} of the start's circuit had no place after matching.")
    if circuits[-1].layers * (circuits[-1].heads + 1) > ALL_NODES:
        notes.append("Only layers and nodes of these circuits are drawn.")
    return tuple(notes)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where nodes are: ``rows`` maps a layer to the upper edge of its row, lower layers further down."""

    circuit: DrawnCircuit
    rows: Mapping[int, float]
    nodes: frozenset[str] | None
    column: float
    band: float

    @classmethod
    def of(cls, circuit: DrawnCircuit, edges: Sequence[Sequence[Edge]]) -> _Layout:
        nodes, layers = None, list(range(circuit.layers))
        if circuit.layers * (circuit.heads + 1) > ALL_NODES:
            names = {name for some in edges for e in some for name in (e.source, e.target)}
            nodes = frozenset(_owner(name, circuit) for name in names)
            layers = sorted({parse_node(name).layer for name in names} - {-1})  # type: ignore[union-attr]
        band = min(96.0, max(34.0, 640.0 / max(len(layers), 1)))
        column = min(64.0, max(14.0, _PLOT / (circuit.heads + 1)))
        rows = {layer: _TOP + i * band for i, layer in enumerate(reversed(layers))}
        return cls(circuit, rows, nodes, column, band)

    @property
    def width(self) -> float:
        return _GUTTER + (self.circuit.heads + 1.7) * self.column

    @property
    def height(self) -> float:
        return _TOP + len(self.rows) * self.band + (56.0 if self.small else 40.0)

    @property
    def small(self) -> bool:
        """Boxes too small for text."""
        return self.column < 30

    @property
    def box(self) -> tuple[float, float]:
        return (min(40.0, 0.74 * self.column), min(22.0, 0.27 * self.band))

    def columns(self) -> tuple[tuple[str, float], ...]:
        """The heads' numbers and the MLPs' column, thinned out so that they can be read."""
        if not self.small:
            return ()
        every = 1 if self.circuit.heads <= 16 else 4
        heads = [(str(i), self._x(i)) for i in range(0, self.circuit.heads, every)]
        return (*heads, ("mlp", self._x(self.circuit.heads)))

    def _x(self, column: float) -> float:
        return _GUTTER + (column + 0.5) * self.column

    @property
    def _middle(self) -> float:
        return self._x((self.circuit.heads - 0) / 2)

    def place(self, node: Node) -> tuple[float, float]:
        """Centre of a node, or of the inputs that a group of query heads shares."""
        if node.kind in ("embed", "logits"):
            return (self._middle, 18.0 if node.kind == "logits" else _TOP + len(self.rows) * self.band + 20)
        top, low = self.rows[node.layer], 0.70 * self.band
        if node.kind == "mlp":
            return (self._x(self.circuit.heads), top + (low if self.circuit.parallel else 0.26 * self.band))
        if _shared(node, self.circuit):
            group = self.circuit.heads / self.circuit.kv_heads
            return (self._x((node.index + 0.5) * group - 0.5), top + low + self.box[1] / 2 + 5)
        return (self._x(node.index), top + low)

    def leave(self, node: Node, towards: float) -> tuple[float, float]:
        """Where an edge begins: the upper edge of its source."""
        x, y = self.place(node)
        return (
            self._spread(x, towards) if node.kind == "embed" else x,
            y - (10 if node.kind == "embed" else self.box[1] / 2),
        )

    def enter(self, node: Node, origin: float) -> tuple[float, float]:
        """Where an edge ends: q, k and v of a head from left to right."""
        x, y = self.place(node)
        if node.kind == "logits":
            return (self._spread(x, origin), y + 10)
        port = {"q": -0.3, "k": 0.0, "v": 0.3}.get(node.port, 0.0) * self.box[0]
        if _shared(node, self.circuit):
            return (x + {"k": -0.15, "v": 0.15}[node.port] * self.box[0], y + 1)
        return (x + port, y + self.box[1] / 2)

    def _spread(self, middle: float, other: float) -> float:
        return middle + 0.3 * (other - middle)

    def boxes(self, inside: set[str]) -> tuple[Box, ...]:
        """Every node that is drawn; ``inside`` names those of the circuit."""
        c, (width, height) = self.circuit, self.box
        names = [f"a{layer}.h{i}" for layer in self.rows for i in range(c.heads)]
        names += [f"m{layer}" for layer in self.rows]
        if c.kv_heads < c.heads:
            names += [f"a{layer}.kv{g}" for layer in self.rows for g in range(c.kv_heads)]
        found = [self._pill("embed", inside), self._pill("logits", inside)]
        for name in names:
            if self.nodes is None or name in self.nodes:
                node, shared = _node_of(name), ".kv" in name
                x, y = self.place(node)
                text = "" if self.small or shared else "mlp" if node.kind == "mlp" else f"h{node.index}"
                span = (c.heads / c.kv_heads - 1) * self.column + width if shared else width
                title = f"{name}: keys and values that {_group(node, c)} share" if shared else name
                found.append(Box(name, x, y, span, 3.0 if shared else height, text, title, name in inside))
        return tuple(found)

    def _pill(self, name: str, inside: set[str]) -> Box:
        x, y = self.place(Node(name))
        return Box(name, x, y, 0.36 * (self.circuit.heads + 1) * self.column + 20, 20.0, name, name, name in inside)


def _shared(node: Node, circuit: DrawnCircuit) -> bool:
    return node.port in ("k", "v") and circuit.kv_heads != circuit.heads


def _owner(name: str, circuit: DrawnCircuit) -> str:
    """The box that an edge's end belongs to."""
    node = parse_node(name)
    if node is None or node.kind != "head":
        return name
    return f"a{node.layer}.{'kv' if _shared(node, circuit) else 'h'}{node.index}"


def _node_of(box: str) -> Node:
    """The node at a box's place."""
    if ".kv" in box:
        layer, _, group = box[1:].partition(".kv")
        return Node("head", int(layer), int(group), "k")
    return parse_node(box) or Node("embed")


def _group(node: Node, circuit: DrawnCircuit) -> str:
    size = circuit.heads // circuit.kv_heads
    return f"heads {node.index * size} to {(node.index + 1) * size - 1}"


def _line(
    edge: Edge,
    layout: _Layout,
    largest: float,
    other: tuple[DrawnCircuit, Mapping[tuple[str, str], float]] | None,
    lonely: Fate,
) -> Line:
    source, target = parse_node(edge.source) or Node("embed"), parse_node(edge.target) or Node("logits")
    x1, y1 = layout.leave(source, layout.place(target)[0])
    x2, y2 = layout.enter(target, layout.place(source)[0])
    rise = y1 - y2
    lift, bow = min(0.45 * rise, 0.6 * layout.band), 0.0
    if abs(x1 - x2) < layout.box[0] and rise > layout.band:  # around the boxes between, not through them
        lift, bow = 0.35 * rise, 0.8 * layout.column
    numbers = (x1, y1, x1 + bow, y1 - lift, x2 + bow, y2 + lift, x2, y2)
    path = "M{:.1f} {:.1f}C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*numbers)
    fate: Fate = "alone"
    title = f"{edge.source} → {edge.target}: {signed(edge.score)}"
    if other is not None:
        circuit, scores = other
        there = scores.get((edge.source, edge.target))
        fate = lonely if there is None else "both"
        whole = len(scores) >= circuit.size
        absent = "not in the circuit" if whole else f"not among the {len(scores)} strongest edges"
        title += f"; at step {circuit.step} {absent if there is None else signed(there)}"
    width = max(_LEAST_WIDTH, _WIDTH * abs(edge.score) / largest)
    ends = (_owner(edge.source, layout.circuit), _owner(edge.target, layout.circuit))
    return Line(f"{edge.source}>{edge.target}", *ends, path, round(width, 2), fate, edge.score >= 0, title)
