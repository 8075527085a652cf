"""Folders of sparse dictionaries as three libraries write them, read as numbers only and checked before they are used.

===================  ======================================  ==========================================================
library              files                                   kinds
===================  ======================================  ==========================================================
SAELens 6 (and 3–5)  cfg.json, sae_weights.safetensors       standard, topk, jumprelu, gated, batchtopk (a checkpoint)
sparsify             cfg.json, sae.safetensors               topk
dictionary_learning  config.json, ae.pt                      AutoEncoder, AutoEncoderNew, GatedAutoEncoder,
                                                             JumpReluAutoEncoder, AutoEncoderTopK, BatchTopKSAE,
                                                             MatryoshkaBatchTopKSAE
===================  ======================================  ==========================================================

Transcoders, crosscoders, signed features and group-wise maxima are refused by name: they do not describe the
activations of one place by features of one sign. Keys of a JSON that say nothing about the mathematics are passed over;
tensors have to be exactly those of the kind, in shape, finite, and stored as float16, bfloat16, float32 or float64.
Features are in the units of the stored weights: decoders are not scaled to length 1 first, as dictionary_learning's own
loader does for ``AutoEncoder``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from interp_rlhf.activations.hookpoints import parse_hookpoint
from interp_rlhf.errors import FormatError, HookpointError
from interp_rlhf.readouts.sae_hooks import lens_name, translate_hook, translate_submodule
from interp_rlhf.readouts.sae_tensors import (
    Shape,
    read_json,
    read_safetensors,
    read_torch,
    shown,
    true_or_false,
    whole_number,
    wrong_value,
)

Architecture = Literal["standard", "topk", "batchtopk", "jumprelu", "gated"]
Normalisation = Literal["none", "length", "layer_norm"]

#: A tensor's name there -> the field of SparseAutoencoder it becomes; ``.T`` where it is stored transposed, ``()``
#: where one number stands for all features.
_Names = dict[str, str]

_PLAIN: _Names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_SAELENS: Mapping[str, tuple[Architecture, _Names]] = {
    "standard": ("standard", _PLAIN),
    "topk": ("topk", _PLAIN),
    "jumprelu": ("jumprelu", _PLAIN | {"threshold": "threshold"}),
    "gated": (
        "gated",
        {"W_enc": "W_enc", "b_gate": "b_gate", "b_mag": "b_enc", "r_mag": "r_mag", "W_dec": "W_dec", "b_dec": "b_dec"},
    ),
    "batchtopk": ("batchtopk", _PLAIN | {"topk_threshold": "threshold()"}),
    "matryoshka_batchtopk": ("batchtopk", _PLAIN | {"topk_threshold": "threshold()"}),
}
_SAELENS_NORMALISATION: Mapping[Any, Normalisation] = {
    "none": "none",
    "expected_average_only_in": "none",
    "constant_norm_rescale": "length",
    "layer_norm": "layer_norm",
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SPARSIFY: _Names = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_LINEAR: _Names = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}


@dataclass(frozen=True, slots=True)
class _Class:
    """One of dictionary_learning's classes: its tensors, and whether ``b_dec`` is taken from the activations."""

    architecture: Architecture
    names: _Names
    apply_b_dec_to_input: bool = True
    optional: tuple[str, ...] = ()


_LEARNED: Mapping[str, _Class] = {
    "AutoEncoder": _Class("standard", {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": _Class("standard", {**_LINEAR, "decoder.bias": "b_dec"}, apply_b_dec_to_input=False),
    "GatedAutoEncoder": _Class(
        "gated",
        {
            "encoder.weight": "W_enc.T", "gate_bias": "b_gate", "mag_bias": "b_enc", "r_mag": "r_mag",
            "decoder.weight": "W_dec.T", "decoder_bias": "b_dec",
        },
    ),
    "JumpReluAutoEncoder": _Class("jumprelu", {**_PLAIN, "threshold": "threshold"}, apply_b_dec_to_input=False),
    "AutoEncoderTopK": _Class(
        "topk", {**_LINEAR, "b_dec": "b_dec", "k": "k", "threshold": "ignored"}, optional=("k", "threshold")
    ),
    "BatchTopKSAE": _Class(
        "batchtopk", {**_LINEAR, "b_dec": "b_dec", "k": "k", "threshold": "threshold()"}, optional=("k",)
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        "batchtopk",
        {**_PLAIN, "k": "k", "threshold": "threshold()", "group_sizes": "groups"},
        optional=("k", "group_sizes"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredDictionary:
    """What a folder holds, in this package's words.

    Attributes:
        hookpoint: one of our names.
        architecture: the kind of autoencoder.
        tensors: float32, by field of :class:`~interp_rlhf.readouts.saes.SparseAutoencoder`.
        settings: its other fields, where they differ from their defaults or are told.
    """

    hookpoint: str
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def read_folder(folder: Path, hookpoint: str | None = None) -> StoredDictionary:
    """Read one dictionary. Links are followed (a download cache is made of them); nothing in the folder is executed.

    Args:
        hookpoint: where the dictionary is read, in place of what the folder tells.

    Raises:
        FormatError: a file is missing, damaged or foreign, or the kind is not supported; names file and field.
        HookpointError: the place it was trained on has no counterpart here, or ``hookpoint`` is no hookpoint's name.
    """
    if hookpoint is not None:
        parse_hookpoint(hookpoint)
    readers = {"sae_weights.safetensors": _saelens, "sae.safetensors": _sparsify, "ae.pt": _learned}
    found = [name for name in readers if os.path.lexists(folder / name)]
    if len(found) != 1:
        raise FormatError(
            f"{folder}: expected a folder of a dictionary, with one of {', '.join(readers)} (SAELens, sparsify, "
            f"dictionary_learning), found {' and '.join(found) or 'none of them'}"
        )
    return readers[found[0]](folder, hookpoint)


# ------------------------------------------------------------------------------------------------------------- SAELens


def _saelens(folder: Path, hookpoint: str | None) -> StoredDictionary:
    path, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    about = _current(read_json(path), path)
    kind = about.get("architecture")
    if not isinstance(kind, str) or kind not in _SAELENS:
        raise _unsupported(path, "architecture", kind, _SAELENS)
    architecture, names = _SAELENS[kind]
    sizes = {"d": whole_number(about, "d_in", path), "F": whole_number(about, "d_sae", path)}
    if str(about.get("dtype", "float32")).removeprefix("torch.") not in _DTYPES:
        raise wrong_value(path, "dtype", f"one of {', '.join(_DTYPES)}", about["dtype"])
    settings: dict[str, Any] = {}
    settings["apply_b_dec_to_input"] = true_or_false(about, "apply_b_dec_to_input", path, default=True)
    if architecture == "topk":
        settings["k"] = whole_number(about, "k", path, most=sizes["F"])
    if architecture in ("topk", "batchtopk"):
        settings["rescale_acts_by_decoder_norm"] = true_or_false(about, "rescale_acts_by_decoder_norm", path)
    normalisation = about.get("normalize_activations", "none")
    if not isinstance(normalisation, str) or normalisation not in _SAELENS_NORMALISATION:
        raise wrong_value(path, "normalize_activations", f"one of {', '.join(_SAELENS_NORMALISATION)}", normalisation)
    settings["normalisation"] = _SAELENS_NORMALISATION[normalisation]
    scales = folder / "activation_scaler.json"
    if normalisation == "expected_average_only_in" and os.path.lexists(scales):
        settings["scale"] = _scale(scales)
    place = _saelens_place(about, path, hookpoint)
    shapes = _shapes(names) | {"scaling_factor": ("F",)}
    found = read_safetensors(
        weights, shapes, sizes, optional=("scaling_factor",), instead={"log_threshold": "threshold"}
    )
    if not bool((found.get("scaling_factor", torch.ones(1)) == 1).all()):
        raise FormatError(f"{weights}: scaling_factor: expected 1 for every feature, found a fine-tuned dictionary")
    if "log_threshold" in found:
        found["threshold"] = found["log_threshold"].exp()
    return StoredDictionary(place, architecture, _fields(found, names), settings)


def _current(about: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration as SAELens 6 would write it: before, all keys stood side by side."""
    if "metadata" in about:
        if not isinstance(about["metadata"], dict):
            raise wrong_value(path, "metadata", "an object", about["metadata"])
        return about
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    about = {renamed.get(key, key): value for key, value in about.items()}
    about.setdefault("architecture", "standard")
    activation = about.get("activation_fn", "relu")
    if activation == "topk":
        options = about.get("activation_fn_kwargs")
        about |= {"architecture": "topk", "k": options.get("k") if isinstance(options, dict) else None}
    elif activation != "relu":
        raise wrong_value(path, "activation_fn", "relu or topk", activation)
    normalisation = about.get("normalize_activations")
    if normalisation is None or isinstance(normalisation, bool):
        about["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    return {**about, "metadata": about}


def _saelens_place(about: dict[str, Any], path: Path, hookpoint: str | None) -> str:
    metadata = about["metadata"]
    if metadata.get("hook_name_out") is not None:
        raise _unsupported(path, "metadata.hook_name_out", metadata["hook_name_out"], ())
    if metadata.get("hook_head_index") is not None:
        raise wrong_value(path, "metadata.hook_head_index", "null (all heads together)", metadata["hook_head_index"])
    options = metadata.get("model_from_pretrained_kwargs")
    if isinstance(options, dict) and options.get("center_writing_weights"):
        raise wrong_value(
            path,
            "metadata.model_from_pretrained_kwargs.center_writing_weights",
            "false (activations as the model computes them)",
            options["center_writing_weights"],
        )
    hook = metadata.get("hook_name") or metadata.get("hf_hook_name")
    if hookpoint is None:
        hookpoint = _place(path, "metadata.hook_name", hook, metadata.get("model_name"))
    reshape = about.get("reshape_activations", "none")
    if reshape not in ("none", "hook_z") or (reshape == "hook_z" and not hookpoint.endswith(".heads")):
        raise wrong_value(path, "reshape_activations", f"none (or hook_z for heads) at {hookpoint}", reshape)
    return hookpoint


def _scale(path: Path) -> float:
    scale = read_json(path).get("scaling_factor")
    if scale is None:
        return 1.0
    if type(scale) not in (int, float) or not 0 < scale < 1e30:
        raise wrong_value(path, "scaling_factor", "a number above 0", scale)
    return float(scale)


# ---------------------------------------------------------------------------------------------------------- the others


def _sparsify(folder: Path, hookpoint: str | None) -> StoredDictionary:
    path = folder / "cfg.json"
    about = read_json(path)
    for option in ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed"):
        if true_or_false(about, option, path):
            raise _unsupported(path, option, True, ())
    if about.get("activation", "topk") != "topk":
        raise _unsupported(path, "activation", about["activation"], ("topk",))
    d = whole_number(about, "d_in", path)
    told = about.get("num_latents") not in (None, 0)
    width = whole_number(about, "num_latents", path) if told else d * whole_number(about, "expansion_factor", path)
    settings = {"k": whole_number(about, "k", path, most=width)}
    if hookpoint is None:
        hookpoint = _place(folder, "name of the folder", Path(os.path.abspath(folder)).name, None)
    found = read_safetensors(folder / "sae.safetensors", _shapes(_SPARSIFY), {"d": d, "F": width})
    return StoredDictionary(hookpoint, "topk", _fields(found, _SPARSIFY), settings)


def _learned(folder: Path, hookpoint: str | None) -> StoredDictionary:
    path = folder / "config.json"
    about = read_json(path).get("trainer")
    if not isinstance(about, dict):
        raise wrong_value(path, "trainer", "an object", about)
    kind = about.get("dict_class")
    if not isinstance(kind, str) or kind not in _LEARNED:
        raise _unsupported(path, "trainer.dict_class", kind, _LEARNED)
    learned = _LEARNED[kind]
    told = {"d": "activation_dim", "F": "dict_size"}
    sizes = {letter: whole_number(about, name, path) for letter, name in told.items() if name in about}
    if hookpoint is None:
        submodule, layer = about.get("submodule_name"), whole_number(about, "layer", path, least=0, most=10**6)
        if submodule is not None and not isinstance(submodule, str):
            raise wrong_value(path, "trainer.submodule_name", "a name", submodule)
        hookpoint = _named(
            f"{path}: trainer", lambda: translate_submodule(layer, submodule, _model(about.get("lm_name")))
        )
    weights = folder / "ae.pt"
    found = read_torch(weights, _shapes(learned.names), sizes, optional=learned.optional)
    settings: dict[str, Any] = {"apply_b_dec_to_input": learned.apply_b_dec_to_input}
    tensors = _fields(found, learned.names)
    if learned.architecture == "topk":
        stored = int(found["k"]) if "k" in found else None
        settings["k"] = whole_number({"k": stored} | about, "k", path, most=len(tensors["b_enc"]))
        if stored not in (None, settings["k"]):
            raise FormatError(f"{weights}: k: expected {settings['k']} as in {path.name}, found {stored}")
    return StoredDictionary(hookpoint, learned.architecture, tensors, settings)


# ------------------------------------------------------------------------------------------------------------ writing


def write_folder(
    folder: Path,
    hookpoint: str,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> None:
    """Write a folder in the format of SAELens 6; it appears complete or not at all.

    Args:
        tensors, settings: as in :class:`StoredDictionary`, with nothing that SAELens has no word for.

    Raises:
        FormatError: the folder exists and is not empty, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    d, width = tensors["W_enc"].shape
    words = {ours: theirs for theirs, ours in _SAELENS_NORMALISATION.items() if theirs != "expected_average_only_in"}
    about: dict[str, Any] = {
        "architecture": architecture,
        "d_in": d,
        "d_sae": width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": settings["apply_b_dec_to_input"],
        "normalize_activations": words[settings["normalisation"]],
        "reshape_activations": "hook_z" if lens_name(hookpoint).endswith("_z") else "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": lens_name(hookpoint), "hook_head_index": None},
    }
    if architecture == "topk":
        about |= {name: settings[name] for name in ("k", "rescale_acts_by_decoder_norm")}
    named = {theirs: tensors[ours].cpu().contiguous() for theirs, ours in _SAELENS[architecture][1].items()}
    temporary = folder.parent / f".interp-{secrets.token_hex(8)}"
    config, weights = temporary / "cfg.json", temporary / "sae_weights.safetensors"
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise FormatError(f"{folder}: expected a new or an empty folder, found one that holds files")
        temporary.mkdir(parents=True)
        save_file(named, weights)
        config.write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")
        weights.chmod(config.stat().st_mode)  # readable for whom new files are; safetensors makes its own private
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{folder}: cannot be written ({shown(str(error))[1:-1]})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- small helpers

_SHAPES: Mapping[str, Shape] = {
    "W_enc": ("d", "F"), "W_enc.T": ("F", "d"), "W_dec": ("F", "d"), "W_dec.T": ("d", "F"), "b_dec": ("d",),
    "threshold()": (), "k": (), "ignored": (), "groups": ("groups",),
}  # fmt: skip


def _shapes(names: _Names) -> dict[str, Shape]:
    return {theirs: _SHAPES.get(ours, ("F",)) for theirs, ours in names.items()}


def _fields(found: Mapping[str, Tensor], names: _Names) -> dict[str, Tensor]:
    """What was read, by our names, turned and spread as ours are; what is no field of ours is left out."""
    width = len(next(found[theirs] for theirs, ours in names.items() if ours == "b_enc"))
    fields = {}
    for theirs, ours in names.items():
        if ours.endswith("()"):
            fields[ours.removesuffix("()")] = found[theirs].expand(width).clone()
        elif ours not in ("k", "ignored", "groups"):
            fields[ours.removesuffix(".T")] = found[theirs].T if ours.endswith(".T") else found[theirs]
    return fields


def _place(path: Path, field: str, hook: Any, model: Any) -> str:
    if not isinstance(hook, str):
        raise FormatError(f"{path}: {field}: expected the name of a hook, found {shown(hook)}; hookpoint= says it too")
    return _named(f"{path}: {field}", lambda: translate_hook(hook, _model(model)))


def _named(place: str, translate: Callable[[], str]) -> str:
    try:
        return translate()
    except HookpointError as error:
        raise HookpointError(f"{place}: {error}") from None


def _model(name: Any) -> str | None:
    return name if isinstance(name, str) else None


def _unsupported(path: Path, field: str, found: object, understood: Iterable[str]) -> FormatError:
    known = ", ".join(understood)
    return FormatError(
        f"{path}: {field}: found {shown(found)}, expected an autoencoder of one place's activations"
        f"{f' ({known})' if known else ''}; transcoders, crosscoders and signed features are not supported"
    )
