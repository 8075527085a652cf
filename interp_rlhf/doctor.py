"""What is installed here, what is missing, and what each missing part costs: ``interp-rlhf doctor``."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.version import Version

from interp_rlhf.errors import InterpError

if TYPE_CHECKING:
    from torch import nn

State = Literal["fine", "untested", "missing", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination.

    Attributes:
        topic: what was looked at.
        state: ``fine``; ``untested`` works in principle; ``missing`` costs what ``text`` says; ``broken`` cannot work.
        text: what was found, and what it means.
    """

    topic: str
    state: State
    text: str


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package that must be there: the lowest version that works, the first that does not, and the tested ones."""

    name: str
    lowest: str
    below: str | None
    tested: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Extra:
    """An optional extra: the packages it installs and what is lost without them."""

    name: str
    packages: tuple[str, ...]
    without: str


#: What the package stands on. The tested versions are those of the constraint files under ``requirements/``.
REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement("torch", "2.6", None, ("2.13.0",)),
    Requirement("transformers", "5", None, ("5.23.0",)),
    Requirement("trl", "1.12", "2", ("1.12.0", "1.16.0")),
    Requirement("accelerate", "1.4", None, ("1.15.0",)),
    Requirement("peft", "0.18", None, ("0.21.2",)),
)

EXTRAS: tuple[Extra, ...] = (
    Extra("wandb", ("wandb",), "no rows in Weights & Biases"),
    Extra("trackio", ("trackio",), "no rows in Trackio"),
    Extra("tensorboard", ("tensorboard",), "no rows in TensorBoard"),
    Extra("deepspeed", ("deepspeed",), "no ZeRO stages; single process, DDP and FSDP2 are not affected"),
    Extra("report", ("plotly", "jinja2"), "no report.html; timeline, snapshots and console summary are not affected"),
    Extra("sae", ("sae-lens",), "no dictionary of features can be trained (fit sae)"),
    Extra("test", ("pytest", "beartype"), "the tests do not run"),
)

TRAINERS: tuple[tuple[str, str | None], ...] = (
    ("DPO", None),
    ("GRPO", None),
    ("RLOO", None),
    ("SFT", None),
    ("Reward", None),
    ("KTO", None),
    ("PPO", "trl.experimental.ppo"),
    ("OnlineDPO", "trl.experimental.online_dpo"),
)


def installed(name: str) -> str | None:
    """The installed version of a distribution, or ``None``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examine() -> list[Finding]:
    """Look at the environment: versions, trainers, devices, trackers, extras and DeepSpeed's tools."""
    findings = [Finding("python", "fine", sys.version.split()[0])]
    findings += [check_requirement(requirement, installed(requirement.name)) for requirement in REQUIREMENTS]
    if all(finding.state != "broken" for finding in findings):
        findings += [_trainers(), _devices()]
    findings += [check_extra(extra, installed) for extra in EXTRAS]
    if installed("deepspeed"):
        findings.append(_deepspeed_tools())
    return findings


def check_requirement(requirement: Requirement, found: str | None) -> Finding:
    """Compare an installed version with the range that works and the versions that were tested."""
    span = f">={requirement.lowest}" + (f",<{requirement.below}" if requirement.below else "")
    if found is None:
        return Finding(requirement.name, "broken", f"not installed, expected {span}")
    public = Version(Version(found).public)
    too_new = requirement.below is not None and public >= Version(requirement.below)
    if public < Version(requirement.lowest) or too_new:
        return Finding(requirement.name, "broken", f"{found}, expected {span}")
    tested = [Version(text) for text in requirement.tested]
    names = " and ".join(requirement.tested)
    if public in tested:
        return Finding(requirement.name, "fine", f"{found} (tested)")
    place = "between" if min(tested) < public < max(tested) else "older than" if public < min(tested) else "newer than"
    return Finding(requirement.name, "untested", f"{found}, {place} the tested {names}")


def check_extra(extra: Extra, look_up: Callable[[str], str | None]) -> Finding:
    """Say which packages of an extra are there, or what their absence costs and how to get them."""
    found = {name: look_up(name) for name in extra.packages}
    missing = [name for name, number in found.items() if number is None]
    if not missing:
        return Finding(extra.name, "fine", ", ".join(f"{name} {number}" for name, number in found.items()))
    return Finding(
        extra.name, "missing", f"{extra.without} (no {', '.join(missing)}: pip install 'interp-rlhf[{extra.name}]')"
    )


def _trainers() -> Finding:
    import trl

    names = set(dir(trl))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl.experimental warns that it is experimental
        there = [name for name, module in TRAINERS if (find_spec(module) if module else f"{name}Trainer" in names)]
    absent = [name for name, _ in TRAINERS if name not in there]
    note = f"; not in TRL {trl.__version__}: {', '.join(absent)}" if absent else ""
    if "PPO" in absent:
        note += " (PPO: TRL 1.12 is the last line that has it)"
    return Finding("trainers", "fine", f"{', '.join(there)}{note}")


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return Finding("devices", "untested", f"{count} GPU ({names}), {torch.get_num_threads()} CPU threads")
    return Finding("devices", "fine", f"CPU, {torch.get_num_threads()} threads")


def _deepspeed_tools() -> Finding:
    beside = Path(sys.executable).parent
    absent = [name for name in ("g++", "ninja") if not (shutil.which(name) or (beside / name).exists())]
    if absent:
        return Finding("build tools", "missing", f"no {', '.join(absent)}: DeepSpeed on CPU cannot build its operator")
    return Finding("build tools", "fine", "g++ and ninja, for DeepSpeed's CPU operator")


def render(findings: Sequence[Finding]) -> str:
    """The findings as aligned lines of text."""
    width = max(len(finding.topic) for finding in findings)
    return "\n".join(f"{finding.topic:<{width}}  {finding.state:<8}  {finding.text}" for finding in findings)


def describe_model(path: Path) -> str:
    """Resolve hookpoints on a local model and describe its layout. Weights are not loaded.

    Args:
        path: a folder with a ``config.json``.

    Raises:
        InterpError: the folder holds no model configuration, or the architecture has no hookpoints.
    """
    from interp_rlhf.activations.hookpoints import layout, resolve_hookpoints
    from interp_rlhf.config import InterpConfig

    if not (path / "config.json").is_file():
        raise InterpError(f"{path}: no config.json there, expected a folder with a saved model")
    model = _empty_model(path)
    try:
        tree = layout(model)
        points = resolve_hookpoints(InterpConfig().hookpoints, tree)
    except InterpError as error:
        raise type(error)(f"{path}: {error}") from None
    lines = [f"{path}: {type(model).__name__}, {len(tree.layers)} layers, d = {tree.d_model}"]
    lines += [f"  {', '.join(point.asked)} -> {point.name}" for point in points]
    return "\n".join(lines)


def _empty_model(path: Path) -> nn.Module:
    """The model that ``path/config.json`` describes, without weights; code beside it is not run."""
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InterpError(
                f"{path}/config.json: expected a causal language model, found model_type {config.model_type!r}"
            )
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except InterpError:
        raise
    except Exception as error:  # a foreign file: each configuration class fails in its own way
        reason = " ".join(str(error).split())[:400]
        raise InterpError(f"{path}/config.json: not a model configuration ({type(error).__name__}: {reason})") from None
