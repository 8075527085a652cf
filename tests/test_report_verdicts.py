"""The four verdicts: against nulls and control runs, on hand-made rows and against a brute-force reading."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_run import HOOKPOINTS, SyntheticRun, controls_of, drift_row, make_run, row, with_panels

from interp_rlhf.measurement import Measurement
from interp_rlhf.report.console import render_text
from interp_rlhf.report.controls import Controls, ControlTable
from interp_rlhf.report.rows import current
from interp_rlhf.report.tables import CAVEAT, Summary, summarise
from interp_rlhf.report.verdicts import NULLS, Finding

AT = HOOKPOINTS[0]


def summary_of(rows: list[Measurement], controls: Controls | None = None, confidence: float = 0.95) -> Summary:
    run = SyntheticRun(Path("run"), {}, rows, [False] * len(rows))
    return summarise(run.timeline(), [], tolerance=0.1, confidence=confidence, controls=controls)


def specificity(kind: str, value: float, half: float | None, hookpoint: str = AT, **changes: Any) -> Measurement:
    band = {"null_low": None if half is None else -half, "null_high": half}
    return row(f"specificity/{kind}", "c", hookpoint, 5, value, null_kind=kind, unit="sd", **(band | changes))


def only(rows: list[Measurement], **options: Any) -> Finding:
    (finding,) = summary_of(rows, **options).findings
    return finding


def controls_with(drifts: list[dict[tuple[str, str], float]], step: int = 5) -> Controls:
    tables = []
    for number, values in enumerate(drifts, 1):
        rows = [drift_row(name, place, step, value) for (name, place), value in values.items()]
        table = current(SyntheticRun(Path("control"), {}, rows, [False] * len(rows)).timeline())
        tables.append(ControlTable(f"{number:02d}", "pairs swapped", table))
    return Controls(tuple(tables))


@pytest.mark.parametrize(
    ("without_top", "bank", "verdict", "like"),
    [
        (0.4, 0.4, "specific", ()),
        (0.6, 0.4, "moved", ("directions without the top component",)),
        (0.4, 0.6, "moved", ("unrelated concepts",)),
        (0.6, 0.6, "moved", ("directions without the top component", "unrelated concepts")),
    ],
)
def test_specific_is_outside_every_band(without_top: float, bank: float, verdict: str, like: tuple[str, ...]) -> None:
    rows = [drift_row("c", AT, 5, 0.5), specificity("directions_without_top", 0.5, without_top)]
    finding = only([*rows, specificity("concept_bank", 0.5, bank)])
    assert (finding.verdict, finding.not_beaten) == (verdict, like)
    assert finding.outside_at == ((AT,) if verdict == "specific" else ())


def test_the_nulls_have_to_be_beaten_at_one_hookpoint_not_across_several() -> None:
    rows = [drift_row("c", AT, 5, 0.5), drift_row("c", HOOKPOINTS[1], 5, 0.3)]
    nulls = [specificity("concept_bank", 0.5, 0.9), specificity("concept_bank", 0.3, 0.1, HOOKPOINTS[1])]
    assert only([*rows, *nulls]).verdict == "moved"
    nulls[0] = specificity("concept_bank", 0.5, 0.4)
    assert only([*rows, *nulls]).outside_at == (AT,)


def test_a_band_where_it_did_not_move_proves_nothing() -> None:
    rows = [drift_row("c", AT, 5, 0.5, null_low=-0.9, null_high=0.9)]
    still = drift_row("c", HOOKPOINTS[1], 5, 0.5, ci_low=-1, ci_high=2, null_low=-0.1, null_high=0.1)
    assert only([*rows, still]).verdict == "moved"


@pytest.mark.parametrize(
    ("p", "verdict", "ignored"),
    [(0.05, "specific", ()), (0.06, "specific", ("unrelated concepts",)), (None, "specific", ("unrelated concepts",))],
)
def test_a_bank_too_small_for_a_band_counts_by_its_p_or_not_at_all(
    p: float | None, verdict: str, ignored: tuple[str, ...]
) -> None:
    finding = only([drift_row("c", AT, 5, 0.5), specificity("concept_bank", 0.5, None, p=p)])
    assert (finding.verdict, finding.ignored, finding.not_beaten) == (verdict, ignored, ())


def test_without_any_null_nothing_is_specific() -> None:
    bare = drift_row("c", AT, 5, 0.5, null_kind="none", null_low=None, null_high=None, p=None)
    assert only([bare]).verdict == "moved"
    assert only([bare, specificity("concept_bank", 0.5, None, p=0.5)]).verdict == "moved"


@pytest.mark.parametrize(
    ("k", "confidence", "verdict"),
    [(19, 0.95, "attributable"), (18, 0.95, "specific"), (9, 0.9, "attributable"), (8, 0.9, "specific"),
     (99, 0.99, "attributable"), (98, 0.99, "specific")],
)  # fmt: skip
def test_attributable_needs_enough_control_runs(k: int, confidence: float, verdict: str) -> None:
    controls = controls_with([{("c", AT): 0.01 * i / k} for i in range(k)])
    summary = summary_of([drift_row("c", AT, 5, 0.5)], controls, confidence)
    assert [f.verdict for f in summary.findings] == [verdict]
    assert summary.controls.possible is (verdict == "attributable") and summary.controls.k == k
    assert bool(summary.attributable) is summary.controls.possible and len(summary.specific) == 1
    if not summary.controls.possible:
        assert f"the smallest possible p is {1 / (k + 1):.2g}; {summary.controls.needed} are" in render_text(summary)


def test_the_largest_size_over_hookpoints_is_ranked_whatever_its_sign() -> None:
    places = HOOKPOINTS[:2]
    rows = [drift_row("c", places[0], 5, -0.9), drift_row("c", places[1], 5, 0.5)]
    quiet = [{("c", places[0]): 0.8, ("c", places[1]): -0.85} for _ in range(18)]
    for loudest, p in ((-0.89, 0.05), (0.91, 0.1), (-0.91, 0.1)):
        controls = controls_with([*quiet, {("c", places[0]): 0.1, ("c", places[1]): loudest}])
        finding = only(rows, controls=controls)
        assert finding.control is not None and finding.control.statistic == 0.9
        assert finding.control.controls == (*[0.85] * 18, abs(loudest))
        assert finding.control.rank.p == pytest.approx(p)
        assert finding.verdict == ("attributable" if p == 0.05 else "specific")


def test_moved_but_not_specific_is_never_attributable() -> None:
    controls = controls_with([{("c", AT): 0.0} for _ in range(30)])
    finding = only([drift_row("c", AT, 5, 0.3)], controls=controls)
    assert finding.control is not None and finding.control.rank.p < 0.05
    assert finding.verdict == "moved"


def test_p_over_the_family_ranks_among_the_largest_of_any_concept() -> None:
    rows = [drift_row("a", AT, 5, 2.0), drift_row("b", AT, 5, 0.6)]
    controls = controls_with([{("a", AT): 1.0, ("b", AT): 0.5} for _ in range(19)])
    found = {f.readout: f.control for f in summary_of(rows, controls).findings}
    assert found["b"] is not None and (found["b"].rank.p, found["b"].family.p) == (0.05, 1.0)
    assert found["a"] is not None and (found["a"].rank.p, found["a"].family.p) == (0.05, 0.05)


def test_a_control_run_itself_claims_nothing_about_the_preferences() -> None:
    rows = [drift_row("c", AT, 5, 0.5)]
    controls = replace(controls_with([{("c", AT): 0.0}] * 19), itself="control run 3: pairs swapped")
    summary = summary_of(rows, controls)
    assert [f.verdict for f in summary.findings] == ["specific"] and summary.controls.k == 0
    assert not summary.controls.decides and "This is control run 3: pairs swapped." in render_text(summary)


def test_strongest_verdict_first_and_console_says_which_null_and_which_p() -> None:
    run = with_panels(make_run(Path("run")))
    controls = controls_of(run, 19, scale=0.15)
    summary = summarise(run.timeline(), [], tolerance=0.1, confidence=0.95, controls=controls)
    assert [f.verdict for f in summary.findings] == ["attributable", "attributable", "moved", "moved"]
    text = render_text(summary)
    assert text.index("Attributable to the preferences") < text.index("agreeing with the user")
    assert "(p = 0.05 against 19 control runs" in text
    assert "hedging" in text and "(like comparable directions and unrelated concepts)" in text
    assert CAVEAT not in text and "19 control runs (pairs swapped): smallest possible p 0.05" in text
    assert len(text.splitlines()) <= 35 and "None" not in text and "nan" not in text


def test_left_out_control_runs_are_named_with_their_reason() -> None:
    controls = Controls(left_out=(("04", "run.json differs in seed: 0 → 1"),))
    text = render_text(summary_of([drift_row("c", AT, 5, 0.5)], controls))
    assert "04: run.json differs in seed: 0 → 1" in text and CAVEAT in text


def test_against_a_brute_force_reading_of_random_runs() -> None:
    rng, seen = random.Random(1), set()
    for _ in range(15):
        rows = []
        for name in "abcdef":
            for place in HOOKPOINTS:
                value, half = rng.gauss(0, 0.5), rng.uniform(0.01, 0.3)
                rows.append(drift_row(name, place, 5, value, ci_low=value - half, ci_high=value + half))
                for kind in ("directions_without_top", "concept_bank"):
                    wide = rng.uniform(0.1, 0.8)
                    rows.append(replace(specificity(kind, value, wide, place), readout=name))
        drifts = [{(name, place): rng.gauss(0, 0.3) for name in "abcdef" for place in HOOKPOINTS} for _ in range(20)]
        summary = summary_of(rng.sample(rows, len(rows)), controls_with(drifts))
        table = pd.DataFrame([r.as_row() for r in rows])
        for finding in summary.findings:
            expected = _verdict(table[table["readout"] == finding.readout], finding.readout, drifts)
            assert finding.verdict == expected
            seen.add(expected)
    assert seen == {"attributable", "specific", "moved", "not detected"}


def _verdict(table: pd.DataFrame, name: str, drifts: list[dict[tuple[str, str], float]]) -> str:
    own = table[table["metric"] == "concept/drift"].set_index("hookpoint")
    moved = [p for p in own.index if own["ci_low"][p] > 0.1 or own["ci_high"][p] < -0.1]
    bands = table[table["metric"].isin(list(NULLS))]
    out = (bands["value"] > bands["null_high"]) | (bands["value"] < bands["null_low"])
    clear = [p for p in moved if out[bands["hookpoint"] == p].all()]
    largest = own["value"].abs().max()
    beaten_by = sum(max(abs(d[name, p]) for p in own.index) >= largest for d in drifts)
    if clear and (1 + beaten_by) / (1 + len(drifts)) <= 0.05:
        return "attributable"
    return "specific" if clear else "moved" if moved else "not detected"
