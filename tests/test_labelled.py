"""Labelled texts from a file: what is read, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainers.table import tokenizer

from interp_rlhf.activations.labelled import LabelledTexts
from interp_rlhf.errors import PromptError


def rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"w{i}", "completion": " w70 w71", "label": i % 2 == 0} for i in range(n)]


def read(path: Path, *lines: Any, **options: Any) -> LabelledTexts:
    written = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(written) + "\n", encoding="utf-8")
    return LabelledTexts.from_jsonl(path, tokenizer(), name="order", **{"max_length": 16, **options})


def test_texts_and_labels_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = read(tmp_path / "l.jsonl", *rows(5), "", rows(5)[2])  # an empty line, and one text twice with one label
    assert found.name == "order" and found.labels == (True, False, True, False, True)
    encode = tokenizer()
    for prompt, row in zip(found.prompts, rows(5), strict=True):
        assert encode.decode(prompt.input_ids[: prompt.completion_start], skip_special_tokens=True) == row["prompt"]
        assert encode.decode(prompt.input_ids[prompt.completion_start :]).split() == row["completion"].split()


def test_texts_without_a_prompt(tmp_path: Path) -> None:
    lines = [{"text": f"w{i} w{i + 1}", "label": i < 2} for i in range(4)]
    assert read(tmp_path / "l.jsonl", *lines).labels == (True, True, False, False)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1]", "label None"),
        ({"text": "w1 w2"}, "label None"),
        ({"text": "w1 w2", "label": 1}, "label 1"),
        ({"text": "w1 w2", "label": "true"}, "label 'true'"),
        ({"prompt": "w0", "completion": " w70 w71", "label": False}, "found both for the same text"),
        ({"prompt": "w1", "chosen": " w2", "rejected": " w3", "label": True}, "expected one text"),
        ({"words": "w1", "label": True}, ""),
        ({"text": 3, "label": True}, ""),
        ({"prompt": "w1 " * 40, "completion": " w2", "label": True}, ""),
    ],
)
def test_a_line_that_does_not_fit_is_named(line: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError) as error:
        read(tmp_path / "l.jsonl", *rows(4), line)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'l.jsonl'}, line 5: ") and problem in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(("true", "false"), [(3, 0), (0, 3), (1, 3), (3, 1), (0, 0)])
def test_both_classes_are_needed_twice(true: int, false: int, tmp_path: Path) -> None:
    lines = [{"text": f"w{i} w{i}", "label": i < true} for i in range(true + false)]
    with pytest.raises(PromptError, match=f"labels of both classes, found {true} true, {false} false; 2 of each"):
        read(tmp_path / "l.jsonl", *lines)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, problem in (("none.jsonl", "cannot be read"), ("b.jsonl", "expected UTF-8"), (".", "cannot be read")):
        with pytest.raises(PromptError, match=problem):
            LabelledTexts.from_jsonl(tmp_path / name, tokenizer(), name="order", max_length=16)
