"""The report in a real headless Chromium, over the DevTools protocol: numbers in the DOM, no requests, no errors."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planted_run import PLANTED, SAVED, planted_run
from synthetic_run import (
    SyntheticRun,
    circuit_event,
    components_event,
    make_run,
    store_controls,
    store_run,
    with_circuits,
    with_panels,
)

from interp_rlhf.audit.store import load_run
from interp_rlhf.report.html import write_report
from interp_rlhf.report.tables import headline_key

pytest.importorskip("plotly", reason="the report needs the extra 'report'")
pytest.importorskip("jinja2", reason="the report needs the extra 'report'")
websocket = pytest.importorskip("websocket", reason="talking to Chromium needs websocket-client")

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BINARY is None, reason="no chromium or chrome binary on the path"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
HOSTILE = '<b>bold</b><img src=x onerror="document.title=1">%{x}'
NAMES = ("agreeing with the user", HOSTILE, "متملق", "🙂 smiling & nodding")


class Tab:
    """One browser tab: commands in, answers and events out."""

    def __init__(self, url: str) -> None:
        self._socket = websocket.create_connection(url, timeout=60, suppress_origin=True)
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def value(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def open(self, path: Path, *, width: int = 1280) -> None:
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 60
        while not self.value("document.documentElement?.dataset.ready || ''"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path}: the page's script did not finish: {self.problems()}")
            time.sleep(0.05)

    def requested(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def problems(self) -> list[str]:
        kinds = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
        found = [e for e in self.events if e["method"] in kinds]
        return [json.dumps(e["params"])[:300] for e in found if e["params"].get("type") not in ("log", "info")]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    profile = tmp_path_factory.mktemp("profile")
    command = [str(BINARY), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield _connect(profile, process)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _connect(profile: Path, process: subprocess.Popen[bytes]) -> Tab:
    port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
    while not (port_file.exists() and len(port_file.read_text().splitlines()) == 2):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{BINARY} did not start (exit status {process.poll()})")
        time.sleep(0.05)
    port, path = port_file.read_text().splitlines()
    browser = Tab(f"ws://127.0.0.1:{port}{path}")
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    opened = Tab(f"ws://127.0.0.1:{port}/devtools/page/{target}")
    for domain in ("Page", "Network", "Runtime", "Log"):
        opened.call(f"{domain}.enable")
    return opened


def _live_rows(run: SyntheticRun) -> dict[tuple[Any, ...], Any]:
    return {
        (r.metric, r.readout, r.hookpoint, r.text, r.reader, r.segment, r.step): r
        for r, superseded in zip(run.rows, run.superseded, strict=True)
        if not superseded
    }


def check_numbers(tab: Tab, rows: Mapping[tuple[Any, ...], Any]) -> list[dict[str, Any]]:
    """Every number of the page is its row's, in its data and, rounded, in what is seen. Gives the numbers' spans."""
    shown = tab.value(
        "[...document.querySelectorAll('[data-value]')].map(e => ({...e.dataset, seen: e.textContent, number: Number("
        "e.dataset.value), table: e.closest('table')?.id || ''}))"
    )
    assert shown
    for cell in shown:
        place = (cell[name] for name in ("metric", "readout", "hookpoint", "text", "reader"))
        key = (*place, int(cell["segment"]), int(cell["step"]))
        exact = getattr(rows[key], cell["field"])
        assert float(cell["value"]) == exact and cell["number"] == exact, cell
        factor = 100 if cell["metric"] == "cost_fraction" else 1
        decimals = len(cell["seen"].partition(".")[2])
        seen = float(cell["seen"].replace("−", "-"))
        assert math.isclose(seen, factor * exact, abs_tol=0.5000001 * 10**-decimals), cell
    return shown


def test_every_number_in_the_dom_is_its_timeline_row(tab: Tab, tmp_path: Path) -> None:
    run = with_panels(make_run(tmp_path / "interp", concepts=NAMES, steps=range(0, 50, 10), resumed_at=20))
    tab.open(write_report(run, tmp_path / "report.html"))
    shown = check_numbers(tab, _live_rows(run))
    headline = {(c["metric"], c["readout"]) for c in shown if c["table"] == "headline" and c["field"] == "value"}
    assert headline == {(m, name) for m in ("concept/drift", "concept/behaviour_change") for name in NAMES}
    assert {c["hookpoint"] for c in shown if c["table"] == "representation-table"} == {
        r.hookpoint for r in run.rows if r.hookpoint
    }
    assert all(int(c["step"]) == 40 for c in shown)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The output folder of a real attached run, and the last row with our scalars in its trainer's log."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    trainer, _ = planted_run(folder)
    ours = [row for row in trainer.state.log_history if any(key.startswith("interp/") for key in row)]
    return folder, {key: value for key, value in ours[-1].items() if key.startswith("interp/")}


def _stored_rows(folder: Path) -> dict[tuple[Any, ...], SimpleNamespace]:
    """Measurements as the timeline's lines spell them, read without the package."""
    lines = map(json.loads, (folder / "interp" / "timeline.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [SimpleNamespace(**line) for line in lines if "event" not in line]
    return {(r.metric, r.readout, r.hookpoint, r.text, r.reader, r.segment, r.step): r for r in rows}


def test_every_number_of_a_real_run_is_its_timeline_row(tab: Tab, trained: tuple[Path, dict[str, float]]) -> None:
    folder, logged = trained
    tab.open(folder / "interp" / "report.html")
    rows = _stored_rows(folder)
    shown = check_numbers(tab, rows)
    last = [r for r in rows.values() if r.step == 10]
    found = {(c["table"], c["metric"], c["readout"], c["hookpoint"], c["field"]) for c in shown}
    for r in last:
        kind = r.metric.split("/")[0]
        if kind != "cost" and not r.metric.startswith("concept/behaviour"):
            table = {"representation": "representation-table", "cost_fraction": "", "probe": "probes-table",
                     "shift": "shift-table", "quadrant": "quadrant-table", "component": "causes-table",
                     "causal": "causes-table"}.get(kind, "readings")  # fmt: skip
            field = "p" if kind == "specificity" else "value"
            assert (table, r.metric, r.readout, r.hookpoint, field) in found, r
    assert {c[2] for c in found if c[0] == "headline"} == {PLANTED, SAVED}
    assert ("headline", "concept/behaviour_change", PLANTED, "", "ci_high") in found
    by_key = {headline_key(r): r for r in last}
    assert logged and all(by_key[key].value == value for key, value in logged.items())
    for key in logged:
        row = by_key[key]
        if row.metric != "concept/behaviour":  # drawn over steps, its change is the headline
            assert any(c[1:] == (row.metric, row.readout, row.hookpoint, "value") for c in found), key


def test_a_number_that_is_not_its_row_is_seen(tab: Tab, trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    source = (trained[0] / "interp" / "report.html").read_text(encoding="utf-8")
    number = re.search(r'data-field="value" data-value="([^"]+)">([^<]+)</span>', source)
    assert number is not None
    for old, new in ((f">{number[2]}<", ">+9.99<"), (f'data-value="{number[1]}"', 'data-value="0.123"')):
        (tmp_path / "changed.html").write_text(source.replace(old, new, 1), encoding="utf-8")
        tab.open(tmp_path / "changed.html")
        with pytest.raises(AssertionError):
            check_numbers(tab, _stored_rows(trained[0]))


def test_headline_rows_of_a_real_run_follow_from_the_timeline(tab: Tab, trained: tuple[Path, dict[str, float]]) -> None:
    folder, _ = trained
    tab.open(folder / "interp" / "report.html")
    stored = _stored_rows(folder)
    rows = [r for r in stored.values() if r.step == 10 and r.metric == "concept/drift"]
    table = tab.value(
        "[...document.querySelectorAll('#headline tbody tr')].map(tr => { const cells = [...tr.children]; return {"
        "name: cells[0].textContent, verdict: cells[1].querySelector('.badge').textContent.slice(2), "
        "n: Number(cells[6].textContent), hookpoint: "
        "cells[3].querySelector('code').textContent, where: cells[3].querySelector('small')?.textContent || '', "
        "detectable: cells[2].querySelector('small')?.textContent || '', rest: cells.slice(1, 6).map(td => { const c = "
        "td.cloneNode(true); c.querySelectorAll('.num, code, small').forEach(e => e.remove()); return c.textContent; })"
        ".join('')}; })"
    )
    assert {line["name"] for line in table} == {PLANTED, SAVED}
    for line in table:
        mine = [r for r in rows if r.readout == line["name"]]
        moved = [r for r in mine if r.ci_low > 0.1 or r.ci_high < -0.1]
        top = max(moved or mine, key=lambda r: abs(r.value))
        assert line["hookpoint"] == top.hookpoint and line["n"] == top.n
        assert line["verdict"] == _verdict(moved, stored.values())
        if len(mine) > 1:
            assert line["where"] == (f"moved at {len(moved)} of {len(mine)}" if moved else f"largest of {len(mine)}")
        if not moved:
            assert line["detectable"] == f"smallest detectable {0.1 + (top.ci_high - top.ci_low) / 2:.2f}"
        assert not any(character.isdigit() for character in line["rest"]), "a number that no row stands behind"
    lead = tab.value("document.getElementById('summary').textContent")
    count = len({r.readout for r in rows if r.ci_low > 0.1 or r.ci_high < -0.1})
    assert f"Of {len(table)} concepts read at step 10, {count} moved" in lead


def _verdict(moved: list[SimpleNamespace], stored: Iterable[SimpleNamespace]) -> str:
    """What a run without control runs may say, from the rows alone."""
    bands = [r for r in stored if r.step == 10 and (r.metric == "concept/drift" or r.metric.startswith("specificity/"))]
    for at in moved:
        here = [r for r in bands if (r.readout, r.hookpoint) == (at.readout, at.hookpoint) and r.null_low is not None]
        if here and all(not r.null_low <= r.value <= r.null_high for r in here):
            return "specific"
    return "moved" if moved else "not detected"


def test_control_runs_and_panels_are_drawn_without_errors(tab: Tab, tmp_path: Path) -> None:
    run = with_panels(make_run(tmp_path / "interp", concepts=NAMES, steps=(0, 10, 20)))
    store_run(tmp_path, run.info, run.rows)
    store_controls(run, 19, tmp_path, scale=0.15)
    page = write_report(load_run(tmp_path), tmp_path / "report.html")
    for width in (360, 1280):
        tab.open(page, width=width)
        assert tab.value("document.documentElement.scrollWidth") <= width
        assert tab.problems() == [] and [u for u in tab.requested() if not u.startswith("data:")] == [page.as_uri()]
    check_numbers(tab, _live_rows(run))
    tally = tab.value("[...document.querySelectorAll('.tally li')].map(e => e.querySelector('strong').textContent)")
    badges = tab.value("[...document.querySelectorAll('#headline .badge')].map(e => e.textContent.slice(2))")
    words = ("attributable", "specific", "moved", "not detected")
    assert tally == [str(badges.count(word)) for word in words] and badges.count("attributable") == 2
    points = "document.getElementById('fig-controls')._fullData.find(t => t.name === 'control runs').x.length"
    assert tab.value(points) == 19 * len(NAMES)
    grey = (
        "document.getElementById('fig-drift-0')._fullData.filter(t => t.visible === true && t.name === 'control runs')"
    )
    assert tab.value(f"{grey}.map(t => t.y.length)") == [19 * 4]  # three steps and a gap each
    for index in range(len(NAMES)):
        assert tab.value("document.getElementById('concept').selectedIndex") == index
        assert tab.value(f"{grey}.map(t => t.meta)") == [index]
        tab.value("document.getElementById('next').click()")
    for place in ("fig-shift-0", "fig-quadrant"):
        assert tab.value(f"document.getElementById('{place}').querySelectorAll('.bars .point').length") > 0


@pytest.mark.parametrize(
    ("concepts", "steps"), [(NAMES, (0, 10, 20)), ((), (0, 10)), (("c",), (0,)), (("c",), (0, 10)), (("c",), ())]
)
def test_no_request_no_error_and_all_figures_drawn(
    tab: Tab, tmp_path: Path, concepts: tuple[str, ...], steps: tuple[int, ...]
) -> None:
    page = write_report(make_run(tmp_path / "interp", concepts=concepts, steps=steps), tmp_path / "report.html")
    tab.open(page)
    assert [url for url in tab.requested() if not url.startswith("data:")] == [page.as_uri()]
    assert tab.problems() == []
    assert tab.value("document.title").startswith("interp_rlhf report")
    plots, drawn = tab.value("['.plot', '.plot .main-svg:first-child'].map(s => document.querySelectorAll(s).length)")
    assert plots == drawn == int(tab.value("document.documentElement.dataset.ready"))
    assert (plots > 0) is bool(steps)


def test_the_guard_against_requests_would_see_one(tab: Tab, tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "interp", concepts=(), steps=(0,)), tmp_path / "report.html")
    source = page.read_text(encoding="utf-8")
    page.write_text(source.replace("</main>", '<img src="https://example.invalid/pixel.png"></main>'), encoding="utf-8")
    tab.open(page)
    assert tab.problems(), "the page's own content policy refuses it"
    policy = source.index("<meta http-equiv"), source.index('<meta name="viewport"')
    page.write_text(
        (source[: policy[0]] + source[policy[1] :]).replace("</main>", '<img src="https://example.invalid/p"></main>'),
        encoding="utf-8",
    )
    tab.open(page)
    assert "https://example.invalid/p" in tab.requested()


def test_picker_shows_one_concept_in_every_panel(tab: Tab, tmp_path: Path) -> None:
    run = make_run(tmp_path / "interp", concepts=NAMES, steps=range(0, 50, 10))
    run.rows = [r for r in run.rows if not (r.readout == "متملق" and r.hookpoint == "layers.0.resid_post")]
    run.superseded = [False] * len(run.rows)
    tab.open(write_report(run, tmp_path / "report.html"))
    names = tab.value("[...document.getElementById('concept').options].map(o => o.textContent)")
    assert sorted(names) == sorted(NAMES)
    tab.value("document.getElementById('previous').click()")
    for index in [len(names) - 1, *range(len(names))]:
        assert tab.value("document.getElementById('concept').selectedIndex") == index
        assert tab.problems() == []
        drawn = tab.value(
            "[...document.querySelectorAll('[data-per-concept] .plot')].map(p => [p.id, p._fullData"
            ".filter(t => t.visible === true && t.mode !== 'lines').map(t => [...t.y])])"
        )
        for place, lines in drawn:
            metric = {"fig-behaviour-0": "concept/behaviour", "fig-behaviour-1": "concept/behaviour_change"}.get(place)
            hookpoint = "" if metric else f"layers.{place[-1]}.resid_post"
            key = (metric or "concept/drift", names[index], hookpoint)
            expected = [r.value for r in run.rows if (r.metric, r.readout, r.hookpoint) == key]
            assert len(lines) == (1 if expected else 0), place
            if expected:
                assert lines[0] == pytest.approx(expected, abs=1e-6)
        absent = tab.value("document.querySelectorAll('.absent').length")
        assert absent == (1 if names[index] == "متملق" else 0)
        tab.value("document.getElementById('next').click()")


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_the_page_itself_never_scrolls_sideways(tab: Tab, tmp_path: Path, width: int) -> None:
    long = "a name without any break " + "x" * 120
    run = make_run(tmp_path / "interp", concepts=(*NAMES, long), steps=(0, 10, 20))
    tab.open(write_report(run, tmp_path / "report.html"), width=width)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.problems() == []


LIT = "[...document.querySelectorAll('.edge.lit')].map(e => [e.dataset.from, e.dataset.to, e.closest('svg').ariaLabel])"


def test_circuits_before_and_now_are_drawn_and_can_be_followed(tab: Tab, tmp_path: Path) -> None:
    run = make_run(tmp_path / "interp", concepts=NAMES, steps=(0, 10, 20))
    run = with_circuits(run, {"different": "different", HOSTILE: "lost", "same": "same"}, steps=(0, 20))
    wide = {"layers": 32, "heads": 32, "kv_heads": 8}
    run.events += [circuit_event("large", 0, **wide), circuit_event("large", 20, **wide), {"event": "circuit"}]
    run.events.append(components_event(HOSTILE, "layers.1.resid_post", 20))
    page = write_report(run, tmp_path / "report.html")
    for width in (360, 1280):
        tab.open(page, width=width)
        assert tab.value("document.documentElement.scrollWidth") <= width
        assert tab.problems() == [] and [u for u in tab.requested() if not u.startswith("data:")] == [page.as_uri()]
    check_numbers(tab, _live_rows(run))
    headings = tab.value("[...document.querySelectorAll('h2, h3')].map(h => h.textContent.trim())")
    for heading in ("Mechanisms", "≠ different different", f"✕ lost {HOSTILE}", "large", "What a drift is made of"):
        assert heading in headings
    badges = tab.value("[...document.querySelectorAll('#mechanisms .badge')].map(e => e.textContent.slice(2))")
    assert badges == ["different", "lost", "same"]
    edges = "[...document.querySelectorAll('.side svg')].map(s => [...s.querySelectorAll('.edge')].filter(e => {})"
    assert tab.value(edges.format("e.getTotalLength() > 1") + ".length)") == [150] * 8
    lonely = tab.value(edges.format("e.matches('.gone, .new') && e.getAttribute('stroke-dasharray')") + ".length)")
    assert lonely == [50] * 8
    colours = tab.value("[...new Set([...document.querySelectorAll('.edge')].map(e => getComputedStyle(e).stroke))]")
    assert sorted(colours) == ["rgb(0, 114, 178)", "rgb(213, 94, 0)"]
    tab.value("document.querySelector('.circuits [data-node=\"a2.h3\"]').dispatchEvent(new PointerEvent("
              "'pointerover', {bubbles: true}))")  # fmt: skip
    lit = tab.value(LIT)
    assert lit and all("a2.h3" in ends[:2] for ends in lit) and len({ends[2] for ends in lit}) == 2
    mine = [e for e in run.events if e["event"] == "circuit" and e.get("task") == "different"]
    assert len(lit) == sum("a2.h3" in (u, v[:5]) for event in mine for u, v, _ in event["edges"])
    tab.value("document.querySelector('.circuits').dispatchEvent(new PointerEvent('pointerleave'))")
    assert tab.value(LIT) == [] and not tab.value("document.querySelector('.circuits.focused') !== null")
    bars = tab.value("document.getElementById('fig-components-0').querySelectorAll('.bars .point').length")
    assert bars == 11 * 2 + 2  # eleven parts in two, the embedding and everything else
    assert tab.value("document.querySelectorAll('.problem').length") == 1
