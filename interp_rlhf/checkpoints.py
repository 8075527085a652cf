"""Models from folders: a saved model, a PEFT adapter on its base, a reward model; and the tokenizer beside them.

Nothing is downloaded and no code that lies beside weights is run. A hub name is found where it was downloaded before.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from interp_rlhf.errors import ConfigError

#: Any of these means that a folder holds a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HEADS = ("score", "classifier")  # what transformers calls a sequence classifier's last layer
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_STEP = re.compile(r"checkpoint-(\d+)")

Precision = torch.dtype | Literal["auto"]


def model_folder(path: str | Path) -> Path:
    """The folder of a saved model or adapter: ``path`` itself, or where a hub name was downloaded to.

    Raises:
        ConfigError: no such folder, a hub name that was not downloaded, or a folder without a model.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"{path}: expected a folder with a saved model, found a file")
        if not _HUB_NAME.fullmatch(str(path)):
            raise ConfigError(f"{path}: no such folder, expected one with a saved model or adapter")
        folder = _downloaded(str(path))
    if not is_model_folder(folder):
        raise ConfigError(f"{path}: not a model folder, expected config.json or adapter_config.json in it")
    return folder


def is_model_folder(path: str | Path) -> bool:
    """Whether a folder holds a saved model or a PEFT adapter."""
    return any((Path(path) / name).is_file() for name in ("config.json", "adapter_config.json"))


def short_name(path: str | Path) -> str:
    """The last part of a folder's path or of a hub name: folders of a machine are nobody else's business."""
    return Path(path).resolve().name if Path(path).is_dir() else Path(path).name


def load_checkpoint(path: str | Path, *, dtype: Precision = torch.float32, base: str | Path | None = None) -> nn.Module:
    """The model of a folder in evaluation mode, on the GPU where there is one.

    A folder with ``adapter_config.json`` is a PEFT adapter on its base; the others are causal language models, or
    sequence classifiers (reward models) where their ``architectures`` or the adapter's task say so.

    Args:
        path: the folder, or the name of a model on the hub that was downloaded before.
        dtype: precision of the weights; ``"auto"`` is the one they were saved in.
        base: the adapter's base, instead of the one its configuration names.

    Raises:
        ConfigError: no such folder, no model in it, or one that cannot be loaded; names the folder.
    """
    folder = model_folder(path)
    if (folder / "adapter_config.json").is_file():
        model = _load_adapter(folder, dtype, base)
    else:
        model = _load_model(folder, dtype, _labels_of(folder))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def names_its_base(path: str | Path) -> bool:
    """Whether the base model that an adapter names can be found; true for whole models."""
    folder = model_folder(path)
    if not (folder / "adapter_config.json").is_file():
        return True
    named = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        return False
    try:
        model_folder(named)
    except ConfigError:
        return False
    return True


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder; ``None`` where there is none (adapters are often saved without).

    Raises:
        ConfigError: no such folder, or files that cannot be read.
    """
    folder = model_folder(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way
        raise ConfigError(f"{path}: its tokenizer cannot be read ({_reason(error)})") from None


def checkpoint_step(path: str | Path) -> int | None:
    """Optimizer steps done, from ``trainer_state.json`` or the name ``checkpoint-N``; ``None`` where neither tells.

    Raises:
        ConfigError: the state file is there but names no step.
    """
    state = Path(path) / "trainer_state.json"
    if state.is_file():
        step = _json(state).get("global_step")
        if type(step) is not int or step < 0:
            raise ConfigError(f"{state}: global_step: expected a whole number, found {step!r}")
        return step
    match = _STEP.fullmatch(Path(path).resolve().name)
    return int(match[1]) if match else None


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise ConfigError(
            f"{name}: no such folder, and no model of that name was downloaded; hf download {name} gets it"
        ) from None


def _load_adapter(folder: Path, dtype: Precision, base: str | Path | None) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError(f"{folder}: a PEFT adapter, which needs pip install peft") from None
    settings = _json(folder / "adapter_config.json")
    named = base or settings.get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{folder}/adapter_config.json: names no base model, expected base to be given")
    try:
        place = model_folder(named)
    except ConfigError as error:
        advice = "" if base else "; give the adapter's base model as base"
        raise ConfigError(f"{folder}: the adapter's base: {error}{advice}") from None
    if (place / "adapter_config.json").is_file():
        raise ConfigError(f"{folder}: the adapter's base {place.name} is an adapter too, expected a whole model")
    labels = _labels_of(place)
    if labels is None and settings.get("task_type") == "SEQ_CLS":
        labels = _scores_of(folder)
    model = _load_model(place, dtype, labels, head_later=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # they would be as before training
            return PeftModel.from_pretrained(model, folder)
    except Exception as error:  # each kind of adapter fails in its own way
        raise ConfigError(f"{folder}: the adapter does not fit {place.name} ({_reason(error)})") from None


def _load_model(folder: Path, dtype: Precision, labels: int | None, *, head_later: bool = False) -> nn.Module:
    """A causal language model, or a sequence classifier of ``labels`` scores; ``head_later`` where its head follows."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    kind: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    options |= {} if labels is None else {"num_labels": labels}
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # damaged or foreign files: each model class fails in its own way
        raise ConfigError(f"{folder}: cannot be loaded as a model ({_reason(error)})") from None
    absent = sorted(name for name in found["missing_keys"] if not (head_later and name.startswith(_HEADS)))
    if absent:
        raise ConfigError(f"{folder}: {len(absent)} of its weights are not there, the first is {absent[0]}")
    return model


def _labels_of(folder: Path) -> int | None:
    """Number of scores of a sequence classifier; ``None`` for a language model."""
    settings = _json(folder / "config.json")
    names = settings.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        return None
    return len(settings["id2label"]) if "id2label" in settings else settings.get("num_labels", 2)


def _scores_of(adapter: Path) -> int:
    """Number of scores of the head that was trained with an adapter; 1, a reward, where none was saved."""
    from safetensors import safe_open

    weights = adapter / "adapter_model.safetensors"
    if weights.is_file():
        with safe_open(str(weights), framework="pt") as file:
            heads = [name for name in sorted(file.keys()) if name.endswith(tuple(f"{head}.weight" for head in _HEADS))]
            if heads:
                return file.get_slice(heads[0]).get_shape()[0]
    return 1


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({_reason(error)})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
