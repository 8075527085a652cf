"""Names of places in other libraries of dictionaries, translated to hookpoints of this package.

==================================================  ===============================  ===================================
there                                               here                             kept apart because
==================================================  ===============================  ===================================
``blocks.0.hook_resid_pre``                         ``embed``
``blocks.3.hook_resid_pre``                         ``layers.2.resid_post``          one layer's output enters the next
``blocks.3.hook_resid_post``, ``model.layers.3``,   ``layers.3.resid_post``
``transformer.h.3``, ``gpt_neox.layers.3``
``blocks.3.hook_attn_out``, ``….3.self_attn``       ``layers.3.attn_out``            TransformerLens reads it behind a
                                                                                     norm that follows, we before it
``blocks.3.hook_mlp_out``, ``….3.mlp``              ``layers.3.mlp_out``             likewise
``blocks.3.attn.hook_z``                            ``layers.3.heads``
==================================================  ===============================  ===================================

Our own names are understood as well. Not understood, because nothing here reads the same numbers: ``hook_embed`` and
``embed_tokens`` (before positions and scaling), ``hook_resid_mid``, inputs of the MLP, neurons inside it.
"""

from __future__ import annotations

import re

from interp_rlhf.activations.hookpoints import parse_hookpoint
from interp_rlhf.errors import HookpointError

_LENS = re.compile(r"blocks\.(\d{1,6})\.(?:hook_(resid_pre|resid_post|attn_out|mlp_out)|attn\.hook_(z))")
_LENS_SITES = {"resid_post": "resid_post", "attn_out": "attn_out", "mlp_out": "mlp_out", "z": "heads"}

#: Paths of Hugging Face modules: where the list of layers is, which layer, which part of it.
_MODULE = re.compile(
    r"(?:(?:model\.){0,2}(?:language_model\.)?(?:model\.)?(?:decoder\.)?layers|gpt_neox\.layers|(?:transformer\.)?h)"
    r"\.(\d{1,6})(?:\.([\w.]+?))??(?:\.output)?"
)
_ATTENTION = ("self_attn", "self_attention", "attention", "attn", "attn.attention")
_PROJECTION = ("o_proj", "out_proj", "dense", "c_proj")
_PARTS = {
    "": "resid_post",
    "mlp": "mlp_out",
    "block_sparse_moe": "mlp_out",
    **{part: "attn_out" for part in _ATTENTION},
    **{f"{part}.{last}": "attn_out" for part in _ATTENTION for last in _PROJECTION},
}

#: What dictionary_learning's ``submodule_name`` may begin with; a layer's number may follow.
_SUBMODULES = {
    "resid": "resid_post",
    "resid_post": "resid_post",
    "resid_out": "resid_post",
    "resid_pre": "resid_pre",
    "attn": "attn_out",
    "attn_out": "attn_out",
    "attention": "attn_out",
    "mlp": "mlp_out",
    "mlp_out": "mlp_out",
}
_SUBMODULE = re.compile(rf"(?:blocks\.(\d{{1,6}})\.)?({'|'.join(_SUBMODULES)})(?:_?layer_?(\d{{1,6}}))?")

#: Models whose attention and MLP outputs pass a norm before they are added.
_POST_NORM = re.compile(r"(?:gemma|olmo)[-_]?[23](?!b)", re.IGNORECASE)
#: Models that add the residual inside the attention and MLP modules.
_ADDS_INSIDE = re.compile("bloom", re.IGNORECASE)

#: Characters of the longest name that is looked at.
_LONGEST = 200
_UNDERSTOOD = (
    "blocks.<l>.hook_resid_pre | hook_resid_post | hook_attn_out | hook_mlp_out | attn.hook_z; "
    "[model.]layers.<l>, transformer.h.<l> or gpt_neox.layers.<l>, alone or followed by .mlp or .self_attn; "
    "layers.<l>.resid_post | attn_out | mlp_out | heads; embed"
)


def translate_hook(name: str, model: str | None = None) -> str:
    """The hookpoint of this package that reads what a hook of another library reads.

    Args:
        name: a hook of TransformerLens or SAELens, a module's path in a Hugging Face model, a hookpoint of sparsify, or
            one of our own names.
        model: the model's name where it is known; on some models a hook has no counterpart.

    >>> translate_hook("blocks.3.hook_resid_pre"), translate_hook("transformer.h.3.mlp")
    ('layers.2.resid_post', 'layers.3.mlp_out')

    Raises:
        HookpointError: no hookpoint reads the same; the message lists the names that are understood.
    """
    if len(name) > _LONGEST:
        raise HookpointError(f"hook {name[:20]!r}…: expected at most {_LONGEST} characters, found {len(name)}")
    try:
        parse_hookpoint(name)
    except HookpointError:
        pass
    else:
        return name
    if match := _LENS.fullmatch(name):
        site = match[2] or match[3]
        if site in ("attn_out", "mlp_out") and model and _POST_NORM.search(model):
            raise HookpointError(
                f"hook {name!r} of {model[:80]!r}: expected a hook before the norm that follows (the path of a Hugging "
                f"Face module), found one behind it, and layers.{match[1]}.{site} is read before it"
            )
        return _place(int(match[1]), site)
    if match := _MODULE.fullmatch(name):
        part = match[2] or ""
        if part in _PARTS:
            return _module(name, int(match[1]), _PARTS[part], model)
    raise HookpointError(f"hook {name!r}: no hookpoint reads the same; understood are {_UNDERSTOOD}")


def translate_submodule(layer: int, submodule: str | None, model: str | None = None) -> str:
    """The hookpoint for dictionary_learning's ``layer`` and ``submodule_name``.

    Args:
        layer: index of the layer from 0.
        submodule: ``None`` is the residual stream, as that library's own helper reads it; ``resid_post_layer_3``,
            ``mlp``, ``attn_out`` and the like, or a module's path.
        model: the model's name where it is known.

    >>> translate_submodule(3, "resid_post_layer_3"), translate_submodule(3, "mlp"), translate_submodule(0, "resid_pre")
    ('layers.3.resid_post', 'layers.3.mlp_out', 'embed')

    Raises:
        HookpointError: no hookpoint reads the same, or the name holds another layer than ``layer``.
    """
    if submodule is None:
        return _place(layer, "resid_post")
    match = _SUBMODULE.fullmatch(submodule)
    if match:
        numbers = {int(number) for number in (match[1], match[3]) if number is not None}
        found = _module(submodule, layer, _SUBMODULES[match[2]], model)
    else:
        try:
            found = translate_hook(submodule, model)
        except HookpointError:
            raise HookpointError(
                f"submodule_name {submodule!r}: no hookpoint reads the same; understood are {', '.join(_SUBMODULES)}, "
                f"each also with _layer_<l> behind it; {_UNDERSTOOD}"
            ) from None
        numbers = {int(number) for number in re.findall(r"\.(\d+)", submodule)[:1]}
    if numbers - {layer}:
        raise HookpointError(f"submodule_name {submodule!r}: expected layer {layer}, found {min(numbers - {layer})}")
    return found


def lens_name(hookpoint: str) -> str:
    """TransformerLens's name of a hookpoint; a name it has none for (``layers.50%.resid_post``) comes back as it is.

    >>> lens_name("layers.3.heads"), lens_name("embed"), lens_name("layers.-1.resid_post")
    ('blocks.3.attn.hook_z', 'blocks.0.hook_resid_pre', 'layers.-1.resid_post')
    """
    if hookpoint == "embed":
        return "blocks.0.hook_resid_pre"
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", hookpoint)
    if match is None:
        return hookpoint
    return f"blocks.{match[1]}.{'attn.hook_z' if match[2] == 'heads' else f'hook_{match[2]}'}"


def _place(layer: int, site: str) -> str:
    if site == "resid_pre":
        return "embed" if layer == 0 else f"layers.{layer - 1}.resid_post"
    return f"layers.{layer}.{_LENS_SITES[site]}"


def _module(name: str, layer: int, site: str, model: str | None) -> str:
    if site in ("attn_out", "mlp_out") and model and _ADDS_INSIDE.search(model):
        raise HookpointError(
            f"hook {name!r} of {model[:80]!r}: expected the contribution alone, found a module that adds the residual "
            f"stream, and layers.{layer}.{site} is read before that"
        )
    return _place(layer, site)
