"""sae_training.py: a dictionary trained on a model's activations through SAELens, and read back from its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.table import causal_lm, tokenizer

from interp_rlhf.activations.capturing import capture
from interp_rlhf.cli import main
from interp_rlhf.errors import ConfigError, FormatError, HookpointError, PromptError
from interp_rlhf.readouts.saes import SparseAutoencoder
from interp_rlhf.sae_training import SaeOptions, fit_sae

pytestmark = pytest.mark.xdist_group("sae training")  # one worker, so that it is trained once


def write_texts(path: Path, n: int = 60) -> Path:
    """Texts of words that the tiny models know."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (12,), generator=generator).tolist() for _ in range(n)]
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and texts."""
    root = tmp_path_factory.mktemp("sae")
    causal_lm().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    write_texts(root / "texts.jsonl")
    return root


def options(folder: Path, **changes: Any) -> SaeOptions:
    small: dict[str, Any] = {"width": 64, "k": 8, "tokens": 6400, "batch": 64, "buffer": 512, "lr": 3e-3}
    return SaeOptions("layers.50%.resid_post", folder / "texts.jsonl", **(small | changes))


def held_out(found: Any, folder: Path, hookpoint: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every activation of the file's texts that counts, ``[n, d]``, and a dictionary's codes of them."""
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    ids = [tokenizer()(text)["input_ids"] for text in texts]
    values = [capture(causal_lm(), {"input_ids": torch.tensor([one])}, [hookpoint])[hookpoint][0, 1:] for one in ids]
    x = torch.cat(values)
    return x, found.encode(x)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu", "gated"])
def test_it_is_written_in_saelens_format_and_explains_what_it_was_not_trained_on(
    folder: Path, tmp_path: Path, architecture: str
) -> None:
    lens = pytest.importorskip("sae_lens", reason="dictionaries are trained by the extra 'sae'")
    state = torch.get_rng_state()
    sparsity = {"standard": 0.5, "jumprelu": 0.05, "gated": 0.5}.get(architecture, 1.0)
    report = fit_sae(folder / "model", tmp_path / "sae", options(folder, architecture=architecture, sparsity=sparsity))
    assert torch.equal(state, torch.get_rng_state())
    assert (report.hookpoint, report.width, report.name) == ("layers.1.resid_post", 64, "sae")
    assert (report.trained, report.held, report.tokens) == (54, 6, 6400)
    assert report.fvu < 0.6 and 0 < report.l0 <= 64 and 0 <= report.dead < 1
    found = SparseAutoencoder.from_folder(tmp_path / "sae")
    assert found.hookpoint == "layers.1.resid_post"
    x, codes = held_out(found, folder, found.hookpoint)
    theirs = lens.SAE.load_from_disk(tmp_path / "sae", device="cpu")
    torch.testing.assert_close(codes, theirs.encode(x), atol=1e-5, rtol=1e-5)
    error = float(((x - found.reconstruct(x)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert error == pytest.approx(report.fvu, rel=0.5), "on other texts of the same kind"


def test_one_seed_gives_the_same_weights_and_training_is_what_makes_them(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason="dictionaries are trained by the extra 'sae'")
    reports = [
        fit_sae(folder / "model", tmp_path / name, options(folder, name="one", tokens=tokens, seed=seed))
        for name, tokens, seed in (("a", 1280, 0), ("b", 1280, 0), ("c", 1280, 1), ("d", 6400, 0))
    ]
    hashes = [SparseAutoencoder.from_folder(report.path, name="one").hash for report in reports]
    assert hashes[0] == hashes[1] != hashes[2]
    assert reports[3].fvu < 0.85 * reports[0].fvu


def test_the_command_prints_what_it_wrote(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sae_lens", reason="dictionaries are trained by the extra 'sae'")
    words = ["fit", "sae", "--model", folder / "model", "--hookpoint", "layers.1.mlp_out", "--out", tmp_path / "mine"]
    words += ["--data", folder / "texts.jsonl", "--width", "32", "--k", "4", "--train-tokens", "640", "--batch", "64"]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "dictionary mine (topk): 32 features at layers.1.mlp_out of model" in said
    assert "trained on 640 tokens of 54 texts" in said and "on 6 held-out texts: unexplained variance" in said
    assert json.loads((tmp_path / "mine" / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.1.hook_mlp_out"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 1}, "width: expected at least 2, found 1"),
        ({"k": 65}, "k: expected at most the width 64, found 65"),
        ({"architecture": "l1"}, "architecture: expected one of topk, .*, found 'l1'"),
        ({"tokens": 63}, "at least one batch"),
        ({"buffer": 63}, "at least one batch"),
        ({"lr": 0.0}, "learning rate above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options(folder, **changes)


def test_bad_places_and_texts_are_named_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason="dictionaries are trained by the extra 'sae'")
    model, good = folder / "model", options(folder)
    few = write_texts(tmp_path / "few.jsonl", 3)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "w3 w4"}\n{"text": \n')
    (tmp_path / "there").mkdir()
    cases: list[tuple[Path, SaeOptions, type[Exception], str]] = [
        (tmp_path / "there", good, FormatError, "exists, expected the name of a new folder"),
        (tmp_path / "no" / "sae", good, FormatError, "is no folder"),
        (tmp_path / "new", replace(good, hookpoint="layers.9.resid_post"), HookpointError, "layers.9"),
        (tmp_path / "new", replace(good, data=few), PromptError, "expected at least 16 different texts, found 3"),
        (tmp_path / "new", replace(good, data=broken), PromptError, "broken.jsonl, line 2: not valid JSON"),
        (tmp_path / "new", replace(good, data=tmp_path / "none"), PromptError, "none: cannot be read"),
    ]
    for out, settings, error, words in cases:
        with pytest.raises(error, match=words):
            fit_sae(model, out, settings)
    assert not (tmp_path / "new").exists()


def test_without_saelens_the_extra_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sae_lens", None)
    with pytest.raises(ConfigError, match=r"pip install 'interp-rlhf\[sae\]'"):
        fit_sae(folder / "model", tmp_path / "sae", options(folder))
