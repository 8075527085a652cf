"""Fitting a probe or a direction on a saved model: what is written, what is said about it, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trainers.table import causal_lm, lora, saved_model, sentence, tokenizer
from trainers.tiny_runs import direct_means, small

from interp_rlhf import Direction, LinearProbe
from interp_rlhf.activations.labelled import LabelledTexts
from interp_rlhf.activations.rows import row_texts
from interp_rlhf.activations.tokenizers import tokenizer_hash
from interp_rlhf.errors import ConfigError, FormatError, HookpointError, InterpError, PromptError
from interp_rlhf.fitting import FitOptions, FitReport, fit_direction, fit_probe_file
from interp_rlhf.readouts.folds import label_folds, pair_folds
from interp_rlhf.readouts.packs import load_pack, render

HOOKPOINT = "layers.1.resid_post"
MIDDLE = "layers.50%.resid_post"


@pytest.fixture
def pack(tmp_path: Path) -> str:
    """Pairs of the same words in two orders."""
    return small(tmp_path / "run")["concepts"]["packs"][0]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(path: Path, true: int = 30, false: int = 45) -> Path:
    """Texts whose label is the order of two words."""
    rows = []
    for i in range(true + false):
        end = "w3 w3 w60" if i < true else "w60 w3 w3"
        rows.append({"prompt": sentence(i, 3 + i % 3), "completion": " " + end, "label": i < true})
    return lines(path, rows[::2] + rows[1::2])


def preferences(path: Path, n: int = 24, **changes: Any) -> Path:
    rows = [{"prompt": sentence(i, 4), "chosen": " w3 w3 w60", "rejected": " w60 w3 w3"} for i in range(n)]
    return lines(path, [{**row, **changes} for row in rows])


def readings(pairs: Any) -> tuple[np.ndarray, np.ndarray]:
    model, skip = causal_lm(), frozenset([1])
    return tuple(
        direct_means(model, [getattr(pair, side) for pair in pairs], HOOKPOINT, skip).double().numpy()
        for side in ("positive", "negative")
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------------ what is written


def test_a_probe_is_scikit_learns_on_readings_of_our_own(pack: str, tmp_path: Path) -> None:
    before, out = hashes(saved_model(0)), tmp_path / "order.safetensors"
    report = fit_probe_file(saved_model(0), out, FitOptions(MIDDLE, pack=pack, seed=3))
    assert hashes(saved_model(0)) == before
    pairs = render(load_pack(pack), tokenizer(), 512)
    positive, negative = readings(pairs)
    x, truth = np.r_[positive, negative], np.r_[np.ones(20), np.zeros(20)]
    model = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cg", tol=1e-12)).fit(x, truth)
    probe = LinearProbe.load(out)
    assert (probe.name, probe.hookpoint, probe.tokenizer) == ("order", HOOKPOINT, tokenizer_hash(tokenizer()))
    found = probe.score(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, model.decision_function(x), atol=2e-3, rtol=2e-3)  # readings differ in rounding
    folds, value = np.array(pair_folds([pair.group for pair in pairs], 5, 3)), 0.0
    for fold in range(5):
        out_of, held = np.tile(folds != fold, 2), np.tile(folds == fold, 2)
        value += (folds == fold).mean() * roc_auc_score(
            truth[held], model.fit(x[out_of], truth[out_of]).decision_function(x[held])
        )
    assert report.auc == pytest.approx(value, abs=1e-6)
    assert report.auc > 0.9 > 0.6 > report.tokens_auc and report.length_auc == 0.5
    assert (report.n_positive, report.n_negative, report.folds, report.paired) == (20, 20, 5, True)
    assert report.recall is None and "needs at least 50 held-out negatives, found 20" in str(report)
    assert probe.threshold is None


def test_a_direction_is_the_difference_in_means(pack: str, tmp_path: Path) -> None:
    out = tmp_path / "order.safetensors"
    report = fit_direction(saved_model(0), out, FitOptions(HOOKPOINT, pack=pack, name="sequence"))
    positive, negative = readings(render(load_pack(pack), tokenizer(), 512))
    mean = positive.mean(0) - negative.mean(0)
    direction = Direction.load(out)
    np.testing.assert_allclose(direction.vector.numpy(), mean / np.linalg.norm(mean), atol=1e-5)
    assert (direction.name, report.name, report.kind) == ("sequence", "sequence", "direction")
    assert report.auc > 0.9 and abs(report.shuffled_auc - 0.5) < 0.35


@pytest.mark.parametrize("fit", [fit_probe_file, fit_direction])
def test_labelled_texts_of_unequal_numbers(fit: Any, tmp_path: Path) -> None:
    path, out = labelled(tmp_path / "order.jsonl"), tmp_path / "o.safetensors"
    report: FitReport = fit(saved_model(0), out, FitOptions(HOOKPOINT, labels=path))
    assert (report.n_positive, report.n_negative, report.paired, report.name) == (30, 45, False, "order")
    assert report.auc_low <= report.auc <= report.auc_high and report.auc > 0.7
    assert report.tokens_auc < 0.7 and abs(report.shuffled_auc - 0.5) < 0.25
    texts = LabelledTexts.from_jsonl(path, tokenizer(), name="order", max_length=512)
    x = direct_means(causal_lm(), texts.prompts, HOOKPOINT, frozenset([1])).double().numpy()
    order = np.argsort([not label for label in texts.labels], kind="stable")
    x, truth = x[order], np.array(texts.labels)[order]
    folds, value = np.array(label_folds(truth.tolist(), 5, 0)), 0.0
    for fold in range(5):
        out_of, held = folds != fold, folds == fold
        if fit is fit_probe_file:
            model = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cg", tol=1e-12))
            scores = model.fit(x[out_of], truth[out_of]).decision_function(x[held])
        else:
            scores = x[held] @ (x[out_of & truth].mean(0) - x[out_of & ~truth].mean(0))
        value += held.mean() * roc_auc_score(truth[held], scores)
    assert report.auc == pytest.approx(value, abs=1e-6)
    assert report.recall is None  # 45 negatives, 50 are needed at a rate of 0.2


def test_preference_pairs_and_the_threshold(tmp_path: Path) -> None:
    path, out = preferences(tmp_path / "answers.jsonl", 60), tmp_path / "a.safetensors"
    report = fit_probe_file(saved_model(0), out, FitOptions(HOOKPOINT, pairs=path, fpr=0.25))
    assert report.name == "answers" and report.recall > 0.5
    assert f"recall {report.recall:.3f} at a false-positive rate of 0.25" in str(report)
    assert f"held-out AUC {report.auc:.3f}" in str(report) and str(out) in str(report)
    read = [row_texts(json.loads(line), tokenizer(), max_length=512)[0].pair for line in path.open()]
    positive, negative = readings(read)
    own, seen, thresholds = np.array(pair_folds([pair.group for pair in read], 5, 0)), [], []
    for fold in range(5):
        x, truth = np.r_[positive[own != fold], negative[own != fold]], np.arange(2 * (own != fold).sum())
        model = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cg", tol=1e-12))
        model.fit(x, truth < len(truth) // 2)
        held, others = (model.decision_function(side[own == fold]) for side in (positive, negative))
        thresholds.append(min(t for t in others if (others > t).mean() <= 0.25))
        seen += (held > thresholds[-1]).tolist()
    assert report.recall == pytest.approx(np.mean(seen), abs=1e-9) and len(seen) == report.n_positive == 60
    assert LinearProbe.load(out).threshold == pytest.approx(np.mean(thresholds), abs=1e-2)
    again = fit_probe_file(saved_model(0), tmp_path / "b.safetensors", FitOptions(HOOKPOINT, pairs=path, fpr=0.25))
    assert out.read_bytes() == (tmp_path / "b.safetensors").read_bytes() and again.auc == report.auc


def test_an_adapter_is_read_with_its_weights(pack: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(causal_lm(), lora())
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    options = FitOptions(HOOKPOINT, pack=pack, tokenizer=saved_model(0))
    fit_direction(tmp_path / "adapter", tmp_path / "adapted.safetensors", options)
    fit_direction(saved_model(0), tmp_path / "plain.safetensors", options)
    found, plain = (Direction.load(tmp_path / f"{name}.safetensors").vector for name in ("adapted", "plain"))
    pairs, merged = render(load_pack(pack), tokenizer(), 512), model.merge_and_unload()
    means = [
        direct_means(merged, [getattr(pair, side) for pair in pairs], HOOKPOINT, frozenset([1])).mean(0)
        for side in ("positive", "negative")
    ]
    torch.testing.assert_close(found, torch.nn.functional.normalize(means[0] - means[1], dim=0), atol=1e-4, rtol=0)
    assert float(found @ plain) < 0.999
    with pytest.raises(ConfigError, match="expected a tokenizer to read the texts with, found none"):
        fit_direction(tmp_path / "adapter", tmp_path / "c.safetensors", FitOptions(HOOKPOINT, pack=pack))


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(error: type[InterpError], message: str, out: Path, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        fit_probe_file(saved_model(0), out, FitOptions(**{"hookpoint": HOOKPOINT, **options}))
    assert "\n" not in str(caught.value) and not out.exists()


def test_texts_that_cannot_be_fitted_on(tmp_path: Path) -> None:
    out, path = tmp_path / "out.safetensors", tmp_path / "x.jsonl"
    refused(PromptError, "labels of both classes, found 20 true, 0 false", out, labels=labelled(path, 20, 0))
    refused(PromptError, "at least 8 texts of each class, found 7 true and 30 false", out, labels=labelled(path, 7, 30))
    refused(PromptError, r"at least 16 different pairs .* found 15", out, pairs=preferences(path, 15))
    refused(PromptError, "at least 16 different pairs .* found 0", out, pairs=preferences(path), max_length=5)
    rows = [{"prompt": "w5 w6 w7", "chosen": f" w{i + 6} w3", "rejected": f" w{i + 40} w4"} for i in range(20)]
    refused(PromptError, "at least 2 groups, found 1", out, pairs=lines(path, rows))
    refused(PromptError, "line 1: expected two different answers", out, pairs=preferences(path, chosen=" w60 w3 w3"))
    refused(PromptError, r"line 1: expected an object with chosen and rejected, found \['text'\]", out,
            pairs=lines(path, [{"text": "w1 w2"}]))  # fmt: skip
    path.write_text("{")
    refused(PromptError, "line 1: not valid JSON", out, pairs=path)
    refused(PromptError, "cannot be read", out, pairs=tmp_path / "none.jsonl")


def test_a_text_in_two_folds_is_refused(pack: str, tmp_path: Path) -> None:
    header, *rows = [json.loads(line) for line in Path(pack).read_text().splitlines()]
    groups, same = [row["group"] for row in rows], rows[0]
    folds = pair_folds([*groups, "other"], 5, 0)
    assert folds[0] != folds[-1]  # with this seed the copy lands in another fold
    path = lines(tmp_path / "leak.jsonl", [header, *rows, {**same, "group": "other"}])
    message = r"leak\.jsonl, line 22: expected each text in one group, found that of line 2 \(group 'g0'\) again"
    refused(PromptError, message, tmp_path / "out.safetensors", pack=str(path))


def test_files_and_places_that_do_not_fit(pack: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    refused(HookpointError, r"layers\.9\.resid_post", out, hookpoint="layers.9.resid_post", pack=pack)
    refused(ConfigError, "no packaged pack 'none'", out, pack="none")
    refused(FormatError, "is no folder", tmp_path / "none" / "out.safetensors", pack=pack)
    with pytest.raises(ConfigError, match="no such folder"):
        fit_probe_file(tmp_path / "none", out, FitOptions(HOOKPOINT, pack=pack))
    out.write_bytes(b"mine")
    with pytest.raises(FormatError, match="exists, expected the name of a new file"):
        fit_direction(saved_model(0), out, FitOptions(HOOKPOINT, pack=pack))
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of pairs, labels and pack, found none"),
        ({"pack": "refusal", "labels": "x.jsonl"}, "found labels and pack"),
        ({"pack": "refusal", "fpr": 1.0}, "fpr: expected a rate between 0 and 1, found 1"),
        ({"pack": "refusal", "folds": 1}, "folds: expected at least 2, found 1"),
        ({"pack": "refusal", "batch_size": 0}, "batch_size: expected at least 1, found 0"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitOptions(HOOKPOINT, **options)


def test_copies_and_sides_that_are_the_same_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "chosen": f" w{2 + i % 2}", "rejected": f" w{9 + i % 2}"} for i in range(20)]
    path = lines(tmp_path / "copies.jsonl", rows)
    refused(PromptError, r"at least 16 different pairs that fit the token limit, found 2", tmp_path / "out", pairs=path)
    refused(PromptError, "both sides of a pair answer one prompt", tmp_path / "out", pairs=path, tokens="prompt")
