"""Rows of a measurement, computed once more from readings ``[n, d]`` with NumPy and scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import ttest_1samp
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.drift.crossfit import _half_of_each_fold
from interp_rlhf.readouts.folds import label_folds, pair_folds

Sides = tuple[np.ndarray, np.ndarray]


def probe() -> LogisticRegression:
    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000))


def crossed(fit: Sides, read: Sides, folds: np.ndarray, swap: np.ndarray | None = None) -> tuple[float, Sides]:
    """AUC within folds of probes fitted on the pairs outside each, and the held-out scores of both sides.

    ``swap`` exchanges the sides of some pairs, both where probes are fitted and where they are read.
    """
    if swap is not None:
        mark = swap[:, None]
        fit, read = ((np.where(mark, b, a), np.where(mark, a, b)) for a, b in (fit, read))
    value, scores = 0.0, np.zeros((2, len(folds)))
    for fold in range(folds.max() + 1):
        out, held = folds != fold, folds == fold
        model = probe().fit(np.r_[fit[0][out], fit[1][out]], np.repeat([1, 0], out.sum()))
        scores[:, held] = [model.decision_function(side[held]) for side in read]
        value += held.mean() * roc_auc_score(np.repeat([1, 0], held.sum()), scores[:, held].ravel())
    return value, (scores[0], scores[1])


def panel(start: Sides, now: Sides, groups: Sequence[str], *, fpr: float, seed: int) -> dict[str, float]:
    """The probe panel's rows of two readings of the same pairs; ``reference`` is the frozen AUC on the start."""
    folds = np.array(pair_folds(groups, 5, seed))
    before, (_, negative) = crossed(start, start, folds)
    frozen, (positive, _) = crossed(start, now, folds)
    refit, _ = crossed(now, now, folds)
    caught = 0
    for fold in range(5):
        held = np.sort(negative[folds == fold])
        threshold = next(score for score in held if (held > score).mean() <= fpr)
        caught += int((positive[folds == fold] > threshold).sum())
    swaps = _half_of_each_fold(folds.tolist(), 5, seed).numpy()
    return {
        "probe/auc": frozen,
        "reference": before,
        "probe/auc_refit": refit,
        "probe/staleness": refit - frozen,
        "probe/obfuscation_gap": before - frozen,
        "probe/obfuscation_excess": (before - frozen) - (before - refit),
        "probe/recall": caught / len(folds),
        "probe/baseline_shuffled": float(np.mean([crossed(start, start, folds, swap)[0] for swap in swaps])),
    }


def staleness_band(start: Sides, groups: Sequence[str], *, refits: int, seed: int) -> tuple[float, float]:
    """Middle 95 % of AUCs of refits with other folds, less the frozen one, 0 included."""
    frozen, *others = (crossed(start, start, np.array(pair_folds(groups, 5, seed + i)))[0] for i in range(refits + 1))
    low, high = np.quantile(np.array(others) - frozen, [0.025, 0.975])
    return min(float(low), 0.0), max(float(high), 0.0)


def word_baselines(sides: tuple[Sequence[Prompt], Sequence[Prompt]], groups: Sequence[str], seed: int) -> dict:
    """AUC within folds of token counts and of lengths."""
    folds = np.array(pair_folds(groups, 5, seed))
    written = [[text.input_ids[text.completion_start :] for text in side] for side in sides]
    words, lengths = 0.0, 0.0
    for fold in range(5):
        outside = [tokens for side in written for tokens, own in zip(side, folds, strict=True) if own != fold]
        inside = [tokens for side in written for tokens, own in zip(side, folds, strict=True) if own == fold]
        truth, held = np.repeat([1, 0], len(outside) // 2), np.repeat([1, 0], len(inside) // 2)
        model = make_pipeline(CountVectorizer(analyzer=list), LogisticRegression(max_iter=1000)).fit(outside, truth)
        words += (folds == fold).mean() * roc_auc_score(held, model.decision_function(inside))
        sign = 1 if roc_auc_score(truth, [len(tokens) for tokens in outside]) >= 0.5 else -1
        lengths += (folds == fold).mean() * roc_auc_score(held, [sign * len(tokens) for tokens in inside])
    return {"probe/baseline_tokens": words, "probe/baseline_length": lengths}


def on_domain(
    start: Sides,
    on: tuple[np.ndarray, np.ndarray],
    labels: Sequence[bool],
    groups: Sequence[str],
    moved: float,
    seed: int,
) -> dict[str, float]:
    """Rows of labelled texts read at the start and now; ``moved`` is the change of the frozen AUC on pairs."""
    folds, marks, own = np.array(pair_folds(groups, 5, seed)), np.array(labels), np.array(label_folds(labels, 5, seed))
    aucs = []
    for x in on:
        each = []
        for fold in range(5):
            out = folds != fold
            model = probe().fit(np.r_[start[0][out], start[1][out]], np.repeat([1, 0], out.sum()))
            each.append(roc_auc_score(marks, model.decision_function(x)))
        aucs.append(float(np.mean(each)))
    refit = 0.0
    for fold in range(own.max() + 1):
        model = probe().fit(on[1][own != fold], marks[own != fold])
        refit += (own == fold).mean() * roc_auc_score(marks[own == fold], model.decision_function(on[1][own == fold]))
    return {
        "probe/auc_on": aucs[1],
        "probe/auc_on_refit": refit,
        "probe/concept_drift": aucs[1] - aucs[0] - moved,
    }


def drifts(x0: np.ndarray, xt: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """``D`` of each prompt along each direction ``[k, d]``, ``[n, k]``."""
    return (xt - x0) @ directions.T / (x0 @ directions.T).std(axis=0, ddof=1)


def rank(value: float, null: np.ndarray) -> float:
    """Two-sided rank p-value."""
    return float((1 + (abs(null) >= abs(value)).sum()) / (1 + len(null)))


def bank(x0: np.ndarray, xt: np.ndarray, v: np.ndarray, pairs: Sequence[Sides]) -> np.ndarray:
    """Mean ``D`` along the differences in means of these pairs, without those that are much like ``v``."""
    found = np.stack([a.mean(0) - b.mean(0) for a, b in pairs])
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return drifts(x0, xt, found[abs(found @ v) < 0.5]).mean(0)


def joint_flips(columns: Mapping[str, np.ndarray], seed: int, flips: int = 20_000) -> tuple[dict, dict, float]:
    """t of each column of D, its p by sign flips of whole prompts, and the 95 % point of the largest ``|t*|``."""
    d = np.stack(list(columns.values()), axis=1)
    t = ttest_1samp(d, 0).statistic
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, len(d)))
    means, squares = signs @ d / len(d), (d**2).mean(0)
    largest = abs(means / np.sqrt((squares - means**2) / (len(d) - 1))).max(1)
    p = {name: float((largest >= abs(value)).mean()) for name, value in zip(columns, t, strict=True)}
    return dict(zip(columns, t, strict=True)), p, float(np.quantile(largest, 0.95))
