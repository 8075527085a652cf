"""Runs and checkpoints side by side: differences with their exact values, none where nothing differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from test_offline import attached_run
from trainers.table import causal_lm, lora, preferences, saved_model, tokenizer
from trainers.tiny_runs import live
from transformers import GPT2Config, GPT2LMHeadModel

from interp_rlhf import Direction, compare, load_run
from interp_rlhf.baseline import TEXT_IDS
from interp_rlhf.comparison import compare_command
from interp_rlhf.errors import ConfigError, FormatError
from interp_rlhf.stored_plan import load_plan

PLANTED, POINT = "planted", "layers.1.resid_post"
SHIFTS = {"base": 0.0, "one": 0.25, "two": -0.5}


pytestmark = pytest.mark.xdist_group("comparison")  # one worker, so that it is built once


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that differ by a bias along a saved direction, pairs to read, two runs, a control run, an adapter."""
    folder = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    words = len(tokenizer())
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=words, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0)
    )
    direction = Direction(PLANTED, POINT, torch.randn(32))
    direction.save(folder / "planted.safetensors")
    start = model.transformer.h[1].mlp.c_proj.bias.detach().clone()
    for name, shift in SHIFTS.items():
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.bias.copy_(start + shift * direction.vector)
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in preferences(48)))
    for name, options in {"full": {}, "faster": {"learning_rate": 5e-3}, "adapter": {"use_lora": True}}.items():
        attached_run("dpo", folder / name, **options)
    return folder


def settings(folders: Path) -> dict[str, Any]:
    directions = [str(folders / "planted.safetensors")]
    return {
        "hookpoints": [POINT],
        "prompts": {"n": 16},
        "concepts": {"pairs": False, "packs": [], "bank": False, "directions": directions},
        "probes": {"enabled": False},
        "statistics": {"bootstrap": 100, "directions": 200},
    }


def planted(folders: Path, *names: str, **more: Any) -> Any:
    places = [folders / name for name in names]
    return compare(*places, config=settings(folders), data=folders / "pairs.jsonl", **more)


def test_base_against_two_that_were_tuned(folders: Path) -> None:
    found = planted(folders, "base", "one", "two")
    assert found.start == "base" and list(found.timelines) == ["one", "two"]
    table = found.table().loc[(PLANTED, POINT)]
    ratio = table["two", "drift"] / table["one", "drift"]
    assert ratio == pytest.approx(-2, abs=1e-4) and table["one", "low"] > 0.1
    (difference,) = found.differences
    assert (difference.first, difference.other, difference.n) == ("one", "two", 16)
    assert difference.value == pytest.approx(table["two", "drift"] - table["one", "drift"], abs=1e-6)
    assert difference.value / table["one", "drift"] == pytest.approx(-3, abs=1e-4) and difference.leaves_out_zero
    assert [finding.readout for finding in found.summaries["two"].moved] == [PLANTED]
    text = str(found)
    assert "two - one" in text and "one (step 1):" in text and f"! two - one: {difference.value:+.2f} SD" in text
    assert found.difference_table().leaves_out_zero.tolist() == [True]


def test_identical_models_moved_nothing_and_do_not_differ(folders: Path) -> None:
    found = planted(folders, "base", "base", "base")
    assert list(found.timelines) == ["base (2)", "base (3)"]
    assert all(not summary.moved and summary.not_detected for summary in found.summaries.values())
    (difference,) = found.differences
    assert (difference.value, difference.ci_low, difference.ci_high) == (0, 0, 0) and not difference.leaves_out_zero
    assert np.abs(found.table().to_numpy()[:, :1]).max() < 1e-5


def test_two_runs_by_what_they_recorded(folders: Path) -> None:
    found = compare(folders / "full", folders / "faster")
    assert found.start is None and not found.not_compared
    for name in ("full", "faster"):
        rows = live(load_run(folders / name).timeline())
        for hookpoint in ("layers.1.resid_post", "layers.2.resid_post"):
            row = rows.loc[("concept/drift", "order", hookpoint, 4)]
            shown = found.table().loc[("order", hookpoint)][name]
            assert shown.tolist() == [row.value, row.ci_low, row.ci_high, row.null_low, row.null_high]
    places = [(d.readout, d.hookpoint) for d in found.differences]
    assert ("order", POINT) in places and len(places) == len(set(places))


def test_the_difference_of_two_runs_is_that_of_their_snapshots(folders: Path) -> None:
    """Computed here from the files with NumPy and SciPy, one text per prompt."""
    found = compare(folders / "full", folders / "faster")
    difference = next(d for d in found.differences if (d.readout, d.hookpoint) == ("order", POINT))
    prompts = load_plan(folders / "full" / "_interp" / "01-plan.jsonl").audit.prompts
    ids = [int.from_bytes(bytes.fromhex(prompt.id), signed=True) for prompt in prompts]
    first, *_, last = load_run(folders / "full").snapshots
    v = first.arrays()[f"direction/order/{POINT}"].astype(float)
    x0, a, b = (
        pick(snapshot, key, ids) @ v
        for snapshot, key in (
            (first, f"start/{POINT}"),
            (last, f"means/{POINT}"),
            (load_run(folders / "faster").snapshots[-1], f"means/{POINT}"),
        )
    )
    per_prompt = (b - a) / x0.std(ddof=1)
    assert difference.value == pytest.approx(per_prompt.mean(), abs=1e-9) and abs(difference.value) > 1e-3
    reference = stats.bootstrap((per_prompt,), np.mean, method="percentile", n_resamples=4000, rng=1)
    width = reference.confidence_interval.high - reference.confidence_interval.low
    assert difference.ci_low == pytest.approx(reference.confidence_interval.low, abs=0.3 * width)
    assert difference.ci_high == pytest.approx(reference.confidence_interval.high, abs=0.3 * width)


def pick(snapshot: Any, key: str, ids: list[int]) -> np.ndarray:
    arrays = snapshot.arrays()
    place = {text: row for row, text in enumerate(arrays[TEXT_IDS].tolist())}
    return arrays[key][[place[text] for text in ids]].astype(float)


def test_a_run_and_itself_do_not_differ(folders: Path) -> None:
    found = compare(folders / "full", folders / "full")
    assert list(found.timelines) == ["full", "full (2)"]
    assert found.differences and {(d.value, d.ci_low, d.ci_high) for d in found.differences} == {(0.0, 0.0, 0.0)}


def test_an_adapter_beside_the_full_model(folders: Path) -> None:
    """Checkpoints of runs bring their texts; read anew they show the drifts that their runs recorded."""
    full, adapter = folders / "full" / "checkpoint-4", folders / "adapter" / "checkpoint-4"
    found = compare(saved_model(0), full, adapter)
    assert list(found.timelines) == ["full/checkpoint-4", "adapter/checkpoint-4"]
    runs = compare(folders / "full", folders / "adapter")
    for a, b in zip(found.timelines, runs.timelines, strict=True):
        np.testing.assert_allclose(found.table()[a].drift, runs.table()[b].drift, atol=1e-5)
    np.testing.assert_allclose(
        [d.value for d in found.differences], [d.value for d in runs.differences], rtol=0, atol=1e-5
    )
    assert found.differences and {d.first for d in found.differences} == {"full/checkpoint-4"}


def test_a_run_beside_a_checkpoint(folders: Path) -> None:
    """The run is θ_0 by its step 0, or one of the others by what it recorded."""
    found = compare(folders / "full", folders / "faster" / "checkpoint-4")
    runs = compare(folders / "full", folders / "faster")
    assert list(found.timelines) == ["full", "checkpoint-4"] and found.start == "full"
    np.testing.assert_allclose(found.table().full.drift, runs.table().full.drift, atol=1e-6)
    np.testing.assert_allclose(found.table()["checkpoint-4"].drift, runs.table().faster.drift, atol=1e-5)
    other = compare(saved_model(0), folders / "full", folders / "faster" / "checkpoint-4")
    np.testing.assert_allclose(other.table().to_numpy(), found.table().to_numpy(), atol=1e-4)


def test_controls_are_kept_beside(folders: Path, tmp_path: Path) -> None:
    attached_run("dpo", tmp_path / "own", control=1)
    control = tmp_path / "own" / "_controls" / "01"
    found = compare(folders / "full", folders / "adapter", controls=[control, control / "checkpoint-4"])
    assert list(found.controls) == ["01", "checkpoint-4"]
    assert found.summaries["full"].controls.k == 1
    assert "run.json differs in" in dict(found.summaries["adapter"].controls.left_out)["01"]
    for places, words in (([control, control], "named twice"), ([folders / "faster"], "that it is a control run")):
        with pytest.raises(ConfigError, match=words):
            compare(folders / "full", folders / "adapter", controls=places)
    recorded, read = found.control_tables()
    rows = live(load_run(control).timeline())
    expected = {
        h: abs(rows.loc[("concept/drift", "order", h, 4)].value)
        for h in recorded[recorded.readout == "order"].hookpoint
    }
    assert recorded[recorded.readout == "order"].set_index("hookpoint").value.to_dict() == pytest.approx(expected)
    np.testing.assert_allclose(read.value, recorded.value, atol=1e-5)
    assert "Control runs beside: 01, checkpoint-4" in str(found)


def test_runs_that_cannot_be_subtracted_say_why(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "full", tmp_path / "published")
    shutil.rmtree(tmp_path / "published" / "_interp")
    found = compare(tmp_path / "published", folders / "faster")
    assert not found.differences and "01-plan.jsonl: not there" in found.not_compared[0]
    assert "Not compared: published" in str(found) and len(found.table().columns.levels[0]) == 2
    attached_run("dpo", tmp_path / "other", model=causal_lm(5))
    found = compare(folders / "full", tmp_path / "other")
    assert not found.differences and "other began with other readings than full" in found.not_compared[0]
    attached_run("sft", tmp_path / "texts")
    found = compare(folders / "full", tmp_path / "texts")
    assert not found.differences and "texts was read on other prompts than full" in found.not_compared[0]


def test_a_concept_of_other_pairs_is_not_subtracted(folders: Path, tmp_path: Path) -> None:
    """Two packs of one name: each run has a drift, but not of the same concept."""
    attached_run("dpo", tmp_path / "first")
    lines = (tmp_path / "order.jsonl").read_text().splitlines()
    (tmp_path / "order.jsonl").write_text("\n".join(lines[:-2]))
    attached_run("dpo", tmp_path / "fewer")
    found = compare(tmp_path / "first", tmp_path / "fewer")
    assert found.not_compared == ("first and fewer: order: not read on the same pairs in fewer",)
    assert "order" not in {difference.readout for difference in found.differences}


def test_a_run_that_lost_its_last_snapshot_is_not_subtracted(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "full", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "interp" / "snapshots" / "01-step-000004")
    found = compare(folders / "full", tmp_path / "cut")
    assert not found.differences and "cut has no snapshot of its last step, 4" in found.not_compared[0]


def test_an_adapter_whose_base_is_gone_is_put_on_the_first(tmp_path: Path, folders: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(causal_lm(), lora())
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone"}))
    found = compare(saved_model(0), tmp_path / "adapter", folders / "full")
    assert not found.summaries["adapter"].moved and not (tmp_path / "adapter" / "interp").exists()


def test_wrong_arguments_are_named(folders: Path, tmp_path: Path) -> None:
    pairs = folders / "pairs.jsonl"
    with pytest.raises(ConfigError, match="expected two runs or checkpoints at least, found only"):
        compare(folders / "base")
    with pytest.raises(ConfigError, match="found none"):
        compare_command([])
    with pytest.raises(ConfigError, match="/nowhere/x: no such folder"):
        compare(folders / "base", "/nowhere/x", config=settings(folders), data=pairs)
    with pytest.raises(ConfigError, match="data: expected JSON lines of prompts or pairs"):
        compare(folders / "base", folders / "one")
    with pytest.raises(ConfigError, match="full: a run brings its own settings and texts"):
        compare(folders / "full", folders / "faster", data=pairs)
    attached_run("sft", tmp_path / "texts")
    with pytest.raises(FormatError, match="texts was read on other prompts than"):
        compare(saved_model(0), folders / "full", tmp_path / "texts")


def test_another_tokenizer_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "one", tmp_path / "one")
    other = tokenizer()
    other.add_tokens(["unheard"])
    other.save_pretrained(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"one: tokenizer: found .* expected .* that of base"):
        compare(folders / "base", tmp_path / "one", config=settings(folders), data=folders / "pairs.jsonl")
    with pytest.raises(ConfigError, match="that of full"):
        compare(tmp_path / "one", folders / "full")


def test_the_command_prints_the_same(folders: Path) -> None:
    places = [folders / "full", folders / "faster"]
    assert compare_command(places) == str(compare(*places))
