"""Leading texts, histograms and codes per token id against NumPy on all tokens at once, whatever the batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from shape_checked import checked
from tiny_models import make_model, make_prompts
from torch import Tensor, nn

from interp_rlhf.activations.capturing import capture, read_prompts
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.errors import MeasurementError, PromptError

module = checked("interp_rlhf.activations.top_contexts")
TopContexts, TokenCodes, EDGES = module.TopContexts, module.TokenCodes, module.EDGES
D, F = 6, 20
ASKED = [11, 3, 17, 0]


class Small:
    """Codes that float32 holds exactly: in quarters, of both signs where asked."""

    def __init__(self, *, d: int = D, signed: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.into = torch.randint(-2, 3, (d, F), generator=generator).float() / 2
        self.signed = signed
        self.asked: list[int] = []

    def encode(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        before = x @ self.into - 0.5
        return torch.where(before.abs() > 1, before, 0.0) if self.signed else before.relu()

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.into.T


class Selective(Small):
    """Multiplies the asked columns only."""

    def encode(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        return super().encode(x) if features is None else super().encode(x)[:, features]


class _Module(nn.Module):
    """Weights in float64, no W_dec: only its parameters say so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(Small().into.double())

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.inner - 0.5).relu()

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.inner.T


def texts(n: int = 13) -> tuple[list[Prompt], list[Tensor]]:
    """Prompts of few ids and, for every token, a value in halves; many texts reach the same highest code."""
    generator = torch.Generator().manual_seed(4)
    prompts = make_prompts(n)
    prompts = [Prompt(tuple(3 + token % 7 for token in p.input_ids), p.completion_start, p.unit) for p in prompts]
    return prompts, [torch.randint(-1, 2, (len(p.input_ids), D), generator=generator) / 2 for p in prompts]


def feed(stream: Any, prompts: list[Prompt], values: list[Tensor], *, size: int, side: str, rows: list[int]) -> Any:
    """Batches of completions, padded with NaN; the first token never counts."""
    for start in range(0, len(rows), size):
        mine = rows[start : start + size]
        width = max(len(values[row]) for row in mine) + 1
        batch, mask = torch.full((len(mine), width, D), torch.nan), torch.zeros(len(mine), width, dtype=torch.bool)
        for index, row in enumerate(mine):
            begin = width - len(values[row]) if side == "left" else 0
            batch[index, begin : begin + len(values[row])] = values[row]
            mask[index, begin + max(prompts[row].completion_start, 1) : begin + len(values[row])] = True
        stream(mine, batch, mask)
    return stream


def expected(prompts: list[Prompt], values: list[Tensor], dictionary: Any, k: int, held: set[int]) -> dict[str, Any]:
    """From the definitions, in float64, with Python's sort and NumPy's histogram."""
    where = [np.arange(max(p.completion_start, 1), len(p.input_ids)) for p in prompts]
    codes = [dictionary.encode(v).double().numpy()[w][:, sorted(ASKED)] for v, w in zip(values, where, strict=True)]
    ids = [np.array(p.input_ids)[w] for p, w in zip(prompts, where, strict=True)]
    top = []
    for column in range(len(ASKED)):
        ranked = sorted((-z[:, column].max(), row) for row, z in enumerate(codes) if z[:, column].max() > 0)[:k]
        top.append([(row, -peak, where[row][codes[row][:, column].argmax()]) for peak, row in ranked])
    z = np.concatenate(codes)
    bins = [np.histogram(c[c > 0], [0, *np.float32(EDGES), np.inf])[0] for c in z.T]
    part = {name: [r for r in range(len(prompts)) if (r in held) == (name == "held")] for name in ("fit", "held")}
    per_id = {}
    for name, rows in part.items():
        some, mine = np.concatenate([codes[r] for r in rows]), np.concatenate([ids[r] for r in rows])
        per_id[name] = [(i, (mine == i).sum(), some[mine == i].sum(0)) for i in np.unique(mine)], (some**2).sum(0)
    return {"top": top, "codes": codes, "where": where, "bins": bins, "negative": (z < 0).sum(0), "per_id": per_id}


def same(found: Any, truth: dict[str, Any]) -> None:
    assert found.features.tolist() == sorted(ASKED) and found.texts == len(truth["codes"])
    assert found.tokens == sum(map(len, truth["codes"]))
    for column, (kept, ranked) in enumerate(zip(found.top, truth["top"], strict=True)):
        assert [(c.row, c.peak, c.position) for c in kept] == ranked
        for context in kept:
            np.testing.assert_array_equal(context.codes.numpy(), truth["codes"][context.row][:, column])
            np.testing.assert_array_equal(context.positions.numpy(), truth["where"][context.row])
    np.testing.assert_array_equal(found.histogram.numpy(), truth["bins"])
    np.testing.assert_array_equal(found.negative.numpy(), truth["negative"])
    for name, (rows, squares) in truth["per_id"].items():
        part = getattr(found, name)
        assert part.ids.tolist() == [i for i, _, _ in rows] and part.counts.tolist() == [n for _, n, _ in rows]
        np.testing.assert_array_equal(part.sums.numpy(), [sums for _, _, sums in rows])
        np.testing.assert_array_equal(part.squares.numpy(), squares)
        np.testing.assert_allclose(part.means.numpy(), [sums / n for _, n, sums in rows], rtol=1e-15)


@pytest.mark.parametrize("k", [1, 4, 50])
@pytest.mark.parametrize("memory", [64.0, 1e-9])
@pytest.mark.parametrize(("size", "side", "step"), [(1, "right", 1), (3, "left", 5), (13, "right", 12)])
def test_batches_order_padding_and_memory_change_nothing(
    size: int, side: str, step: int, memory: float, k: int
) -> None:
    prompts, values = texts()
    dictionary, held = Small(signed=True), {2, 5, 6}
    truth = expected(prompts, values, dictionary, k, held)
    peaks = [peak for ranked in truth["top"] for _, peak, _ in ranked]
    assert len(set(peaks)) < len(peaks) or k == 1  # ties are there to be broken
    assert truth["negative"].any()
    stream = TopContexts(
        dictionary, "small", "layers.0.resid_post", ASKED, prompts=prompts, k=k, held_out=held, memory=memory
    )
    feed(stream, prompts, values, size=size, side=side, rows=[step * row % 13 for row in range(13)])
    assert stream.rows.tolist() == list(range(13))
    same(stream.contexts(), truth)


@pytest.mark.parametrize("dictionary", [Selective(), _Module()], ids=["selective", "module"])
def test_dictionaries_that_select_or_have_another_precision(dictionary: Any) -> None:
    prompts, values = texts()
    truth = expected(prompts, values, Small(), 3, {1})
    stream = TopContexts(dictionary, "other", "layers.0.resid_post", ASKED, prompts=prompts, k=3, held_out=[1])
    same(feed(stream, prompts, values, size=4, side="left", rows=list(range(13))).contexts(), truth)
    assert sum(map(bool, stream._recorder.codes)) == 0
    if isinstance(dictionary, Selective):
        assert dictionary.asked.count(1) == 1  # all features of one token once, to know how many there are


def test_sparse_autoencoders_and_sparse_codes() -> None:
    from interp_rlhf.readouts.saes import SparseAutoencoder

    prompts, values = texts()
    small = Small()
    weights = {"W_enc": small.into, "b_enc": torch.full((F,), -0.5), "W_dec": small.into.T, "b_dec": torch.zeros(D)}
    sae = SparseAutoencoder("sae", "layers.0.resid_post", "standard", **weights)
    truth = expected(prompts, values, small, 8, {0})
    sparse = Small()
    sparse.encode = lambda x: small.encode(x).to_sparse()  # type: ignore[method-assign]
    for dictionary in (sae, sparse):
        stream = TopContexts(dictionary, "sae", sae.hookpoint, ASKED, prompts=prompts, held_out=[0])
        same(feed(stream, prompts, values, size=5, side="right", rows=list(range(13))).contexts(), truth)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", ["completion", "all", "prompt"])
def test_in_a_measuring_pass_positions_and_ids_are_those_of_the_prompts(tokens: Any, side: Any) -> None:
    model, prompts, skip = make_model("llama"), make_prompts(7), frozenset({5, 9, 60})
    dictionary = Small(d=32)
    stream = TopContexts(
        dictionary, "small", "layers.0.resid_post", range(F), prompts=prompts, k=7, tokens=tokens, skip_ids=skip
    )
    read_prompts(
        model, prompts, [], batch_size=3, pad_token_id=0, tokens=tokens, skip_ids=skip, side=side,
        observers={stream.hookpoint: stream},
    )  # fmt: skip
    found = stream.contexts()
    assert found.texts == 7
    for row, prompt in enumerate(prompts):
        inputs = {"input_ids": torch.tensor([prompt.input_ids])}
        whole = dictionary.encode(capture(model, inputs, [stream.hookpoint])[stream.hookpoint][0])
        for feature, kept in enumerate(found.top):
            for context in (c for c in kept if c.row == row):
                mine = whole[context.positions, feature]
                torch.testing.assert_close(context.codes, mine, atol=1e-4, rtol=1e-3)
                assert context.peak == context.codes.max() > 0
                assert context.peak == context.codes[context.positions.tolist().index(context.position)]
                first = 0 if tokens != "completion" else prompt.completion_start
                last = prompt.completion_start if tokens == "prompt" else len(prompt.input_ids)
                content = [i for i in range(first, last) if i > 0 and prompt.input_ids[i] not in skip]
                assert context.positions.tolist() == content
    assert not set(found.fit.ids.tolist()) & skip and found.fit.tokens == found.tokens and found.held.tokens == 0


def test_sides_of_an_edge() -> None:
    """Codes on an edge count above it; what lies outside all edges counts at the ends."""
    below = float(np.nextafter(np.float32(EDGES[10]), np.float32(0)))
    codes = torch.tensor([[0.0], [-1.0], [1e-9], [EDGES[0]], [below], [EDGES[10]], [EDGES[-1]], [1e9]])
    identity = Small()
    identity.encode = lambda x: x  # type: ignore[method-assign]
    prompts = [Prompt(tuple(range(9)), 1, "one")]
    stream = TopContexts(identity, "identity", "", [0], prompts=prompts)
    stream([0], torch.cat([torch.zeros(1, 1), codes])[None], torch.arange(9)[None] > 0)
    found = stream.contexts()
    counts = found.histogram[0].tolist()
    assert {bin: n for bin, n in enumerate(counts) if n} == {0: 1, 1: 1, 10: 1, 11: 1, len(EDGES): 2}
    assert found.negative.tolist() == [1] and len(counts) == len(EDGES) + 1
    np.testing.assert_allclose(np.diff(np.log2(EDGES)), 0.5)


def test_silent_features_have_no_context() -> None:
    prompts, values = texts()
    silent = Small()
    silent.encode = lambda x: -torch.ones(len(x), F)  # type: ignore[method-assign]
    stream = TopContexts(silent, "silent", "", [0, 1], prompts=prompts)
    found = feed(stream, prompts, values, size=4, side="left", rows=list(range(13))).contexts()
    assert found.top == ((), ()) and not found.histogram.any() and found.negative.tolist() == [found.tokens] * 2
    assert found.column(1) == 1
    with pytest.raises(MeasurementError, match="feature 7: expected one of the 2 that were read"):
        found.column(7)


def test_what_is_kept_does_not_grow_with_the_texts() -> None:
    prompts, values = texts()
    stream = TopContexts(Small(), "small", "", ASKED, prompts=prompts, k=2)
    feed(stream, prompts, values, size=2, side="left", rows=list(range(13)))
    assert [len(kept) for kept in stream._codes] == [2] * 4
    for codes in (codes for kept in stream._codes for codes in kept.values()):
        assert codes.untyped_storage().nbytes() == 4 * len(codes)  # not a view of the batch


@pytest.mark.parametrize("k", [1, 3, 13])
def test_parts_of_several_ranks_are_the_whole(k: int) -> None:
    prompts, values = texts()
    held, parts, shares = {1, 4, 9}, [], [list(range(rank, 13, 3)) for rank in (2, 0, 1)]
    for share in shares:
        own = [row for row, text in enumerate(share) if text in held]
        mine, some = [prompts[row] for row in share], [values[row] for row in share]
        stream = TopContexts(Small(signed=True), "small", "", ASKED, prompts=mine, k=k, held_out=own)
        parts.append(feed(stream, mine, some, size=2, side="left", rows=list(range(len(share)))).contexts())
    merge = module.FeatureContexts.merge
    same(merge(parts, shares), expected(prompts, values, Small(signed=True), k, held))
    assert merge(parts, shares).k == k
    with pytest.raises(MeasurementError, match="expected rows of all texts, each once, found 13 rows"):
        merge(parts, [shares[0], shares[1], shares[0]])
    with pytest.raises(MeasurementError, match="expected rows of all texts, each once, found 12 rows"):
        merge(parts, [shares[0], shares[1], shares[2][:3]])
    other = TopContexts(Small(), "small", "", [1], prompts=prompts)
    feed(other, prompts, values, size=4, side="left", rows=[0])
    for some in ([parts[0], other.contexts()], []):
        with pytest.raises(MeasurementError, match="expected parts of the same features"):
            merge(some, [[0], [1]])


def test_token_codes_of_no_token() -> None:
    found = TokenCodes.of(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3))
    assert found.tokens == 0 and found.means.shape == (0, 3) and found.squares.tolist() == [0, 0, 0]


def test_what_cannot_be_read_is_named_after_the_pass() -> None:
    prompts, values = texts()
    rows = list(range(13))

    def stream(dictionary: Any = None, **options: Any) -> Any:
        chosen = options.pop("features", ASKED)
        return TopContexts(dictionary or Small(), "small", "layers.1.mlp_out", chosen, prompts=prompts, **options)

    def message(broken: Any, found: str) -> None:
        for _ in range(2):
            with pytest.raises(MeasurementError, match=rf"^dictionary 'small' at layers\.1\.mlp_out: .*{found}"):
                broken.contexts()

    message(stream(), "expected texts to read, found none")
    twice = feed(stream(), prompts, values, size=4, side="left", rows=[0, 1, 2])
    message(feed(twice, prompts, values, size=4, side="left", rows=[3, 1]), "every text once, found row 1 twice")
    both = stream()
    both([0, 0], torch.zeros(2, 20, D), torch.zeros(2, 20))
    message(both, "found 0 marked tokens")
    far = stream()
    far([13], torch.zeros(1, 20, D), torch.ones(1, 20))
    message(far, "expected rows of 13 prompts, found row 13")
    message(feed(stream(tokens="all"), prompts, values, size=4, side="left", rows=rows), r"tokens='all'\) to be marked")
    gap = stream(tokens="all")  # as many marked tokens as expected, but others
    length = len(prompts[0].input_ids)
    gap([0], torch.zeros(1, length + 1, D), (torch.arange(length + 1)[None] != 3) & (torch.arange(length + 1) > 0))
    message(gap, f"expected its {length - 1} content tokens .* to be marked, found {length - 1} marked")
    infinite = Small()
    infinite.encode = lambda x: torch.full((len(x), F), torch.inf)  # type: ignore[method-assign]
    message(feed(stream(infinite), prompts, values, size=4, side="left", rows=rows), "expected finite codes")
    message(feed(stream(Small(d=9)), prompts, values, size=4, side="left", rows=rows), "cannot encode .* width 6")
    late = feed(stream(features=[F]), prompts, values, size=4, side="left", rows=rows)
    message(late, "expected features below 20, found 20")
    for options in (
        {"k": 0},
        {"memory": 0.0},
        {"held_out": [13]},
        {"held_out": [-1]},
        {"features": []},
        {"features": [2, 2]},
        {"features": [-1]},
    ):
        with pytest.raises(MeasurementError, match="dictionary 'small' at "):
            stream(**options)
    with pytest.raises(PromptError, match="no content token"):
        stream(skip_ids=frozenset(range(64)))
