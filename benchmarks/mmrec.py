"""One epoch and one validation the way MMRec does them, in plain PyTorch: the other side of ``peers.py`` on amazon-baby.

Written from the papers' formulas and a description of what the program computes; losses, scores and gradients equal
vectors that the program itself gave (tests/benchmarks/test_mmrec.py). What costs time there costs time here: negatives are
drawn row by row in Python, every batch propagates over the whole graph in COO and projects all items, Adam walks every
table, and lists come from a dense block of scores whose hits are looked up item by item.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, BLOCK, KS = 2048, 4096, (5, 10, 20, 50)


def table(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns)))


def coo(matrix: Any) -> Tensor:
    """A SciPy matrix as a float32 COO tensor."""
    found = sp.coo_array(matrix)
    places = torch.from_numpy(np.stack([found.row, found.col]).astype(np.int64))
    return torch.sparse_coo_tensor(places, torch.from_numpy(found.data.astype(np.float32)), found.shape).coalesce()


def scaled(matrix: Any) -> Any:
    """D^-1/2 M E^-1/2 with the row sums D and column sums E, 1e-7 added to both."""
    left, right = ((matrix.sum(axis) + 1e-7) ** -0.5 for axis in (1, 0))
    return sp.diags_array(left) @ matrix @ sp.diags_array(right)


def bipartite(train: Any) -> Tensor:
    """Both halves of the graph of users and items, users first."""
    return coo(sp.block_array([[None, scaled(train)], [scaled(train).T, None]]))


def item_graph(features: list[Tensor], k: int, shares: tuple[float, ...]) -> Tensor:
    """A mix of graphs in which every item points to its k nearest by cosine with 1 / k, itself included."""
    mixed: Any = 0
    for found, share in zip(features, shares, strict=True):
        near = (F.normalize(found) @ F.normalize(found).T).topk(k).indices.numpy()
        rows = np.repeat(np.arange(len(near)), k)
        mixed = mixed + sp.csr_array((np.full(near.size, share / k), (rows, near.ravel())), (len(near),) * 2)
    return coo(mixed)


def norms(*blocks: Tensor) -> Tensor:
    """The sum of the blocks' Frobenius norms over the rows of the last."""
    return torch.stack([block.norm() for block in blocks]).sum() / len(blocks[-1])


def apart(left: Tensor, right: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(left, right.detach(), dim=-1).mean()


class BPR(nn.Module):
    """Matrix factorisation; the models below differ from it in where vectors come from."""

    width, triples = 1, True

    def __init__(self, train: Any, features: dict[str, Tensor], dim: int = 64, weight: float = 0.01) -> None:
        super().__init__()
        self.train_matrix, self.weight = train, weight
        self.user, self.item = table(train.shape[0], self.width * dim), table(train.shape[1], dim)

    def new_epoch(self) -> None:
        """What is drawn once in an epoch."""

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.user, self.item

    def scored(self) -> tuple[Tensor, Tensor]:
        return self.vectors()

    def loss(self, users: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        every_user, every_item = self.vectors()
        u, p, n = every_user[users], every_item[pos], every_item[neg]
        return self.ranked(u, p, n) + self.weight * self.penalty(u, p, n, users, pos, neg)

    def ranked(self, u: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return -torch.log(1e-10 + torch.sigmoid((u * p).sum(1) - (u * n).sum(1))).mean()

    def penalty(self, u: Tensor, p: Tensor, n: Tensor, *ids: Tensor) -> Tensor:
        return norms(u, p, n)


class VBPR(BPR):
    """Half of an item's vector is its projected features."""

    width = 2

    def __init__(self, train: Any, features: dict[str, Tensor], dim: int = 64, weight: float = 0.01) -> None:
        super().__init__(train, features, dim, weight)
        self.features = torch.cat([features["text"], features["image"]], 1)
        self.proj = nn.Linear(self.features.shape[1], dim)
        nn.init.xavier_normal_(self.proj.weight)

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.user, torch.cat([self.item, self.proj(self.features)], 1)


class LightGCN(BPR):
    """Mean over the layers of a propagation."""

    def __init__(
        self, train: Any, features: dict[str, Tensor], dim: int = 64, weight: float = 1e-4, layers: int = 2
    ) -> None:
        super().__init__(train, features, dim, weight)
        self.layers, self.graph = layers, bipartite(train)

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.propagated(self.graph)

    def propagated(self, graph: Tensor) -> tuple[Tensor, Tensor]:
        found = [torch.cat([self.user, self.item])]
        for _ in range(self.layers):
            found.append(torch.sparse.mm(graph, found[-1]))
        users, items = torch.stack(found).mean(0).split([len(self.user), len(self.item)])
        return users, items

    def penalty(self, u: Tensor, p: Tensor, n: Tensor, *ids: Tensor) -> Tensor:
        users, pos, neg = ids
        return norms(self.user[users], self.item[pos], self.item[neg])


class Featured(LightGCN):
    """A propagation beside feature tables that are trained themselves."""

    def __init__(
        self, train: Any, features: dict[str, Tensor], dim: int = 64, weight: float = 0.1, layers: int = 1
    ) -> None:
        super().__init__(train, features, dim, weight, layers)
        self.image_table, self.text_table = (nn.Parameter(features[name].clone()) for name in ("image", "text"))
        self.image_proj, self.text_proj = (nn.Linear(features[name].shape[1], dim) for name in ("image", "text"))

    def projected(self) -> tuple[Tensor, Tensor]:
        return self.image_proj(self.image_table), self.text_proj(self.text_table)


class BM3(Featured):
    """Online vectors through a predictor against targets that are the same without a few entries."""

    triples = False

    def __init__(self, *about: Any, dropout: float = 0.5, pull: float = 2.0, **more: Any) -> None:
        super().__init__(*about, **more)
        self.dropout, self.pull = dropout, pull
        self.Q = nn.Linear(self.user.shape[1], self.user.shape[1])

    def vectors(self) -> tuple[Tensor, Tensor]:
        users, items = super().vectors()
        return users, items + self.item

    def scored(self) -> tuple[Tensor, Tensor]:
        users, items = self.vectors()
        return self.Q(users), self.Q(items)

    def loss(self, users: Tensor, pos: Tensor, neg: Tensor | None = None) -> Tensor:
        every = [*self.vectors(), *self.projected()]
        targets = [F.dropout(found.detach(), self.dropout) for found in every]
        ids = [users, pos, pos, pos]
        u, i, v, t = (self.Q(found)[which] for found, which in zip(every, ids, strict=True))
        u_t, i_t, v_t, t_t = (found[which] for found, which in zip(targets, ids, strict=True))
        features = apart(t, i_t) + apart(t, t_t) + apart(v, i_t) + apart(v, v_t)
        return apart(u, i_t) + apart(i, u_t) + self.pull * features + self.weight * norms(*every[:2])


class FREEDOM(Featured):
    """A frozen graph of items and a graph that keeps a fifth of its edges in an epoch."""

    def __init__(self, *about: Any, k: int = 10, dropped: float = 0.8, **more: Any) -> None:
        super().__init__(*about, **({"layers": 2, "weight": 1e-3} | more))
        self.near = item_graph([self.image_table.detach(), self.text_table.detach()], k, (0.1, 0.9))
        self.dropped, self.thinned = dropped, self.graph

    def new_epoch(self) -> None:
        edges = sp.coo_array(self.train_matrix)
        by_user, by_item = (np.bincount(ids) for ids in (edges.row, edges.col))
        weights = torch.from_numpy((by_user[edges.row] * by_item[edges.col]) ** -0.5)
        kept = torch.multinomial(weights, int(edges.nnz * (1.0 - self.dropped))).numpy()
        self.thinned = bipartite(sp.csr_array((np.ones(len(kept)), (edges.row[kept], edges.col[kept])), edges.shape))

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.with_neighbours(self.thinned)

    def scored(self) -> tuple[Tensor, Tensor]:
        return self.with_neighbours(self.graph)

    def with_neighbours(self, graph: Tensor) -> tuple[Tensor, Tensor]:
        users, items = self.propagated(graph)
        return users, items + torch.sparse.mm(self.near, self.item)

    def loss(self, users: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        every_user, every_item = self.vectors()
        u, (image, text) = every_user[users], self.projected()
        beside = self.ranked(u, text[pos], text[neg]) + self.ranked(u, image[pos], image[neg])
        return self.ranked(u, every_item[pos], every_item[neg]) + self.weight * beside

    def ranked(self, u: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return -F.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean()


MODELS = {model.__name__: model for model in (BPR, VBPR, LightGCN, BM3, FREEDOM)}


class Batches:
    """Every train pair once, shuffled; negatives are items of train that the user has not, drawn one by one."""

    def __init__(self, train: Any, seed: int = 0) -> None:
        self.pairs = np.stack(train.nonzero())
        self.items = sorted(set(self.pairs[1].tolist()))
        self.liked = [set(train.indices[a:b].tolist()) for a, b in zip(train.indptr, train.indptr[1:], strict=False)]
        self.order, self.draws = np.random.default_rng(seed), random.Random(seed)

    def negative(self, user: int) -> int:
        while (item := self.draws.choice(self.items)) in self.liked[user]:
            pass
        return item

    def epoch(self, triples: bool) -> Iterator[list[Tensor]]:
        shuffled = self.pairs[:, self.order.permutation(self.pairs.shape[1])]
        for first in range(0, shuffled.shape[1], BATCH):
            users, pos = torch.from_numpy(shuffled[:, first : first + BATCH])
            negatives = [torch.tensor([self.negative(user) for user in users.tolist()])] if triples else []
            yield [users, pos, *negatives]


def train_epoch(model: BPR, batches: Batches, optimizer: torch.optim.Optimizer, most: int | None = None) -> float:
    """The sum of the losses of all batches, or of the first ``most``."""
    total = 0.0
    model.train()
    model.new_epoch()
    for batch in itertools.islice(batches.epoch(model.triples), most):
        optimizer.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


@torch.no_grad()
def validate(model: BPR, train: Any, judged: Any) -> dict[str, float]:
    """Recall, precision, NDCG and MAP at 5, 10, 20 and 50 over the users of ``judged``, train items masked."""
    every_user, every_item = model.eval().scored()
    users, hits = np.flatnonzero(np.diff(judged.indptr)), []
    for first in range(0, len(users), BLOCK):
        some = users[first : first + BLOCK]
        scores = every_user[some] @ every_item.T
        scores[train[some].nonzero()] = -1e10
        lists = scores.topk(max(KS)).indices.tolist()
        for user, items in zip(some, lists, strict=True):
            liked = judged.indices[judged.indptr[user] : judged.indptr[user + 1]].tolist()
            hits.append([item in liked for item in items])
    found, length = np.array(hits), np.diff(judged.indptr)[users, None]
    ranks = np.arange(1, max(KS) + 1)
    upto, gains, full = found.cumsum(1), found / np.log2(ranks + 1), np.cumsum(1 / np.log2(ranks + 1))
    least = np.minimum(length, ranks)
    values = {"recall": upto / length, "precision": upto / ranks, "ndcg": gains.cumsum(1) / full[least - 1],
              "map": (found * upto / ranks).cumsum(1) / least}  # fmt: skip
    return {f"{name}@{k}": float(value[:, k - 1].mean()) for name, value in values.items() for k in KS}
