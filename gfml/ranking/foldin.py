"""A new user from his items, by the model's own score and without training: what he would be recommended.

Linear recommenders (EASE, item neighbours, popularity) take his items for his history, exactly as in training.
Models of vectors get the user vector that ranks his items above the others, by gradient steps on the pairwise
loss with the items fixed; over a graph his edges are propagated instead (:func:`gfml.ranking.graph.propagated`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.base.errors import UserError
from gfml.base.optim import light
from gfml.ranking.baselines import LinearScorer
from gfml.ranking.topk import FactorScorer, Scorer, full_precision

STEPS, RATE, DECAY = 20, 0.3, 0.05
# Other items that a new user's are compared with: the same for everybody, so that one alone gets what he gets in a batch.
POOL, PAIRS = 2048, 64
# Users who are solved together, and the fewest places of a history.
BLOCK, LEAST = 32, 16
# Users whose edges are propagated together: the layers of the items are made anew for each block.
GRAPH_BLOCK = 1024


@runtime_checkable
class VectorScorer(Scorer, Protocol):
    """A scorer of user vectors, item vectors and nothing else that belongs to a user but a constant."""

    user: Tensor
    item: Tensor

    def against(self, items: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Scores of any user vectors [B, D] with all items [B, I], or with items int64 [W] or [B, W]: [B, W].

        A gradient flows to the vectors; what belongs to the items alone is made once.
        """


class NewUsers:
    """Users that are vectors, ranked by the score of another scorer (a :class:`gfml.ranking.topk.Scorer`)."""

    def __init__(self, scorer: VectorScorer, vectors: Tensor) -> None:
        self.scorer, self.vectors = scorer, vectors
        self.num_users, self.num_items = len(vectors), scorer.num_items

    @cached_property
    def _scores(self) -> Callable[[Tensor], Tensor]:
        return self.scorer.against()

    @torch.no_grad()
    def score(self, users: Tensor) -> Tensor:
        """Shape: users int64 [B] -> [B, I]. In blocks of one shape: the rounding of a row does not depend on the rest."""
        scores = []
        for rows in users.to(self.vectors.device).split(BLOCK):
            whole = rows.repeat(-(-BLOCK // len(rows)))[:BLOCK]
            scores.append(self._scores(self.vectors[whole])[: len(rows)])
        return torch.cat(scores)

    def factors(self) -> None:
        return None


def fold_in(scorer: Scorer, histories: sp.csr_array, encoder: Any = None) -> Scorer:
    """A scorer of new users with these ``histories`` (binary CSR [n, I]); the known users are gone from it.

    encoder: where the scorer's vectors come from; one with a method ``new_users`` (histories -> vectors [n, D], or None)
    makes those of new users itself, as graph encoders do by :func:`gfml.ranking.graph.propagated`.

    UserError for an empty history and for a scorer that offers neither a history nor vectors.
    """
    empty = np.flatnonzero(np.diff(histories.indptr) == 0)
    if len(empty):
        raise UserError(f"new user {int(empty[0]) + 1} has no item that the model knows: give some of its items")
    if isinstance(scorer, LinearScorer):
        return replace(scorer, history=histories)
    if isinstance(scorer, FactorScorer) and bool((scorer.user == scorer.user[:1]).all()):
        return FactorScorer(scorer.user[:1].expand(histories.shape[0], -1), scorer.item)  # popularity: one for all
    if not isinstance(scorer, VectorScorer):
        raise UserError(
            f"{type(scorer).__name__} cannot take a new user: choose a model of vectors, item neighbours or EASE"
        )
    vectors = _propagated(encoder, histories) if hasattr(encoder, "new_users") else None
    vectors = user_vectors(scorer, histories) if vectors is None else vectors
    return scorer.of_histories(histories, vectors) if hasattr(scorer, "of_histories") else NewUsers(scorer, vectors)


def _propagated(encoder: Any, histories: sp.csr_array) -> Tensor | None:
    """What the encoder makes of the histories, in blocks of one shape, which round alike."""
    found = []
    for rows in np.split(np.arange(histories.shape[0]), range(GRAPH_BLOCK, histories.shape[0], GRAPH_BLOCK)):
        vectors = encoder.new_users(histories[np.resize(rows, GRAPH_BLOCK)])
        if vectors is None:
            return None
        found.append(vectors[: len(rows)])
    return torch.cat(found)


def user_vectors(scorer: VectorScorer, histories: sp.csr_array) -> Tensor:
    """The vector of each history, [n, D]; it does not depend on the others.

    Start: the mean of his items' vectors, as long as the users' vectors are. Then ``STEPS`` steps of Adam on

        mean over his items i and other items j of softplus(s(x, j) - s(x, i)) + decay |x - start|^2 / |start|^2,

    where every item i meets ``PAIRS`` of at most ``POOL`` other items, another lot of them for each i. Users are
    solved ``BLOCK`` at a time with those whose histories are about as long, in blocks of one shape, which round alike.
    Cost of a user: ``STEPS`` times about 3 x D products with each of the other items.
    """
    degree = np.diff(histories.indptr)
    slots = 2 ** np.ceil(np.log2(np.maximum(degree, LEAST))).astype(np.int64)
    found, length = scorer.item.new_empty(len(degree), scorer.user.shape[1]), float(scorer.user.norm(dim=1).median())
    with torch.enable_grad(), full_precision():
        for width in np.unique(slots).tolist():
            rows = np.flatnonzero(slots == width)
            for chunk in np.split(rows, range(BLOCK, len(rows), BLOCK)):
                own = _BlockOfUsers(scorer, histories, np.resize(chunk, BLOCK), width)
                found[torch.from_numpy(chunk).to(found.device)] = own.solve(length)[: len(chunk)]
    return found


class _BlockOfUsers:
    """``BLOCK`` new users with at most ``width`` items, whose vectors are sought."""

    def __init__(self, scorer: VectorScorer, histories: sp.csr_array, users: np.ndarray, width: int) -> None:
        device = scorer.item.device
        self.scorer = scorer.of_histories(histories[users]) if hasattr(scorer, "of_histories") else scorer
        degree, place = np.diff(histories.indptr)[users, None], np.arange(width)
        # Short histories fill their places several times, all items equally often.
        own = histories.indices[histories.indptr[users, None] + place % degree]
        filled = place < degree * (width // degree)
        self.own, self.filled = torch.from_numpy(own.astype(np.int64)).to(device), torch.from_numpy(filled).to(device)
        size = min(PAIRS, scorer.num_items)
        self.lots = min(getattr(scorer, "pool", POOL), scorer.num_items, width * size) // size
        picked = np.random.default_rng(0).permutation(scorer.num_items)[: self.lots * size]
        self.pool = torch.from_numpy(picked).to(device)
        taken = torch.zeros(len(users), scorer.num_items, dtype=torch.bool, device=device).scatter_(1, self.own, True)
        free = ~self._lots(taken[:, self.pool]) & self.filled[:, :, None]
        self.weight = free / free.sum((1, 2), keepdim=True).clamp_min(1)

    def _lots(self, of_pool: Tensor) -> Tensor:
        """What each place of a history is compared with: [B, pool] -> [B, width, PAIRS]."""
        lots = of_pool.unflatten(1, (self.lots, -1))
        return lots.repeat(1, -(-self.own.shape[1] // self.lots), 1)[:, : self.own.shape[1]]

    def solve(self, length: float) -> Tensor:
        """[B, D]; length: of the known users' vectors."""
        item = self.scorer.item.detach()
        share = self.filled[:, :, None].to(item.dtype)
        start = (item[self.own] * share).sum(1) / share.sum(1)
        start = start * (length / start.norm(dim=1, keepdim=True).clamp_min(1e-12))
        vector = start.clone().requires_grad_()
        optimizer = light(torch.optim.Adam)([vector], lr=RATE * length / max(start.shape[1], 1) ** 0.5, fused=True)
        with torch.no_grad():
            near, far = (self.scorer.against(items) for items in (self.own, self.pool))
        for _ in range(STEPS):
            loss = (F.softplus(self._lots(far(vector)) - near(vector)[:, :, None]) * self.weight).sum()
            loss = loss + DECAY * (vector - start).square().sum() / max(length, 1e-12) ** 2
            (vector.grad,) = torch.autograd.grad(loss, vector)
            optimizer.step()
        return vector.detach()
