"""Tasks: metrics equal NumPy, batches and halves are what they say, files are read, whatever is wrong is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from shape_checked import checked
from torch import Tensor

from interp_rlhf.activations.tokenizers import tokenizer_hash
from interp_rlhf.circuits import metrics
from interp_rlhf.circuits.generators import GENERATORS
from interp_rlhf.circuits.metrics import check_metric_values
from interp_rlhf.circuits.task_pairs import NEEDS, TaskPair, read_pairs
from interp_rlhf.circuits.tasks import Task, TaskBatch, load_task, make_task, resolve_task
from interp_rlhf.errors import ConfigError, FormatError, InterpError, MeasurementError, PromptError
from interp_rlhf.organisms.training import make_tokenizer
from interp_rlhf.readouts.probes import LinearProbe

VOCABULARY = 40


def pairs(
    n: int = 10, *, metric: str = "logit_diff", seed: int = 0, lengths: tuple[int, int] = (4, 9)
) -> list[TaskPair]:
    """Random pairs of different lengths, with what the metric needs."""
    random = np.random.default_rng(seed)

    def ids(size: int) -> list[int]:
        return random.choice(VOCABULARY, size=size, replace=False).tolist()

    made = []
    for _ in range(n):
        length, more = int(random.integers(*lengths)), {}
        if metric == "logit_diff":
            tokens = ids(7)
            split = int(random.integers(1, 6))
            more = {"answers": tokens[:split], "wrong": tokens[split:]}
        if metric == "margin":
            more = {name: ids(int(random.integers(1, 5))) for name in ("chosen", "rejected")}
        made.append(TaskPair.of(ids(length), ids(length), **more))
    return made


def task(metric: str = "logit_diff", n: int = 10, **options: Any) -> Task:
    probe = (
        LinearProbe("p", "layers.1.resid_post", torch.linspace(-1, 1, VOCABULARY), 0.25) if metric == "probe" else None
    )
    return Task("t", tuple(pairs(n, metric=metric, **options)), metric, probe)


def logits(batch: TaskBatch, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*batch.clean["input_ids"].shape, VOCABULARY, generator=generator)


def log_softmax(row: np.ndarray) -> np.ndarray:
    return row - np.log(np.exp(row - row.max()).sum()) - row.max()


# ------------------------------------------------------------------------------------------- metrics, by hand in NumPy


def by_hand(one: Task, pair: TaskPair, now: np.ndarray, then: np.ndarray) -> float:
    end = len(pair.clean) - 1
    if one.metric == "logit_diff":
        return np.mean([now[end, t] for t in pair.answers]) - np.mean([now[end, t] for t in pair.wrong])
    if one.metric == "kl":
        p, q = np.exp(log_softmax(then[end])), np.exp(log_softmax(now[end]))
        return -float(np.sum(p * np.log(p / q)))
    assert one.probe is not None
    return float(now[end] @ one.probe.weight.double().numpy() + one.probe.bias)


@pytest.mark.parametrize("metric", ["logit_diff", "kl", "probe"])
def test_metric_equals_numpy_on_rows_of_different_lengths(metric: str):
    one = task(metric)
    batch = one.batch(range(10), pad_token_id=0)
    now, then = logits(batch).double(), logits(batch, seed=1).double()
    found = batch.metric(now, then)
    expected = [by_hand(one, pair, a.numpy(), b.numpy()) for pair, a, b in zip(one.pairs, now, then, strict=True)]
    assert len({len(pair.clean) for pair in one.pairs}) > 2
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6 if metric == "probe" else 1e-12, atol=1e-6)
    assert np.std(expected) > 0.1


def test_margin_of_two_rows_averages_to_the_preference_margin():
    one = task("margin")
    batch = one.batch(range(10), pad_token_id=0)
    now = logits(batch).double()
    found = batch.metric(now, now)
    assert batch.ids == tuple(pair.id for pair in one.pairs for _ in range(2))
    for index, pair in enumerate(one.pairs):
        expected = []
        for row, text in ((2 * index, pair.chosen), (2 * index + 1, pair.rejected)):
            start, rows = len(pair.clean), now[row].numpy()
            expected.append(sum(log_softmax(rows[start - 1 + k])[token] for k, token in enumerate(text)))
        assert found[2 * index].item() == pytest.approx(2 * expected[0], rel=1e-12)
        assert found[2 * index : 2 * index + 2].mean().item() == pytest.approx(expected[0] - expected[1], rel=1e-9)


@pytest.mark.parametrize("metric", ["logit_diff", "kl", "margin", "probe"])
def test_metric_has_the_gradient_of_finite_differences_and_ignores_padding(metric: str):
    one = task(metric, n=8)
    batch = one.batch([3, 1], pad_token_id=0)
    now, then = logits(batch).double(), logits(batch, seed=1).double()
    if metric != "probe":  # its score is float32
        assert torch.autograd.gradcheck(lambda x: batch.metric(x, then), now.requires_grad_())
    padding = batch.clean["attention_mask"] == 0
    assert padding.any()
    changed = now.detach().masked_fill(padding[..., None], 99.0)
    assert torch.equal(batch.metric(changed, then), batch.metric(now.detach(), then))


@pytest.mark.parametrize("metric", ["logit_diff", "kl", "margin", "probe"])
def test_reduced_precision_is_summed_in_float32(metric: str):
    batch = task(metric).batch(range(10), pad_token_id=0)
    now, then = logits(batch).bfloat16(), logits(batch, seed=1).bfloat16()
    found = batch.metric(now, then)
    assert found.dtype == torch.float32
    assert torch.equal(found, batch.metric(now.float(), then.float()))


def test_divergence_is_zero_at_the_clean_run_and_flat_there():
    batch = task("kl").batch(range(4), pad_token_id=0)
    now = logits(batch).double().requires_grad_()
    values = batch.metric(now, now.detach())
    (gradient,) = torch.autograd.grad(values.sum(), now)
    assert values.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


def test_shapes_are_as_annotated():
    module = checked("interp_rlhf.circuits.metrics")
    now, last, ids = torch.zeros(2, 3, 5), torch.tensor([2, 1]), torch.zeros(2, 3, dtype=torch.long)
    marks, rows = torch.eye(5, dtype=torch.bool)[:2], torch.tensor([True, False])
    scored = torch.tensor([[False, True, False], [False, True, True]])
    for values in (
        module.logit_difference(now, last, marks, marks.flip(0)),
        module.negative_kl(now, now, last),
        module.margin_terms(now, ids, scored, rows),
        module.probe_score(now, last, LinearProbe("p", "h", torch.ones(5), 0.0)),
    ):
        assert values.shape == (2,)
    assert module.margin_terms is not metrics.margin_terms


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([0.0, float("nan"), 0.0]), "pair b: expected finite values, found nan"),
        (torch.tensor([0.0, 0.0, float("-inf")]), "pair c: expected finite values, found -inf"),
        (torch.tensor([1, 2, 3]), "expected a floating tensor of shape [3]"),
        (torch.zeros(3, 1), "found torch.float32 of shape [3, 1]"),
        (torch.tensor(1.0), "found torch.float32 of shape []"),
        (0.5, "found float"),
    ],
)
def test_what_is_no_metric_result_is_refused(values: object, message: str):
    with pytest.raises(MeasurementError, match=re.escape(message)):
        check_metric_values(values, ["a", "b", "c"])


def test_a_batch_names_the_pair_whose_value_is_not_finite():
    one = task()
    batch = one.batch([4, 2], pad_token_id=0)
    now = logits(batch)
    now[1] = float("nan")
    with pytest.raises(MeasurementError, match=f"pair {one.pairs[2].id}: expected finite values, found nan"):
        batch.metric(now, now)


def test_tokens_beyond_the_models_vocabulary_are_named():
    one = Task("t", tuple(TaskPair.of([i], [99], answers=[70], wrong=[1]) for i in range(8)))
    batch = one.batch([0], pad_token_id=0)
    with pytest.raises(MeasurementError, match="token 70: expected token ids below 40"):
        batch.metric(torch.zeros(1, 1, VOCABULARY), torch.zeros(1, 1, VOCABULARY))


# ------------------------------------------------------------------------------------------------- batches and halves


@pytest.mark.parametrize("metric", ["logit_diff", "margin"])
def test_batches_are_padded_on_the_right_alike(metric: str):
    one = task(metric)
    batch = one.batch([7, 0, 3], pad_token_id=39)
    chosen = [one.pairs[i] for i in (7, 0, 3)]
    tails = [tails for p in chosen for tails in ([p.chosen, p.rejected] if metric == "margin" else [()])]
    rows = [p for p in chosen for _ in range(2 if metric == "margin" else 1)]
    assert batch.ids == tuple(p.id for p in rows)
    assert torch.equal(batch.clean["attention_mask"], batch.corrupt["attention_mask"])
    for side in ("clean", "corrupt"):
        ids, mask = getattr(batch, side)["input_ids"], getattr(batch, side)["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape[1] == max(p.length for p in chosen)
        for row, pair, tail in zip(range(len(rows)), rows, tails, strict=True):
            text = (*getattr(pair, side), *tail)
            assert tuple(ids[row, : len(text)].tolist()) == text
            assert ids[row, len(text) :].eq(39).all()
            assert mask[row].tolist() == [1] * len(text) + [0] * (ids.shape[1] - len(text))


def test_only_a_probe_reads_another_hookpoint():
    found = {metric: task(metric).batch([0], 0).reads for metric in ("logit_diff", "kl", "margin", "probe")}
    assert found == {"logit_diff": None, "kl": None, "margin": None, "probe": "layers.1.resid_post"}


@pytest.mark.parametrize("n", [8, 9, 33])
def test_halves_are_disjoint_cover_all_and_depend_on_the_seed(n: int):
    one = task(n=n)
    halves = {seed: one.halves(seed) for seed in range(6)}
    for select, evaluate in halves.values():
        assert sorted((*select, *evaluate)) == list(range(n))
        assert abs(len(select) - len(evaluate)) <= 1
    assert one.halves(0) == halves[0]
    assert len(set(halves.values())) > 3


def test_pairs_with_one_clean_prompt_stay_in_one_half():
    shared = [TaskPair.of([i // 3, 5], [30 + i, 5], answers=[1], wrong=[2]) for i in range(24)]
    one = Task("t", tuple(shared))
    for seed in range(8):
        select, evaluate = one.halves(seed)
        assert not {shared[i].clean for i in select} & {shared[i].clean for i in evaluate}
        assert len(select) == len(evaluate) == 12


def test_hash_tells_tasks_apart():
    one = task()
    assert one.hash == task().hash
    others = [task(seed=1), Task("t", one.pairs[:9]), Task("t", one.pairs, "kl"), Task("t", one.pairs[::-1])]
    probe = task("probe")
    assert probe.probe is not None
    moved = LinearProbe("p", "layers.1.resid_post", probe.probe.weight, 0.5)
    others += [probe, Task("t", probe.pairs, "probe", moved)]
    assert len({one.hash, *(other.hash for other in others)}) == len(others) + 1
    assert len({pair.id for pair in one.pairs}) == 10 and re.fullmatch("[0-9a-f]{16}", one.pairs[0].id)
    assert TaskPair.of([1], [2], answers=[3], wrong=[4]).id != TaskPair.of([1], [2], answers=[4], wrong=[3]).id


# ------------------------------------------------------------------------------------------------------ what is refused

GOOD: dict[str, Any] = {"id": "x1", "clean": (1, 2), "corrupt": (1, 3), "answers": (4,), "wrong": (5,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupt": (1, 3, 4)}, "equal length, found 2 (clean) and 3 (corrupt) tokens"),
        ({"clean": ()}, "found an empty one"),
        ({"corrupt": (1, 2)}, "expected clean and corrupt prompts to differ"),
        ({"clean": (1, -2)}, "found a negative one"),
        ({"wrong": (5, 4)}, "no token in common, found 4 in both"),
        ({"chosen": (1,), "rejected": (1,)}, "expected chosen and rejected to differ"),
    ],
)
def test_pairs_that_are_none(changes: dict[str, Any], message: str):
    TaskPair(**GOOD)
    with pytest.raises(PromptError, match=f"pair x1: .*{re.escape(message)}"):
        TaskPair(**{**GOOD, **changes})


def numbered(**changes: Any) -> list[TaskPair]:
    return [TaskPair(**{**GOOD, "id": f"x{i}", "clean": (10 + i, 2), **changes}) for i in range(8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t", tuple(numbered()[:7])), "expected at least 8 pairs, found 7"),
        (("t", tuple(numbered(answers=()))), "pair x0: answers: metric 'logit_diff' needs it"),
        (("t", tuple(numbered()), "margin"), "pair x0: chosen: metric 'margin' needs it"),
        (("t", (*numbered(), TaskPair(**{**GOOD, "id": "y", "clean": (10, 2)}))), "found the same content 2 times"),
        (
            ("t", (*numbered(), TaskPair(**{**GOOD, "id": "x3"}))),
            "pair x3: expected every pair once, found the same id",
        ),
        (
            ("t", tuple(numbered()), "accuracy"),
            "metric: expected one of logit_diff, kl, margin, probe, found 'accuracy'",
        ),
        (("t", tuple(numbered()), "probe"), "expected a probe with metric 'probe'"),
        (
            ("t", tuple(TaskPair(**{**GOOD, "id": str(i), "corrupt": (9, i)}) for i in range(9))),
            "found 0: pairs with one",
        ),
    ],
)
def test_tasks_that_are_none(arguments: tuple[Any, ...], message: str):
    with pytest.raises(PromptError, match=f"task 't': .*{re.escape(message)}"):
        Task(*arguments)


def test_a_name_that_would_be_a_path_is_refused():
    with pytest.raises(ConfigError, match="task name"):
        Task("a/b", tuple(numbered()))


# ---------------------------------------------------------------------------------------------------------------- files

NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hugo")
TEXTS = [
    {"clean": f"{n} from rome says", "corrupt": f"{n} from oslo says", "answers": [" the", " is"], "wrong": " no"}
    for n in NAMES
]
IDS = [{"clean": [7, i], "corrupt": [8, i], "answer": 3, "wrong": [4, 5]} for i in range(8)]
MARGINS = [
    {"clean": f"{n} from rome", "corrupt": f"{n} from oslo", "chosen": " yes so", "rejected": " no"} for n in NAMES
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def write_yaml(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_texts_are_tokenized(tmp_path: Path, tokenizer: Any):
    one = load_task(write(tmp_path / "towns.jsonl", TEXTS), tokenizer)
    assert (one.name, one.metric, len(one.pairs)) == ("towns", "logit_diff", 8)
    ids = tokenizer.convert_tokens_to_ids
    assert one.pairs[1].clean == tuple(ids(["ben", "from", "rome", "says"]))
    assert one.pairs[1].corrupt == tuple(ids(["ben", "from", "oslo", "says"]))
    assert (one.pairs[1].answers, one.pairs[1].wrong) == (tuple(ids(["the", "is"])), (ids("no"),))


def test_texts_get_the_start_token_and_answers_continue_them(tmp_path: Path, stories: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    rows = [{"clean": f"On 1{i}", "corrupt": f"On 2{i}", "answer": "4", "wrong": ["5", "6"]} for i in range(8)]
    one = load_task(write(tmp_path / "digits.jsonl", rows), tokenizer)
    assert one.pairs[0].clean == tuple(tokenizer("On 10")["input_ids"])
    assert one.pairs[0].clean[0] == tokenizer.bos_token_id
    assert one.pairs[0].answers == (tokenizer.convert_tokens_to_ids("4"),)


def test_token_ids_are_taken_as_they_are(tmp_path: Path, tokenizer: Any):
    path = write(tmp_path / "ids.jsonl", IDS)
    for given in (tokenizer, None):
        one = load_task(path, given)
        assert (one.pairs[2].clean, one.pairs[2].answers, one.pairs[2].wrong) == ((7, 2), (3,), (4, 5))
    assert load_task(path, None).hash == one.hash


def test_chat_messages_go_through_the_template(tmp_path: Path, tokenizer: Any):
    rows = [
        {
            key: [{"role": "user", "content": f"{name} from {town}"}]
            for key, town in (("clean", "rome"), ("corrupt", "oslo"))
        }
        | {"answer": "yes", "wrong": "no"}
        for name in NAMES
    ]
    pair = load_task(write(tmp_path / "chat.jsonl", rows), tokenizer).pairs[0]
    assert tokenizer.convert_ids_to_tokens(pair.clean) == ["<s>", "<user>", "anna", "from", "rome", "<assistant>"]
    assert tokenizer.convert_ids_to_tokens(pair.answers) == ["yes"]


def test_completions_make_a_margin_and_prompts_alone_a_divergence(tmp_path: Path, tokenizer: Any):
    one = load_task(write(tmp_path / "m.jsonl", MARGINS), tokenizer)
    assert one.metric == "margin"
    assert tokenizer.convert_ids_to_tokens(one.pairs[0].chosen) == ["yes", "so"]
    assert tokenizer.convert_ids_to_tokens(one.pairs[0].rejected) == ["no"]
    assert one.pairs[0].length == 5
    bare = [{key: row[key] for key in ("clean", "corrupt")} for row in MARGINS]
    assert load_task(write(tmp_path / "k.jsonl", bare), tokenizer).metric == "kl"


def test_a_header_names_task_metric_pairs_and_probe(tmp_path: Path, tokenizer: Any):
    folder = tmp_path / "tasks"
    folder.mkdir()
    write(folder / "rows.jsonl", IDS)
    inline = load_task(write_yaml(folder / "a.yaml", {"name": "one", "metric": "logit_diff", "pairs": IDS}), tokenizer)
    beside = load_task(write_yaml(folder / "b.yml", {"metric": "logit_diff", "pairs": "rows.jsonl"}), tokenizer)
    assert (inline.name, beside.name) == ("one", "b")
    assert inline.hash == beside.hash
    probe = LinearProbe("p", "layers.2.resid_post", torch.ones(4), 0.0, tokenizer=tokenizer_hash(tokenizer))
    probe.save(folder / "p.safetensors")
    bare = [{key: row[key] for key in ("clean", "corrupt")} for row in IDS]
    content = {"metric": "probe", "probe": "p.safetensors", "pairs": bare}
    one = load_task(write_yaml(folder / "c.yaml", content), tokenizer)
    assert one.probe is not None and torch.equal(one.probe.weight, probe.weight)
    assert one.batch([0], 0).reads == "layers.2.resid_post"


def test_a_header_may_name_a_generator(tmp_path: Path, tokenizer: Any):
    path = write_yaml(tmp_path / "short.yaml", {"generator": "induction", "n": 12, "options": {"length": 6}})
    one = load_task(path, tokenizer, n=30, seed=4)
    assert (one.name, len(one.pairs), len(one.pairs[0].clean)) == ("short", 12, 6)
    assert one.pairs == make_task("x", "induction", tokenizer, 12, 4, {"length": 6}).pairs
    fixed = write_yaml(tmp_path / "fixed.yaml", {"generator": "induction", "seed": 9})
    assert load_task(fixed, tokenizer, n=8, seed=4).pairs == make_task("x", "induction", tokenizer, 8, 9).pairs


def test_settings_name_a_generator_or_a_file(tmp_path: Path, tokenizer: Any):
    assert resolve_task("induction", tokenizer, n=20, seed=1) == make_task("induction", "induction", tokenizer, 20, 1)
    path = write(tmp_path / "towns.jsonl", TEXTS)
    assert resolve_task(str(path), tokenizer, n=20, seed=1) == load_task(path, tokenizer)
    with pytest.raises(
        ConfigError, match=r"task 'inducton': expected one of induction, greater_than, agreement, or the"
    ):
        resolve_task("inducton", tokenizer, n=20, seed=1)


def changed(rows: list[Any], **changes: Any) -> list[Any]:
    """Rows of which the second is changed."""
    return [rows[0], {**rows[1], **changes}, *rows[2:]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            changed(TEXTS, corrupt="ben from the rome says"),
            "line 3: pair [0-9a-f]{16}: .*found 4 .clean. and 5 .corrupt.",
        ),
        (changed(TEXTS, answers=[" the is"]), "line 3: answers: expected a single token .* found ' the is' as"),
        (changed(TEXTS, wrong=" xylophone"), "line 3: wrong: expected a single token that the tokenizer knows"),
        (changed(TEXTS, wrong=5), "line 3: wrong: expected a text like clean, in quotes, found 5"),
        (changed(TEXTS, wrong=" the"), "line 3: pair .*no token in common"),
        (changed(TEXTS, answers=[]), "pair .*answers: metric 'logit_diff' needs it"),
        (changed(TEXTS, clean=""), "line 3: clean: expected a text, chat messages or token ids, found ''"),
        (changed(TEXTS, note="x"), "line 3: expected the fields clean, corrupt, answers, wrong .*found .*note"),
        (changed(TEXTS, chosen=" yes"), "line 3: expected the fields"),
        (changed(IDS, answer=" the"), "line 3: answers: expected token ids like clean, found ' the'"),
        (changed(IDS, wrong=[4, 99999]), "line 3: expected token ids below .* found 99999"),
        (changed(IDS, clean=[]), "line 3: pair .*found an empty one"),
        (changed(IDS, clean=[True, 1]), "line 3: clean: expected a text"),
        (changed(MARGINS, rejected=" yes so"), "line 3: pair .*chosen and rejected to differ"),
        (changed(MARGINS, rejected=[1]), "line 3: rejected: expected a text"),
        ([*TEXTS, TEXTS[3]], "expected every pair once, found the same content 2 times"),
        (TEXTS[:5], "expected at least 8 pairs, found 5"),
        ([], "expected at least 8 pairs, found 0"),
        ([["clean"]], r"line 1: expected a mapping with clean and corrupt, found \['clean'\]"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path: Path, tokenizer: Any, rows: list[Any], message: str):
    path = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(PromptError, match=f"^{re.escape(str(path))}: .*{message}") as error:
        load_task(path, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], r"expected a mapping with metric and pairs, or generator, found \[1\]"),
        ({"pairs": IDS}, "found without metric"),
        ({"metric": "kl", "pairs": IDS, "probes": "x"}, "found unknown probes"),
        ({"metric": ["kl"], "pairs": IDS}, r"metric: expected one of logit_diff, margin, kl, probe, found \['kl'\]"),
        ({"metric": "kl", "pairs": 3}, "pairs: expected a list, or the path"),
        ({"metric": "kl", "pairs": IDS}, "pair 1: expected the fields clean, corrupt of metric 'kl'"),
        ({"metric": "logit_diff", "pairs": IDS, "probe": 3}, "probe: expected the path"),
        ({"metric": "logit_diff", "pairs": IDS, "name": "a/b"}, "task name"),
        ({"generator": "deduction"}, "generator 'deduction' does not exist; found induction"),
        ({"generator": "induction", "options": {"width": 3}}, "unknown option 'width'"),
        ({"generator": "induction", "options": {"length": 4}}, "length: expected an integer of 5 at least, found 4"),
        ({"generator": "induction", "options": [1]}, "options: expected a mapping"),
        ({"generator": "induction", "n": "many"}, "n: expected an integer"),
        ({"generator": "induction", "n": 5}, "expected at least 8 pairs, found 5"),
    ],
)
def test_headers_that_are_wrong_are_named(tmp_path: Path, tokenizer: Any, content: Any, message: str):
    path = write_yaml(tmp_path / "t.yaml", content)
    with pytest.raises(InterpError, match=f"^{re.escape(str(path))}: .*{message}"):
        load_task(path, tokenizer)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, tokenizer: Any):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    (tmp_path / "torn.jsonl").write_text('{"clean": ', encoding="utf-8")
    cases = {
        "none.jsonl": "cannot be read",
        "none.yaml": "cannot be read",
        "bytes.jsonl": "not valid UTF-8",
        "bad.yaml": "not valid YAML",
        "torn.jsonl": "line 1: not valid JSON",
        "pairs.txt": "expected a task file that ends in",
    }
    for name, message in cases.items():
        with pytest.raises(PromptError, match=f"{name}: {message}"):
            load_task(tmp_path / name, tokenizer)
    with pytest.raises(PromptError, match="line 1: expected prompts in token ids where there is no tokenizer"):
        load_task(write(tmp_path / "texts.jsonl", TEXTS), None)


def test_probes_that_cannot_be_read_on_the_task_are_named(tmp_path: Path, tokenizer: Any):
    bare = [{key: row[key] for key in ("clean", "corrupt")} for row in IDS]
    path = write_yaml(tmp_path / "t.yaml", {"metric": "probe", "probe": "p.safetensors", "pairs": bare})
    with pytest.raises(FormatError, match=r"p\.safetensors: cannot be read"):
        load_task(path, tokenizer)
    for probe, message in (
        (LinearProbe("p", "layers.2.mlp_out", torch.ones(4), 0.0), "expected one fitted at a resid_post"),
        (LinearProbe("p", "layers.2.resid_post", torch.ones(4), 0.0, tokenizer="0" * 64), "another tokenizer"),
    ):
        probe.save(tmp_path / "p.safetensors", overwrite=True)
        with pytest.raises(InterpError, match=message):
            load_task(path, tokenizer)


def test_a_tokenizer_that_ends_texts_is_refused(tmp_path: Path):
    from tokenizers.processors import TemplateProcessing

    ending = make_tokenizer()
    end = ("</s>", ending.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    for rows in (TEXTS, MARGINS):
        with pytest.raises(PromptError, match="line 1: expected a tokenizer that leaves texts open"):
            load_task(write(tmp_path / "t.jsonl", rows), ending)


# ------------------------------------------------------------------------------------------------------------- the page


def spaced_words() -> Any:
    """A token for every word with the space before it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sentence = "When Ann and Ben left, gave it to him Rome Oslo is in Italy Norway"
    words = sentence.split()
    vocabulary = ("<unk>", *words, *(f" {word}" for word in words), *map(str, range(30)))
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_the_examples_on_the_page_can_be_read(tmp_path: Path, repository: Path):
    text = (repository / "docs" / "formats.md").read_text(encoding="utf-8").split("\n### Tasks\n")[1].split("\n### ")[0]
    (lines,) = re.findall(r"```jsonl\n(.*?)```", text, re.S)
    path = tmp_path / "lines.jsonl"
    path.write_text(lines, encoding="utf-8")
    metric, found = read_pairs(path, spaced_words())
    assert metric == "logit_diff" and len(found) == 2 and len(found[0].wrong) == 2
    listed, generated = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S))
    with pytest.raises(PromptError, match="expected at least 8 pairs, found 1"):
        load_task(write_yaml(tmp_path / "towns.yaml", listed), spaced_words())
    one = load_task(write_yaml(tmp_path / "short.yaml", generated), spaced_words())
    assert (one.name, len(one.pairs), len(one.pairs[0].clean)) == ("short-induction", 32, 10)
    named = re.findall(r"^\| `(\w+)`", text, re.M)
    assert sorted(named) == sorted([*NEEDS, *GENERATORS])
