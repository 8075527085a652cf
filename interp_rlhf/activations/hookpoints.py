"""Where to read: the model inside its wrappers, its layers, and the names of the places in them.

Names. ``d`` is the width of the residual stream, ``H`` the number of query heads, ``dh`` the width of one.

=========================  ===================================================================  ================
name                       what is read                                                         shape
=========================  ===================================================================  ================
``embed``                  the residual stream as it enters layer 0 (positions, scaling and     ``[B, T, d]``
                           embedding norms included)
``layers.3.resid_post``    the residual stream as it leaves layer 3 (before any final norm)     ``[B, T, d]``
``layers.3.attn_out``      output of the attention's output projection, before a norm that      ``[B, T, d]``
                           follows it (Gemma 2/3, OLMo 2) and before the residual is added
``layers.3.mlp_out``       output of the MLP or mixture-of-experts block, likewise              ``[B, T, d]``
``layers.3.heads``         per-head outputs, input of the output projection: head h adds        ``[B, T, H, dh]``
                           ``z_h W_O[h]`` to ``attn_out`` (Elhage et al. 2021, "A Mathematical
                           Framework for Transformer Circuits")
=========================  ===================================================================  ================

A layer is an index (``3``), an index from the end (``-1``) or a depth (``50%``: ``p/100 · (L - 1)`` rounded half up).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from interp_rlhf.errors import HookpointError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LayerSite = Literal["resid_post", "attn_out", "mlp_out", "heads"]
Site = Literal["embed", "resid_post", "attn_out", "mlp_out", "heads"]

#: Sites of one layer in the order in which a forward pass reaches them.
_FORWARD_ORDER: tuple[Site, ...] = ("embed", "heads", "attn_out", "mlp_out", "resid_post")

#: Child modules that are the attention of a layer, most specific first (``attn.attention``: GPT-Neo).
_ATTENTION = ("attn.attention", "self_attn", "self_attention", "attention", "attn")
#: Output projections inside an attention module.
_OUTPUT_PROJECTION = ("o_proj", "out_proj", "dense", "c_proj")
#: Modules whose output is the MLP's contribution, most specific first. BLOOM and MPT add the residual inside the MLP
#: module, so their last projection is read; OPT has no MLP module at all.
_MLP = ("mlp.dense_4h_to_h", "ffn.down_proj", "mlp", "block_sparse_moe", "feed_forward", "ffn", "fc2")
#: Second branches beside the MLP: with one of them no single module outputs the layer's MLP contribution.
_SECOND_MLP = ("shared_mlp", "residual_mlp")

_NAME = re.compile(r"layers\.(?:(?P<index>-?\d+)|(?P<percent>\d+(?:\.\d+)?)%)\.(?P<site>\w+)")
_SYNTAX = f"embed or layers.<index | -index | depth%>.<{' | '.join(get_args(LayerSite))}>"


# ------------------------------------------------------------------------------------------------- inside the wrappers


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` and what it wraps, from the outside in; the last one is the Hugging Face model.

    ==============================================  ====================================================  =============
    wrapper                                         recognised by                                         goes on at
    ==============================================  ====================================================  =============
    DistributedDataParallel, DataParallel, FSDP1    ``isinstance``                                        ``.module``
    DeepSpeedEngine                                 class name                                            ``.module``
    OptimizedModule (``torch.compile``)             child ``_orig_mod``                                   that child
    PolicyAndValueWrapper (TRL's PPO)               children ``policy`` and ``value_model``               ``.policy``
    value-head models (TRL)                         children ``pretrained_model`` and ``v_head``          that child
    PeftModel                                       child ``base_model`` and a ``peft_config``            base model
    ==============================================  ====================================================  =============

    FSDP2 needs no row: it changes a module's class and wraps nothing.
    """
    while True:
        yield model
        inner = _inside(model)
        if inner is None:
            return
        model = inner


def _inside(model: nn.Module) -> nn.Module | None:
    children = model._modules
    if isinstance(model, DistributedDataParallel | DataParallel | FullyShardedDataParallel):
        return model.module
    if any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__):
        return children["module"]
    if "_orig_mod" in children:
        return children["_orig_mod"]
    if "policy" in children and "value_model" in children:
        return children["policy"]
    if "pretrained_model" in children and "v_head" in children:
        return children["pretrained_model"]
    if "base_model" in children and hasattr(model, "peft_config"):
        return cast("PeftModel", model).get_base_model()
    return None


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face causal language model (or sequence classifier) inside the wrappers of :func:`wrappers`.

    Raises:
        HookpointError: what is inside is not a Hugging Face model.
    """
    *_, inner = wrappers(model)
    if not hasattr(inner, "get_decoder") or not hasattr(inner, "config"):
        raise HookpointError(f"model: expected a Hugging Face decoder model, found {type(inner).__name__}")
    return cast("PreTrainedModel", inner)


# --------------------------------------------------------------------------------------------------------- the layout


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Where things are in one model.

    Attributes:
        causal_lm: the unwrapped Hugging Face model.
        decoder: its backbone, without the head.
        embed: the token embedding.
        layers: the decoder layers.
        path: where ``layers`` is inside ``causal_lm``.
        n_layers, d_model, n_heads, head_dim: sizes (``head_dim`` as configured, else ``d_model / n_heads``).
        max_positions: context length in tokens; ``None`` where positions are unbounded.
        architecture: class name of ``causal_lm``.
    """

    causal_lm: PreTrainedModel
    decoder: nn.Module
    embed: nn.Module
    layers: nn.ModuleList
    path: str
    n_layers: int
    d_model: int
    n_heads: int
    head_dim: int
    max_positions: int | None
    architecture: str

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        return self._part(layer, _ATTENTION, "attention module")

    def output_projection(self, layer: int) -> nn.Module:
        """The attention's output projection (``W_O``) of a layer."""
        paths = [f"{attention}.{name}" for attention in _ATTENTION for name in _OUTPUT_PROJECTION]
        return self._part(layer, paths, "attention output projection")

    def mlp(self, layer: int) -> nn.Module:
        """The module whose output is the layer's MLP contribution."""
        second = [name for name in _SECOND_MLP if name in self.layers[layer]._modules]
        if second:
            raise HookpointError(
                f"layers.{layer}: {type(self.layers[layer]).__name__} adds {second[0]} to its MLP, expected one module "
                "that outputs the whole MLP contribution"
            )
        return self._part(layer, _MLP, "MLP module")

    def _part(self, layer: int, paths: Sequence[str], what: str) -> nn.Module:
        block = self.layers[layer]
        for path in paths:
            found = _submodule(block, path)
            if found is not None:
                return found
        children = ", ".join(block._modules)
        raise HookpointError(
            f"layers.{layer}: no {what} in {type(block).__name__}: found {children}; expected one of {', '.join(paths)}"
        )


def layout(model: nn.Module, *, layers: str | None = None) -> ModelLayout:
    """Find a model's parts.

    Args:
        model: the model, wrapped or not.
        layers: path of the layers' ModuleList inside the unwrapped model, for architectures that are not recognised.

    Raises:
        HookpointError: an encoder-decoder, or no single ModuleList of ``num_hidden_layers`` layers; lists those found.
    """
    lm = unwrap_model(model)
    config: Any = lm.config
    if config.is_encoder_decoder:
        raise HookpointError(f"{type(lm).__name__}: expected a decoder-only model, found an encoder-decoder")
    text: Any = config.get_text_config(decoder=True)
    decoder = lm.get_decoder()
    path = layers if layers is not None else _find_layers(lm, decoder, text.num_hidden_layers)
    blocks = _submodule(lm, path)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        empty = isinstance(blocks, nn.ModuleList)
        found = "nothing" if blocks is None else "one without layers" if empty else type(blocks).__name__
        raise HookpointError(f"layers={path!r}: expected a ModuleList, found {found}; {_candidates(lm)}")
    heads = text.num_attention_heads
    return ModelLayout(
        causal_lm=lm,
        decoder=decoder,
        embed=decoder.get_input_embeddings(),
        layers=blocks,
        path=path,
        n_layers=len(blocks),
        d_model=text.hidden_size,
        n_heads=heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        max_positions=_max_positions(text),
        architecture=type(lm).__name__,
    )


def _find_layers(lm: nn.Module, decoder: nn.Module, length: int) -> str:
    """Path inside ``lm`` of the outermost ModuleList of that length under ``decoder``."""
    inside = {id(module) for module in decoder.modules()}
    found = [
        path
        for path, module in lm.named_modules()
        if id(module) in inside and isinstance(module, nn.ModuleList) and len(module) == length
    ]
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise HookpointError(
            f"{type(lm).__name__}: expected one ModuleList of {length} layers, found {len(outermost)}; "
            f'{_candidates(lm)}; layers="path" overrides it (in the interp config, layers: path)'
        )
    return outermost[0]


def _candidates(lm: nn.Module) -> str:
    lists = [
        f"{path} ({len(module)} of {type(module[0]).__name__})"
        for path, module in lm.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    return f"ModuleLists: {', '.join(lists) or 'none'}"


def _max_positions(text: Any) -> int | None:
    """The configured context length. BLOOM, MPT and other ALiBi models have no table of positions to run out of."""
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return None
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


# ---------------------------------------------------------------------------------------------------------- the names


@dataclass(frozen=True, slots=True)
class Hookpoint:
    """A parsed name. ``layer`` (possibly negative) or ``depth`` (0 to 1) is set, neither for ``embed``."""

    site: Site
    layer: int | None = None
    depth: Fraction | None = None


@dataclass(frozen=True, slots=True)
class ResolvedHookpoint:
    """A place in one model.

    Attributes:
        name: canonical name, with a layer index from 0 (``layers.3.resid_post``).
        asked: the names that were asked for and led here.
        site, layer: parts of the name (``layer`` is ``None`` for ``embed``).
        module, kind: the value is this module's ``output`` or its first ``input``.
    """

    name: str
    asked: tuple[str, ...]
    site: Site
    layer: int | None
    module: nn.Module
    kind: Literal["output", "input"]


def parse_hookpoint(name: str) -> Hookpoint:
    """Parse a hookpoint's name.

    >>> parse_hookpoint("layers.-1.resid_post")
    Hookpoint(site='resid_post', layer=-1, depth=None)

    Raises:
        HookpointError: it is not a hookpoint's name; the message holds the syntax.
    """
    if name == "embed":
        return Hookpoint("embed")
    match = _NAME.fullmatch(name)
    if match is None or match["site"] not in get_args(LayerSite):
        raise HookpointError(f"hookpoint {name!r}: expected {_SYNTAX}")
    site: Any = match["site"]
    if match["percent"] is None:
        return Hookpoint(site, layer=int(match["index"]))
    depth = Fraction(match["percent"]) / 100
    if depth > 1:
        raise HookpointError(f"hookpoint {name!r}: expected a depth of 0% to 100%, found {match['percent']}%")
    return Hookpoint(site, depth=depth)


def layer_index(point: Hookpoint, n_layers: int) -> int | None:
    """The layer's index from 0, or ``None`` for ``embed``. It may lie outside the model.

    >>> layer_index(parse_hookpoint("layers.50%.resid_post"), 4)
    2
    """
    if point.depth is not None:
        return math.floor(point.depth * (n_layers - 1) + Fraction(1, 2))
    if point.layer is not None and point.layer < 0:
        return point.layer + n_layers
    return point.layer


def resolve_hookpoints(names: Sequence[str], layout: ModelLayout) -> tuple[ResolvedHookpoint, ...]:
    """The places that the names mean on this model: each once, in the order a forward pass reaches them.

    Raises:
        HookpointError: a name's syntax, layer or site does not exist on this model.
    """
    asked: dict[tuple[int, Site], list[str]] = {}
    for name in names:
        point = parse_hookpoint(name)
        layer = layer_index(point, layout.n_layers)
        if layer is not None and not 0 <= layer < layout.n_layers:
            raise HookpointError(f"hookpoint {name!r}: the model has layers 0..{layout.n_layers - 1}")
        asked.setdefault((-1 if layer is None else layer, point.site), []).append(name)
    order = sorted(asked, key=lambda place: (place[0], _FORWARD_ORDER.index(place[1])))
    return tuple(_resolve(layout, layer, site, asked[layer, site]) for layer, site in order)


def _resolve(layout: ModelLayout, layer: int, site: Site, asked: Sequence[str]) -> ResolvedHookpoint:
    if site == "embed":
        return ResolvedHookpoint("embed", tuple(asked), site, None, layout.layers[0], "input")
    try:
        module = _site_module(layout, layer, site)
    except HookpointError as error:
        raise HookpointError(f"hookpoint {asked[0]!r}: {error}") from None
    kind: Literal["output", "input"] = "input" if site == "heads" else "output"
    return ResolvedHookpoint(f"layers.{layer}.{site}", tuple(asked), site, layer, module, kind)


def _site_module(layout: ModelLayout, layer: int, site: Site) -> nn.Module:
    if site == "resid_post":
        return layout.layers[layer]
    return layout.mlp(layer) if site == "mlp_out" else layout.output_projection(layer)
