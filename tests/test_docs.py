"""The pages say what the code does: columns, metrics, fields, examples, links."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from stored_runs import stored_run
from trainers.table import tokenizer

from interp_rlhf.activations.prompt_sets import PromptSet
from interp_rlhf.audit import snapshots
from interp_rlhf.audit.timeline import scan_timeline
from interp_rlhf.config import InterpConfig
from interp_rlhf.drift.estimates import METRICS
from interp_rlhf.measurement import COLUMNS
from interp_rlhf.readouts.packs import load_pack

NAME = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def pages(repository: Path) -> list[Path]:
    return [
        *(repository / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((repository / "docs").glob("*.md")),
        *sorted((repository / "recipes").glob("*.md")),
    ]


def section(page: Path, heading: str) -> str:
    """Text below a heading of any level, up to the next heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, flags=re.M | re.S)
    assert match is not None, f"{page.name}: no section {heading}"
    return match[1]


def first_cells(text: str) -> list[str]:
    """Names in the first column of the tables, in order."""
    rows = [re.split(r"(?<!\\)\|", line)[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for cell in rows for name in NAME.findall(cell)]


def examples(page: Path, heading: str, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8").partition(f"# {heading}\n")[2]
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@pytest.fixture
def formats(repository: Path) -> Path:
    return repository / "docs" / "formats.md"


def test_timeline_columns(formats: Path) -> None:
    assert tuple(first_cells(section(formats, "Measurements"))) == COLUMNS


def test_manifest_fields(formats: Path) -> None:
    table = first_cells(section(formats, "snapshots/"))
    place = table.index("seal")
    assert sorted(table[:place]) == sorted(f.name for f in fields(snapshots._Manifest))


def test_run_file_fields_and_tensor_names(formats: Path, tmp_path: Path) -> None:
    """Against a run that a trainer wrote, not against what the code says it writes."""
    from trainers.table import trainers
    from trainers.tiny_runs import small

    from interp_rlhf import attach, load_run

    trainer = trainers()["dpo"].build(tmp_path, max_steps=2)
    (pack,) = small(tmp_path / "elsewhere" / "run")["concepts"]["packs"]
    short = tmp_path / "short.yaml"
    short.write_text("generator: induction\noptions: {length: 8}\n", encoding="utf-8")
    config = {
        "hookpoints": ["layers.50%.resid_post"],
        "prompts": {"n": 8},
        "concepts": {"n_pairs": 16, "packs": [pack]},
        "statistics": {"bootstrap": 100, "directions": 200},
        "rollouts": {"enabled": True, "prompts": 8, "max_new_tokens": 4},
        "circuits": {"tasks": ["induction"], "control": str(short), "pairs": 16, "steps": 1},
        "on_error": "raise",
    }
    attach(trainer, config)
    trainer.train()
    written = json.loads((tmp_path / "interp" / "run.json").read_text(encoding="utf-8"))
    assert sorted(first_cells(section(formats, "run.json"))) == sorted(written)
    assert str(tmp_path) not in json.dumps(written) and written["config"]["concepts"]["packs"] == ["order.jsonl"]
    assert [concept["name"] for concept in written["concepts"]] == ["chosen_minus_rejected", "order"]
    run = load_run(tmp_path)
    known = [re.escape(name) for name in first_cells(section(formats, "snapshots/"))]
    patterns = [re.sub(r"<\w+>", r"[\\w.%]+", name) for name in known]
    names = {name for snapshot in run.snapshots for name in snapshot.tensors()}
    assert names and all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in names)
    assert {event["event"] for event in run.events} <= set(first_cells(section(formats, "Events")))


def test_the_example_lines_are_a_timeline(formats: Path) -> None:
    (lines,) = examples(formats, "timeline.jsonl", "jsonl")[:1]
    scan = scan_timeline(lines.encode(), "the example")
    assert scan.damage is None and len(scan.records) == 2


def test_the_chain_is_followed_by_hand(formats: Path, tmp_path: Path) -> None:
    (program,) = examples(formats, "timeline.jsonl", "python")[:1]
    timeline = stored_run(tmp_path).timeline_path

    def follow() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, str(timeline)], capture_output=True, text=True)

    data = timeline.read_bytes()
    done = follow()
    assert done.returncode == 0 and done.stdout.strip() == scan_timeline(data, timeline).head
    timeline.write_bytes(data.replace(b"0.1", b"0.2", 1))
    assert timeline.read_bytes() != data and "does not follow" in follow().stderr


def test_example_files_can_be_read(formats: Path, tmp_path: Path) -> None:
    (prompts,) = examples(formats, "Prompts", "jsonl")[:1]
    encode = tokenizer()
    encode.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    path = tmp_path / "prompts.jsonl"
    path.write_text(prompts, encoding="utf-8")
    assert len(PromptSet.from_jsonl(path, encode, max_length=32).prompts) == len(prompts.strip().splitlines())
    (pack,) = examples(formats, "Concept packs", "jsonl")[:1]
    (tmp_path / "pack.jsonl").write_text(pack, encoding="utf-8")
    assert load_pack(str(tmp_path / "pack.jsonl")).name == "brevity"


def test_metrics_and_page_name_the_same(repository: Path) -> None:
    assert first_cells(section(repository / "docs" / "metrics.md", "Metrics")) == list(METRICS)


def test_metric_rows_give_unit_tier_and_nulls(repository: Path) -> None:
    for line in section(repository / "docs" / "metrics.md", "Metrics").splitlines():
        if line.startswith("| `"):
            name, _, unit, _, _, tier, null = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            metric = METRICS[name.strip("`")]
            assert (unit, tier) == (metric.unit, metric.tier)
            assert all(kind in null for kind in metric.nulls)


def test_settings_named_on_the_pages_exist(repository: Path) -> None:
    known = InterpConfig().as_mapping()
    groups = {key for key, value in known.items() if isinstance(value, dict)}
    for page in pages(repository):
        if page.name not in ("trl.md", "log.md"):  # those name functions like ``reference.find_reference``
            for group, key in re.findall(r"`(\w+)\.(\w+)[`:]", page.read_text(encoding="utf-8")):
                assert group not in groups or key == "py" or key in known[group], f"{page.name}: {group}.{key}"


def test_the_table_of_what_works_has_every_trainer_of_the_contract(repository: Path) -> None:
    from trainers.table import trainers

    readme = (repository / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- works:begin -->")[2].partition("<!-- works:end -->")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in (table[0], *table[2:])]
    names = [re.sub(r"\W", "", row[0]).lower().replace("transformerstrainer", "") for row in rows[1:]]
    assert sorted(names) == sorted(name.replace("_", "") for name in trainers())
    assert {len(row) for row in rows} == {len(rows[0])}
    for leg, column in (("1.12", 1), ("newest", 2)):
        pinned = (repository / "requirements" / f"trl-{leg}.txt").read_text(encoding="utf-8")
        assert f"trl=={rows[0][column].removeprefix('TRL ')}" in pinned
    assert [row[0] for row in rows if row[2] == "–"] == ["PPO"]
    apart = (repository / "tests" / "distributed" / "test_two_processes.py").read_text(encoding="utf-8")
    on_two = re.search(r'"trainer", (\[.*?\])', apart)
    assert on_two is not None
    assert [name for name, row in zip(names, rows[1:], strict=True) if "–" not in row] == json.loads(on_two[1])


def test_relative_links_resolve(repository: Path) -> None:
    for page in pages(repository):
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://", "#", "mailto:")):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_pages_that_code_points_at_exist(repository: Path) -> None:
    for path in [*(repository / "interp_rlhf").rglob("*.py"), *(repository / "interp_rlhf").rglob("*.yaml")]:
        for name in re.findall(r"docs/\w+\.md", path.read_text(encoding="utf-8")):
            assert (repository / name).exists(), f"{path.name}: {name}"


def test_no_machine_paths(repository: Path) -> None:
    for page in pages(repository):
        found = re.search(r"(?<![\w.])/(work|root|home|tmp|mnt|Users)/\S*", page.read_text(encoding="utf-8"))
        assert found is None, f"{page.name}: {found}"


def test_configuration_examples_are_yaml(repository: Path) -> None:
    for page in pages(repository):
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S):
            assert yaml.safe_load(block) is not None, page.name
