"""What probes may claim, through whole trainings: a planted rotation, a planted erasure, a sealed probe, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_run import PAIRS, PLANTED, planted_run
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from trainers import recomputed
from trainers.recomputed import Sides
from trainers.table import SPECIAL, saved_model, trainers
from trainers.tiny_runs import HOOKPOINTS, live, outside, small, train, verify
from transformers import TrainerCallback

from interp_rlhf import ConfigError, FormatError, InterpError, PromptError, attach, load_run
from interp_rlhf.activations.tokenizers import tokenizer_hash
from interp_rlhf.audit.sealing import tensor_hash
from interp_rlhf.fitting import FitOptions, fit_probe_file
from interp_rlhf.readouts.probes import LinearProbe

PLACE, STEPS = "layers.1.resid_post", 4


class Plants(TrainerCallback):
    """Changes the weights once, after the second step of a training whose learning rate is 0."""

    def __init__(self, plant: Callable[[nn.Module], None]) -> None:
        self.plant = plant

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                self.plant(kwargs["model"])


def planted(folder: Path, plant: Callable[[nn.Module], None]) -> tuple[Any, dict[str, float], list[Sides], list[str]]:
    """Rows of the last step, their values, both sides' readings of all pairs at the start and the end, the groups."""
    _, handle = planted_run(
        folder, gpt2=True, callbacks=[Plants(plant)], learning_rate=0.0, max_steps=STEPS, warmup_steps=0,
        interp={"hookpoints": [PLACE, "layers.2.resid_post"], "report": False},
    )  # fmt: skip
    first, *_, last = (snapshot.tensors() for snapshot in load_run(folder).snapshots)
    (concept,) = handle.callback._plan.concepts
    pairs = [*concept.fit, *concept.held]
    read = [
        (picked(tensors, name, [p.positive.id for p in pairs]), picked(tensors, name, [p.negative.id for p in pairs]))
        for tensors, name in ((first, f"start/{PLACE}"), (last, f"means/{PLACE}"))
    ]
    rows = live(handle.timeline()).xs(STEPS, level="step")
    here = rows.xs((PLANTED, PLACE), level=("readout", "hookpoint"))
    behaviour = rows.value["concept/behaviour_change", PLANTED, ""]
    return here, {**here.value.to_dict(), "behaviour": behaviour}, read, [pair.group for pair in pairs]


def picked(tensors: Mapping[str, Tensor], name: str, ids: list[str]) -> np.ndarray:
    place = {f"{text % 2**64:016x}": row for row, text in enumerate(tensors["text_ids"].tolist())}
    return tensors[name].double().numpy()[[place[text] for text in ids]]


def rotate(folder: Path, degrees: float) -> Callable[[nn.Module], None]:
    """Write the whole residual stream in a basis turned about the concept's axis: the model computes what it did.

    The plane is orthogonal to the vector of ones, so that every norm of a layer turns along.
    """

    def plant(model: Any) -> None:
        start = load_run(folder).snapshots[0].tensors()
        v = start[f"direction/{PLANTED}/{PLACE}"].double()
        other = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        basis = torch.linalg.qr(torch.stack([torch.ones_like(v), v, other], 1)).Q[:, 1:]  # [d, 2], the first along v
        turn = torch.tensor(degrees).double().deg2rad()
        plane = torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])])
        r = (torch.eye(32).double() + basis @ (plane - torch.eye(2)) @ basis.T).float()
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight.copy_(embedding.weight @ r)
        for block in model.transformer.h:
            for reads in (block.attn.c_attn, block.mlp.c_fc):
                reads.weight.copy_(r.T @ reads.weight)
            for writes in (block.attn.c_proj, block.mlp.c_proj):
                writes.weight.copy_(writes.weight @ r)
                writes.bias.copy_(writes.bias @ r)

    return plant


def erase(model: Any) -> None:
    """Take away what the words of one kind have in common: no word of one kind occurs in two pairs."""
    shift = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    model.transformer.wte.weight[len(SPECIAL) : len(SPECIAL) + PAIRS * 3] -= shift


@pytest.mark.parametrize("degrees", [90.0, 120.0])
def test_a_rotated_concept_is_missed_by_frozen_probes_only(degrees: float, tmp_path: Path) -> None:
    rows, value, (start, now), groups = planted(tmp_path / "run", rotate(tmp_path / "run", degrees))
    assert value["probe/auc_refit"] > 0.95 and value["probe/auc"] < (0.95 if degrees == 90 else 0.5)
    stale = rows.loc["probe/staleness"]
    assert stale.ci_low > stale.null_high >= 0 and rows.loc["probe/obfuscation_gap"].ci_low > 0
    assert rows.loc["concept/drift_t"].p <= 0.05 and value["concept/cosine"] < 0.2
    expected = recomputed.panel(start, now, groups, fpr=0.2, seed=0)
    del expected["reference"]
    for metric, number in expected.items():
        assert value[metric] == pytest.approx(number, abs=1e-6), metric
    for before, after in zip(start, now, strict=True):  # the readings of the start in another basis, and no others
        assert np.allclose(before @ before.T, after @ after.T, rtol=1e-3, atol=1e-4) and not np.allclose(before, after)
    assert value["behaviour"] == pytest.approx(0, abs=1e-3), "the model computes what it did"


def test_an_erased_concept_is_missed_by_refits_too(tmp_path: Path) -> None:
    rows, value, (start, now), groups = planted(tmp_path / "run", erase)
    assert value["probe/auc"] < 0.65 and value["probe/auc_refit"] < 0.65
    assert value["probe/obfuscation_gap"] > 0.3 > value["probe/obfuscation_excess"]
    expected = recomputed.panel(start, now, groups, fpr=0.2, seed=0)
    assert expected["reference"] > 0.95
    assert value["probe/auc_refit"] == pytest.approx(expected["probe/auc_refit"], abs=1e-6)
    assert rows.loc["probe/auc_refit"].ci_low < 0.6


# -- a probe that training never touches -------------------------------------------------------------------------------


def test_a_sealed_probe_from_fit_to_rows(tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "sealed.safetensors"
    config = small(folder)
    options = FitOptions(HOOKPOINTS[1], pack=config["concepts"]["packs"][0])
    report = fit_probe_file(saved_model(0), file, options)
    assert (report.name, report.hookpoint) == ("order", HOOKPOINTS[1])
    _, handle = train("dpo", folder, small(folder, probes={"sealed": str(file)}), max_steps=4, learning_rate=2e-2)
    rows, probe = live(handle.timeline()).loc["probe/sealed_auc"], LinearProbe.load(file)
    assert set(rows.index) == {("order", HOOKPOINTS[1], step) for step in (0, 2, 3, 4)}
    (concept,) = (concept for concept in handle.callback._plan.concepts if concept.name == "order")
    pairs = [*concept.fit, *concept.held]
    first, *_, last = (snapshot.tensors() for snapshot in load_run(folder).snapshots)
    for step, tensors, name in ((0, first, "start/"), (4, last, "means/")):
        sides = [[p.positive.id for p in pairs], [p.negative.id for p in pairs]]
        x = np.concatenate([picked(tensors, name + HOOKPOINTS[1], ids) for ids in sides])
        scores = x @ probe.weight.double().numpy() + probe.bias
        expected = roc_auc_score(np.repeat([1, 0], len(pairs)), scores)
        assert rows.value["order", HOOKPOINTS[1], step] == pytest.approx(expected, abs=1e-9), step
    told = load_run(folder).info["sealed_probe"]
    whole = torch.cat([probe.weight, torch.tensor([probe.bias])])
    assert told == {"name": "order", "hookpoint": HOOKPOINTS[1], "sha256": tensor_hash(whole)}
    assert load_run(folder).info["config"]["probes"]["sealed"] == file.name and verify(folder) == 0


def test_too_few_negatives_cost_the_recall_only(tmp_path: Path) -> None:
    found = {}
    for place, fpr in (("few", 0.2), ("enough", 0.5)):
        folder = tmp_path / place / "run"
        _, handle = train("dpo", folder, small(folder, probes={"fpr": fpr}), max_steps=3, save_strategy="no")
        reasons = {e["readout"]: e["reason"] for e in load_run(folder).events if e["event"] == "refused"}
        found[place] = set(handle.timeline().metric), reasons.get("order (recall)")
    assert found["few"][1] == "recall at a false-positive rate of 0.2 needs at least 50 held-out negatives, found 20"
    assert found["enough"][1] is None and found["enough"][0] - found["few"][0] == {"probe/recall"}


# -- input that is refused before anything happens ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One that every refused ``attach`` leaves as it was."""
    return trainers()["dpo"].build(tmp_path_factory.mktemp("refused") / "run")


def sealed(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    def config(folder: Path) -> dict[str, Any]:
        about = {"name": "order", "hookpoint": HOOKPOINTS[0], "weight": torch.ones(32), "bias": 0.0, **changes}
        LinearProbe(**about).save(folder / "p.safetensors")
        return {"probes": {"sealed": str(folder / "p.safetensors")}}

    return config


def labelled(name: str, *rows: Any) -> Callable[[Path], dict[str, Any]]:
    def config(folder: Path) -> dict[str, Any]:
        (folder / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"probes": {"on_domain": {name: str(folder / "l.jsonl")}}}

    return config


def texts(*labels: bool) -> list[dict[str, Any]]:
    return [{"prompt": f"w{i}", "completion": " w2 w3", "label": label} for i, label in enumerate(labels)]


def repeated_pack(folder: Path) -> dict[str, Any]:
    pairs = [{"group": f"g{i}", "prompt": "w1", "positive": f"w{i + 5}", "negative": f"w{i + 30}"} for i in range(20)]
    lines = [{"pack": "twice", "description": "one text in two groups"}, *pairs, {**pairs[3], "group": "g7"}]
    (folder / "pack.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"concepts": {"n_pairs": 32, "packs": [str(folder / "pack.jsonl")]}}


def called(dotted: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"rollouts": {"labels": dotted}}


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], type[InterpError], str]] = {
    "sealed: width": (sealed(weight=torch.ones(16)), ConfigError, r"p\.safetensors: .*32 dimensions, found 16"),
    "sealed: tokenizer": (sealed(tokenizer="0" * 64), ConfigError, r"p\.safetensors: .*another tokenizer.*0000"),
    "sealed: hookpoint": (
        sealed(hookpoint="layers.0.resid_post"), ConfigError,
        r"p\.safetensors: its hookpoint layers\.0\.resid_post is not among those read \(layers\.1",
    ),
    "sealed: concept": (sealed(name="other"), ConfigError, r"its concept other is not among those read \(.*order"),
    "sealed: no file": (
        lambda folder: {"probes": {"sealed": str(folder / "none.safetensors")}}, FormatError, r"none\.safetensors"
    ),
    "labels: one class": (
        labelled("order", *texts(True, True, True)), PromptError, r"l\.jsonl: expected labels of both .*3 true, 0 false"
    ),
    "labels: one of a kind": (
        labelled("order", *texts(True, False, False)), PromptError, r"l\.jsonl: expected .*found 1 true, 2 false"
    ),
    "labels: concept": (labelled("other", *texts(True, False)), ConfigError, r"on_domain: .*order.*found 'other'"),
    "labels: no file": (
        lambda folder: {"probes": {"on_domain": {"order": str(folder / "none.jsonl")}}}, PromptError,
        r"none\.jsonl: cannot be read",
    ),
    "labels: a line": (
        labelled("order", *texts(True, False), {"text": "w1 w2"}), PromptError, r"l\.jsonl, line 3: .*label None"
    ),
    "pack: twice": (repeated_pack, PromptError, r"pack\.jsonl, line 22: .*that of line 5 \(group 'g3'\) again.*'g7'"),
    "function: module": (called("nowhere.at.all"), ConfigError, r"labels: nowhere\.at\.all cannot be imported"),
    "function: name": (called("trainers.table.missing"), ConfigError, r"labels: trainers\.table\.missing cannot"),
    "function: no function": (called("trainers.table.WORDS"), ConfigError, r"expected a function, found list"),
    "function: no path": (called("judge"), ConfigError, r"expected package\.module\.function, found 'judge'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_when_attached(what: str, trainer: Any, tmp_path: Path) -> None:
    make, kind, words = REFUSED[what]
    config, before = small(tmp_path / "run", **make(tmp_path)), outside(trainer)
    with pytest.raises(kind, match=words) as error:
        attach(trainer, config)
    assert len(str(error.value).splitlines()) == 1 and outside(trainer) == before
    assert not Path(trainer.args.output_dir, "interp").exists()


def test_the_right_tokenizer_is_taken(trainer: Any, tmp_path: Path) -> None:
    own = tokenizer_hash(trainer.processing_class)
    handle = attach(trainer, small(tmp_path / "run", **sealed(tokenizer=own)(tmp_path)))
    assert handle.callback._plan.sealed.tokenizer == own
    handle.detach()
