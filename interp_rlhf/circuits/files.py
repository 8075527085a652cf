"""Circuits on disk: JSON that people can read, or Parquet for large ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from interp_rlhf.circuits.graph import Circuit, Graph
from interp_rlhf.errors import FormatError, MeasurementError

VERSION = 1
_COLUMNS = ("source", "target", "score", "selected")
_KEY = b"interp_rlhf.circuit"


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
    if header.get("version") != VERSION:
        raise FormatError(f"{path}: version: expected {VERSION}, found {header.get('version')!r}")
    graph = _graph(path, header.get("graph"))
    rows, columns = ({name: i for i, name in enumerate(names)} for names in (graph.sources, graph.targets))
    scores, selected, seen = torch.zeros(graph.possible.shape), torch.zeros_like(graph.possible), 0
    for edge in edges:
        if len(edge) != len(_COLUMNS):
            raise FormatError(f"{path}: edges: expected {', '.join(_COLUMNS)}, found {edge!r:.80}")
        source, target, score, chosen = edge
        if source not in rows or target not in columns:
            raise FormatError(f"{path}: edges: {source!r} → {target!r}: expected nodes of the graph in its header")
        if not isinstance(score, int | float) or not math.isfinite(score) or not isinstance(chosen, bool):
            raise FormatError(
                f"{path}: edges: {source} → {target}: expected a finite score and true or false, found {score!r} and "
                f"{chosen!r}"
            )
        scores[rows[source], columns[target]], selected[rows[source], columns[target]] = score, chosen
        seen += 1
    if seen != graph.size:
        raise FormatError(f"{path}: edges: expected the {graph.size} possible ones, found {seen}")
    settings: dict[str, Any] = {name: header.get(name) for name in ("method", "steps", "ablation", "n", "task")}
    wrong = next((name for name, value in settings.items() if type(value) is not type(getattr(_EMPTY, name))), None)
    if wrong is not None or not isinstance(header.get("has_selection"), bool):
        raise FormatError(f"{path}: {wrong or 'has_selection'}: not found or of another type")
    chosen = selected if header["has_selection"] else None
    try:
        return Circuit(graph=graph, scores=scores, selected=chosen, **settings)
    except MeasurementError as error:
        raise FormatError(f"{path}: {error}") from None


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
    known: dict[str, Any] = {**found, "architecture": str(found["architecture"])}
    return Graph(**known)


def _read_json(path: Path) -> tuple[dict[str, Any], list[Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
    except (OSError, pa.ArrowException, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a circuit in Parquet ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(header, dict) or tuple(table.column_names) != _COLUMNS:
        raise FormatError(f"{path}: expected a circuit with columns {', '.join(_COLUMNS)}, found something else")
    return header, list(zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True))


_EMPTY = Circuit(Graph(1, 1, 1, False, ""), torch.zeros(Graph(1, 1, 1, False, "").possible.shape))
