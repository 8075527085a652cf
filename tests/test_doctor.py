"""doctor.py: versions against ranges, what a missing extra costs, hookpoints of a local model."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement as Wanted
from packaging.version import Version

from interp_rlhf import doctor
from interp_rlhf.doctor import EXTRAS, REQUIREMENTS, Extra, Requirement, check_extra, check_requirement
from interp_rlhf.errors import InterpError

TRL = Requirement("trl", "1.12", "2", ("1.12.0", "1.16.0"))


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        (None, "broken", "not installed, expected >=1.12,<2"),
        ("1.11.9", "broken", "1.11.9, expected >=1.12,<2"),
        ("2.0.0", "broken", "2.0.0, expected >=1.12,<2"),
        ("1.12.0", "fine", "tested"),
        ("1.16.0+local", "fine", "tested"),
        ("1.14.2", "untested", "between the tested 1.12.0 and 1.16.0"),
        ("1.17.0", "untested", "newer than"),
    ],
)
def test_versions_are_compared_with_the_range_and_the_tested_ones(found: str | None, state: str, words: str):
    finding = check_requirement(TRL, found)
    assert finding.state == state
    assert words in finding.text


def test_the_table_equals_pyproject_and_the_constraint_files(repository: Path):
    import tomllib

    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {Wanted(line).name: Wanted(line).specifier for line in project["dependencies"]}
    pins = [
        dict(line.split("==") for line in (repository / "requirements" / name).read_text().splitlines() if "==" in line)
        for name in ("trl-1.12.txt", "trl-newest.txt")
    ]
    for requirement in REQUIREMENTS:
        specifier = wanted[requirement.name]
        assert requirement.lowest in specifier
        assert requirement.below is None or requirement.below not in specifier
        assert {leg[requirement.name] for leg in pins} == set(requirement.tested)
    extras = project["optional-dependencies"]
    assert {extra.name for extra in EXTRAS} == set(extras) - {"dev"}
    for extra in EXTRAS:
        assert set(extra.packages) <= {Wanted(line).name for line in extras[extra.name]}


def test_a_missing_extra_says_what_it_costs_and_how_to_get_it():
    extra = Extra("report", ("plotly", "jinja2"), "no report.html")
    finding = check_extra(extra, {"plotly": "7.1.0"}.get)
    assert finding.state == "missing"
    assert finding.text == "no report.html (no jinja2: pip install 'interp-rlhf[report]')"
    assert check_extra(extra, lambda name: "1.0").state == "fine"


def test_this_environment_is_fine():
    findings = {finding.topic: finding for finding in doctor.examine()}
    assert not [finding for finding in findings.values() if finding.state == "broken"]
    assert findings["trl"].text.startswith(version("trl"))
    trainers = findings["trainers"].text.split("; not in")[0].split(", ")
    assert {"DPO", "GRPO", "SFT"} <= set(trainers)
    assert ("PPO" in trainers) == (Version(version("trl")) < Version("1.13"))
    text = doctor.render(list(findings.values()))
    assert len(text.splitlines()) == len(findings)


def test_hookpoints_of_a_local_model(tmp_path: Path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        vocab_size=32,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    lines = doctor.describe_model(tmp_path).splitlines()
    assert lines[0] == f"{tmp_path}: LlamaForCausalLM, 5 layers, d = 16"
    assert [line.split(" -> ")[1] for line in lines[1:]] == [f"layers.{layer}.resid_post" for layer in (1, 2, 3, 4)]


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no_such_model"}', '{"model_type": "resnet"}'])
def test_a_folder_without_a_language_model_is_a_one_line_error(content: str | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InterpError) as caught:
        doctor.describe_model(tmp_path)
    assert str(tmp_path) in str(caught.value)
