"""The report page as bytes: content, escaping, determinism, atomicity, size (a browser's view: another file)."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import (
    SyntheticRun,
    control_rows,
    drift_row,
    make_run,
    store_controls,
    store_run,
    with_panels,
)

from interp_rlhf.audit.store import RunStore, load_run
from interp_rlhf.errors import FormatError, InterpError
from interp_rlhf.report.html import render_report, write_report

pytest.importorskip("plotly", reason="the report needs the extra 'report'")
pytest.importorskip("jinja2", reason="the report needs the extra 'report'")

HOSTILE = '<b>bold</b><img src=x onerror="alert(1)">%{x}</script><script>alert(2)</script>'
NAMES = ("agreeing with the user", HOSTILE, "متملق", "🙂 smiling & nodding")


class Page(HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.mark.parametrize("panels", [False, True])
def test_every_number_is_its_row_and_every_row_of_the_last_step_is_there(tmp_path: Path, panels: bool) -> None:
    run = make_run(tmp_path / "interp", concepts=NAMES, resumed_at=20)
    run = with_panels(run) if panels else run
    rows = {
        (r.metric, r.readout, r.hookpoint, r.text, r.reader, r.segment, r.step): r
        for r, superseded in zip(run.rows, run.superseded, strict=True)
        if not superseded
    }
    marked = [a for _, a in Page(render_report(run)).elements if "data-value" in a]
    seen = set()
    for a in marked:
        place = tuple(a[f"data-{name}"] for name in ("metric", "readout", "hookpoint", "text", "reader"))
        r = rows[(*place, int(a["data-segment"]), int(a["data-step"]))]
        assert a["data-value"] == repr(getattr(r, a["data-field"]))
        seen |= {(place, a["data-field"])}
    last = [(key[:5], r) for key, r in rows.items() if r.step == 40]
    unseen = {place for place, _ in last} - {place for place, _ in seen}
    assert {place[:3] for place in unseen} == {("concept/behaviour", name, "") for name in NAMES}
    for place, r in last:
        if r.metric.startswith("specificity/"):
            assert {(place, field) for field in ("null_low", "null_high", "p")} <= seen
        if r.metric == "concept/drift_t":
            assert {(place, field) for field in ("value", "p")} <= seen


def test_a_run_read_back_from_disk(tmp_path: Path) -> None:
    store, made = RunStore(tmp_path), make_run(tmp_path)
    store.start(made.info, resumed_from=None)
    store.event("refused", readout="weak", hookpoint="layers.0.resid_post", reason="AUC 0.5")
    for step in (0, 10, 20):
        rows = [r for r in made.rows if r.step == step]
        store.append(rows)
        store.snapshot(step, rows, {"start": np.zeros((2, 3), dtype=np.float32)})
    store.texts("prompts", [{"id": "p1", "prompt": "say <b>"}])
    run = load_run(tmp_path)
    path = write_report(run, run.path / "report.html", texts=True)
    page = Page(path.read_text(encoding="utf-8"))
    for words in ("say <b>", "AUC 0.5", "01-step-000020", run.snapshots[-1].digest, "a-tiny-model · DPOTrainer"):
        assert words in page.words
    values = {a["data-value"] for _, a in page.elements if a.get("data-metric") == "concept/drift"}
    assert {repr(r.value) for r in made.rows if (r.metric, r.step) == ("concept/drift", 20)} <= values


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    source = render_report(make_run(tmp_path / "interp", concepts=NAMES))
    page = Page(source)
    assert not [tag for tag, _ in page.elements if tag in ("b", "img")]
    assert "alert(2)</script>" not in source and "<img src=x" not in source
    assert HOSTILE in page.text and "متملق" in page.text and "🙂 smiling & nodding" in page.text
    for spec in _figures(source):
        assert "<img" not in json.dumps(spec) and "<b>" not in json.dumps(spec)


def test_every_link_leads_inside_the_page(tmp_path: Path) -> None:
    events = [{"event": "refused", "readout": "weak", "hookpoint": "", "reason": "AUC 0.5"}]
    elements = Page(render_report(make_run(tmp_path / "interp", events=events))).elements
    ids = [a["id"] for _, a in elements if "id" in a]
    links = [a["href"] for _, a in elements if "href" in a]
    assert len(ids) == len(set(ids))
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert not [a for _, a in elements if a.get("src") or a.get("srcset") or a.get("action")]


def test_control_runs_on_the_page(tmp_path: Path) -> None:
    run = with_panels(make_run(tmp_path / "interp", concepts=NAMES))
    store_run(tmp_path, run.info, run.rows)
    store_controls(run, 19, tmp_path, scale=0.15)
    other = {**run.info, "seed": 5, "control": {"number": 20, "kind": "pairs swapped", "changed": 1}}
    store_run(tmp_path / "_controls" / "20", other, control_rows(run))
    source = render_report(load_run(tmp_path))
    words = Page(source).words
    assert "Attributable to the preferences : agreeing with the user" in words.replace("preferences:", "preferences :")
    for expected in ("19 control runs (pairs swapped): smallest possible p 0.05", "p 0.05 of 19", "Left out",
                     "run.json differs in seed: absent → 5", "Thin grey lines: control runs"):  # fmt: skip
        assert expected in words
    assert "nothing here says that these preferences" not in words and str(tmp_path) not in source
    lines = [t for f in _figures(source) for t in f["data"] if t.get("name") == "control runs" and t["mode"] == "lines"]
    assert len(lines) == 16 and len({t["meta"] for t in lines}) == 4
    strips = [f for f in _figures(source) if any(t.get("name") == "this run, attributable" for t in f["data"])]
    (points,) = [t for t in strips[0]["data"] if t["name"] == "control runs"]
    values = sorted(max(abs(r.value) for r in control_rows(run, scale=0.15, seed=seed)
                        if r.readout == name and r.step == 40) for seed in range(1, 20) for name in NAMES)  # fmt: skip
    assert sorted(points["x"]) == values
    assert render_report(load_run(tmp_path)) == source


def test_too_few_control_runs_and_a_control_run_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "interp")
    store_run(tmp_path, run.info, run.rows)
    store_controls(run, 3, tmp_path)
    words = Page(render_report(load_run(tmp_path))).words
    assert "the smallest possible p is 0.25; 19 are needed for 0.05" in words
    assert "not decided, takes 19 control runs" in words and "Attributable to the preferences" not in words
    itself = Page(render_report(load_run(tmp_path / "_controls" / "03"))).words
    assert itself.index("This is control run 3: pairs swapped.") < itself.index("Concepts at the last step")
    assert "Nothing in it can be because of the preferences" in itself


def test_panels_are_only_there_with_their_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "interp")
    plain = {a.get("id") for _, a in Page(render_report(run)).elements}
    tables = {"probes-table", "shift-table", "quadrant-table", "fig-quadrant", "fig-shift-0"}
    assert not tables & plain
    reason = "the start was not kept <whole>"
    run.events = [{"event": "refused", "readout": "shift/representation", "hookpoint": "", "reason": reason}]
    page = Page(render_report(with_panels(run)))
    assert tables <= {a.get("id") for _, a in page.elements}
    assert page.words.count("not measured") >= 12 and f"Not measured: {reason}" in page.words
    assert "on-domain" not in page.words.partition("Probes are fitted")[0]  # a column only where it has rows


def test_the_step_of_older_panels_is_said(tmp_path: Path) -> None:
    run = with_panels(make_run(tmp_path / "interp", steps=(0, 10)))
    later = drift_row("refusal", "layers.0.resid_post", 20, 0.5)
    run.rows, run.superseded = [*run.rows, later], [*run.superseded, False]
    words = Page(render_report(run)).words
    assert "Read at step 10." in words and "Sampled at step 10." in words


def test_superseded_rows_are_neither_shown_nor_drawn(tmp_path: Path) -> None:
    kept, gone = (
        drift_row("c", "layers.0.resid_post", 5, 0.25, segment=2),
        drift_row("c", "layers.0.resid_post", 9, 7.5),
    )
    info = make_run(tmp_path).info
    shown = SyntheticRun(tmp_path, info, [kept], [False])
    both = SyntheticRun(tmp_path, info, [gone, kept], [True, False])
    assert render_report(both) == render_report(shown)


def test_same_run_same_bytes_and_row_order_within_a_step_does_not_matter(tmp_path: Path) -> None:
    run = make_run(tmp_path / "interp", concepts=NAMES, resumed_at=20)
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert write_report(run, tmp_path / "b.html").read_bytes() == first
    assert b"\r" not in first.replace(b"\\r", b"")[:20000]


@pytest.mark.parametrize(
    ("concepts", "steps", "words"),
    [
        ((), (0, 10), "No concept was read in this run"),
        (("c",), (0,), "Only the starting point was measured"),
        (("c",), (), "Nothing was measured in this run"),
        (("c",), (0, 10), "Of 1 concept read at step 10, 1 moved"),
    ],
)
def test_small_runs(tmp_path: Path, concepts: tuple[str, ...], steps: tuple[int, ...], words: str) -> None:
    page = Page(render_report(make_run(tmp_path / "interp", concepts=concepts, steps=steps)))
    assert words in page.words
    assert not re.search(r"\b(nan|None|inf)\b", page.words)
    assert "nothing here says that these preferences are the reason" in page.words


def test_what_could_not_be_measured_is_listed(tmp_path: Path) -> None:
    events = [
        {"event": "refused", "readout": "weak", "hookpoint": "layers.0.resid_post", "reason": "AUC 0.5 < 0.7"},
        {"event": "failure", "step": 20, "what": "a measurement", "reason": "NaN activations"},
        {"event": "note", "text": "drawn from <training>"},
    ]
    words = Page(render_report(make_run(tmp_path / "interp", events=events))).words
    for expected in ("AUC 0.5 < 0.7", "NaN activations", "drawn from <training>"):
        assert expected in words


def test_texts_only_on_request_and_only_unchanged(tmp_path: Path) -> None:
    data = b'{"id":"p1","prompt":"a secret \\u003cb\\u003eprompt"}\n'
    folder = tmp_path / "_interp"
    folder.mkdir()
    (folder / "01-prompts.jsonl").write_bytes(data)
    told = {"event": "texts", "texts": "01-prompts.jsonl", "sha256": hashlib.sha256(data).hexdigest()}
    run = make_run(tmp_path / "interp", events=[told])
    assert "a secret" not in render_report(run)
    assert "a secret <b>prompt" in Page(render_report(run, texts=True)).words
    (folder / "01-prompts.jsonl").write_bytes(data + data)
    with pytest.raises(FormatError, match=r"01-prompts\.jsonl: found SHA-256"):
        render_report(run, texts=True)


def test_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, target = make_run(tmp_path / "interp", concepts=("c",), steps=(0, 10)), tmp_path / "report.html"
    target.write_text("the old one")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InterpError, match=r"report\.html: the report cannot be written \(No space left"):
        write_report(run, target)
    assert target.read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(InterpError, match="cannot be written"):
        write_report(run, tmp_path / "missing" / "report.html")


@pytest.mark.parametrize("missing", ["plotly", "plotly.offline", "jinja2"])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InterpError, match=r"pip install interp-rlhf\[report\]"):
        write_report(make_run(tmp_path / "interp"), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_foreign_run_file_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "interp")
    run.info = {"config": {}}
    with pytest.raises(FormatError, match=r"run\.json: config\.statistics"):
        render_report(run)


def test_large_run_stays_small_and_quick(tmp_path: Path) -> None:
    run = make_run(tmp_path / "interp", concepts=[f"concept {i}" for i in range(30)], steps=range(0, 2000, 10))
    table = run.timeline()
    run.timeline = lambda: table  # type: ignore[method-assign]
    write_report(make_run(tmp_path / "interp"), tmp_path / "warm.html")
    began = time.process_time()
    size = write_report(run, tmp_path / "report.html").stat().st_size
    assert time.process_time() - began < 3
    assert size < 8e6


def _figures(source: str) -> list[dict]:
    found = re.findall(r'<script type="application/json" data-for="[^"]+">(.*?)</script>', source, re.DOTALL)
    assert found
    return [json.loads(text) for text in found]
