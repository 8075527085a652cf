"""What ``run.json`` says about a run: config, versions, and hashes of everything that a comparison depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp_rlhf.activations.hookpoints import unwrap_model
from interp_rlhf.activations.tokenizers import tokenizer_hash
from interp_rlhf.audit.sealing import tensor_hash
from interp_rlhf.config import InterpConfig
from interp_rlhf.controls import Control
from interp_rlhf.distributed import World
from interp_rlhf.plan import ConceptTexts, Plan

#: Packages whose versions are recorded.
RECORDED: tuple[str, ...] = (
    "interp-rlhf",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
)


def versions() -> dict[str, str | None]:
    """Installed versions of :data:`RECORDED`; ``None`` where a package is absent."""
    found: dict[str, str | None] = {}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


#: Training arguments that say where and how a run is told of, not what is trained.
_TELLING = frozenset({"output_dir", "run_name", "logging_dir", "disable_tqdm", "resume_from_checkpoint", "report_to"})


def run_info(
    config: InterpConfig,
    plan: Plan,
    model: nn.Module,
    tokenizer: Any,
    trainer_class: str,
    world: World,
    args: Any = None,
    control: Control | None = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON-ready content of ``run.json``. Hashes of texts, never texts: this file is published with the model."""
    inner = unwrap_model(model)
    settings = inner.config
    return {
        "config": published(config),
        "versions": versions(),
        "trainer": trainer_class or None,
        "training_sha256": None if args is None else training_hash(args),
        "training": None if training is None else {**training, "trainable_sha256": _trainable(model)},
        "control": None if control is None else control.as_info(),
        "model": {
            "class": type(inner).__name__,
            "name": getattr(settings, "_name_or_path", "") and str(settings._name_or_path).rstrip("/").split("/")[-1],
            "config_sha256": _digest(settings.to_json_string()),
        },
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "chat_template_sha256": _digest(str(tokenizer.chat_template)) if _template(tokenizer) else None,
        "hookpoints": list(plan.hookpoints),
        "prompts": {
            "name": plan.audit.name,
            "source": plan.audit.source,
            "n": len(plan.audit.prompts),
            "skipped": plan.audit.skipped,
            "sha256": plan.audit.hash,
            "max_length": plan.max_length,
        },
        "concepts": [
            {"name": concept.name, "fit": len(concept.fit), "held": len(concept.held), "sha256": _pairs_hash(concept)}
            for concept in plan.concepts
        ],
        "directions": [
            {"name": direction.name, "hookpoint": direction.hookpoint, "sha256": tensor_hash(direction.vector)}
            for direction in plan.directions
        ],
        "sealed_probe": _sealed(plan),
        "circuits": _circuits(plan),
        "world_size": world.size,
        "seed": config.seed,
    }


def training_info(dataset: Any, rewards: Sequence[str]) -> dict[str, Any]:
    """What a run learns from, before a control run scrambles it: a hash of the data, and names of the rewards.

    The hash is over the columns, the number of rows and 512 of them evenly spaced, without transforms that are applied
    when a row is read; ``None`` for data that are no map-style ``datasets.Dataset``.
    """
    found = None
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names") and hasattr(dataset, "__len__"):
        plain, n = dataset.with_format(None), len(dataset)
        rows = [plain[index] for index in range(0, n, max(n // 512, 1))]
        found = _digest(json.dumps([sorted(dataset.column_names), n, rows], sort_keys=True, default=_nameless))
    return {"data_sha256": found, "rewards": list(rewards)}


def describe_reward(reward: Any) -> str:
    """A reward's name: of a function with a hash of its code and constants, of a model with its class and name."""
    code = getattr(reward, "__code__", None)
    if code is not None:
        plain = [value for value in code.co_consts if isinstance(value, int | float | str | bytes | None)]
        return f"{reward.__name__}:{_digest(repr((code.co_code, plain, code.co_names)))[:16]}"
    settings = getattr(reward, "config", None)
    name = str(getattr(settings, "_name_or_path", "") or "").rstrip("/").split("/")[-1]
    return f"{type(reward).__name__}:{name}" if name else type(reward).__name__


def _circuits(plan: Plan) -> list[dict[str, Any]]:
    tasks = (*plan.tasks, *([] if plan.control_task is None else [plan.control_task]))
    return [
        {"task": task.name, "pairs": len(task.pairs), "sha256": task.hash, "control": task is plan.control_task}
        for task in tasks
    ]


def _trainable(model: nn.Module) -> str:
    """SHA-256 over the names of the parameters that are trained."""
    return _digest(json.dumps(sorted(name for name, p in unwrap_model(model).named_parameters() if p.requires_grad)))


def _nameless(value: Any) -> str:
    return type(value).__name__


def _sealed(plan: Plan) -> dict[str, Any] | None:
    """The sealed probe, fixed before training begins."""
    probe = plan.sealed
    if probe is None:
        return None
    whole = torch.cat([probe.weight, torch.tensor([probe.bias])])
    return {"name": probe.name, "hookpoint": probe.hookpoint, "sha256": tensor_hash(whole)}


def training_hash(args: Any) -> str:
    """SHA-256 over the training arguments that change what is trained: equal for a run and its control runs."""
    told = {
        name: value
        for name, value in args.to_dict().items()
        if name not in _TELLING and not name.startswith(("hub_", "push_to_hub", "log", "save_", "trackio"))
    }
    return _digest(json.dumps(told, sort_keys=True, default=_nameless))


def published(config: InterpConfig) -> dict[str, Any]:
    """The config with files by their names: folders of a machine are nobody else's business."""
    settings = config.as_mapping()
    path = settings["prompts"]["path"]
    settings["prompts"]["path"] = path and Path(path).name
    for key in ("packs", "directions"):
        settings["concepts"][key] = [Path(path).name for path in settings["concepts"][key]]
    probes = settings["probes"]
    probes["sealed"] = probes["sealed"] and Path(probes["sealed"]).name
    probes["on_domain"] = {name: Path(path).name for name, path in probes["on_domain"].items()}
    circuits = settings["circuits"]
    circuits["tasks"] = [Path(entry).name for entry in circuits["tasks"]]
    circuits["control"] = circuits["control"] and Path(circuits["control"]).name
    return settings


def _pairs_hash(concept: ConceptTexts) -> str:
    halves = {half: [(p.positive.id, p.negative.id) for p in getattr(concept, half)] for half in ("fit", "held")}
    return _digest(json.dumps(halves))


def _template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
