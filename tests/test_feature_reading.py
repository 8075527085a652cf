"""Features read in the pass that reads a run's texts: which texts count, ranks' parts as one, what is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import counting, make_model, make_prompts
from torch import Tensor

from interp_rlhf import feature_reading
from interp_rlhf.activations.feature_sums import FeatureReading, FeatureStream
from interp_rlhf.activations.prompt_sets import PromptSet
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World, share
from interp_rlhf.errors import MeasurementError
from interp_rlhf.feature_reading import check_streams, gather_features
from interp_rlhf.plan import Plan, TextTable
from interp_rlhf.reading import Reading, read_table

ALONE, D, F = World(), 32, 24
HOOKPOINTS = ("layers.0.resid_post",)


class Grid:
    """Codes in steps of 1/8: activations that differ in their last bits, as in other batches, give the same codes."""

    def __init__(self, seed: int = 0) -> None:
        self.into = torch.randn(D, F, generator=torch.Generator().manual_seed(seed))

    def encode(self, x: Tensor) -> Tensor:
        return ((x @ self.into - 0.3) * 8).round().relu() / 8

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.into.T / D


def setting(n: int = 11, audited: int = 5, scored: int = 4) -> tuple[Any, TextTable, Plan, InterpConfig]:
    """A table of which the first texts are scored, and every second one is an audit text."""
    prompts = sorted(make_prompts(n), key=lambda prompt: prompt.id)
    table = TextTable(tuple(prompts), frozenset(prompt.id for prompt in prompts[:scored]))
    audit = PromptSet("test", "named", tuple(prompts[1::2][:audited]))
    plan = Plan(
        hookpoints=HOOKPOINTS, audit=audit, concepts=(), directions=(), refused=(), pad_token_id=0,
        skip_ids=frozenset(), max_length=64, behaviour=True,
    )  # fmt: skip
    config = InterpConfig.from_mapping({"prompts": {"batch_size": 3, "tokens": "all"}})
    return make_model("llama"), table, plan, config


def streams() -> list[FeatureStream]:
    return [
        FeatureStream(Grid(), "early", "layers.0.resid_post"),
        FeatureStream(Grid(1), "other seed", "layers.0.resid_post", features=[3, 8]),
        FeatureStream(Grid(2), "late", "layers.1.mlp_out"),
    ]


def equal(one: FeatureReading, two: FeatureReading) -> None:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=field.name)


def alone(stream: FeatureStream, prompts: Any, model: Any) -> FeatureReading:
    """One unpadded text at a time, straight from the model's modules."""
    module = model.model.layers[0] if stream.hookpoint.endswith("resid_post") else model.model.layers[1].mlp
    for row, prompt in enumerate(prompts):
        seen: list[Any] = []
        handle = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(torch.tensor([prompt.input_ids]))
        handle.remove()
        value = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
        stream([row], value, (torch.arange(value.shape[1]) > 0)[None])
    return stream.reading()


def test_audit_texts_are_read_in_the_same_pass_and_no_others() -> None:
    model, table, plan, config = setting()
    plain = read_table(model, table, plan, config, ALONE)
    with counting(model.model.layers[0]) as early, counting(model.model.layers[2]) as last:
        found = read_table(model, table, plan, config, ALONE, streams=streams())
    assert (len(early), len(last)) == (2 + 3, 2)  # batches of three of 4 scored and 7 other texts
    assert torch.equal(found.means[HOOKPOINTS[0]], plain.means[HOOKPOINTS[0]]) and list(found.means) == [*HOOKPOINTS]
    torch.testing.assert_close(found.log_probs, plain.log_probs, equal_nan=True)
    assert list(found.features) == ["early", "other seed", "late"] and plain.features == {}
    for stream in streams():
        equal(found.features[stream.name], alone(stream, plan.audit.prompts, model))
    torch.testing.assert_close(
        found.features["early"].x_mean, found.means[HOOKPOINTS[0]][table.rows(plan.audit.prompts)]
    )
    assert found.features["other seed"].features.tolist() == [3, 8]


def test_other_texts_may_be_named_and_padding_or_order_change_nothing() -> None:
    model, table, plan, config = setting()
    texts = [table.prompts[row] for row in (7, 0, 3)]
    found = read_table(model, table, plan, config, ALONE, streams=streams(), texts=texts)
    for stream in streams():
        equal(found.features[stream.name], alone(stream, texts, model))
    turned = read_table(
        model, table, plan, config, ALONE, streams=streams(), texts=texts, side="left", longest_first=False
    )
    for name, reading in turned.features.items():
        equal(reading, found.features[name])


def test_texts_that_the_table_does_not_have_are_missed() -> None:
    model, table, plan, config = setting()
    strange = Prompt((5, 6, 7), 1, "strange")
    with pytest.raises(MeasurementError, match="expected 2 texts over all ranks, each once, found 1"):
        read_table(model, table, plan, config, ALONE, streams=streams(), texts=[table.prompts[0], strange])
    with pytest.raises(MeasurementError, match="expected 2 texts over all ranks, each once, found 1"):
        read_table(model, table, plan, config, ALONE, streams=streams(), texts=[table.prompts[0]] * 2)


def test_a_dictionary_that_does_not_fit_is_named_after_the_pass() -> None:
    model, table, plan, config = setting()
    narrow = SimpleNamespace(encode=lambda x: x, decode=lambda z: z, d_model=16)
    with pytest.raises(
        MeasurementError, match=r"dictionary 'narrow' at layers\.1\.heads: expected activations of width 16, found 32"
    ):
        read_table(model, table, plan, config, ALONE, streams=[FeatureStream(narrow, "narrow", "layers.1.heads")])


def test_streams_that_cannot_be_told_apart_or_have_read() -> None:
    one, two = FeatureStream(Grid(), "a", "embed"), FeatureStream(Grid(), "a", "layers.0.heads")
    with pytest.raises(MeasurementError, match="dictionary 'a' at embed: expected dictionaries of different names"):
        check_streams([one, two])
    with pytest.raises(MeasurementError, match="dictionary 'b': expected a hookpoint"):
        check_streams([FeatureStream(Grid(), "b")])
    one([4], torch.ones(1, 2, D), torch.ones(1, 2))
    with pytest.raises(MeasurementError, match="expected a new stream, found one that read 1 texts"):
        check_streams([one])
    check_streams([two])


# -------------------------------------------------------------------------------------------------------------- ranks


class _Ranks:
    """Every rank of one call after another: what each puts in comes out for all, in a second round."""

    def __init__(self) -> None:
        self.calls: list[dict[int, Any]] = []
        self.rank, self.turn = 0, 0

    def all_gather_object(self, into: list[Any], own: Any, group: Any = None) -> None:
        if self.turn == len(self.calls):
            self.calls.append({})
        self.calls[self.turn][self.rank] = own
        into[:] = [self.calls[self.turn].get(rank, own) for rank in range(len(into))]
        self.turn += 1

    all_gather = all_gather_object


def on_every_rank(size: int, work: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    ranks = _Ranks()
    for name in ("all_gather_object", "all_gather"):
        monkeypatch.setattr(feature_reading.dist, name, getattr(ranks, name))
    for last in (False, True):
        found = []
        for rank in range(size):
            ranks.rank, ranks.turn = rank, 0
            try:
                found.append(work(World(rank, size)))
            except MeasurementError as error:
                if last:
                    found.append(str(error))
    return found


def part_of(rows: list[int], prompts: list[Prompt], model: Any) -> FeatureReading | None:
    stream = FeatureStream(Grid(), "early", "layers.0.resid_post")
    return alone(stream, [prompts[row] for row in rows], model) if rows else None


@pytest.mark.parametrize(("n", "size"), [(7, 2), (6, 3), (2, 3)])
def test_parts_of_ranks_are_the_whole_on_every_rank(n: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make_model("llama"), make_prompts(n)
    whole = part_of(list(range(n)), prompts, model)
    assert whole is not None

    def work(world: World) -> FeatureReading:
        real = list(range(world.rank, n, world.size))
        assert share(n, world)[: len(real)] == real  # rows after these only pad
        return gather_features(part_of(real, prompts, model), n, world)

    for reading in on_every_rank(size, work, monkeypatch):
        equal(reading, whole)


@pytest.mark.parametrize(("n", "scored"), [(5, 2), (4, 1)])
def test_a_table_on_two_ranks_counts_every_text_once(n: int, scored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both shares of a rank, of scored and of other texts, may end in a row that only pads it: the first text's."""
    model, table, plan, config = setting(n, n, scored)
    plan = replace(plan, audit=PromptSet("test", "named", table.prompts))

    def work(world: World) -> FeatureReading:
        stream = FeatureStream(Grid(), "early", "layers.0.resid_post")
        return read_table(model, table, plan, config, world, streams=[stream]).features["early"]

    whole = work(ALONE)
    for reading in on_every_rank(2, work, monkeypatch):
        equal(reading, whole)


def test_rows_may_lie_anywhere_and_must_be_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make_model("llama"), make_prompts(5)
    rows = [[4, 0], [1, 2, 3]]
    whole = part_of(list(range(5)), prompts, model)
    assert whole is not None

    def work(world: World, n: int = 5) -> FeatureReading:
        mine = rows[world.rank]
        return gather_features(part_of(mine, prompts, model), n, world, torch.tensor(mine))

    for reading in on_every_rank(2, work, monkeypatch):
        equal(reading, whole)
    for n in (4, 6):
        messages = on_every_rank(2, lambda world, n=n: work(world, n), monkeypatch)
        assert messages == [f"feature readings: expected {n} texts over all ranks, each once, found 5"] * 2


def test_alone_nothing_is_sent() -> None:
    whole = part_of([0, 1, 2], make_prompts(3), make_model("llama"))
    assert whole is not None
    equal(gather_features(whole, 3, ALONE), whole)
    assert Reading({}, torch.zeros(0), 0, 0.0).features == {}
    assert replace(whole, l0=3).l0 == 3
