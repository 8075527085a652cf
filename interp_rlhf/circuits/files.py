"""Circuits on disk: JSON that people can read, or Parquet for large ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_rlhf.circuits.graph import Circuit, Graph
from interp_rlhf.errors import FormatError

VERSION = 1
_COLUMNS = ("source", "target", "score", "selected")
_KEY = b"interp_rlhf.circuit"
_LARGEST = torch.finfo(torch.float32).max


def save_circuit(circuit: Circuit, path: str | Path) -> None:
    """Write a circuit to ``path``, by its suffix ``.json`` or ``.parquet``.

    Raises:
        FormatError: another suffix, or a file that cannot be written.
    """
    path = Path(path)
    header, frame = _header(circuit), circuit.to_frame()
    try:
        if path.suffix == ".json":
            edges = [list(row) for row in frame.itertuples(index=False)]
            lines = ",\n    ".join(json.dumps(edge) for edge in edges)
            text = json.dumps({**header, "columns": list(_COLUMNS)}, indent=2).rstrip("\n}")
            path.write_text(f'{text},\n  "edges": [\n    {lines}\n  ]\n}}\n', encoding="utf-8")
            return
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.Table.from_pandas(frame.astype({"score": "float32"}), preserve_index=False)
            pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(header).encode()}), path)
            return
    except OSError as error:
        raise FormatError(f"{path}: cannot be written ({error.strerror})") from None
    raise FormatError(f"{path}: expected a name that ends in .json or .parquet")


def load_circuit(path: str | Path) -> Circuit:
    """Read a circuit.

    Raises:
        FormatError: names the file, the field, what was found and what was expected.
    """
    path = Path(path)
    header, edges = _read_json(path) if path.suffix == ".json" else _read_parquet(path)
    if type(header.get("version")) is not int or header["version"] != VERSION:
        raise FormatError(f"{path}: version: expected {VERSION}, found {header.get('version')!r}")
    graph = _graph(path, header.get("graph"))
    nodes = graph.n_layers * (graph.n_heads + 2 * graph.n_kv_heads)  # each has at least one edge
    if nodes > len(edges) or graph.size != len(edges):
        raise FormatError(
            f"{path}: edges: expected the possible ones of the graph in its header, found {len(edges)} edges"
        )
    possible = graph.possible
    scores, selected = _values(path, graph, edges)
    settings: dict[str, Any] = {name: header.get(name) for name in ("method", "steps", "ablation", "n", "task")}
    wrong = next((name for name, value in settings.items() if type(value) is not type(getattr(_EMPTY, name))), None)
    if wrong is not None or not isinstance(header.get("has_selection"), bool):
        raise FormatError(f"{path}: {wrong or 'has_selection'}: not found or of another type")
    if selected.any() and not header["has_selection"]:
        raise FormatError(f"{path}: has_selection: expected true where edges are selected, found false")
    placed = torch.zeros(possible.shape)
    placed[possible] = scores
    chosen = torch.zeros_like(possible)
    chosen[possible] = selected
    return Circuit(graph=graph, scores=placed, selected=chosen if header["has_selection"] else None, **settings)


def _values(path: Path, graph: Graph, edges: list[Any]) -> tuple[Tensor, Tensor]:
    """Scores and selection ``[graph.size]`` of the possible edges, each of which is expected once."""
    sources, targets = graph.sources, graph.targets
    places = {(sources[i], targets[j]): place for place, (i, j) in enumerate(graph.possible.nonzero().tolist())}
    scores, selected = [0.0] * len(places), [False] * len(places)
    for edge in edges:
        if len(edge) != len(_COLUMNS):
            raise FormatError(f"{path}: edges: expected {', '.join(_COLUMNS)}, found {edge!r:.80}")
        source, target, score, chosen = edge
        place = places.pop((source, target), None) if isinstance(source, str) and isinstance(target, str) else None
        if place is None:
            raise FormatError(
                f"{path}: edges: {source!r:.40} → {target!r:.40}: expected nodes of the graph in its header and every "
                f"edge once, found a second or one that is not possible"
            )
        finite = type(score) in (int, float) and abs(score) <= _LARGEST
        if not finite or not isinstance(chosen, bool):
            raise FormatError(
                f"{path}: edges: {source} → {target}: expected a finite score and true or false, found {score!r:.40} "
                f"and {chosen!r:.40}"
            )
        scores[place], selected[place] = score, chosen
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(selected)


def _header(circuit: Circuit) -> dict[str, Any]:
    return {
        "version": VERSION,
        "graph": asdict(circuit.graph),
        "method": circuit.method,
        "steps": circuit.steps,
        "ablation": circuit.ablation,
        "n": circuit.n,
        "task": circuit.task,
        "has_selection": circuit.selected is not None,
    }


def _graph(path: Path, found: Any) -> Graph:
    expected = {field.name: field.type for field in fields(Graph)}
    if not isinstance(found, Mapping) or set(found) != set(expected):
        raise FormatError(f"{path}: graph: expected {', '.join(expected)}, found {found!r:.80}")
    for name in ("n_layers", "n_heads", "n_kv_heads"):
        if type(found[name]) is not int or not 1 <= found[name] <= 4096:
            raise FormatError(f"{path}: graph: {name}: expected a number from 1 to 4096, found {found[name]!r}")
    if found["n_heads"] % found["n_kv_heads"] or type(found["parallel"]) is not bool:
        raise FormatError(f"{path}: graph: expected n_heads a multiple of n_kv_heads and parallel true or false")
    if not isinstance(found["architecture"], str):
        raise FormatError(f"{path}: graph: architecture: expected a name, found {found['architecture']!r:.40}")
    known: dict[str, Any] = dict(found)
    return Graph(**known)


def _read_json(path: Path) -> tuple[dict[str, Any], list[Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("edges"), list):
        raise FormatError(f"{path}: expected a circuit with a list of edges, found something else")
    edges = found.pop("edges")
    if not all(isinstance(edge, list) for edge in edges):
        raise FormatError(f"{path}: edges: expected lists of {', '.join(_COLUMNS)}")
    return found, edges


def _read_parquet(path: Path) -> tuple[dict[str, Any], list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix != ".parquet":
        raise FormatError(f"{path}: expected a name that ends in .json or .parquet")
    try:
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise FormatError(f"{path}: not a circuit in Parquet ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(header, dict) or tuple(table.column_names) != _COLUMNS:
        raise FormatError(f"{path}: expected a circuit with columns {', '.join(_COLUMNS)}, found something else")
    return header, list(zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True))


_EMPTY = Circuit(Graph(1, 1, 1, False, ""), torch.zeros(Graph(1, 1, 1, False, "").possible.shape))
