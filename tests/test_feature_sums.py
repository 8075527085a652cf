"""Streaming statistics of a dictionary against NumPy on all tokens at once, whatever the batches, and within memory."""

from __future__ import annotations

import itertools
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shape_checked import checked
from tiny_models import make_model, make_prompts
from torch import Tensor, nn

from interp_rlhf.activations.capturing import capture, read_prompts
from interp_rlhf.activations.prompts import batches
from interp_rlhf.errors import HookpointError, MeasurementError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from memory_meter import MemoryMeter

sums = checked("interp_rlhf.activations.feature_sums")
FeatureReading, FeatureStream = sums.FeatureReading, sums.FeatureStream
D, F = 12, 40


class Small:
    """A dictionary that is nothing but its two functions; codes of both signs unless it rectifies."""

    def __init__(self, d: int = D, width: int = F, *, bias: float = -0.5, seed: int = 0, signed: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.into = torch.randn(d, width, generator=generator) / d**0.5
        self.out = torch.randn(width, d, generator=generator) / width**0.5
        self.bias, self.signed = bias, signed
        self.asked: list[int] = []

    def encode(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        before = x @ self.into + self.bias
        return torch.where(before.abs() > 0.4, before, 0.0) if self.signed else before.relu()

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.out


class Selective(Small):
    """Multiplies the asked columns only."""

    def encode(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        if features is None:
            return super().encode(x)
        self.asked.append(-len(features))
        return (x @ self.into[:, features] + self.bias).relu()


def texts(n: int = 9, d: int = D, *, seed: int = 1, longest: int = 11) -> list[Tensor]:
    """Activations ``[T_i, d]`` of texts of different lengths, not centred."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (n,), generator=generator).tolist()
    return [torch.randn(length, d, generator=generator) + 0.3 for length in lengths]


def stream_through(
    stream: Any, values: list[Tensor], *, size: int = 4, side: str = "right", order: list[int] | None = None
) -> Any:
    """Feed texts in batches, padded with NaN."""
    rows = list(range(len(values))) if order is None else order
    for start in range(0, len(rows), size):
        mine = rows[start : start + size]
        width = max(len(values[row]) for row in mine) + 2
        batch = torch.full((len(mine), width, values[0].shape[1]), torch.nan, dtype=values[0].dtype)
        mask = torch.zeros(len(mine), width, dtype=torch.bool)
        for index, row in enumerate(mine):
            length = len(values[row])
            window = slice(width - length, width) if side == "left" else slice(0, length)
            batch[index, window], mask[index, window] = values[row], True
        stream(mine, batch, mask)
    return stream


def expected(values: list[Tensor], dictionary: Any) -> dict[str, np.ndarray]:
    """From the definitions, in float64, on all tokens at once."""
    codes = [dictionary.encode(x).double().numpy() for x in values]
    back = [dictionary.decode(dictionary.encode(x)).double().numpy() for x in values]
    x, x_hat, z = np.concatenate([v.double().numpy() for v in values]), np.concatenate(back), np.concatenate(codes)
    return {
        "means": np.stack([c.mean(0) for c in codes]),
        "fired": np.stack([(c != 0).mean(0) for c in codes]),
        "x_mean": np.stack([v.double().numpy().mean(0) for v in values]),
        "x_hat_mean": np.stack([v.mean(0) for v in back]),
        "error": ((x - x_hat) ** 2).sum(),
        "power": (x**2).sum(),
        "x_sum": x.sum(0),
        "l0": (z != 0).sum(),
        "alive": (z != 0).any(0),
        "texts": sum((c != 0).any(0).astype(int) for c in codes),
        "tokens": np.array([len(v) for v in values]),
    }


def same(reading: Any, truth: dict[str, np.ndarray], *, atol: float = 1e-6) -> None:
    everything = torch.arange(reading.width)
    for name in ("means", "fired"):
        np.testing.assert_allclose(reading.dense(everything, of=name).numpy(), truth[name], atol=atol, rtol=1e-6)
    for name in ("x_mean", "x_hat_mean", "x_sum"):
        np.testing.assert_allclose(getattr(reading, name).numpy(), truth[name], atol=atol, rtol=1e-6)
    np.testing.assert_allclose([reading.error, reading.power], [truth["error"], truth["power"]], rtol=1e-6)
    assert reading.l0 == truth["l0"]
    for name in ("alive", "texts", "tokens"):
        np.testing.assert_array_equal(getattr(reading, name).numpy(), truth[name])


def equal(one: Any, two: Any) -> None:
    """Bit for bit."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


def exact(values: Any) -> Any:
    """Numbers whose sums and products stay exact in float32, so that the order of additions does not show."""
    if isinstance(values, Small):
        values.into, values.out = exact(values.into), exact(values.out)
        return values
    return [exact(x) for x in values] if isinstance(values, list) else (values * 8).round() / 8


# -------------------------------------------------------------------------------------------------- against NumPy


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_that_is_kept_is_what_numpy_finds_on_all_tokens(side: str, signed: bool) -> None:
    dictionary, values = Small(signed=signed), texts()
    truth = expected(values, dictionary)
    assert truth["means"].min() < -0.1 if signed else truth["means"].min() == 0
    reading = stream_through(FeatureStream(dictionary, "small"), values, side=side).reading()
    same(reading, truth)
    assert len(reading.columns) == (truth["fired"] > 0).sum() and reading.features is None
    for row in range(len(values)):
        window = slice(int(reading.indptr[row]), int(reading.indptr[row + 1]))
        np.testing.assert_array_equal(reading.columns[window].numpy(), np.flatnonzero(truth["fired"][row]))


def test_codes_that_cancel_have_fired() -> None:
    both = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    stream = stream_through(FeatureStream(_Plain(lambda x: x), "plain"), [both])
    reading = stream.reading()
    assert reading.alive.tolist() == [True, False] and reading.l0 == 2
    assert reading.dense([0, 1]).tolist() == [[0.0, 0.0]] and reading.dense([0], of="fired").tolist() == [[1.0]]


class _Plain:
    def __init__(self, encode: Any, decode: Any = None) -> None:
        self.encode, self.decode = encode, decode or (lambda z: z)


@pytest.mark.parametrize("memory", [256.0, 0.01, 1e-9])
@pytest.mark.parametrize(("size", "side", "step"), [(1, "right", 1), (3, "left", 8), (9, "right", 2)])
def test_batches_padding_order_and_chunks_change_nothing(memory: float, size: int, side: str, step: int) -> None:
    dictionary, values = exact(Small(signed=True)), exact(texts())
    reference = stream_through(FeatureStream(dictionary, "small"), values, size=9).reading()
    same(reference, expected(values, dictionary))
    stream = FeatureStream(dictionary, "small", memory=memory)
    stream_through(stream, values, size=size, side=side, order=[step * row % 9 for row in range(9)])
    assert stream.rows.tolist() == list(range(9))
    equal(stream.reading(), reference)


def test_float64_sums_outlast_many_tokens() -> None:
    """A float32 sum of 40,000 ones and thousands of 1e-4 is off in the fourth digit."""
    x = torch.full((40_000, 1), 1e-4)
    x[:1000] = 1000.0
    reading = stream_through(FeatureStream(_Plain(lambda x: x), "plain", memory=0.1), [x]).reading()
    total = x.double().sum().item()
    np.testing.assert_allclose(reading.x_sum.item(), total, rtol=1e-11)
    np.testing.assert_allclose(reading.dense([0]).item(), np.float32(total / 40_000), rtol=0)
    np.testing.assert_allclose(reading.power, x.double().square().sum().item(), rtol=1e-11)


# ---------------------------------------------------------------------------------------------- kinds of dictionaries


def test_selected_features_are_those_of_all_and_nothing_else_is_multiplied() -> None:
    values, chosen = texts(), [31, 4, 17]
    everything = stream_through(FeatureStream(Small(), "small"), values).reading()
    for dictionary in (Small(), Selective()):
        dictionary.asked.clear()
        reading = stream_through(FeatureStream(dictionary, "some", features=chosen, width=F), values).reading()
        for of in ("means", "fired"):
            torch.testing.assert_close(reading.dense(chosen, of=of), everything.dense(chosen, of=of))
        assert reading.features.tolist() == [4, 17, 31] and reading.width == F
        assert reading.l0 == round(
            float((everything.dense(chosen, of="fired").double() * reading.tokens[:, None]).sum())
        )
        assert reading.x_hat_mean is None and np.isnan(reading.error)
        np.testing.assert_allclose(reading.power, everything.power)
        if isinstance(dictionary, Selective):
            assert dictionary.asked == [1, -3, -3, -3]  # F from the first token, then three columns per batch
        with pytest.raises(MeasurementError, match="feature 5: expected one of the 3 that were read"):
            reading.dense([4, 5])


def test_codes_may_be_sparse_or_in_another_precision_and_weights_elsewhere() -> None:
    dictionary, values = exact(Small()), exact(texts())
    reference = stream_through(FeatureStream(dictionary, "small"), values).reading()
    sparse = _Plain(lambda x: dictionary.encode(x).to_sparse(), lambda z: torch.sparse.mm(z, dictionary.out))
    equal(stream_through(FeatureStream(sparse, "sparse"), values).reading(), reference)

    rough = _Plain(lambda x: dictionary.encode(x).bfloat16(), lambda z: dictionary.decode(z.float()))
    rounded = exact(Small())
    rounded.encode = lambda x: Small.encode(dictionary, x).bfloat16().float()  # type: ignore[method-assign]
    same(stream_through(FeatureStream(rough, "rough"), values).reading(), expected(values, rounded))


def test_reconstructions_may_need_the_activations() -> None:
    """A dictionary that reads directions only: with what it read it gives back every length."""
    values = texts()

    def decode(codes: Tensor, x: Tensor | None = None) -> Tensor:
        return codes if x is None else codes * x.norm(dim=1, keepdim=True)

    unit = _Plain(lambda x: x / x.norm(dim=1, keepdim=True), decode)
    reading = stream_through(FeatureStream(unit, "unit"), values).reading()
    assert reading.error < 1e-10 * reading.power
    torch.testing.assert_close(reading.x_hat_mean, reading.x_mean)
    named = stream_through(FeatureStream(_Plain(unit.encode, lambda x: x), "codes called x"), values).reading()
    assert named.error > 0.1 * reading.power


@pytest.mark.parametrize("options", [{"architecture": "standard"}, {"architecture": "topk", "k": 5}])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_sparse_autoencoders_are_read_as_they_reconstruct(options: dict[str, Any], normalisation: Any) -> None:
    from interp_rlhf.readouts.saes import SparseAutoencoder

    small, values = Small(bias=0.0), texts()
    weights = {"W_enc": small.into, "b_enc": torch.zeros(F), "W_dec": small.out, "b_dec": torch.full((D,), 0.1)}
    sae = SparseAutoencoder("sae", "layers.0.resid_post", **options, **weights, normalisation=normalisation)
    reading = stream_through(FeatureStream(sae, sae.name, sae.hookpoint), values, size=4).reading()
    x = torch.cat(values)
    np.testing.assert_allclose(reading.error, (x - sae.reconstruct(x)).double().square().sum().item(), rtol=1e-5)
    assert reading.l0 == int((sae.encode(x) != 0).sum())
    some = stream_through(FeatureStream(sae, sae.name, features=[7, 2]), values).reading()
    torch.testing.assert_close(some.dense([2, 7]), reading.dense([2, 7]))


class Entrywise(Small):
    """Decodes what fired alone."""

    def decode_entries(self, starts: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
        self.asked.append(len(values))
        assert len(starts) == len(x) + 1 and int(starts[-1]) == len(columns)
        return torch.stack([values[a:b] @ self.out[columns[a:b]] for a, b in itertools.pairwise(starts.tolist())])


@pytest.mark.parametrize(("bias", "used"), [(-2.5, True), (-0.5, False)])
def test_few_codes_are_decoded_one_by_one_where_a_dictionary_can(bias: float, used: bool) -> None:
    values = texts()
    dictionary, plain = Entrywise(bias=bias), Small(bias=bias)
    reading = stream_through(FeatureStream(dictionary, "entries"), values, size=9).reading()
    same(reading, expected(values, plain))
    assert dictionary.asked[2:] == ([reading.l0] if used else []) and reading.l0 > 0


class _Module(nn.Module):
    """One whose weights say where they are and in which precision."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(D, F, **options)

    def encode(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.inner.weight


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_come_in_the_precision_of_the_weights(given: torch.dtype) -> None:
    values, module = [value.to(given) for value in texts()], _Module(dtype=torch.float64)
    reading = stream_through(FeatureStream(module, "module"), values).reading()
    with torch.no_grad():
        same(reading, expected([value.double() for value in values], module))
    asked: list[torch.dtype] = []
    stream = FeatureStream(_Plain(lambda x: asked.append(x.dtype) or x), "nobody says")
    same(stream_through(stream, values).reading(), expected([value.float() for value in values], _Plain(lambda x: x)))
    assert set(asked) == {torch.float32}


def test_activations_go_to_the_device_of_the_weights() -> None:
    """The meta device stands for one that is not the CPU; what fired cannot be found there, but that comes later."""
    with pytest.raises(RuntimeError, match="meta"):
        stream_through(FeatureStream(_Module(device="meta"), "elsewhere"), texts())


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("bias", "longest"), [(5.0, 2), (5.0, 60), (-2.5, 30)], ids=["short", "dense", "sparse"])
def test_memory_stays_within_what_was_given(bias: float, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code on or few, texts of one token or of many: tensors and arrays, beside what is kept (while it is put
    together, twice), take an eighth of what all codes would at most."""
    wide, values = Small(width=4096, bias=bias), texts(64, longest=longest)
    tokens = sum(len(value) for value in values)
    memory = tokens * 4096 * 4 / 8 / 2**20
    stream = FeatureStream(wide, "wide", width=4096, memory=memory)
    batch = nn.utils.rnn.pad_sequence(values, batch_first=True)
    mask = torch.arange(batch.shape[1]) < torch.tensor([[len(value)] for value in values])
    arrays, find = [0], np.flatnonzero

    def finding(fired: np.ndarray) -> np.ndarray:
        found = find(fired)
        arrays.append(fired.nbytes + found.nbytes)
        return found

    monkeypatch.setattr(np, "flatnonzero", finding)
    with MemoryMeter() as meter:
        stream(range(64), batch, mask)
    monkeypatch.undo()
    kept = sum(getattr(stream.reading(), name).nbytes for name in ("columns", "means", "fired"))
    assert meter.peak + max(arrays) - 2 * kept <= memory * 2**20
    same(stream.reading(), expected(values, wide), atol=1e-4)


def test_what_stays_between_batches_is_what_fired() -> None:
    dictionary, values = Small(width=2048, bias=-2.5), texts(200, longest=6)
    stream = FeatureStream(dictionary, "rare")
    with MemoryMeter() as meter:
        for start in range(0, 200, 20):
            stream_through(stream, values, order=list(range(start, start + 20)), size=20)
    reading = stream.reading()
    entries, n = len(reading.columns), 200
    assert entries < 0.05 * n * 2048
    assert meter.live <= entries * 12 + n * (16 + 8 * D) + 10 * (8 * 21 + 8 * D + 8 * 20) + 4096


# ---------------------------------------------------------------------------------------------------- parts and errors


def test_parts_of_several_ranks_are_the_whole() -> None:
    dictionary, values = exact(Small()), exact(texts())
    whole = stream_through(FeatureStream(dictionary, "small"), values).reading()
    shares = [list(range(rank, 9, 2)) for rank in (0, 1)]
    parts = [stream_through(FeatureStream(dictionary, "small"), values, order=rows).reading() for rows in shares]
    order = torch.tensor(shares[0] + shares[1]).argsort()
    equal(FeatureReading.merge(parts, order), whole)
    equal(FeatureReading.merge([whole], range(9)), whole)
    shuffled = FeatureReading.merge([whole], [8, 0, 3, 2, 1, 7, 6, 5, 4])
    torch.testing.assert_close(shuffled.dense(range(F)), whole.dense(range(F))[[8, 0, 3, 2, 1, 7, 6, 5, 4]])


def test_dense_columns_come_as_asked() -> None:
    reading = stream_through(FeatureStream(Small(), "small"), texts()).reading()
    whole = reading.dense(range(F))
    assert torch.equal(reading.dense([3, 30, 3]), whole[:, [3, 30, 3]]) and reading.dense([]).shape == (9, 0)
    for feature in (-1, F):
        with pytest.raises(MeasurementError, match=rf"feature {feature}: expected 0\.\.39"):
            reading.dense([0, feature])


def test_parts_that_do_not_belong_together_are_refused() -> None:
    reading = stream_through(FeatureStream(Small(), "small"), texts()).reading()
    other = stream_through(FeatureStream(Small(width=41), "other"), texts()).reading()
    with pytest.raises(MeasurementError, match="40 features of width 12 and 41 features of width 12"):
        FeatureReading.merge([reading, other], range(18))
    with pytest.raises(MeasurementError, match="expected parts of one dictionary"):
        FeatureReading.merge([reading, replace(reading, features=torch.tensor([1]))], range(18))
    with pytest.raises(MeasurementError, match="found none"):
        FeatureReading.merge([], [])
    for order in (range(8), [0, *range(8)], range(1, 10)):
        with pytest.raises(MeasurementError, match="an order of 9 texts, each once"):
            FeatureReading.merge([reading], order)


def _told(**attributes: Any) -> Any:
    dictionary = Small()
    for name, value in attributes.items():
        setattr(dictionary, name, value)
    return dictionary


@pytest.mark.parametrize(
    ("dictionary", "options", "message"),
    [
        (_told(d_model=16), {}, "expected activations of width 16, found 12"),
        (_told(W_dec=torch.zeros(F, 24)), {}, "expected activations of width 24, found 12"),
        (Small(d=7), {}, "cannot encode activations of width 12: mat1 and mat2"),
        (_Plain(lambda x: x[:, :5], lambda z: z), {}, "expected activations of width 5, found 12"),
        (Small(), {"width": 50}, "expected codes of width 50, found 40"),
        (Small(), {"features": [3, 40]}, "expected features below 40, found 40"),
        (_Plain(lambda x: (x, x)), {}, r"expected codes of shape \[1, F\], found tuple"),
        (_Plain(lambda x: x[:1]), {}, r"expected codes of shape \[\d+, 12\], found \[1, 12\]"),
        (_Plain(lambda x: x / x.gt(2.4).logical_not()), {}, "expected finite codes, found NaN or infinity"),
        (_Plain(lambda x: x, lambda z: z * torch.nan), {}, "expected finite reconstructions, found NaN or infinity"),
    ],
    ids=["d_model", "W_dec", "raises", "decodes", "width", "features", "tuple", "rows", "infinite", "decoded"],
)
def test_what_cannot_be_read_names_dictionary_and_hookpoint_after_the_pass(
    dictionary: Any, options: dict[str, Any], message: str
) -> None:
    stream = FeatureStream(dictionary, "other", "layers.3.resid_post", **options)
    stream_through(stream, texts())
    for _ in range(2):
        with pytest.raises(MeasurementError, match=rf"^dictionary 'other' at layers\.3\.resid_post: .*{message}"):
            stream.reading()


def test_texts_that_cannot_be_counted() -> None:
    stream = FeatureStream(Small(), "small")
    with pytest.raises(MeasurementError, match="expected texts to read, found none"):
        stream.reading()
    stream([], torch.zeros(0, 3, D), torch.zeros(0, 3))
    assert stream.part() is None
    stream_through(stream, texts(), order=[0, 1, 2])
    stream_through(stream, texts(), order=[3, 1])
    with pytest.raises(MeasurementError, match="expected every text once, found one twice"):
        stream.reading()
    empty = FeatureStream(Small(), "small")
    empty([0, 1], torch.zeros(2, 3, D), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(MeasurementError, match="found a text without"):
        empty.reading()
    for options in ({"memory": 0.0}, {"features": []}, {"features": [2, 2]}, {"features": [-1]}):
        with pytest.raises(MeasurementError, match="dictionary 'small': "):
            FeatureStream(Small(), "small", **options)


# ------------------------------------------------------------------------------------------------- in a measuring pass


def test_observers_get_each_batch_of_the_same_pass() -> None:
    model, prompts = make_model("llama"), make_prompts()
    plain = read_prompts(model, prompts, ["layers.0.resid_post"], batch_size=3, pad_token_id=0)
    seen: dict[int, Tensor] = {}
    streams = {name: FeatureStream(Small(d=32), "small") for name in ("layers.1.heads", "layers.0.resid_post")}

    def keep(rows: Any, values: Tensor, mask: Tensor) -> None:
        seen.update((row, values[i][mask[i]].clone()) for i, row in enumerate(rows))

    names = ["layers.0.resid_post", "layers.50%.heads"]
    found = read_prompts(
        model, prompts, names[:1], batch_size=3, pad_token_id=0, observers={**streams, "layers.50%.heads": keep}
    )
    assert list(found.means) == names[:1] and torch.equal(found.means[names[0]], plain.means[names[0]])
    assert sorted(seen) == list(range(len(prompts)))
    heads = streams["layers.1.heads"].reading()
    for row, prompt in enumerate(prompts):
        inputs = {"input_ids": torch.tensor([prompt.input_ids])}
        whole = capture(model, inputs, ["layers.1.heads"])["layers.1.heads"][0].flatten(1)
        torch.testing.assert_close(seen[row], whole[max(prompt.completion_start, 1) :], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.x_mean[row], seen[row].mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(streams["layers.0.resid_post"].reading().x_mean, plain.means[names[0]])


def test_one_forward_per_batch_and_no_layer_more_than_observers_need() -> None:
    from tiny_models import counting

    model, prompts = make_model("llama"), make_prompts(6)
    stream = FeatureStream(Small(d=32), "small")
    with counting(model.model.layers[1]) as reached, counting(model.model.layers[2]) as later:
        found = read_prompts(model, prompts, [], batch_size=2, pad_token_id=0, observers={"layers.1.mlp_out": stream})
    assert (len(reached), len(later)) == (3, 0) and dict(found.means) == {}
    assert len(stream.reading().tokens) == 6
    assert len(list(batches(prompts, batch_size=2, pad_token_id=0))) == 3
    with pytest.raises(HookpointError, match=r"layers 0\.\.2"):
        read_prompts(model, prompts, [], batch_size=2, pad_token_id=0, observers={"layers.9.mlp_out": stream})
