"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import interp_rlhf

MODULES = [module.name for module in pkgutil.walk_packages(interp_rlhf.__path__, "interp_rlhf.")]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=OPTIONS)
    assert found.failed == 0


def test_every_formula_has_one() -> None:
    """Every public function of the modules that hold one metric a function."""
    for name in ("drift.concepts", "readouts.separation", "readouts.baselines"):
        module = importlib.import_module(f"interp_rlhf.{name}")
        for key, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and not key.startswith("_"):
                assert ">>>" in (value.__doc__ or ""), f"{name}.{key} has no example"
