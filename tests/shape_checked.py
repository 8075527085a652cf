"""A second copy of a module in which jaxtyping and beartype check every annotated shape. The original is untouched."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from jaxtyping import install_import_hook


def checked(name: str) -> ModuleType:
    """The module ``name``, imported anew with its annotations enforced at run time."""
    original = importlib.import_module(name)
    parent, _, leaf = name.rpartition(".")
    del sys.modules[name]
    try:
        with install_import_hook(name, "beartype.beartype"):
            return importlib.import_module(name)
    finally:
        sys.modules[name] = original
        setattr(sys.modules[parent], leaf, original)
