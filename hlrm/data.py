"""Histories and batches: the items a relation is built from, drawn on the model's device without a loop over users.

A history is at most P items of a user, as ids [B, P] and counts [B]: the first ``counts`` places are filled, the rest
hold id 0 and are masked wherever they are used. The item being scored never stands in its own training history.

How P of more items are chosen:

    random  without replacement. Every epoch shuffles each user's items once; a pair takes consecutive items of that
            order (cyclic) from a random place, which is a uniform subset for every single pair.
    unpop   with replacement, with probability proportional to 1 / train popularity, as published.
    last    the P items with the highest numbers, the same at every visit, as in the seed program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from gfml.ranking.sampling import TripleSampler, padded, seeded_generator

HISTORY_KINDS = ("random", "unpop", "last")


class History(NamedTuple):
    """Ids int64 [B, P], filled from the left, and how many are filled, int64 [B]."""

    ids: Tensor
    counts: Tensor

    @property
    def mask(self) -> Tensor:
        """bool [B, P]: which places are filled."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.counts[:, None]


class Histories:
    """Draws at most ``width`` entries of the rows of a binary CSR matrix [N, M]; see the module text.

    popularity [M]: for unpop, at least 1 where the matrix has entries.
    """

    def __init__(
        self,
        matrix: sp.csr_array,
        width: int,
        *,
        kind: str = "random",
        popularity: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in HISTORY_KINDS:
            raise ValueError(f"unknown history sampling {kind!r}: choose one of {', '.join(HISTORY_KINDS)}")
        if width < 0:
            raise ValueError(f"found a history width of {width}, wanted 0 or more")
        matrix = matrix if matrix.has_sorted_indices else matrix.sorted_indices()
        self.width, self.kind, self.device = width, kind, torch.device(device)
        self.num_columns = matrix.shape[1]
        self.start = torch.from_numpy(matrix.indptr[:-1].astype(np.int64)).to(self.device)
        self.degree = torch.from_numpy(np.diff(matrix.indptr).astype(np.int64)).to(self.device)
        self.items = torch.from_numpy(matrix.indices.astype(np.int64)).to(self.device)
        self._rows = torch.repeat_interleave(self.degree)
        if kind == "unpop":
            if popularity is None:
                raise ValueError("unpop needs the popularity of the columns")
            rarity = 1 / np.maximum(popularity, 1).astype(np.float64)
            ends = np.cumsum(rarity[matrix.indices])
            self._weight = torch.from_numpy(np.concatenate([[0.0], ends])).to(self.device)
            self._keys = self._rows * self.num_columns + self.items

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The items in an order that is random within every row: what ``order`` below takes. [nnz]"""
        if self.kind == "last":
            return self.items
        key = self._rows + torch.rand(len(self.items), generator=generator, device=self.device, dtype=torch.float64)
        return self.items[key.argsort()]

    def of_rows(self, rows: Tensor, generator: torch.Generator, order: Tensor) -> History:
        """A history of each row [B]; nothing is left out."""
        window = self._window(rows, self.width, generator, order)
        counts = self.degree[rows].clamp(max=self.width)
        if self.kind == "unpop" and self.width:
            long = self.degree[rows] > self.width
            window = torch.where(long[:, None], self._rare(rows, None, generator), window)
        return _padded(window, counts)

    def of_pairs(self, rows: Tensor, left_out: Tensor, generator: torch.Generator, order: Tensor) -> History:
        """A history of each row [B] without the entry ``left_out`` [B], which must be one of the row's."""
        window = self._window(rows, self.width + 1, generator, order)
        length = self.degree[rows].clamp(max=self.width + 1)
        # The entry left out gives its place to the last one; where it was not drawn, the last one goes.
        last = window.gather(1, (length - 1)[:, None])
        window = torch.where(window == left_out[:, None], last, window)[:, : self.width]
        if self.kind == "unpop" and self.width:
            long = self.degree[rows] - 1 > self.width
            window = torch.where(long[:, None], self._rare(rows, left_out, generator), window)
        return _padded(window, length - 1)

    def _window(self, rows: Tensor, width: int, generator: torch.Generator, order: Tensor) -> Tensor:
        """``width`` consecutive entries of each row, cyclic: [B, width]; a shorter row repeats after ``degree``."""
        degree, steps = self.degree[rows], torch.arange(width, device=self.device)
        if self.kind == "last":
            place = degree[:, None] - 1 - steps
        else:
            draw = torch.randint(2**31, (len(rows),), generator=generator, device=self.device)
            place = ((draw * degree) >> 31)[:, None] + steps
        place = place.remainder(degree[:, None].clamp_min(1)) + self.start[rows][:, None]
        # A row without entries reads its neighbour's; its count is 0.
        return order[place.clamp(max=max(len(order) - 1, 0))] if len(order) else torch.zeros_like(place)

    def _rare(self, rows: Tensor, left_out: Tensor | None, generator: torch.Generator) -> Tensor:
        """Draws with replacement, proportional to rarity: [B, P]. Rows need two entries if one is left out."""
        first, end = self.start[rows], self.start[rows] + self.degree[rows]
        below, total = self._weight[first], self._weight[end] - self._weight[first]
        draw = torch.rand((len(rows), self.width), generator=generator, device=self.device, dtype=torch.float64)
        if left_out is None:
            place = torch.searchsorted(self._weight, below[:, None] + draw * total[:, None], right=True) - 1
            return self.items[place.clamp(first[:, None], (end - 1).clamp_min(0)[:, None])]
        gap = torch.searchsorted(self._keys, rows * self.num_columns + left_out).clamp(max=len(self._keys) - 1)
        width = self._weight[gap + 1] - self._weight[gap]
        value = below[:, None] + draw * (total - width)[:, None]
        value = torch.where(value >= self._weight[gap][:, None], value + width[:, None], value)
        place = torch.searchsorted(self._weight, value, right=True) - 1
        place = place.clamp(first[:, None], (end - 1).clamp_min(0)[:, None])
        # Rounding may end on the entry that is left out: take its neighbour.
        aside = torch.where(gap + 1 < end, gap + 1, gap - 1).clamp_min(0)
        return self.items[torch.where(place == gap[:, None], aside[:, None], place)]


def _padded(window: Tensor, counts: Tensor) -> History:
    history = History(window, counts)
    return History(window.masked_fill(~history.mask, 0), counts)


def fixed_histories(
    matrix: sp.csr_array, width: int, seed: int, *, kind: str, popularity: np.ndarray, device: torch.device | str
) -> History:
    """The histories that judging uses: one draw for every row, a function of the seed. Ids [N, P], counts [N].

    Drawn on the CPU, so that a model is judged alike on every device.
    """
    histories = Histories(matrix, width, kind=kind, popularity=popularity)
    generator = seeded_generator("cpu", seed, 0, 7)
    order = histories.shuffled(generator)
    found = histories.of_rows(torch.arange(matrix.shape[0]), generator, order)
    return History(*(part.to(device) for part in found))


@dataclass(frozen=True)
class PairBatch:
    """Users [B], positives [B], negatives [B], histories of the users and, where a model asks, users of the items.

    audience: histories of the items (positives, then negatives): ids [2B, P] of users, counts [2B].
    weight: as in :class:`gfml.ranking.sampling.Triples`.
    """

    users: Tensor
    pos: Tensor
    neg: Tensor
    history: History
    audience: History | None = None
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.users)

    def rows(self, part: slice | Tensor) -> PairBatch:
        """The pairs at these places."""
        audience = None
        if self.audience is not None:
            both = (
                torch.stack([side[: len(self)][part], side[len(self) :][part]]).flatten(0, 1) for side in self.audience
            )
            audience = History(*both)
        history = History(*(side[part] for side in self.history))
        return PairBatch(self.users[part], self.pos[part], self.neg[part], history, audience)


class PairSampler:
    """Epochs of batches: every train pair once, shuffled, with one uniform negative and a fresh history.

    An epoch is a function of (seed, epoch). with_audience: also draw users of both items (never the pair's own user).
    constant: as in :class:`gfml.ranking.sampling.TripleSampler`.
    """

    def __init__(
        self,
        train: sp.csr_array,
        *,
        batch_size: int,
        width: int,
        seed: int,
        kind: str = "random",
        with_audience: bool = False,
        device: torch.device | str = "cpu",
        constant: bool = False,
    ) -> None:
        self.constant = constant
        self.triples = TripleSampler(train, batch_size=batch_size, seed=seed, scheme="interaction", device=device)
        popularity = np.bincount(train.indices, minlength=train.shape[1])
        self.histories = Histories(train, width, kind=kind, popularity=popularity, device=device)
        self.audiences = None
        if with_audience:
            self.audiences = Histories(sp.csr_array(train.T.tocsr()), width, device=device)
        self.seed, self.device = seed, torch.device(device)

    def epoch(self, epoch: int) -> PairBatches:
        """The batches of one epoch; ``len`` is their number."""
        return PairBatches(self, epoch)


class PairBatches:
    """The batches of one epoch. Iterating again yields the same batches."""

    def __init__(self, sampler: PairSampler, epoch: int) -> None:
        self._sampler, self._epoch = sampler, epoch
        self._triples = sampler.triples.epoch(epoch)

    def __len__(self) -> int:
        return len(self._triples)

    def __iter__(self) -> Iterator[PairBatch]:
        sampler = self._sampler
        generator = seeded_generator(sampler.device, sampler.seed, self._epoch, 2)
        order = sampler.histories.shuffled(generator)
        audience_order = sampler.audiences.shuffled(generator) if sampler.audiences is not None else None
        for triple in self._triples:
            history = sampler.histories.of_pairs(triple.users, triple.pos, generator, order)
            audience = None
            if sampler.audiences is not None:
                known = sampler.audiences.of_pairs(triple.pos, triple.users, generator, audience_order)
                other = sampler.audiences.of_rows(triple.neg, generator, audience_order)
                audience = History(torch.cat([known.ids, other.ids]), torch.cat([known.counts, other.counts]))
            batch = PairBatch(triple.users, triple.pos, triple.neg, history, audience)
            yield padded(batch, sampler.triples.batch_size) if sampler.constant and len(self) > 1 else batch
