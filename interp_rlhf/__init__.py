"""See what preference training does inside the model: one line attaches this package to a TRL training script.

Importing it is cheap: public names are loaded on first use, so neither transformers nor trl is imported here.

>>> import interp_rlhf
>>> interp_rlhf.InterpConfig.preset("observe").schedule.every
50
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_rlhf.activations.capturing import capture
    from interp_rlhf.activations.prompt_sets import PromptSet
    from interp_rlhf.audit.snapshots import Snapshot
    from interp_rlhf.audit.store import load_run
    from interp_rlhf.callback import InterpCallback
    from interp_rlhf.circuits.attribution import attribute_edges
    from interp_rlhf.circuits.graph import Circuit
    from interp_rlhf.comparison import compare
    from interp_rlhf.config import InterpConfig
    from interp_rlhf.errors import (
        ConfigError,
        FormatError,
        HookpointError,
        InterpError,
        MeasurementError,
        PromptError,
        ReferenceMismatch,
    )
    from interp_rlhf.readouts.directions import Direction
    from interp_rlhf.readouts.probes import LinearProbe
    from interp_rlhf.readouts.saes import SparseAutoencoder
    from interp_rlhf.seam import attach, with_interp

__version__ = "0.1.0"

#: The one table of public names: where each is defined.
_PUBLIC: dict[str, str] = {
    "Circuit": "interp_rlhf.circuits.graph",
    "ConfigError": "interp_rlhf.errors",
    "Direction": "interp_rlhf.readouts.directions",
    "FormatError": "interp_rlhf.errors",
    "HookpointError": "interp_rlhf.errors",
    "InterpCallback": "interp_rlhf.callback",
    "InterpConfig": "interp_rlhf.config",
    "InterpError": "interp_rlhf.errors",
    "LinearProbe": "interp_rlhf.readouts.probes",
    "MeasurementError": "interp_rlhf.errors",
    "PromptError": "interp_rlhf.errors",
    "PromptSet": "interp_rlhf.activations.prompt_sets",
    "ReferenceMismatch": "interp_rlhf.errors",
    "Snapshot": "interp_rlhf.audit.snapshots",
    "SparseAutoencoder": "interp_rlhf.readouts.saes",
    "attach": "interp_rlhf.seam",
    "attribute_edges": "interp_rlhf.circuits.attribution",
    "capture": "interp_rlhf.activations.capturing",
    "compare": "interp_rlhf.comparison",
    "load_run": "interp_rlhf.audit.store",
    "with_interp": "interp_rlhf.seam",
}

__all__ = [
    "Circuit",
    "ConfigError",
    "Direction",
    "FormatError",
    "HookpointError",
    "InterpCallback",
    "InterpConfig",
    "InterpError",
    "LinearProbe",
    "MeasurementError",
    "PromptError",
    "PromptSet",
    "ReferenceMismatch",
    "Snapshot",
    "SparseAutoencoder",
    "attach",
    "attribute_edges",
    "capture",
    "compare",
    "load_run",
    "with_interp",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'interp_rlhf' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
