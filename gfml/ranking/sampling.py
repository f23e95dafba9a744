"""Training triples and negatives: vectorised, on the model's device, reproducible epoch by epoch.

An epoch is a function of (seed, epoch number) alone: a resumed run draws what the uninterrupted run would
have drawn, and the number of epochs asked for does not alter earlier ones.

Schemes (``scheme``), for a train matrix with T pairs over U users:

    user         T draws of a uniform user (with replacement), then a uniform positive of that user; draws of
                 users without positives are left out. The published LightGCN Python sampler.
    interaction  every train pair once, shuffled.
    per_user     floor(T / U) uniform positives for every user, shuffled. The published C++ sampler.

Each positive gets W negatives among the items the user has not in train (test items may be drawn):

    uniform      every such item alike.
    popularity   in proportion to the number of train pairs of the item; items without any are never drawn.
    train-items  every such item that occurs in train alike (MMRec's sampler).
    two-stage    :class:`TwoStageSampler`: popular candidates, then those near the positive.

A user for whom no item is left can have no negative and is left out; the number of such users is ``num_saturated``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.base.errors import UserError
from gfml.data.interactions import column_counts

SCHEMES = ("user", "interaction", "per_user")
NEGATIVES = ("uniform", "popularity", "train-items")
NEGATIVES_PER_DRAW = 1 << 21
LOOKUPS_PER_BLOCK = 1 << 16
# A key and its share of the hashed bitmap; while they are built, twice as much is taken.
BYTES_OF_A_PAIR = 16
# After so many rejections in a row a slot is filled from the list of all free items.
ROUNDS = 64
# Entries of a block of weights, float64.
WEIGHTS_PER_BLOCK = 1 << 22


class PairSet:
    """Exact membership of (user, item) pairs, for rejecting false negatives, on one device.

    A bitmap of U x I bits when it fits the budget, or on a CPU is no larger than the rest would be (one gather per
    query), else a binary search in the sorted int64 keys user * I + item behind a small hashed bitmap that settles most
    queries at once.
    """

    def __init__(self, matrix: sp.csr_array, device: torch.device | str = "cpu", budget_mb: int = 512) -> None:
        self.num_users, self.num_items = matrix.shape
        cells, on_cpu = self.num_users * self.num_items, torch.device(device).type == "cpu"
        self._exact = cells // 8 <= max(budget_mb << 20, BYTES_OF_A_PAIR * matrix.nnz if budget_mb and on_cpu else 0)
        if self._exact and on_cpu:
            from gfml.kernels.bits import set_bits  # not before it is needed: it imports numba

            found = np.zeros(cells // 8 + 1, np.uint8)
            set_bits(matrix.indptr, matrix.indices, self.num_items, found)
            self._map = torch.from_numpy(found)
            return
        users = np.repeat(np.arange(self.num_users, dtype=np.int64), np.diff(matrix.indptr))
        keys = users * self.num_items + matrix.indices.astype(np.int64)
        # Rows need not list their items in order; the binary search needs sorted keys.
        self._keys = torch.from_numpy(keys if matrix.has_sorted_indices else np.sort(keys)).to(device)
        # Sixteen times as many bits as pairs leave about 6 % of the queries to the binary search.
        self._bits = cells if self._exact else 1 << max(20, int(np.ceil(np.log2(16 * max(1, len(users))))))
        slots = torch.unique(self._slot(self._keys))
        # NumPy asks the system for large pages, which random reads of many bytes need; torch does not.
        self._map = torch.from_numpy(np.zeros(self._bits // 8 + 1, dtype=np.uint8)).to(device)
        # Slots are distinct, so adding bit values sets bits.
        self._map.index_put_((slots >> 3,), _bit(slots), accumulate=True)

    def contains(self, users: Tensor, items: Tensor) -> Tensor:
        """Bool, shaped like the broadcast of integer ids ``users`` and ``items``."""
        users, items = torch.broadcast_tensors(users, items)
        if users.device.type != "cpu" or users.numel() <= LOOKUPS_PER_BLOCK:
            return self._contains(users, items)
        # Temporaries that stay in the cache cost half as much as those of a whole epoch.
        hit = torch.empty(users.shape, dtype=torch.bool)
        rows = max(1, LOOKUPS_PER_BLOCK // max(1, users[0].numel()))
        for out, chosen, wanted in zip(hit.split(rows), users.split(rows), items.split(rows)):
            out.copy_(self._contains(chosen, wanted))
        return hit

    def _contains(self, users: Tensor, items: Tensor) -> Tensor:
        keys = users.long() * self.num_items + items
        if not self._exact and users.device.type != "cpu":
            # Elsewhere the possible hits are not picked out: learning their number would stall the device.
            position = torch.searchsorted(self._keys, keys).clamp_(max=max(len(self._keys) - 1, 0))
            return self._keys[position] == keys if len(self._keys) else torch.zeros_like(keys, dtype=torch.bool)
        slots = self._slot(keys)
        byte = self._map.index_select(0, (slots >> 3).view(-1)).view(slots.shape)
        hit = (byte >> (slots & 7).to(torch.uint8)) & 1 != 0
        if self._exact:
            return hit
        # Most queries end here; only the possible hits are searched.
        found = hit.view(-1).nonzero().squeeze(1)
        wanted = keys.reshape(-1)[found]
        position = torch.searchsorted(self._keys, wanted).clamp_(max=max(len(self._keys) - 1, 0))
        hit.view(-1)[found] = self._keys[position] == wanted
        return hit

    def _slot(self, keys: Tensor) -> Tensor:
        if self._exact:
            return keys
        # Multiplicative hashing (Knuth): the top bits of key * odd constant, modulo 2^64.
        shift = 64 - self._bits.bit_length() + 1
        return ((keys * -7046029254386353131) >> shift) & (self._bits - 1)


class FreeItems:
    """Draws of items that a user has not, without rejection: one search a draw, whatever share of the items is taken.

    weights: whole numbers >= 0 [I]; an item is drawn in proportion. On the line of all weights laid end to end a user's
    items are gaps; a draw counts along what is left, and a search in the gaps' places says how many lie before it.
    """

    def __init__(self, matrix: sp.csr_array, weights: np.ndarray, device: torch.device) -> None:
        matrix = matrix if matrix.has_sorted_indices else matrix.sorted_indices()
        self._uniform = bool((weights == 1).all())
        end = np.cumsum(weights.astype(np.int64))
        taken = weights.astype(np.int64)[matrix.indices]
        # Weight taken before each entry, over all rows, and the same within its row.
        before = np.concatenate([[0], np.cumsum(taken)])
        lengths = np.diff(matrix.indptr)
        users = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), lengths)
        place = end[matrix.indices] - taken - (before[:-1] - before[matrix.indptr[:-1]][users])
        self._stride = int(end[-1]) + 1 if len(end) else 1
        arrays = {
            "end": end, "before": before, "first": matrix.indptr[:-1].astype(np.int64), "gaps": users * self._stride + place,
            "left": (end[-1] if len(end) else 0) - (before[matrix.indptr[1:]] - before[matrix.indptr[:-1]]),
        }  # fmt: skip
        self._end, self._before, self._first, self._gaps, self._left = (
            torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays.values()
        )

    def draw(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """An item for each of ``users`` int64 [n], all of whom must have one left: int64 [n]."""
        draw = torch.randint(2**31, users.shape, generator=generator, device=users.device)
        draw = draw.mul_(self._left.index_select(0, users)).bitwise_right_shift_(31)
        first = self._first.index_select(0, users)
        gaps = torch.searchsorted(self._gaps, draw + users * self._stride, right=True)
        draw += self._before.index_select(0, gaps) - self._before.index_select(0, first)
        return draw if self._uniform else torch.searchsorted(self._end, draw, right=True)


def seeded_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator that is a function of the numbers >= 0, such as seed, epoch and stream; near numbers share nothing."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) & (2**63 - 1))


@dataclass(frozen=True)
class Triples:
    """One batch: users [B], positives [B], negatives [B] (W = 1) or [B, W], W >= 0; int64 on one device.

    weight float64 [B]: 1 / number of real rows, 0 for rows that fill the batch up; None: all are real.
    """

    users: Tensor
    pos: Tensor
    neg: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        return self.users.shape[0]

    def rows(self, chosen: slice | Tensor) -> Triples:
        """These rows of the batch."""
        return Triples(self.users[chosen], self.pos[chosen], self.neg[chosen])


def padded(batch: Any, size: int) -> Any:
    """A batch with ``users`` and ``rows`` made ``size`` rows long by repeating its first row, with the weights of its rows.

    A repeated row changes nothing in terms of a batch's distinct users and items either.
    """
    real, device = len(batch), batch.users.device
    weight = torch.full((real,), 1 / real, dtype=torch.float64, device=device)
    if real < size:
        place = torch.arange(size, device=device)
        batch = batch.rows(place.where(place < real, 0))
    return replace(batch, weight=F.pad(weight, (0, size - real)))


class TripleSampler:
    """Draws epochs of triples from a binary train matrix; see the module text.

    num_negatives: W >= 0; with W = 1 negatives are [B]. With W = 0 only pairs are drawn, also for users who have every
    item. batch_size: the last batch may be smaller. constant: it is filled up, and all batches have weights, so that a step
    recorded for one serves all (:mod:`gfml.engine.capture`); an epoch of one batch stays as it is.
    negatives: uniform, popularity or train-items.
    Raises :class:`UserError` when no user can give a triple.
    """

    def __init__(
        self,
        train: sp.csr_array,
        *,
        batch_size: int,
        seed: int,
        scheme: str = "user",
        num_negatives: int = 1,
        negatives: str = "uniform",
        device: torch.device | str = "cpu",
        budget_mb: int = 512,
        constant: bool = False,
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"unknown sampling scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")
        if negatives not in NEGATIVES:
            raise ValueError(f"unknown kind of negatives {negatives!r}: choose one of {', '.join(NEGATIVES)}")
        if batch_size < 1 or num_negatives < 0:
            raise ValueError(f"found batch size {batch_size} and {num_negatives} negatives, wanted at least 1 and 0")
        self.scheme, self.batch_size, self.num_negatives, self.seed = scheme, batch_size, num_negatives, seed
        self.constant = constant
        self.num_users, self.num_items = train.shape
        self.device = torch.device(device)
        self._user_type, self._item_type = (_smallest_type(count, self.device) for count in train.shape)
        self._by_popularity = negatives == "popularity"
        counts = column_counts(train)
        weights = {"popularity": counts, "train-items": counts > 0}.get(negatives, np.ones(self.num_items))
        self._pool = (
            torch.from_numpy(np.flatnonzero(counts)).to(self.device, self._item_type)
            if negatives == "train-items"
            else None
        )
        self._weights = torch.from_numpy(weights.astype(np.float64)).to(self.device)
        # So many items can be drawn at all.
        drawable = int(np.count_nonzero(weights))
        degree = torch.from_numpy(np.diff(train.indptr).astype(np.int64)).to(self.device)
        self._saturated = (degree == drawable) & (num_negatives > 0)
        self.num_saturated = int(self._saturated.sum())
        self._usable = (degree > 0) & ~self._saturated
        self._usable_ids = self._usable.nonzero().squeeze(1)
        self._all_usable = len(self._usable_ids) == self.num_users
        if not len(self._usable_ids):
            raise UserError(
                f"found no user with both a train item and an item left over ({self.num_users} users, "
                f"{self.num_items} items, {train.nnz} train pairs): nothing to learn from, check the data"
            )
        self._degree = degree
        self._start = torch.from_numpy(train.indptr[:-1].astype(np.int64)).to(self.device)
        self._items = torch.tensor(train.indices, dtype=self._item_type, device=self.device)
        self._known = PairSet(train, self.device, budget_mb)
        # Rejection is cheaper on a CPU; elsewhere it would wait for the device after every round.
        self._free = None if self.device.type == "cpu" else FreeItems(train, weights, self.device)

    def epoch(self, epoch: int) -> TripleBatches:
        """The batches of one epoch. The same (seed, epoch) gives the same triples."""
        users, pos = getattr(self, f"_pairs_{self.scheme}")(self._generator(epoch, 0))
        return TripleBatches(self, users, pos, epoch)

    def negatives(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """Items outside each user's train items: [n] for W = 1, else [n, W].

        Draws for everybody, then again only where a train item was hit. A user for whom none is left raises
        ValueError: its rejection would never end.
        """
        if self.num_saturated and bool(self._saturated[users].any()):
            raise ValueError("a user who has every item has no negative; leave such users out")
        return self._negatives(users, generator).long()

    def _negatives(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """As :meth:`negatives`, of integers of any type into the type of the stored items."""
        shape = (len(users),) if self.num_negatives == 1 else (len(users), self.num_negatives)
        if self._free is not None and self.num_negatives:
            wide = users if self.num_negatives == 1 else users[:, None].expand(shape).reshape(-1)
            return self._free.draw(wide, generator).view(shape)
        items = self._draw(shape, generator)
        if self.num_negatives == 0:
            return items
        wide = users if self.num_negatives == 1 else users[:, None].expand(shape)
        flat_items, flat_users = items.view(-1), wide.reshape(-1)
        self._replace_known(flat_users, flat_items, generator)
        return items

    def triples(self, users: Tensor, pos: Tensor, generator: torch.Generator) -> Iterator[Triples]:
        """The batches of the given pairs, in order, with negatives from ``generator``."""
        size, width = self.batch_size, max(1, self.num_negatives)
        # Negatives of many batches at once cost less than batch by batch; a block bounds their memory.
        block = size * max(1, NEGATIVES_PER_DRAW // (size * width))
        part = size * max(1, LOOKUPS_PER_BLOCK // (size * width))
        for chosen, liked in zip(users.split(block), pos.split(block)):
            neg = self._negatives(chosen, generator)
            for few in zip(chosen.split(part), liked.split(part), neg.split(part)):
                yield from map(Triples, *(ids.long().split(size) for ids in few))

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Items, whoever knows them."""
        if self._pool is not None:
            return self._pool[torch.randint(len(self._pool), shape, generator=generator, device=self.device)]
        if not self._by_popularity:
            return torch.randint(self.num_items, shape, generator=generator, device=self.device, dtype=self._item_type)
        # The item of a random train pair: in proportion to counts without a table.
        return self._items[torch.randint(len(self._items), shape, generator=generator, device=self.device)]

    def _replace_known(self, users: Tensor, items: Tensor, generator: torch.Generator) -> None:
        """Draw anew, in place, where the user knows the item. Shape: users, items [n], integers of any type."""
        open_slots = self._known.contains(users, items).nonzero().squeeze(1)
        for _ in range(ROUNDS):
            if not len(open_slots):
                return
            again = self._draw((len(open_slots),), generator)
            items[open_slots] = again.to(items.dtype)
            open_slots = open_slots[self._known.contains(users[open_slots], again)]
        every = torch.arange(self.num_items, device=self.device)
        for slots in open_slots.split(max(1, WEIGHTS_PER_BLOCK // self.num_items)) if len(open_slots) else ():
            free = ~self._known.contains(users[slots, None], every)
            items[slots] = torch.multinomial(free * self._weights, 1, generator=generator).squeeze(1).to(items.dtype)

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        return seeded_generator(self.device, self.seed, epoch, stream)

    def _pairs_user(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = len(self._items)
        users = torch.randint(self.num_users, (count,), generator=generator, device=self.device, dtype=self._user_type)
        if not self._all_usable:
            users = users[self._usable[users.long()]]
        if not len(users):  # of very few users none may have been drawn who can be used
            some = torch.randint(len(self._usable_ids), (1,), generator=generator, device=self.device)
            users = self._usable_ids[some].to(self._user_type)
        return users, self._random_positive(users, generator)

    def _pairs_per_user(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        each = len(self._items) // self.num_users
        users = self._usable_ids.repeat_interleave(max(each, 1))
        users = users[torch.randperm(len(users), generator=generator, device=self.device)]
        return users, self._random_positive(users, generator)

    def _pairs_interaction(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(self._items), generator=generator, device=self.device)
        users, pos = (
            torch.repeat_interleave(self._degree, output_size=len(self._items))[order].to(self._user_type),
            self._items[order],
        )
        if self._all_usable:
            return users, pos
        keep = self._usable[users.long()]
        return users[keep], pos[keep]

    def _random_positive(self, users: Tensor, generator: torch.Generator) -> Tensor:
        # Block by block on the CPU: temporaries that stay in its cache cost half as much as those of a whole epoch.
        block = LOOKUPS_PER_BLOCK if self.device.type == "cpu" else max(1, len(users))
        found = users.new_empty(len(users), dtype=self._item_type)
        for chosen, place in zip(users.split(block), found.split(block)):
            chosen = chosen.long()
            # A 31-bit draw scaled to 0..degree-1: uniform up to degree / 2^31, and much cheaper than floats.
            draw = torch.randint(2**31, (len(chosen),), generator=generator, device=self.device)
            offset = draw.mul_(self._degree.index_select(0, chosen)).bitwise_right_shift_(31)
            torch.index_select(self._items, 0, offset.add_(self._start.index_select(0, chosen)), out=place)
        return found


class TripleBatches:
    """The batches of one epoch; ``len`` is their number. Iterating again yields the same batches.

    users, pos: all pairs in order, on the CPU in the smallest type that holds the ids, so that an epoch of many pairs
    needs little memory; the batches are int64.
    """

    def __init__(self, sampler: TripleSampler, users: Tensor, pos: Tensor, epoch: int) -> None:
        self.users, self.pos = users, pos
        self._sampler, self._epoch = sampler, epoch

    def __len__(self) -> int:
        return -(-len(self.users) // self._sampler.batch_size)

    def __iter__(self) -> Iterator[Triples]:
        found = self._sampler.triples(self.users, self.pos, self._sampler._generator(self._epoch, 1))
        constant, size = self._sampler.constant and len(self) > 1, self._sampler.batch_size
        return (padded(batch, size) for batch in found) if constant else found


class TwoStageSampler(TripleSampler):
    """Negatives that are popular and near the positive item.

    Every batch draws ``num_candidates`` candidates by popularity; for a positive j each candidate k then has the
    weight (1 - s^2)^((3 - D) / 2) for s = cos(v_j, v_k) > 0 and none otherwise: one over the density of s between
    random directions in D dimensions, so that all similarities are met alike. The positive itself has no weight; a
    positive without any weight takes its candidates alike. Known items are drawn again, in the end by popularity.

    item_vectors: gives the item table [I, D]; asked at the start of an epoch and every ``refresh`` batches, so an
    epoch is a function of (seed, epoch, weights).
    Reference: Tran, Sweeney, Lee, Improving Top-N Recommendation with Efficient Negative Sampling, SIGIR 2019.
    Differences: candidates may repeat; no spread-out loss.
    """

    def __init__(
        self,
        train: sp.csr_array,
        *,
        item_vectors: Callable[[], Tensor],
        num_candidates: int = 2000,
        refresh: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(train, negatives="popularity", **options)
        if num_candidates < 1 or refresh < 1:
            raise ValueError(f"found {num_candidates} candidates, refreshed every {refresh} batches, wanted at least 1")
        self._item_vectors, self.num_candidates, self.refresh = item_vectors, num_candidates, refresh

    def triples(self, users: Tensor, pos: Tensor, generator: torch.Generator) -> Iterator[Triples]:
        """As :meth:`TripleSampler.triples`; the vectors are read while the batches are used."""
        directions = None
        for number, ids in enumerate(zip(users.split(self.batch_size), pos.split(self.batch_size))):
            chosen, liked = (part.long() for part in ids)
            if number % self.refresh == 0:
                directions = F.normalize(self._item_vectors().detach().float(), dim=1)
            yield Triples(chosen, liked, self._near(chosen, liked, directions, generator))

    def _near(self, users: Tensor, pos: Tensor, directions: Tensor, generator: torch.Generator) -> Tensor:
        candidates = self._draw((self.num_candidates,), generator).long()
        if self._free is not None:
            return self._near_without_waiting(users, pos, candidates, directions, generator)
        items, place = pos.unique(return_inverse=True)
        place = place[:, None].expand(-1, self.num_negatives).reshape(-1)
        wide = users[:, None].expand(-1, self.num_negatives).reshape(-1)
        found = torch.empty_like(place)
        rows = max(1, WEIGHTS_PER_BLOCK // self.num_candidates)
        for first in range(0, len(items), rows):
            upto = self._cumulative_shares(items[first : first + rows], candidates, directions)
            slots = ((place >= first) & (place < first + rows)).nonzero().squeeze(1)
            for _ in range(4):
                found[slots] = candidates[_pick(upto, place[slots] - first, generator)]
                slots = slots[self._known.contains(wide[slots], found[slots])]
        self._replace_known(wide, found, generator)
        return found if self.num_negatives == 1 else found.view(len(users), -1)

    def _near_without_waiting(
        self, users: Tensor, pos: Tensor, candidates: Tensor, directions: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The same with a row of weights for every positive, repeated ones too, and tensors of constant shape."""
        upto = self._cumulative_shares(pos, candidates, directions)
        place, wide = (
            rows[:, None].expand(-1, self.num_negatives).reshape(-1)
            for rows in (torch.arange(len(pos), device=pos.device), users)
        )
        found, known = self._free.draw(wide, generator), torch.ones_like(wide, dtype=torch.bool)
        for _ in range(4):
            again = candidates[_pick(upto, place, generator)]
            fits = known & ~self._known.contains(wide, again)
            found, known = torch.where(fits, again, found), known & ~fits
        return found if self.num_negatives == 1 else found.view(len(users), -1)

    @staticmethod
    def _cumulative_shares(items: Tensor, candidates: Tensor, directions: Tensor) -> Tensor:
        """Running sums of each candidate's probability for each item, float64 [n, C]; row r runs from r to r + 1."""
        cosine = directions[items] @ directions[candidates].T
        itself = candidates == items[:, None]
        away = (cosine <= 0) | itself
        # Below 1 also in single precision: coinciding directions weigh much, not infinitely much.
        log_weight = cosine.square_().clamp_max_(1 - 1e-6).neg_().log1p_().mul_((3 - directions.shape[1]) / 2)
        log_weight.masked_fill_(away, -torch.inf)
        lonely = log_weight.amax(1, keepdim=True) == -torch.inf
        upto = log_weight.masked_fill_(lonely, 0.0).softmax(1).cumsum(1, dtype=torch.float64)
        return upto.div_(upto[:, -1:].clone()).add_(torch.arange(len(items), device=items.device)[:, None])


def _pick(upto: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """A random column for each of ``rows`` [n], by the cumulative shares [m, C] of its row: int64 [n]."""
    draw = rows + torch.rand(len(rows), generator=generator, device=upto.device, dtype=torch.float64)
    width = upto.shape[1]
    # Rows follow each other in value, so one sorted list answers for all.
    return (torch.searchsorted(upto.view(-1), draw, right=True) - rows * width).clamp_(0, width - 1)


def _smallest_type(count: int, device: torch.device) -> torch.dtype:
    """For ids below ``count``. On the CPU the fewer bytes, the more of a large table stays in the cache."""
    if device.type != "cpu":
        return torch.int64
    return next(kind for kind in (torch.int16, torch.int32, torch.int64) if count - 1 <= torch.iinfo(kind).max)


def _bit(slots: Tensor) -> Tensor:
    return torch.ones_like(slots, dtype=torch.uint8) << (slots & 7).to(torch.uint8)
