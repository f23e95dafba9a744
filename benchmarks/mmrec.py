"""One epoch and one validation the way MMRec does them, in plain PyTorch: the other side of ``peers.py`` on amazon-baby.

Written from the papers' formulas and a description of what the program computes; losses, scores and gradients equal
vectors that the program itself gave (tests/benchmarks/test_mmrec.py). What costs time there costs time here: negatives are
drawn row by row in Python, every batch propagates over the whole graph, in COO or a gathered row per edge, and maps all
items, Adam walks every table, LATTICE's item graph is dense, DRAGON's lists of similar users become a tensor in every batch,
and lists come from a dense block of scores whose hits are looked up item by item.
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
NAMES = ("image", "text")


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


def nearest(features: Tensor, k: int) -> Tensor:
    """The cosines of the k nearest rows of each row, dense; elsewhere 0."""
    unit = F.normalize(features)
    found = (unit @ unit.T).topk(k)
    return torch.zeros(len(unit), len(unit)).scatter(1, found.indices, found.values)


def balanced(graph: Tensor) -> Tensor:
    """Divided by the roots of the row sums at both ends."""
    scale = graph.sum(1) ** -0.5
    return scale[:, None] * graph * scale


def edges_of(train: Any) -> Tensor:
    """Source and target of every edge, both ways, users first: int64 [2, 2 E]."""
    users, items = (torch.from_numpy(ids.astype(np.int64)) for ids in train.nonzero())
    return torch.stack([torch.cat([users, items + train.shape[0]]), torch.cat([items + train.shape[0], users])])


def degrees(edges: Tensor, count: int) -> Tensor:
    return torch.zeros(count).scatter_add(0, edges[1], torch.ones(edges.shape[1]))


def gathered(messages: Tensor, edges: Tensor, count: int) -> Tensor:
    """The sum of the messages [edges, D] at their targets."""
    places = edges[1][:, None].expand_as(messages)
    return torch.zeros(count, messages.shape[1]).scatter_add(0, places, messages)


def likest_users(train: Any, most: int) -> list[tuple[list[int], list[float]]]:
    """For each user those who share most items, at most ``most``, and how many."""
    shared = sp.csr_array(train @ train.T)
    shared.setdiag(0)
    shared.eliminate_zeros()
    found = []
    for first, last in itertools.pairwise(shared.indptr):
        best = np.argsort(-shared.data[first:last], kind="stable")[:most] + first
        found.append((shared.indices[best].tolist(), shared.data[best].tolist()))
    return found


def norms(*blocks: Tensor) -> Tensor:
    """The sum of the blocks' Frobenius norms over the rows of the last."""
    return torch.stack([block.norm() for block in blocks]).sum() / len(blocks[-1])


def apart(left: Tensor, right: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(left, right.detach(), dim=-1).mean()


class Model(nn.Module):
    """Users and items ranked by dot products."""

    triples = True

    def __init__(self, train: Any, weight: float) -> None:
        super().__init__()
        self.train_matrix, self.weight = train, weight

    def new_epoch(self) -> None:
        """What is drawn once in an epoch."""

    def vectors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def scored(self) -> tuple[Tensor, Tensor]:
        return self.vectors()


class BPR(Model):
    """Matrix factorisation; most models below differ from it in where vectors come from."""

    width = 1

    def __init__(self, train: Any, features: dict[str, Tensor], dim: int = 64, weight: float = 0.01) -> None:
        super().__init__(train, weight)
        self.user, self.item = table(train.shape[0], self.width * dim), table(train.shape[1], dim)

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.user, self.item

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
        self,
        train: Any,
        features: dict[str, Tensor],
        dim: int = 64,
        weight: float = 0.1,
        layers: int = 1,
        mapped: int | None = None,
    ) -> None:
        super().__init__(train, features, dim, weight, layers)
        self.image_table, self.text_table = (nn.Parameter(features[name].clone()) for name in NAMES)
        self.image_proj, self.text_proj = (nn.Linear(features[name].shape[1], mapped or dim) for name in NAMES)

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


class Smoothed(Featured):
    """Ranked without a guard, with the squares of the batch's vectors, over the batch size that is asked for."""

    def __init__(self, *about: Any, rows: int = BATCH, k: int = 10, **more: Any) -> None:
        super().__init__(*about, **({"layers": 2} | more))
        self.rows, self.k = rows, k

    def smoothed_loss(self, every: tuple[Tensor, Tensor], users: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        u, p, n = every[0][users], every[1][pos], every[1][neg]
        squares = 0.5 * sum(rows.square().sum() for rows in (u, p, n)) / self.rows
        return -F.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean() + self.weight * squares


class LATTICE(Smoothed):
    """A dense graph of items, partly learned; learned anew at the first batch of an epoch, a constant in the others.

    The learned part is scaled by two products with dense diagonal matrices, as in the program.
    """

    def __init__(self, *about: Any, frozen: float = 0.9, **more: Any) -> None:
        super().__init__(*about, **({"weight": 0.0} | more))
        both = sp.block_array([[None, self.train_matrix], [self.train_matrix.T, None]])
        both = both + sp.eye_array(both.shape[0])
        self.graph = coo(sp.diags_array(1 / both.sum(1)) @ both)
        self.modal_weight = nn.Parameter(torch.full((2,), 0.5))
        self.original = [balanced(nearest(found.detach(), self.k)) for found in (self.image_table, self.text_table)]
        self.frozen, self.kept = frozen, None

    def new_epoch(self) -> None:
        self.kept = None

    def near(self) -> Tensor:
        shares = self.modal_weight.softmax(0)
        learned = sum(share * nearest(found, self.k) for share, found in zip(shares, self.projected(), strict=True))
        scale = torch.diag(learned.sum(1) ** -0.5)
        original = sum(share * found for share, found in zip(shares, self.original, strict=True))
        return (1 - self.frozen) * (scale @ learned @ scale) + self.frozen * original

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.with_neighbours(self.near())

    def with_neighbours(self, near: Tensor) -> tuple[Tensor, Tensor]:
        users, items = self.propagated(self.graph)
        return users, items + F.normalize(near @ self.item)

    def loss(self, users: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        near = self.near() if self.kept is None else self.kept
        self.kept = near.detach()
        return self.smoothed_loss(self.with_neighbours(near), users, pos, neg)


class MGCN(Smoothed):
    """Items gated by their features and smoothed over a graph of each kind, fused by attention with the propagated ids."""

    def __init__(self, *about: Any, pull: float = 0.01, **more: Any) -> None:
        super().__init__(*about, **({"weight": 1e-4} | more))
        dim, tables = self.user.shape[1], (self.image_table, self.text_table)
        self.to_users, self.pull = coo(scaled(self.train_matrix)), pull
        self.near = [balanced(nearest(found.detach(), self.k)).to_sparse() for found in tables]
        self.gate_image, self.gate_text, self.prefer_image, self.prefer_text, self.query1 = (
            nn.Linear(dim, dim) for _ in range(5)
        )
        self.query2 = nn.Linear(dim, 1, bias=False)

    def sides(self) -> tuple[Tensor, Tensor]:
        """What the features say of all nodes, and their propagated ids."""
        ids, views = torch.cat(self.propagated(self.graph)), []
        for found, gate, near in zip(self.projected(), (self.gate_image, self.gate_text), self.near, strict=True):
            items = torch.sparse.mm(near, self.item * gate(found).sigmoid())
            views.append(torch.cat([torch.sparse.mm(self.to_users, items), items]))
        asked = torch.cat([self.query2(self.query1(view).tanh()) for view in views], 1).softmax(1)
        common = asked[:, :1] * views[0] + asked[:, 1:] * views[1]
        own = [prefer(ids).sigmoid() * (view - common)
               for prefer, view in zip((self.prefer_image, self.prefer_text), views, strict=True)]  # fmt: skip
        return (own[0] + own[1] + common) / 3, ids

    def halves(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        users, items = nodes.split([len(self.user), len(self.item)])
        return users, items

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.halves(sum(self.sides()))

    def loss(self, users: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        side, ids = self.sides()
        pairs = zip(self.halves(side), self.halves(ids), (users, pos), strict=True)
        pulled = sum(self.contrast(left[which], right[which]) for left, right, which in pairs)
        return self.smoothed_loss(self.halves(side + ids), users, pos, neg) + self.pull * pulled

    def contrast(self, left: Tensor, right: Tensor, temperature: float = 0.2) -> Tensor:
        left, right = F.normalize(left), F.normalize(right)
        own = torch.exp((left * right).sum(1) / temperature)
        return -torch.log(own / torch.exp(left @ right.T / temperature).sum(1)).mean()


class MMGCN(Model):
    """The mean of a graph network of each kind of features. Ids and preferences have gradients that nobody applies."""

    def __init__(self, train: Any, features: dict[str, Tensor], dim: int = 64, weight: float = 1e-3) -> None:
        super().__init__(train, weight)
        self.features, self.edges, (users, items) = features, edges_of(train), train.shape
        self.constants = {"id": torch.empty(users + items, dim)}
        self.image_proj = nn.Linear(features["image"].shape[1], 256)
        for name, found in features.items():
            width = 256 if name == "image" else found.shape[1]
            self.constants[f"{name}_pref"] = torch.empty(users, width)
            for layer, size in enumerate((width, dim, dim), 1):
                setattr(self, f"{name}_conv{layer}", nn.Parameter(nn.init.xavier_normal_(torch.empty(size, size))))
                setattr(self, f"{name}_lin{layer}", nn.Linear(size, dim))
                setattr(self, f"{name}_g{layer}", nn.Linear(size + dim, dim))
        for found in self.constants.values():
            nn.init.xavier_normal_(found).requires_grad_()

    def mean(self, nodes: Tensor) -> Tensor:
        count = degrees(self.edges, len(nodes)).clamp(min=1)[:, None]
        return gathered(nodes[self.edges[0]], self.edges, len(nodes)) / count

    def branch(self, name: str) -> Tensor:
        found = self.image_proj(self.features[name]) if name == "image" else self.features[name]
        nodes = F.normalize(torch.cat([self.constants[f"{name}_pref"], found]))
        for layer in (1, 2, 3):
            conv, lin, g = (getattr(self, f"{name}_{part}{layer}") for part in ("conv", "lin", "g"))
            neighbours = F.leaky_relu(self.mean(nodes @ conv))
            nodes = F.leaky_relu(g(torch.cat([neighbours, F.leaky_relu(lin(nodes)) + self.constants["id"]], 1)))
        return nodes

    def vectors(self) -> tuple[Tensor, Tensor]:
        users, items = (sum(map(self.branch, NAMES)) / 2).split(self.train_matrix.shape)
        return users, items

    def loss(self, users: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        (every_user, every_item), ids = self.vectors(), self.constants["id"]
        u, p, n = every_user[users], every_item[pos], every_item[neg]
        of_items = ids[torch.cat([pos, neg]) + len(every_user)]
        penalty = ids[users].square().mean() + of_items.square().mean() + self.constants["image_pref"].square().mean()
        return -torch.log(torch.sigmoid((u * p).sum(1) - (u * n).sum(1))).mean() + self.weight * penalty


class DRAGON(Model):
    """Networks of both kinds of features side by side, with a graph of items and one of users on top."""

    def __init__(
        self,
        train: Any,
        features: dict[str, Tensor],
        dim: int = 64,
        weight: float = 1e-3,
        k: int = 10,
        user_k: int = 40,
    ) -> None:
        super().__init__(train, weight)
        self.features, self.edges, self.user_k = features, edges_of(train), user_k
        for name, found in features.items():
            setattr(self, f"{name}_pref", nn.Parameter(nn.init.xavier_normal_(torch.empty(train.shape[0], dim))))
            setattr(self, f"{name}_mlp1", nn.Linear(found.shape[1], 256))
            setattr(self, f"{name}_mlp2", nn.Linear(256, dim))
        self.wu = nn.Parameter(nn.init.xavier_normal_(torch.empty(train.shape[0], 2)).softmax(1))
        self.near = item_graph([features[name] for name in NAMES], k, (0.1, 0.9))
        self.likest, self.draws = likest_users(train, user_k), np.random.default_rng(0)
        self.new_epoch()

    def new_epoch(self) -> None:
        """Lists of similar users, short ones filled up with elements drawn from them."""
        self.similar, counts = [], torch.zeros(len(self.likest), self.user_k)
        for user, (ids, shared) in enumerate(self.likest):
            places = list(range(len(ids)))
            while places and len(places) < self.user_k:
                places.append(places[self.draws.integers(len(places))])
            self.similar.append([ids[place] for place in places] or [0] * self.user_k)
            counts[user] = torch.tensor([shared[place] for place in places] or [-torch.inf] * self.user_k)
        self.similar_weight = counts.softmax(1).nan_to_num(0.0)

    def branch(self, name: str) -> tuple[Tensor, Tensor]:
        mapped = getattr(self, f"{name}_mlp2")(F.leaky_relu(getattr(self, f"{name}_mlp1")(self.features[name])))
        total = layer = F.normalize(torch.cat([getattr(self, f"{name}_pref"), mapped]))
        for _ in range(2):
            root = degrees(self.edges, len(layer)) ** -0.5
            messages = (root[self.edges[0]] * root[self.edges[1]])[:, None] * layer[self.edges[0]]
            layer = gathered(messages, self.edges, len(layer))
            total = total + layer
        users, items = total.split(self.train_matrix.shape)
        return users, items

    def vectors(self) -> tuple[Tensor, Tensor]:
        (image_user, image), (text_user, text) = map(self.branch, NAMES)
        users, items = (
            torch.cat([self.wu[:, :1] * image_user, self.wu[:, 1:] * text_user], 1),
            torch.cat([image, text], 1),
        )
        similar = torch.matmul(self.similar_weight[:, None], users[torch.tensor(self.similar)]).squeeze(1)
        return users + similar, items + torch.sparse.mm(self.near, items)

    def loss(self, users: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
        every_user, every_item = self.vectors()
        u, p, n = every_user[users], every_item[pos], every_item[neg]
        tables = (self.image_pref[users], self.text_pref[users], self.wu)
        penalty = sum(found.square().mean() for found in tables)
        return -torch.log2(torch.sigmoid((u * p).sum(1) - (u * n).sum(1))).mean() + self.weight * penalty


MODELS = {model.__name__: model for model in (BPR, VBPR, LightGCN, BM3, FREEDOM, LATTICE, MGCN, MMGCN, DRAGON)}


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


def train_epoch(model: Model, batches: Batches, optimizer: torch.optim.Optimizer, most: int | None = None) -> float:
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
def validate(model: Model, train: Any, judged: Any) -> dict[str, float]:
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
