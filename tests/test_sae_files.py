"""Folders of strangers: damaged, foreign and forged ones are refused in one line, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Executed, check_message
from sae_folders import CLASSES, FLAT, WIDTH, D, K, learned_folder, sparsify_folder, weights
from safetensors.torch import load_file, save_file

from interp_rlhf.errors import FormatError, HookpointError
from interp_rlhf.readouts.saes import SparseAutoencoder

SAELENS: dict[str, dict[str, tuple[int, ...]]] = {
    "standard": FLAT,
    "topk": FLAT,
    "jumprelu": {**FLAT, "threshold": (WIDTH,)},
    "gated": {
        **{name: shape for name, shape in FLAT.items() if name != "b_enc"},
        **{name: (WIDTH,) for name in ("b_gate", "b_mag", "r_mag")},
    },
    "batchtopk": {**FLAT, "topk_threshold": ()},
}


def saelens_folder(folder: Path, kind: str = "standard", **changes: Any) -> None:
    folder.mkdir(parents=True)
    about = {
        "architecture": kind, "d_in": D, "d_sae": WIDTH, "dtype": "float32", "device": "cuda:1",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"},
        **({"k": K} if kind == "topk" else {}), **changes,
    }  # fmt: skip
    save_file(weights(SAELENS[kind]), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(about), encoding="utf-8")


FOLDERS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    **{f"saelens {kind}": (lambda path, kind=kind: saelens_folder(path, kind), "cfg.json", "sae_weights.safetensors")
       for kind in SAELENS},
    "sparsify": (sparsify_folder, "cfg.json", "sae.safetensors"),
    **{f"learned {kind}": (lambda path, kind=kind: learned_folder(path, kind), "config.json", "ae.pt")
       for kind in CLASSES},
}  # fmt: skip
EACH = ["saelens standard", "sparsify", "learned BatchTopKSAE"]


def folder(tmp_path: Path, kind: str) -> tuple[Path, Path, Path]:
    """A good folder of this kind, its configuration and its weights."""
    write, config, tensors = FOLDERS[kind]
    place = tmp_path / "layers.3"
    write(place)
    return place, place / config, place / tensors


def refused(place: Path, *words: str) -> str:
    with pytest.raises(FormatError) as found:
        SparseAutoencoder.from_folder(place)
    check_message(str(found.value), (str(place), *words))
    return str(found.value)


def changed(path: Path, **changes: Any) -> None:
    about = json.loads(path.read_text())
    inner = about.get("trainer", about)
    for name, value in changes.items():
        if value is ...:
            inner.pop(name, None)
        else:
            inner[name] = value
    path.write_text(json.dumps(about))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The file of weights with other tensors in it."""
    tensors = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
    change(tensors)
    torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)


@pytest.mark.parametrize("kind", FOLDERS)
def test_good_folders_are_read(kind: str, tmp_path: Path) -> None:
    place, config, tensors = folder(tmp_path, kind)
    sae = SparseAutoencoder.from_folder(place)
    assert (sae.d_model, sae.width, sae.hookpoint) == (D, WIDTH, "layers.3.resid_post")
    given = SparseAutoencoder.from_folder(str(place), hookpoint="layers.50%.mlp_out", name="mine")
    assert (given.hookpoint, given.name, given.hash) == ("layers.50%.mlp_out", "mine", sae.hash)
    with pytest.raises(HookpointError, match="expected embed or layers"):
        SparseAutoencoder.from_folder(place, hookpoint="blocks.3.hook_resid_post")
    changed(config, note="a key that says nothing about the mathematics")
    rewrite(tensors, lambda found: found.update({name: value.clone() for name, value in reversed(found.items())}))
    assert SparseAutoencoder.from_folder(place).hash == sae.hash


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_tensor_missing_misshapen_of_another_type_or_not_finite(kind: str, tmp_path: Path) -> None:
    place, _, path = folder(tmp_path, kind)
    good = path.read_bytes()
    names = list(torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path))
    optional = ("k", "group_sizes") if "Batch" in kind else ("k", "threshold") if "AutoEncoderTopK" in kind else ()
    for name in names:
        changes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "another shape": lambda found, name=name: found.update({name: found[name].new_zeros(3, 5, 7)}),
            "no size": lambda found, name=name: found.update({name: found[name].new_zeros(0)}),
            "another type": lambda found, name=name: found.update({name: found[name].bool()}),
            "a renamed one": lambda found, name=name: found.update({f"{name}.x": found.pop(name)}),
        }  # fmt: skip
        if name not in optional:
            changes["missing"] = lambda found, name=name: found.pop(name)
        if name not in ("k", "group_sizes"):
            changes["NaN"] = lambda found, name=name: found[name].view(-1)[-1:].fill_(float("nan"))
            changes["infinity"] = lambda found, name=name: found[name].view(-1)[-1:].fill_(float("-inf"))
        for what, change in changes.items():
            rewrite(path, change)
            message = refused(place, path.name, name)
            assert "expected" in message and "found" in message, what
            path.write_bytes(good)
    rewrite(path, lambda found: found.update({"more\nthan one line": torch.zeros(2)}))
    refused(place, path.name, "more\\nthan one line")


@pytest.mark.parametrize("kind", ["saelens standard", "sparsify", "learned AutoEncoder"])
def test_a_transposed_matrix_is_refused(kind: str, tmp_path: Path) -> None:
    place, _, path = folder(tmp_path, kind)
    name = {"saelens standard": "W_enc", "sparsify": "W_dec", "learned AutoEncoder": "decoder.weight"}[kind]
    rewrite(path, lambda found: found.update({name: found[name].T.contiguous()}))
    refused(place, f"{name}: expected shape [", "d=12", "F=40")


SETTINGS: dict[str, list[tuple[str, dict[str, Any], tuple[str, ...]]]] = {
    "saelens standard": [
        ("d_in", {"d_in": 13}, ("W_enc", "d=13", "[12, 40]")),
        ("d_in", {"d_in": ...}, ("d_in: expected a whole number", "found None")),
        ("d_in", {"d_in": "12"}, ("d_in: expected a whole number",)),
        ("d_sae", {"d_sae": 10**30}, ("d_sae: expected a whole number",)),
        ("d_sae", {"d_sae": True}, ("d_sae: expected a whole number",)),
        ("dtype", {"dtype": "int8"}, ("dtype: expected one of float16",)),
        ("dtype", {"dtype": ["float32"]}, ("dtype: expected one of float16",)),
        ("flag", {"apply_b_dec_to_input": 1}, ("apply_b_dec_to_input: expected true or false",)),
        ("norm", {"normalize_activations": "covariance_whitening"}, ("normalize_activations: expected one of none",)),
        ("norm", {"normalize_activations": {}}, ("normalize_activations: expected one of none",)),
        ("reshape", {"reshape_activations": "hook_z"}, ("reshape_activations: expected none",)),
        ("metadata", {"metadata": 5}, ("metadata: expected an object",)),
        ("hook", {"metadata": {}}, ("metadata.hook_name: expected the name of a hook", "hookpoint=")),
        ("hook", {"metadata": {"hook_name": 5}}, ("metadata.hook_name: expected the name of a hook",)),
        ("head", {"metadata": {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 3}}, ("hook_head_index",)),
        (
            "centred",
            {"metadata": {"hook_name": "layers.1", "model_from_pretrained_kwargs": {"center_writing_weights": True}}},
            ("center_writing_weights: expected false",),
        ),
        ("out", {"metadata": {"hook_name": "layers.1", "hook_name_out": "layers.2"}}, ("hook_name_out", "transcoders")),
        *(
            ("kind", {"architecture": kind}, (f"architecture: found '{kind}'", "transcoders, crosscoders"))
            for kind in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "crosscoder", "abstopk", "temporal")
        ),
        ("kind", {"architecture": ["standard"]}, ("architecture: found ['standard']",)),
        ("kind", {"architecture": ...}, ("architecture: found None",)),
        ("kind", {"architecture": "jumprelu"}, ("sae_weights.safetensors", "threshold", "missing")),
    ],
    "saelens topk": [
        ("k", {"k": ...}, ("k: expected a whole number from 1 to 40, found None",)),
        ("k", {"k": 41}, ("k: expected a whole number from 1 to 40, found 41",)),
        ("k", {"k": 0}, ("k: expected",)),
        ("k", {"k": 2.5}, ("k: expected",)),
        ("rescale", {"rescale_acts_by_decoder_norm": "yes"}, ("rescale_acts_by_decoder_norm: expected true or false",)),
    ],
    "sparsify": [
        *(("option", {name: True}, (f"{name}: found True", "transcoders"))
          for name in ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed")),
        ("option", {"transcode": "no"}, ("transcode: expected true or false",)),
        ("activation", {"activation": "groupmax"}, ("activation: found 'groupmax'",)),
        ("k", {"k": WIDTH + 1}, ("k: expected",)),
        ("k", {"k": ...}, ("k: expected",)),
        ("width", {"num_latents": 0}, ("encoder.weight: expected shape [F=384, d=12], found [40, 12]",)),
        ("width", {"num_latents": ..., "expansion_factor": ...}, ("expansion_factor: expected",)),
        ("d_in", {"d_in": 10**9}, ("encoder.weight", "d=1000000000")),
    ],
    "learned BatchTopKSAE": [
        *(("class", {"dict_class": name}, ("trainer.dict_class: found",))
          for name in ("CrossCoder", "IdentityDict", "BatchTopKCrossCoder", None, 5, ["AutoEncoder"])),
        ("class", {"dict_class": "AutoEncoder"}, ("ae.pt", "bias", "missing")),
        ("layer", {"layer": [1, 2]}, ("layer: expected a whole number",)),
        ("layer", {"layer": ...}, ("layer: expected a whole number",)),
        ("submodule", {"submodule_name": 3}, ("trainer.submodule_name: expected a name",)),
        ("width", {"dict_size": 41}, ("encoder.weight: expected shape [F=41, d=12], found [40, 12]",)),
        ("width", {"activation_dim": None}, ("activation_dim: expected",)),
    ],
    "learned AutoEncoderTopK": [
        ("k", {"k": 7}, ("ae.pt: k: expected 7 as in config.json, found 5",)),
        ("k", {"k": WIDTH + 1}, ("k: expected a whole number from 1 to 40",)),
        ("k", {"k": None}, ("k: expected a whole number",)),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        pytest.param(kind, changes, words, id=f"{kind}-{what}-{number}")
        for kind, cases in SETTINGS.items()
        for number, (what, changes, words) in enumerate(cases)
    ],
)
def test_settings_that_do_not_fit(kind: str, changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    place, config, _ = folder(tmp_path, kind)
    changed(config, **changes)
    refused(place, *words)


def test_hooks_without_a_counterpart_name_file_and_field(tmp_path: Path) -> None:
    for kind, changes, words in (
        ("saelens standard", {"metadata": {"hook_name": "blocks.3.hook_resid_mid"}}, "cfg.json: metadata.hook_name"),
        ("learned AutoEncoder", {"submodule_name": "resid_post_layer_9"}, "config.json: trainer: submodule_name"),
    ):
        place, config, _ = folder(tmp_path / kind, kind)
        changed(config, **changes)
        with pytest.raises(HookpointError, match=words):
            SparseAutoencoder.from_folder(place)
        assert SparseAutoencoder.from_folder(place, hookpoint="embed").hookpoint == "embed"
    sparsify_folder(tmp_path / "layers.3.mlp.act")
    with pytest.raises(HookpointError, match=r"name of the folder: hook 'layers\.3\.mlp\.act'"):
        SparseAutoencoder.from_folder(tmp_path / "layers.3.mlp.act")


BAD_JSON: dict[str, bytes] = {
    "empty": b"", "cut": b'{"d_in": 12', "list": b"[]", "number": b"7", "binary": b"\xff\xfe\x00" * 9,
    "deep": b"[" * 200_000, "long number": b'{"d_in": ' + b"9" * 10_000 + b"}", "pickle": pickle.dumps([1]),
}  # fmt: skip


@pytest.mark.parametrize("what", [*BAD_JSON, "missing", "folder", "loop", "device", "huge"])
@pytest.mark.parametrize("kind", EACH)
def test_configurations_that_are_none(kind: str, what: str, tmp_path: Path) -> None:
    place, config, _ = folder(tmp_path, kind)
    spoil(config, what, BAD_JSON)
    refused(place, config.name)


@pytest.mark.parametrize("what", ["empty", "half", "one byte less", "text", "missing", "folder", "loop", "device"])
@pytest.mark.parametrize("kind", EACH)
def test_weights_that_are_none(kind: str, what: str, tmp_path: Path) -> None:
    place, _, path = folder(tmp_path, kind)
    data = path.read_bytes()
    bad = {"empty": b"", "half": data[: len(data) // 2], "one byte less": data[:-1], "text": b"no weights\n" * 99}
    spoil(path, what, bad)
    refused(place, path.name if what != "missing" else "found none of them")


def spoil(path: Path, what: str, contents: dict[str, bytes]) -> None:
    path.unlink()
    if what in contents:
        path.write_bytes(contents[what])
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)


def test_folders_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "expected a folder of a dictionary", "found none of them")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "expected a folder of a dictionary")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "expected a folder of a dictionary")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "sae_weights.safetensors, sae.safetensors, ae.pt")
    saelens_folder(tmp_path / "two")
    (tmp_path / "two" / "ae.pt").write_bytes(b"")
    refused(tmp_path / "two", "found sae_weights.safetensors and ae.pt")


def test_links_are_followed_as_download_caches_need(tmp_path: Path) -> None:
    place, config, tensors = folder(tmp_path, "saelens standard")
    (tmp_path / "cache").mkdir()
    for path in (config, tensors):
        (tmp_path / "cache" / path.name).symlink_to(path)
    (tmp_path / "linked").symlink_to("cache")
    assert SparseAutoencoder.from_folder(tmp_path / "linked").hash == SparseAutoencoder.from_folder(place).hash


# ------------------------------------------------------------------------------------------------------- forged weights


def stored(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, more: bytes = b"\0" * 64) -> None:
    """A file in the format of ``torch.save`` around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", more)):
            archive.writestr(f"archive/{name}", data)


@pytest.mark.parametrize("around", ["zip", "plain", "inside", "old format"])
def test_a_pickle_with_code_is_not_executed(around: str, tmp_path: Path) -> None:
    place, _, path = folder(tmp_path, "learned AutoEncoder")
    mark = tmp_path / "executed"
    payload = pickle.dumps({"bias": Executed(mark)}, protocol=2)
    if around == "zip":
        stored(path, payload)
    elif around == "plain":
        path.write_bytes(payload)
    elif around == "inside":
        rewrite(path, lambda found: found.update(bias=Executed(mark)))
    else:
        tensors = torch.load(path, weights_only=True)
        torch.save({**tensors, "bias": Executed(mark)}, path, _use_new_zipfile_serialization=False)
    message = refused(place, "ae.pt")
    assert "weights_only=False" not in message
    assert not mark.exists()
    if around == "plain":
        pickle.loads(payload)["bias"].close()
        assert mark.exists(), "the pickle would have worked"


def test_a_pickle_in_the_place_of_safetensors_is_not_executed(tmp_path: Path) -> None:
    for kind in ("saelens standard", "sparsify"):
        place, _, path = folder(tmp_path / kind, kind)
        path.write_bytes(pickle.dumps(Executed(tmp_path / "executed")))
        refused(place, path.name, "not a safetensors file")
    assert not (tmp_path / "executed").exists()


def test_tensors_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    place, _, path = folder(tmp_path, "learned AutoEncoder")
    rewrite(path, lambda found: found.update(bias=torch.zeros(1).expand(10**12)))
    refused(place, "ae.pt", "'bias': expected at most the")
    rewrite(path, lambda found: found.update(bias=torch.zeros(D).to_sparse()))
    refused(place, "ae.pt", "'bias': expected a dense tensor")
    rewrite(path, lambda found: found.update(bias=torch.zeros(D, device="meta")))
    refused(place, "ae.pt")
    rewrite(path, lambda found: found.update(bias=5))
    refused(place, "ae.pt", "bias", "found str and int")
    torch.save([torch.zeros(D)], path)
    refused(place, "ae.pt", "expected a mapping of names to tensors, found list")


def test_a_zip_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    place, _, path = folder(tmp_path, "learned AutoEncoder")
    stored(path, pickle.dumps({}, protocol=2), zipfile.ZIP_DEFLATED, b"\0" * 2**24)
    refused(place, "ae.pt: expected at most the", "found entries of 16777")


def test_a_safetensors_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    place, _, path = folder(tmp_path, "saelens standard")
    header = {"W_enc": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 1]}}
    for text in (json.dumps(header).encode(), b"{" * 50):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        refused(place, path.name, "not a safetensors file")
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(place, path.name, "not a safetensors file")


@pytest.mark.parametrize("value", ["x", -1, 0, True, [], 10**400])
def test_scales_that_are_none(value: Any, tmp_path: Path) -> None:
    saelens_folder(tmp_path / "sae", normalize_activations="expected_average_only_in")
    (tmp_path / "sae" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": value}))
    refused(tmp_path / "sae", "activation_scaler.json: scaling_factor: expected a number above 0")


def test_old_folders_with_more_than_version_6_can_express_are_refused(tmp_path: Path) -> None:
    place, config, path = folder(tmp_path, "saelens standard")
    changed(config, metadata=..., hook_name="blocks.3.hook_resid_post")
    rewrite(path, lambda found: found.update(scaling_factor=torch.ones(WIDTH)))
    assert SparseAutoencoder.from_folder(place).hookpoint == "layers.3.resid_post"
    rewrite(path, lambda found: found.update(scaling_factor=torch.full((WIDTH,), 1.5)))
    refused(place, path.name, "scaling_factor: expected 1 for every feature")
    changed(config, activation_fn_str="tanh-relu")
    refused(place, "activation_fn: expected relu or topk, found 'tanh-relu'")


def test_a_threshold_stored_as_its_logarithm(tmp_path: Path) -> None:
    place, _, path = folder(tmp_path, "saelens jumprelu")
    expected = SparseAutoencoder.from_folder(place)
    rewrite(path, lambda found: found.update(log_threshold=found.pop("threshold").log()))
    torch.testing.assert_close(SparseAutoencoder.from_folder(place).threshold, expected.threshold)


def test_reading_needs_nothing_outside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _, _ = folder(tmp_path, "sparsify")
    monkeypatch.chdir(place)
    assert SparseAutoencoder.from_folder(os.curdir).name == "layers.3"
