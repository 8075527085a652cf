"""Importing is cheap, public names mean what the table says, imports point down, and the house's sizes are kept."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import interp_rlhf

PACKAGE = Path(interp_rlhf.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    ".".join(("interp_rlhf", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCES
]
LOWEST = {"interp_rlhf.errors", "interp_rlhf.measurement"}

#: Layer -> (outside packages it must not know, parts of this package it may know).
LAYERS = {
    "activations": ({"trl", "accelerate", "deepspeed"}, {"activations", "config"}),
    "readouts": ({"trl", "accelerate", "deepspeed", "transformers"}, {"readouts", "activations"}),
    "circuits": ({"trl", "accelerate", "deepspeed"}, {"circuits", "readouts", "activations", "config", "organisms"}),
    "drift": ({"trl", "accelerate", "deepspeed", "transformers"}, {"drift", "readouts", "activations"}),
    "audit": ({"trl", "accelerate", "deepspeed", "transformers"}, {"audit", "config", "readouts", "activations"}),
    "report": (
        {"trl", "accelerate", "deepspeed", "transformers", "torch"},
        {"report", "audit", "config", "drift.control_runs", "drift.circuit_verdict"},
    ),
}
MAY_IMPORT_SEAM = {"interp_rlhf", "interp_rlhf.cli", "interp_rlhf.demo"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what a module imports, at any depth, outside ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_import_is_cheap_and_light():
    code = (
        "import time, sys, json; t = time.perf_counter(); import interp_rlhf; dir(interp_rlhf)\n"
        "print(json.dumps([time.perf_counter() - t, [m for m in ('torch', 'transformers', 'trl', 'pydantic') "
        "if m in sys.modules]]))"
    )
    results = [json.loads(run(code)) for _ in range(3)]
    assert results[0][1] == []
    assert min(seconds for seconds, _ in results) < 0.3


@pytest.mark.parametrize("name", ["InterpConfig", "InterpError", "PromptSet", "Direction", "capture"])
def test_names_that_need_no_trainer_do_not_import_trl(name: str):
    assert run(f"import sys, interp_rlhf; interp_rlhf.{name}; print('trl' in sys.modules)").strip() == "False"


def test_attach_does_not_import_trl():
    assert run("import sys; from interp_rlhf import attach; print('trl' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("seed", [0, 1])
def test_public_names_survive_any_import_order(seed: int):
    run(
        "import random, importlib, interp_rlhf\n"
        f"modules = {MODULES!r}\n"
        f"random.Random({seed}).shuffle(modules)\n"
        "for name in modules: importlib.import_module(name)\n"
        "for name in interp_rlhf.__all__:\n"
        "    home = importlib.import_module(interp_rlhf._PUBLIC[name])\n"
        "    assert getattr(interp_rlhf, name) is vars(home)[name], name\n"
        "    assert getattr(interp_rlhf, name).__module__ == home.__name__, name\n"
        "    assert getattr(interp_rlhf, name).__doc__, name\n"
    )


def test_public_names_are_listed_once_and_equal_no_module():
    assert interp_rlhf.__all__ == sorted(interp_rlhf._PUBLIC)
    assert set(interp_rlhf.__all__) <= set(dir(interp_rlhf))
    parts = {part for module in MODULES for part in module.split(".")}
    assert not parts & set(interp_rlhf.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = interp_rlhf.no_such_name


def test_static_imports_equal_the_table():
    checked = next(node for node in parsed(PACKAGE / "__init__.py").body if isinstance(node, ast.If))
    names = {alias.name: node.module for node in checked.body for alias in node.names}
    assert names == interp_rlhf._PUBLIC


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_know_only_what_is_below(layer: str):
    outside, inside = LAYERS[layer]
    allowed = LOWEST | {f"interp_rlhf.{part}" for part in inside}
    files = sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(parsed(path)):
            assert name.split(".")[0] not in outside, f"{path.name} imports {name}"
            if name.startswith("interp_rlhf"):
                assert any(name == part or name.startswith(f"{part}.") for part in allowed), f"{path.name}: {name}"


def test_only_the_front_imports_the_seam():
    for path, module in zip(SOURCES, MODULES, strict=True):
        if module not in MAY_IMPORT_SEAM:
            assert not [name for name in imports(parsed(path)) if name.startswith("interp_rlhf.seam")], module


def test_report_loads_neither_torch_nor_transformers():
    code = "import sys, interp_rlhf.report.html; print({*sys.modules} & {'torch', 'transformers'})"
    assert run(code).strip() == "set()"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_and_docstrings(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    tree = parsed(path)
    assert ast.get_docstring(tree), "module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{node.name}: {lines} lines"
    for node in public_definitions(tree):
        assert ast.get_docstring(node), f"{node.name} has no docstring"


def public_definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arguments_are_annotated(path: Path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: {bare} without annotation"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle_no_silent_except_no_assert(path: Path):
    tree = parsed(path)
    assert not {"pickle", "dill", "joblib", "cloudpickle"} & {name.split(".")[0] for name in imports(tree)}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert"
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(part, ast.Pass) for part in node.body)
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (silent and broad), f"line {node.lineno}: exception dropped silently"


def test_packaged_data_is_found():
    from importlib import resources

    root = resources.files("interp_rlhf")
    assert (root / "py.typed").is_file()
    assert (root / "presets" / "observe.yaml").is_file()
    assert [entry for entry in (root / "report").iterdir() if entry.name.endswith(".j2")]
    assert len([entry for entry in (root / "readouts" / "packs").iterdir() if entry.name.endswith(".jsonl")]) >= 5
