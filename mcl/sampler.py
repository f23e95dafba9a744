"""Batches of users with all their positives and W negatives for each, one seeded stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.base.errors import UserError
from gfml.ranking.sampling import TripleSampler, seeded_generator

# Padded batches have a multiple of so many edges.
EDGE_STEP = 256


@dataclass(frozen=True)
class UserBatch:
    """Users [n] with all their positives; edges are grouped by user, int64 on one device.

    counts [n]: positives of each user, all >= 1. segment [E]: the place of each edge's user in ``users``.
    pos [E], neg [E, W]: item ids. weight float64 [E]: 1 / number of real edges, 0 at padding; None: all are real.
    """

    users: Tensor
    counts: Tensor
    segment: Tensor
    pos: Tensor
    neg: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        """The number of edges E."""
        return len(self.pos)

    def rows(self, part: slice) -> UserBatch:
        """The batch of these edges; a user whose edges are cut apart keeps those inside."""
        kept, segment, counts = self.segment[part].unique_consecutive(return_inverse=True, return_counts=True)
        return UserBatch(self.users[kept], counts, segment, self.pos[part], self.neg[part])

    def padded(self, users: int, edges: int) -> UserBatch:
        """The batch with ``users`` + 1 users and ``edges`` edges; edges that are added belong to the last user."""
        more, size = edges - len(self), len(self)
        counts = F.pad(self.counts, (0, users + 1 - len(self.users)))
        counts[-1] = more
        weight = F.pad(torch.full((size,), 1 / size, dtype=torch.float64), (0, more))
        rest = F.pad(self.segment, (0, more), value=users), F.pad(self.pos, (0, more)), F.pad(self.neg, (0, 0, 0, more))
        return UserBatch(F.pad(self.users, (0, users + 1 - len(self.users))), counts, *rest, weight)


class UserBatchSampler:
    """Shuffles all users once per epoch and cuts them into batches of ``batch_size`` consecutive ones.

    Users without positives, or with every item, are left out of their batch, which is then smaller. Negatives are
    uniform over the items the user has not in train. An epoch is a function of (seed, epoch) alone: batches are drawn
    on the CPU, which has to know their number of edges, and then go to ``device``.
    drop_last: leave an incomplete last batch out, as published (541 of 5 541 users in each epoch of Digital-Music).
    duplicate_batches: every batch, negatives included, is used this often in a row before the stream moves on. The
        published sampler forks five workers with one random state, so its batches come five times; an epoch keeps
        its number of steps and sees a fifth of the users.
    constant: batches of one shape, so that a step can be recorded: padded to the expected number of edges and four
        standard deviations. A batch with more than that stays as it is.
    Raises :class:`UserError` when no batch can be formed.
    """

    def __init__(
        self,
        train: sp.csr_array,
        *,
        batch_size: int,
        num_negatives: int,
        seed: int,
        drop_last: bool = False,
        duplicate_batches: int = 1,
        device: torch.device | str = "cpu",
        constant: bool = False,
    ) -> None:
        if duplicate_batches < 1:
            raise ValueError(f"found duplicate_batches {duplicate_batches}, wanted at least 1")
        self.num_users, self.batch_size, self.seed = train.shape[0], batch_size, seed
        self.duplicate_batches, self.device = duplicate_batches, torch.device(device)
        self.num_negatives = num_negatives
        self.num_batches = self.num_users // batch_size if drop_last else -(-self.num_users // batch_size)
        if self.num_batches == 0:
            raise UserError(
                f"found {self.num_users} users, fewer than one batch of {batch_size}: lower --batch-size or give --no-drop-last"
            )
        self._negatives = TripleSampler(train, batch_size=batch_size, seed=seed, num_negatives=num_negatives).negatives
        degree = torch.from_numpy(np.diff(train.indptr).astype(np.int64))
        self._usable = (degree > 0) & (degree < train.shape[1])
        self._degree = degree
        self._start = torch.from_numpy(train.indptr[:-1].astype(np.int64))
        self._items = torch.from_numpy(train.indices.astype(np.int64))
        self._room = _usual_edges(torch.where(self._usable, degree, 0), batch_size) if constant else 0

    def epoch(self, epoch: int) -> UserBatches:
        """The batches of epoch 1, 2, ..."""
        return UserBatches(self, epoch)

    def batch(self, number: int) -> UserBatch | None:
        """The batch at a place 0, 1, ... of the whole stream; None when none of its users can be used."""
        shuffle, place = divmod(number, self.num_batches)
        order = torch.randperm(self.num_users, generator=self._generator(shuffle, 0))
        users = order[place * self.batch_size : (place + 1) * self.batch_size]
        users = users[self._usable[users]]
        if len(users) == 0:
            return None
        counts = self._degree[users]
        ends = counts.cumsum(0)
        segment = torch.repeat_interleave(counts)
        shift = self._start[users] - (ends - counts)
        pos = self._items[torch.arange(len(segment)) + shift[segment]]
        neg = self._negatives(users[segment], self._generator(shuffle, 1 + place))
        batch = UserBatch(users, counts, segment, pos, neg.view(len(pos), self.num_negatives))
        batch = batch.padded(self.batch_size, self._room) if len(batch) <= self._room else batch
        parts = (getattr(batch, part.name) for part in fields(batch))
        return UserBatch(*(None if part is None else part.to(self.device, non_blocking=True) for part in parts))

    def _generator(self, shuffle: int, stream: int) -> torch.Generator:
        return seeded_generator("cpu", self.seed, shuffle, stream)


def _usual_edges(degree: Tensor, users: int) -> int:
    """A number of edges that few batches of so many users exceed."""
    mean, deviation = float(degree.double().mean()), float(degree.double().std(correction=0))
    room = users * mean + 4 * math.sqrt(users) * deviation
    return min(-(-math.ceil(room) // EDGE_STEP) * EDGE_STEP, int(degree.sort(descending=True).values[:users].sum()))


class UserBatches:
    """One epoch of a :class:`UserBatchSampler`; ``len`` is its number of steps. Iterating again repeats it."""

    def __init__(self, sampler: UserBatchSampler, epoch: int) -> None:
        self._sampler, self._first = sampler, (epoch - 1) * sampler.num_batches

    def __len__(self) -> int:
        return self._sampler.num_batches

    def __iter__(self) -> Iterator[UserBatch]:
        number, batch = -1, None
        for step in range(self._first, self._first + len(self)):
            if step // self._sampler.duplicate_batches != number:
                number = step // self._sampler.duplicate_batches
                batch = self._sampler.batch(number)
            if batch is not None:
                yield batch
