"""Where chosen features fire most: the leading texts of each, a histogram of its codes, and its codes per token id.

Read while the model runs, batch by batch; of the codes only this remains. Counts are exact and the leading texts those
of all texts together, however these are batched, ordered and padded; sums of codes are float64, so that another order
of the texts can change their last bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from torch import Tensor, nn

from interp_rlhf.activations.feature_sums import Codes, FeatureStream
from interp_rlhf.activations.prompts import Prompt, Tokens, content_tokens
from interp_rlhf.activations.token_sums import as_dense
from interp_rlhf.errors import MeasurementError

#: Edges of the histograms' bins, two to an octave. They depend on nothing that is read: any two histograms compare.
EDGES: tuple[float, ...] = tuple(2.0 ** (step / 2) for step in range(-32, 33))


# ------------------------------------------------------------------------------------------------------- the results


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """One text on which a feature fires.

    Attributes:
        row: which text.
        peak: highest code, above 0.
        position: index into the text's ``input_ids`` of the token with that code, the first one where several have it.
        positions: indices ``[n]`` of all content tokens, ascending.
        codes: the feature's codes on them ``[n]``.
    """

    row: int
    peak: float
    position: int
    positions: Int64[Tensor, " n"]
    codes: Float32[Tensor, " n"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenCodes:
    """Codes of K features on content tokens, summed up by token id, of which U were read.

    Attributes:
        ids: token ids ``[U]``, ascending.
        counts: how many content tokens have the id ``[U]``, each at least 1.
        sums: sum of the codes on these ``[U, K]``.
        squares: sum of the squared codes over all ids ``[K]``.
    """

    ids: Int64[Tensor, " U"]
    counts: Int64[Tensor, " U"]
    sums: Float64[Tensor, "U K"]
    squares: Float64[Tensor, " K"]

    @property
    def means(self) -> Float64[Tensor, "U K"]:
        """Mean code per token id; tokens on which a feature did not fire count as 0."""
        return self.sums / self.counts.unsqueeze(1)

    @property
    def tokens(self) -> int:
        """Content tokens in all."""
        return int(self.counts.sum())

    @staticmethod
    def of(ids: Int64[Tensor, " n"], codes: Float[Tensor, "n K"]) -> TokenCodes:
        """From n tokens and their codes.

        >>> found = TokenCodes.of(torch.tensor([7, 3, 7]), torch.tensor([[1.0], [0.0], [2.0]]))
        >>> found.ids.tolist(), found.means.tolist(), found.squares.tolist()
        ([3, 7], [[0.0], [1.5]], [5.0])
        """
        known, place, counts = ids.unique(return_inverse=True, return_counts=True)
        codes = codes.double()
        sums = torch.zeros(len(known), codes.shape[1], dtype=torch.float64).index_add_(0, place, codes)
        return TokenCodes(known, counts, sums, codes.square().sum(0))

    @staticmethod
    def merge(parts: Sequence[TokenCodes]) -> TokenCodes:
        """Codes of the same features on different tokens as one; at least one part."""
        known, place = torch.cat([part.ids for part in parts]).unique(return_inverse=True)
        every, sums = torch.cat([part.counts for part in parts]), torch.cat([part.sums for part in parts])
        return TokenCodes(
            ids=known,
            counts=torch.zeros_like(known).index_add_(0, place, every),
            sums=sums.new_zeros(len(known), sums.shape[1]).index_add_(0, place, sums),
            squares=torch.stack([part.squares for part in parts]).sum(0),
        )


@dataclass(frozen=True, slots=True, eq=False)
class FeatureContexts:
    """What :class:`TopContexts` found about K features; tensors on the CPU.

    Attributes:
        features: which ``[K]``, ascending.
        k: how many texts were asked for.
        top: per feature its texts with the highest codes, the highest first, ties by row; fewer than asked for where it
            is above 0 on fewer.
        histogram: how many codes lie in each bin ``[K, len(EDGES) + 1]``: above 0 and below ``EDGES[0]``, from
            ``EDGES[b - 1]`` to below ``EDGES[b]``, and from ``EDGES[-1]``.
        negative: how many codes are below 0 ``[K]``.
        texts, tokens: how many were read.
        fit: codes per token id on the texts that were not held out.
        held: the same on those held out.
    """

    features: Int64[Tensor, " K"]
    k: int
    top: tuple[tuple[Context, ...], ...]
    histogram: Int64[Tensor, "K bins"]
    negative: Int64[Tensor, " K"]
    texts: int
    tokens: int
    fit: TokenCodes
    held: TokenCodes

    def column(self, feature: int) -> int:
        """Place of a feature among :attr:`features`.

        Raises:
            MeasurementError: it was not read.
        """
        found = (self.features == feature).nonzero().flatten().tolist()
        if not found:
            raise MeasurementError(f"feature {feature}: expected one of the {len(self.features)} that were read")
        return found[0]

    @staticmethod
    def merge(parts: Sequence[FeatureContexts], rows: Sequence[Sequence[int]]) -> FeatureContexts:
        """What was found of the same features on different texts, as one.

        Args:
            parts: one or more, e.g. every rank's.
            rows: for each part, which row of the whole each of its rows is.

        Raises:
            MeasurementError: parts of different features or ``k``; rows that name a text twice or are too few.
        """
        kinds = {(part.k, tuple(part.features.tolist())) for part in parts}
        every = [row for own in rows for row in own]
        if len(kinds) != 1 or len(rows) != len(parts):
            raise MeasurementError(f"feature contexts: expected parts of the same features, found {len(kinds)} kinds")
        if len(set(every)) != len(every) or any(part.texts > len(own) for part, own in zip(parts, rows, strict=True)):
            raise MeasurementError(f"feature contexts: expected rows of all texts, each once, found {len(every)} rows")
        columns: list[list[Context]] = [[] for _ in parts[0].top]
        for part, own in zip(parts, rows, strict=True):
            for column, kept in zip(columns, part.top, strict=True):
                column += [replace(context, row=int(own[context.row])) for context in kept]
        first = [sorted(column, key=lambda context: (-context.peak, context.row)) for column in columns]
        return FeatureContexts(
            features=parts[0].features,
            k=parts[0].k,
            top=tuple(tuple(column[: parts[0].k]) for column in first),
            histogram=torch.stack([part.histogram for part in parts]).sum(0),
            negative=torch.stack([part.negative for part in parts]).sum(0),
            texts=sum(part.texts for part in parts),
            tokens=sum(part.tokens for part in parts),
            fit=TokenCodes.merge([part.fit for part in parts]),
            held=TokenCodes.merge([part.held for part in parts]),
        )


# -------------------------------------------------------------------------------------------------------- the stream


class _Recorder(nn.Module):
    """A dictionary that keeps the codes it gives of some features; all else is the dictionary's own."""

    def __init__(self, dictionary: Any) -> None:
        super().__init__()
        self.inner = dictionary
        self.codes: list[Tensor] = []
        self._selects = "features" in list(inspect.signature(dictionary.encode).parameters)[1:]
        self._first: Tensor | None = None

    def encode(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """Codes ``[n, K]`` of ``features``; all ``[1, F]`` of the very first token, which tell F."""
        if features is None:
            self._first = self.inner.encode(x) if self._first is None else self._first
            return self._first
        z = as_dense(self.inner.encode(x, features=features) if self._selects else self.inner.encode(x))
        z = z if self._selects else z[:, features]
        self.codes.append(z.detach().float().cpu())
        return z

    def decode(self, z: Tensor) -> Tensor:
        """As the dictionary decodes."""
        return self.inner.decode(z)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner") if "inner" in self._modules else self.__dict__["inner"], name)


class TopContexts:
    """Keeps where features fire most, over the batches of one pass: an observer for ``read_prompts``.

    As with :class:`~interp_rlhf.activations.feature_sums.FeatureStream`, what is wrong with a batch is raised after the
    pass, by :meth:`contexts`. Per feature are kept the codes of ``k`` texts, one histogram, and 16 bytes for each
    distinct content token id of ``prompts``.

    Args:
        dictionary, name, hookpoint: as for ``FeatureStream``.
        features: which, a few hundred at most; ``encode(x, features=…)`` is called where the dictionary takes that.
        prompts: the texts that the rows count through.
        k: how many texts to keep of each feature.
        held_out: rows whose codes per token id are kept apart, so that a label made from the others can be tested.
        tokens, skip_ids: as ``read_prompts`` gets them.
        memory: MiB that reading a batch may take beyond the dictionary, what is kept and the batch's codes of
            ``features``.

    Raises:
        MeasurementError: ``k`` or ``memory`` is not positive, a row held out does not exist, or features are not
            different ones of the dictionary.
        PromptError: a text has no content token.
    """

    def __init__(
        self,
        dictionary: Codes,
        name: str,
        hookpoint: str,
        features: Sequence[int] | Int[Tensor, " K"],
        *,
        prompts: Sequence[Prompt],
        k: int = 8,
        held_out: Collection[int] = (),
        tokens: Tokens = "completion",
        skip_ids: frozenset[int] = frozenset(),
        memory: float = 64.0,
    ) -> None:
        self.name, self.hookpoint = name, hookpoint
        self.features = torch.as_tensor(features, dtype=torch.long).sort().values
        self._recorder, self._memory = _Recorder(dictionary), memory
        self.place = self._stream().place
        if k < 1:
            raise MeasurementError(f"{self.place}: k: expected at least 1 text to keep, found {k}")
        self._prompts, self._held = prompts, frozenset(held_out)
        strange = sorted(self._held - set(range(len(prompts))))
        if strange:
            raise MeasurementError(f"{self.place}: held_out: expected rows 0..{len(prompts) - 1}, found {strange[0]}")
        self._where = [torch.tensor(content_tokens(prompt, tokens, skip_ids)).nonzero().flatten() for prompt in prompts]
        self._tokens = tokens
        self._ids = torch.tensor(sorted({id for row in range(len(prompts)) for id in self._content(row).tolist()}))
        self._seen: set[int] = set()
        self._problem: MeasurementError | None = None
        width, known = len(self.features), len(self._ids)
        self._peak = np.full((width, k), -np.inf)
        self._row = np.full((width, k), np.iinfo(np.int64).max)
        self._codes: list[dict[int, Tensor]] = [{} for _ in range(width)]
        self._histogram = torch.zeros(width, len(EDGES) + 1, dtype=torch.long)
        self._negative = torch.zeros(width, dtype=torch.long)
        self._counts = torch.zeros(2, known, dtype=torch.long)
        self._sums = torch.zeros(2, known, width, dtype=torch.float64)
        self._squares = torch.zeros(2, width, dtype=torch.float64)

    @property
    def rows(self) -> Int64[Tensor, " N"]:
        """The rows read so far, ascending."""
        return torch.tensor(sorted(self._seen), dtype=torch.long)

    def __call__(self, rows: Sequence[int], values: Float[Tensor, "B T d"], content_mask: Tensor) -> None:
        """Take in a batch: values of the texts ``rows``, of which the marked tokens ``[B, T]`` count."""
        if self._problem is not None or not len(rows):
            return
        try:
            self._take(rows, values, content_mask.bool())
        except MeasurementError as problem:  # raised by contexts()
            self._problem = problem

    def contexts(self) -> FeatureContexts:
        """What was found.

        Raises:
            MeasurementError: nothing was read; a text came twice or is none of ``prompts``; its marked tokens are not
                its content tokens; or what ``FeatureStream`` refuses.
        """
        if self._problem is not None:
            raise self._problem
        if not self._seen:
            raise MeasurementError(f"{self.place}: expected texts to read, found none")
        return FeatureContexts(
            features=self.features,
            k=self._peak.shape[1],
            top=tuple(self._kept(column) for column in range(len(self.features))),
            histogram=self._histogram.clone(),
            negative=self._negative.clone(),
            texts=len(self._seen),
            tokens=int(self._counts.sum()),
            fit=self._per_id(0),
            held=self._per_id(1),
        )

    # ------------------------------------------------------------------------------------------------------ one batch

    def _stream(self) -> FeatureStream:
        """Chunks a batch's tokens, asks the dictionary and checks its answers."""
        features, memory = self.features, self._memory
        return FeatureStream(self._recorder, self.name, self.hookpoint, features=features, memory=memory)

    def _content(self, row: int) -> Tensor:
        return torch.tensor(self._prompts[row].input_ids)[self._where[row]]

    @torch.no_grad()
    def _take(self, rows: Sequence[int], values: Tensor, mask: Tensor) -> None:
        for row, marked in zip(rows, mask.cpu(), strict=True):
            self._check(row, marked)
        self._recorder.codes.clear()
        stream = self._stream()
        stream(rows, values, mask)
        stream.reading()
        z = torch.cat(self._recorder.codes)
        self._recorder.codes.clear()
        self._seen.update(rows)
        self._count(z)
        self._sum(rows, z)
        self._rank(rows, z)

    def _check(self, row: int, marked: Tensor) -> None:
        if not 0 <= row < len(self._prompts):
            raise MeasurementError(f"{self.place}: expected rows of {len(self._prompts)} prompts, found row {row}")
        if row in self._seen:
            raise MeasurementError(f"{self.place}: expected every text once, found row {row} twice")
        where, found = self._where[row], marked.nonzero().flatten()
        if len(found) != len(where) or bool((found - where != found[0] - where[0]).any()):
            raise MeasurementError(
                f"{self.place}: prompt {self._prompts[row].id}: expected its {len(where)} content tokens "
                f"(tokens={self._tokens!r}) to be marked, found {len(found)} marked tokens"
            )

    def _count(self, z: Tensor) -> None:
        token, column = (z > 0).nonzero(as_tuple=True)
        bins = torch.bucketize(z[token, column], torch.tensor(EDGES), right=True)
        cells = torch.bincount(column * (len(EDGES) + 1) + bins, minlength=self._histogram.numel())
        self._histogram += cells.view_as(self._histogram)
        self._negative += (z < 0).sum(0)

    def _sum(self, rows: Sequence[int], z: Tensor) -> None:
        start = 0
        for row in rows:
            part, ids = int(row in self._held), torch.searchsorted(self._ids, self._content(row))
            codes = z[start : start + len(ids)].double()
            self._counts[part] += torch.bincount(ids, minlength=len(self._ids))
            self._sums[part].index_add_(0, ids, codes)
            self._squares[part] += codes.square().sum(0)
            start += len(ids)

    def _rank(self, rows: Sequence[int], z: Tensor) -> None:
        pieces = z.split([len(self._where[row]) for row in rows])
        peak = np.stack([piece.max(0).values.double().numpy() for piece in pieces], axis=1)
        every = np.concatenate([self._peak, np.where(peak > 0, peak, -np.inf)], axis=1)
        names = np.concatenate([self._row, np.broadcast_to(np.array(rows), peak.shape)], axis=1)
        k = self._peak.shape[1]
        order = np.lexsort((names, -every), axis=1)[:, :k]
        self._peak, self._row = np.take_along_axis(every, order, axis=1), np.take_along_axis(names, order, axis=1)
        for column in np.flatnonzero((order >= k).any(axis=1)):
            before, self._codes[column] = self._codes[column], {}
            for place, row in zip(order[column].tolist(), self._row[column].tolist(), strict=True):
                if np.isfinite(every[column, place]):
                    new = place >= k
                    self._codes[column][row] = pieces[place - k][:, column].clone() if new else before[row]

    # --------------------------------------------------------------------------------------------------- what remains

    def _kept(self, column: int) -> tuple[Context, ...]:
        found = []
        for peak, row in zip(self._peak[column].tolist(), self._row[column].tolist(), strict=True):
            if np.isfinite(peak):
                codes, where = self._codes[column][row], self._where[row]
                found.append(Context(row, peak, int(where[codes.argmax()]), where, codes))
        return tuple(found)

    def _per_id(self, part: int) -> TokenCodes:
        read = self._counts[part] > 0
        return TokenCodes(
            self._ids[read], self._counts[part][read], self._sums[part][read], self._squares[part].clone()
        )
