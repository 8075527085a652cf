"""Dictionaries: the numbers SAELens itself gives, the formulas of two other libraries, and what is multiplied."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_folders import CLASSES, WIDTH, D, K, formula, learned_folder, sparsify_folder
from shape_checked import checked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from interp_rlhf.errors import ConfigError, FormatError, HookpointError, MeasurementError
from interp_rlhf.readouts.saes import Dictionary, SparseAutoencoder

HOOKPOINT = "layers.3.resid_post"
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no b_dec": {"apply_b_dec_to_input": False},
    "expected average": {"normalize_activations": "expected_average_only_in"},
    "norm": {"normalize_activations": "constant_norm_rescale"},
    "norm, no b_dec": {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False},
    "layer norm": {"normalize_activations": "layer_norm"},
    "torch.float32": {"dtype": "torch.float32"},
}


def activations(n: int = 50, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(2, n // 2, D)) * 3).float()


def lens() -> Any:
    return pytest.importorskip("sae_lens", reason="parity with SAELens needs the extra sae")


def randomised(sae: Any, seed: int = 0) -> Any:
    """An SAELens object with every parameter drawn anew; thresholds are above 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()
    return sae


def saelens(kind: str, hook: str = "blocks.3.hook_resid_post", seed: int = 0, **options: Any) -> Any:
    """An SAELens object for reading, random in all its parameters."""
    library = lens()
    about = {"architecture": kind, "d_in": D, "d_sae": WIDTH, **({"k": K} if kind == "topk" else {}), **options}
    about["metadata"] = {"hook_name": hook, "model_name": "tiny", **about.pop("metadata", {})}
    return randomised(library.SAE.from_dict(about), seed)


def check_parity(theirs: Any, ours: SparseAutoencoder, x: Tensor) -> None:
    with torch.no_grad():
        z = theirs.encode(x)
        out = theirs.decode(z)
    assert 0 < float((z != 0).float().mean()) < 1, "the test data must make some features fire"
    torch.testing.assert_close(ours.encode(x), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(z, x), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), out, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- parity with SAELens


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_saelens_folders_give_saelens_numbers(kind: str, options: str, tmp_path: Path) -> None:
    theirs = saelens(kind, **OPTIONS[options])
    theirs.save_model(tmp_path / "sae")
    ours = SparseAutoencoder.from_folder(tmp_path / "sae")
    assert (ours.name, ours.hookpoint, ours.architecture) == ("sae", HOOKPOINT, kind)
    assert (ours.d_model, ours.width) == (D, WIDTH)
    check_parity(theirs, ours, activations())


@pytest.mark.parametrize("normalisation", ["none", "constant_norm_rescale", "layer_norm"])
def test_topk_rescaled_by_the_decoders_norm(normalisation: str, tmp_path: Path) -> None:
    theirs = saelens("topk", rescale_acts_by_decoder_norm=True, normalize_activations=normalisation)
    theirs.save_model(tmp_path / "sae")
    ours = SparseAutoencoder.from_folder(tmp_path / "sae")
    check_parity(theirs, ours, activations())
    plain = replace(ours, rescale_acts_by_decoder_norm=False)
    assert not torch.allclose(plain.encode(activations()), ours.encode(activations())), "the option must matter here"


def test_topk_gives_no_negative_activation_where_fewer_than_k_are_positive(tmp_path: Path) -> None:
    theirs = saelens("topk")
    with torch.no_grad():
        theirs.b_enc -= 25
    theirs.save_model(tmp_path / "sae")
    ours = SparseAutoencoder.from_folder(tmp_path / "sae")
    check_parity(theirs, ours, activations())
    assert float((ours.encode(activations()) > 0).sum(-1).float().mean()) < K


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_batchtopk_is_read_as_saelens_saves_it_and_from_a_checkpoint(kind: str, rescale: bool, tmp_path: Path) -> None:
    library = lens()
    more = {"matryoshka_widths": [10, WIDTH]} if kind.startswith("M") else {}
    config = getattr(library, f"{kind}TrainingSAEConfig")(
        d_in=D, d_sae=WIDTH, k=2.5, rescale_acts_by_decoder_norm=rescale, **more
    )
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    trained = randomised(getattr(library, f"{kind}TrainingSAE")(config))
    trained.topk_threshold = torch.tensor(1.5, dtype=torch.double)
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "final")
    final = library.SAE.load_from_disk(tmp_path / "final")
    ours = SparseAutoencoder.from_folder(tmp_path / "final")
    assert ours.architecture == "jumprelu"
    check_parity(final, ours, activations())
    checkpoint = SparseAutoencoder.from_folder(tmp_path / "checkpoint")
    assert checkpoint.architecture == "batchtopk"
    check_parity(final, checkpoint, activations())


@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Gated"])
def test_training_checkpoints_of_saelens(kind: str, tmp_path: Path) -> None:
    library = lens()
    config = getattr(library, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=WIDTH, **({"k": K} if kind == "TopK" else {}))
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    theirs = randomised(getattr(library, f"{kind}TrainingSAE")(config))
    theirs.save_model(tmp_path / "sae")
    check_parity(theirs, SparseAutoencoder.from_folder(tmp_path / "sae"), activations())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_heads_are_flattened_as_saelens_flattens_them(kind: str, tmp_path: Path) -> None:
    theirs = saelens(kind, hook="blocks.3.attn.hook_z", reshape_activations="hook_z")
    theirs.save_model(tmp_path / "sae")
    ours = SparseAutoencoder.from_folder(tmp_path / "sae")
    x = activations().unflatten(-1, (3, 4))
    assert ours.hookpoint == "layers.3.heads"
    with torch.no_grad():
        z = theirs.encode(x)
        out = theirs.decode(z)
    torch.testing.assert_close(ours.encode(x), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode(x.flatten(-2)), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(z), out.flatten(-2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_precisions_are_read_as_float32(dtype: str, tmp_path: Path) -> None:
    theirs = saelens("jumprelu", dtype=dtype)
    theirs.save_model(tmp_path / "sae")
    ours = SparseAutoencoder.from_folder(tmp_path / "sae")
    assert ours.W_enc.dtype == torch.float32
    check_parity(lens().SAE.load_from_disk(tmp_path / "sae", dtype="float32"), ours, activations())


def test_the_scale_of_a_checkpoint_is_applied_as_saelens_folds_it(tmp_path: Path) -> None:
    theirs = saelens("jumprelu", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path / "sae")
    (tmp_path / "sae" / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    ours = SparseAutoencoder.from_folder(tmp_path / "sae")
    theirs.fold_activation_norm_scaling_factor(0.25)
    check_parity(theirs, ours, activations())
    (tmp_path / "sae" / "activation_scaler.json").write_text('{"scaling_factor": null}')
    assert SparseAutoencoder.from_folder(tmp_path / "sae").scale == 1


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_folders_of_saelens_before_version_6(activation: str, tmp_path: Path) -> None:
    theirs = saelens("standard" if activation == "relu" else "topk")
    theirs.save_model(tmp_path / "sae")
    about = {
        "d_in": D, "d_sae": WIDTH, "dtype": "torch.float32", "hook_point": "blocks.3.hook_resid_pre", "model_name": "m",
        "activation_fn_str": activation, "activation_fn_kwargs": {"k": K}, "normalize_activations": False,
    }  # fmt: skip
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(about))
    ours = SparseAutoencoder.from_folder(tmp_path / "sae")
    assert ours.hookpoint == "layers.2.resid_post"
    check_parity(lens().SAE.load_from_disk(tmp_path / "sae"), ours, activations())


# ----------------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning_folders_follow_its_formulas(kind: str, tmp_path: Path) -> None:
    tensors = learned_folder(tmp_path / "ae", kind)
    ours, x = SparseAutoencoder.from_folder(tmp_path / "ae"), activations().flatten(0, 1)
    z, out = formula(kind, tensors, x)
    assert ours.hookpoint == HOOKPOINT and 0 < (z > 0).mean() < 1
    for found, expected in ((ours.encode(x), z), (ours.decode(torch.from_numpy(z)), out), (ours.reconstruct(x), out)):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6 * max(10, np.abs(expected).max()))


def test_sparsify_folders_follow_its_formula(tmp_path: Path) -> None:
    tensors = sparsify_folder(tmp_path / "layers.3.mlp")
    ours, x = SparseAutoencoder.from_folder(tmp_path / "layers.3.mlp"), activations().flatten(0, 1)
    z, out = formula("sparsify", tensors, x)
    assert (ours.hookpoint, ours.k, ours.name) == ("layers.3.mlp_out", K, "layers.3.mlp")
    np.testing.assert_allclose(ours.encode(x).numpy(), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.reconstruct(x).numpy(), out, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------- selective encoding


def example(kind: str, width: int = WIDTH, hookpoint: str = HOOKPOINT, **changes: Any) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    more: dict[str, Any] = {"topk": {"k": K}, "gated": {"b_gate": draw(width), "r_mag": draw(width)}}.get(kind, {})
    if kind in ("jumprelu", "batchtopk"):
        more = {"threshold": draw(width).abs()}
    weights = (draw(D, width), draw(width), draw(width, D), draw(D))
    return SparseAutoencoder("s", hookpoint, kind, *weights, **more, **changes)  # type: ignore[arg-type]


RESCALED = [*((kind, False) for kind in (*ARCHITECTURES, "batchtopk")), ("topk", True), ("batchtopk", True)]


@pytest.mark.parametrize(("kind", "rescale"), RESCALED)
def test_selected_features_are_columns_of_all(kind: str, rescale: bool) -> None:
    sae, x = example(kind, rescale_acts_by_decoder_norm=rescale), activations()
    whole = sae.encode(x)
    for features in ([7], [31, 2, 2, 39], torch.tensor([5, 0]), []):
        found = sae.encode(x, features)
        assert found.shape == (2, 25, len(features))
        torch.testing.assert_close(found, whole[..., torch.as_tensor(features, dtype=torch.long)])


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "batchtopk", "gated"])
def test_only_the_columns_asked_for_are_multiplied(kind: str) -> None:
    sae, x = example(kind, 400), activations()
    with FlopCounterMode(display=False) as counter:
        sae.encode(x, [3, 5, 8])
    products = 2 if kind == "gated" else 1
    assert counter.get_total_flops() == products * 2 * 50 * D * 3
    with FlopCounterMode(display=False) as counter:
        sae.encode(x)
    assert counter.get_total_flops() == products * 2 * 50 * D * 400


def test_topk_looks_at_all_features() -> None:
    with FlopCounterMode(display=False) as counter:
        example("topk").encode(activations(), [3])
    assert counter.get_total_flops() == 2 * 50 * D * WIDTH


@pytest.mark.parametrize("features", [[WIDTH], [-1], [1.0], [True], torch.tensor([1.0]), [[1]], torch.tensor([True])])
def test_features_that_do_not_exist_are_refused(features: Any) -> None:
    with pytest.raises(ConfigError, match=f"'s' at {HOOKPOINT}: features: expected") as found:
        example("standard").encode(activations(), features)
    assert "\n" not in str(found.value)


# -------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("normalisation", ["length", "layer_norm"])
def test_a_normalisation_is_undone_only_with_the_activations(normalisation: str) -> None:
    sae, x = example("standard", normalisation=normalisation, scale=0.5), activations()
    with pytest.raises(MeasurementError, match=f"cannot be undone.*{normalisation}|{normalisation}.*cannot be undone"):
        sae.decode(sae.encode(x))
    y = 0.5 * x.double()
    if normalisation == "length":
        spread, centre = y.norm(dim=-1, keepdim=True) / D**0.5, 0.0
        n = y / spread
    else:
        centre, spread = y.mean(-1, keepdim=True), y.std(-1, keepdim=True)
        n = (y - centre) / (spread + 1e-5)
    w = {
        name: value.double() for name, value in (("e", sae.W_enc), ("b", sae.b_enc), ("d", sae.W_dec), ("c", sae.b_dec))
    }
    z = ((n - w["c"]) @ w["e"] + w["b"]).clamp(min=0)
    expected = ((z @ w["d"] + w["c"]) * spread + centre) / 0.5
    torch.testing.assert_close(sae.reconstruct(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("normalisation", ["none", "length", "layer_norm"])
def test_an_activation_of_zeros_gives_finite_numbers(normalisation: str) -> None:
    sae = example("standard", normalisation=normalisation)
    assert bool(torch.isfinite(sae.reconstruct(torch.zeros(3, D))).all())


def test_a_decoder_row_of_zeros_gives_finite_numbers() -> None:
    sae = example("topk")
    dead = replace(sae, W_dec=sae.W_dec.clone().index_fill_(0, torch.tensor([4]), 0), rescale_acts_by_decoder_norm=True)
    assert (
        bool(torch.isfinite(dead.reconstruct(activations())).all())
        and float(dead.encode(activations())[..., 4].max()) == 0
    )


def test_autocast_does_not_touch_the_numbers_and_half_precision_is_read() -> None:
    sae, x = example("jumprelu"), activations()
    with torch.autocast("cpu", torch.bfloat16):
        z, out = sae.encode(x), sae.reconstruct(x)
    assert torch.equal(z, sae.encode(x)) and torch.equal(out, sae.reconstruct(x))
    assert sae.encode(x.bfloat16()).dtype == torch.float32


def test_gradients_reach_the_activations() -> None:
    x = activations().requires_grad_()
    example("gated").encode(x, [1, 2]).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


# --------------------------------------------------------------------------------------------------- hash, save, checks


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_hash_is_the_same_for_the_same_numbers(kind: str, tmp_path: Path) -> None:
    sae = example(kind)
    for again in (
        replace(sae, name="other", hookpoint="embed"),
        sae.to("cpu"),
        replace(sae, W_enc=sae.W_enc.T.clone().T),
    ):
        assert again.hash == sae.hash and len(sae.hash) == 64
    sae.save(tmp_path / "a")
    again = SparseAutoencoder.from_folder(tmp_path / "a")
    assert again.hash == sae.hash and again.hookpoint == HOOKPOINT
    again.save(tmp_path / "b")
    assert (tmp_path / "a" / "sae_weights.safetensors").read_bytes() == (
        tmp_path / "b" / "sae_weights.safetensors"
    ).read_bytes()
    changes: list[dict[str, Any]] = [
        {"b_dec": sae.b_dec + 1e-6}, {"apply_b_dec_to_input": False}, {"scale": 2.0}, {"normalisation": "length"},
        {"W_enc": sae.W_enc.flip(1)}, *([{"rescale_acts_by_decoder_norm": True}, {"k": 2}] if kind == "topk" else []),
    ]  # fmt: skip
    assert len({sae.hash, *(replace(sae, **change).hash for change in changes)}) == len(changes) + 1


def test_hash_does_not_depend_on_the_library_that_wrote_it(tmp_path: Path) -> None:
    theirs = saelens("gated", apply_b_dec_to_input=False)
    theirs.save_model(tmp_path / "theirs")
    ours = SparseAutoencoder.from_folder(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    assert SparseAutoencoder.from_folder(tmp_path / "ours").hash == ours.hash


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in (*ARCHITECTURES, "batchtopk")),
        *((kind, {"rescale_acts_by_decoder_norm": True}) for kind in ("topk", "batchtopk")),
        *((kind, {"scale": 0.5}) for kind in ARCHITECTURES),
        ("topk", {"scale": 0.5, "rescale_acts_by_decoder_norm": True}),
        ("batchtopk", {"scale": 0.5, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
        ("jumprelu", {"scale": 0.5, "normalisation": "length"}),
        ("gated", {"normalisation": "layer_norm", "hookpoint": "layers.1.attn_out"}),
    ],
)
def test_saelens_reads_what_is_saved(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    sae = example(kind, **changes)
    sae.save(tmp_path / "new" / "sae")
    theirs = lens().SAE.load_from_disk(tmp_path / "new" / "sae")
    assert theirs.cfg.metadata.hook_name == f"blocks.{sae.hookpoint[7]}.hook_{sae.hookpoint[9:]}"
    check_parity(theirs, sae, activations())
    again = SparseAutoencoder.from_folder(tmp_path / "new" / "sae")
    assert again.hookpoint == sae.hookpoint
    check_parity(theirs, again, activations())


def test_saving_heads_and_refusing_a_full_folder(tmp_path: Path) -> None:
    sae = example("standard", hookpoint="layers.3.heads")
    (tmp_path / "sae").mkdir()
    sae.save(tmp_path / "sae")
    x = activations().unflatten(-1, (3, 4))
    theirs = lens().SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x))
    with pytest.raises(FormatError, match="expected a new or an empty folder"):
        sae.save(tmp_path / "sae")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="file/sae: cannot be written"):
        sae.save(tmp_path / "file" / "sae")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sae"], "no leftovers"


def test_any_object_with_two_methods_is_a_dictionary() -> None:
    class Own:
        def encode(self, x: Tensor) -> Tensor:
            return x

        def decode(self, z: Tensor) -> Tensor:
            return z

    assert isinstance(Own(), Dictionary) and isinstance(example("standard"), Dictionary)
    assert not isinstance(object(), Dictionary)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("standard", {"W_enc": torch.zeros(D)}, r"W_enc: expected \[d, F\], found \[12\]"),
    ("standard", {"W_dec": torch.zeros(D, WIDTH)}, r"W_dec: expected \[40, 12\] for standard, found \[12, 40\]"),
    ("standard", {"b_dec": torch.full((D,), float("nan"))}, "b_dec: expected finite numbers"),
    ("standard", {"threshold": torch.zeros(WIDTH)}, r"threshold: expected none for standard, found \[40\]"),
    ("jumprelu", {"threshold": None}, r"threshold: expected \[40\] for jumprelu, found none"),
    ("gated", {"r_mag": None}, "r_mag: expected"),
    ("topk", {"k": None}, "k: expected 1 to 40"),
    ("topk", {"k": WIDTH + 1}, "k: expected 1 to 40"),
    ("topk", {"k": True}, "k: expected 1 to 40"),
    ("standard", {"k": 3}, "k: expected 1 to 40 for topk and none otherwise"),
    ("standard", {"architecture": "transcoder"}, "architecture: expected one of standard, topk"),
    ("standard", {"normalisation": "batch"}, "normalisation: expected one of none"),
    ("gated", {"rescale_acts_by_decoder_norm": True}, "expected topk or batchtopk, found gated"),
    ("standard", {"scale": 0.0}, "scale: expected a finite number above 0"),
    ("standard", {"name": "a/b"}, "printable"),
    ("standard", {"hookpoint": "blocks.3.hook_resid_post"}, "expected embed or layers"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), WRONG)
def test_what_does_not_fit_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((MeasurementError, ConfigError, HookpointError), match=message) as found:
        replace(example(kind), **changes)
    assert "\n" not in str(found.value)


def test_other_widths_are_refused() -> None:
    sae = example("standard")
    with pytest.raises(ConfigError, match=r"expected 12 dimensions, found shape \[2, 13\]"):
        sae.encode(torch.zeros(2, 13))
    with pytest.raises(ConfigError, match="expected 12 dimensions"):
        sae.encode(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match=r"expected 40 features, found shape \[41\]"):
        sae.decode(torch.zeros(41))


def test_shapes_are_as_annotated() -> None:
    module = checked("interp_rlhf.readouts.saes")
    for kind in (*ARCHITECTURES, "batchtopk"):
        plain = example(kind, hookpoint="layers.3.heads")
        sae = module.SparseAutoencoder("s", plain.hookpoint, **plain._tensors(), **plain._settings())
        for x in (activations(), activations()[0, 0], activations().unflatten(-1, (3, 4))):
            assert sae.reconstruct(x).shape == x.shape
            assert sae.encode(x, [1, 2]).shape[-1] == 2


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_few_features_decode_as_all_of_them_do(architecture: str) -> None:
    generator = torch.Generator().manual_seed(0)
    d, width = 8, 32
    options: dict[str, Any] = {"topk": {"k": 4}, "jumprelu": {"threshold": torch.full((width,), 0.5)}}.get(
        architecture, {}
    )
    made = SparseAutoencoder(
        "one", "layers.0.resid_post", architecture,  # type: ignore[arg-type]
        torch.randn(d, width, generator=generator), torch.randn(width, generator=generator),
        torch.randn(width, d, generator=generator), torch.randn(d, generator=generator),
        normalisation="layer_norm", scale=1.5, rescale_acts_by_decoder_norm=architecture == "topk", **options,
    )  # fmt: skip
    x = torch.randn(5, d, generator=generator)
    z = made.encode(x)
    z[2] = 0
    row, column = z.nonzero(as_tuple=True)
    starts = torch.searchsorted(row, torch.arange(6))
    found = made.decode_entries(starts, column, z[row, column], x)
    torch.testing.assert_close(found, made.decode(z, x), atol=1e-5, rtol=1e-5)
