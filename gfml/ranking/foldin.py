"""A new user from his items, by the model's own score and without training: what he would be recommended.

Linear recommenders (EASE, item neighbours, popularity) take his items for his history, exactly as in training.
Models of vectors get the user vector that ranks his items above the others, by gradient steps on the pairwise
loss with the items fixed; over a graph his edges are propagated instead (:func:`propagated`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gfml.base.errors import UserError
from gfml.ranking.baselines import LinearScorer, NeighbourScorer
from gfml.ranking.encoders import LightGCN
from gfml.ranking.graph import layer_weights
from gfml.ranking.topk import FactorScorer, Scorer, full_precision

STEPS, RATE, DECAY = 60, 0.1, 0.05
# Other items that a new user's are compared with: the same for everybody, so that one alone gets what he gets in a batch.
OTHERS = 2048


@runtime_checkable
class VectorScorer(Scorer, Protocol):
    """A scorer of user vectors, item vectors and nothing else that belongs to a user but a constant."""

    user: Tensor
    item: Tensor

    def of_vectors(self, vectors: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores of user vectors [B, D] with all items, or with items int64 [W]: [B, I] or [B, W]; a gradient flows."""


class NewUsers:
    """Users that are vectors, ranked by the score of another scorer (a :class:`gfml.ranking.topk.Scorer`)."""

    def __init__(self, scorer: VectorScorer, vectors: Tensor) -> None:
        self.scorer, self.vectors = scorer, vectors
        self.num_users, self.num_items = len(vectors), scorer.num_items

    @torch.no_grad()
    def score(self, users: Tensor) -> Tensor:
        """Shape: users int64 [B] -> [B, I]. One row after the other: its rounding does not depend on the rest."""
        rows = self.vectors[users.to(self.vectors.device)]
        return torch.cat([self.scorer.of_vectors(row[None]) for row in rows])

    def factors(self) -> None:
        return None


def fold_in(scorer: Scorer, histories: sp.csr_array, encoder: Any = None) -> Scorer:
    """A scorer of new users with these ``histories`` (binary CSR [n, I]); the known users are gone from it.

    encoder: where the scorer's vectors come from; over a graph new users get theirs by :func:`propagated`.

    UserError for an empty history and for a scorer that offers neither a history nor vectors.
    """
    empty = np.flatnonzero(np.diff(histories.indptr) == 0)
    if len(empty):
        raise UserError(f"new user {int(empty[0]) + 1} has no item that the model knows: give some of its items")
    if isinstance(scorer, LinearScorer | NeighbourScorer):
        return replace(scorer, history=histories)
    if isinstance(scorer, FactorScorer) and bool((scorer.user == scorer.user[:1]).all()):
        return FactorScorer(scorer.user[:1].expand(histories.shape[0], -1), scorer.item)  # popularity: one for all
    if not isinstance(scorer, VectorScorer):
        raise UserError(
            f"{type(scorer).__name__} cannot take a new user: choose a model of vectors, item neighbours or EASE"
        )
    if isinstance(encoder, LightGCN) and encoder.num_layers:
        return NewUsers(scorer, graph_vectors(encoder, histories))
    return NewUsers(scorer, user_vectors(scorer, histories))


def user_vectors(scorer: VectorScorer, histories: sp.csr_array) -> Tensor:
    """The vector of each history, [n, D]; each is found alone, so that it does not depend on the others.

    Start: the mean of his items' vectors, as long as the users' vectors are. Then ``STEPS`` steps of Adam on

        mean over his items i and other items j of softplus(s(x, j) - s(x, i)) + decay |x - start|^2 / |start|^2.

    Cost: about 100 products of [I'] x D a user, I' at most ``OTHERS`` items and his own.
    """
    device, length = scorer.item.device, float(scorer.user.norm(dim=1).median())
    picked = np.random.default_rng(0).permutation(scorer.num_items)[:OTHERS]
    others = torch.from_numpy(np.sort(picked)).to(device)
    with torch.enable_grad(), full_precision():
        return torch.stack([_one(scorer, torch.from_numpy(own.astype(np.int64)).to(device), others, length)
                            for own in np.split(histories.indices, histories.indptr[1:-1])])  # fmt: skip


def _one(scorer: VectorScorer, own: Tensor, others: Tensor, length: float) -> Tensor:
    start = scorer.item.detach()[own].mean(0, keepdim=True)
    start = start * (length / start.norm().clamp_min(1e-12))
    vector = start.clone().requires_grad_()
    others = others[~torch.isin(others, own)]
    optimizer = torch.optim.Adam([vector], lr=RATE * length / max(start.shape[1], 1) ** 0.5)
    for _ in range(STEPS):
        scores = scorer.of_vectors(vector, torch.cat([own, others]))[0]
        loss = F.softplus(scores[None, len(own) :] - scores[: len(own), None]).mean()
        loss = loss + DECAY * (vector - start).square().sum() / length**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vector.detach()[0]


@torch.no_grad()
def graph_vectors(encoder: LightGCN, histories: sp.csr_array) -> Tensor:
    """Vectors [n, D] of new users by :func:`propagated`, with the layers of a trained LightGCN. Cost: K - 1 products."""
    graph, layers = encoder.graph, [encoder.nodes.detach()]
    for _ in range(encoder.num_layers - 1):
        layers.append(graph.multiply(layers[-1]))
    items = [layer[graph.num_users :] for layer in layers]
    return propagated(items, graph.indptr.diff()[graph.num_users :], histories, combine=encoder.combine)


def propagated(
    layers: Sequence[Tensor], item_degree: Tensor, histories: sp.csr_array, *, combine: str = "mean"
) -> Tensor:
    """Vectors [n, D] of new users in LightGCN: his edges carry every layer of his items, his own start is zero.

    layers: item vectors [I, D] of layers 0..K - 1; item_degree [I]: train users of each item. With the symmetric
    normalisation layer k + 1 of a user is sum over his items i of layer_k(i) / sqrt(|items| degree_i), the result
    the mean of K + 1 layers (or their sum, or the final one). The items stay as trained.
    """
    device = layers[0].device
    weight = 1 / np.sqrt(np.repeat(np.diff(histories.indptr), np.diff(histories.indptr)))
    scale = item_degree.to(layers[0].dtype).clamp_min(1).rsqrt()
    rows = torch.from_numpy(histories.indptr.astype(np.int64)).to(device)
    items = torch.from_numpy(histories.indices.astype(np.int64)).to(device)
    per_edge = torch.from_numpy(weight).to(device, layers[0].dtype) * scale[items]
    weights = layer_weights(len(layers), combine)[1:]
    summed = sum((factor * layer for factor, layer in zip(weights, layers, strict=True)), torch.zeros_like(layers[0]))
    return F.embedding_bag(items, summed, rows, mode="sum", include_last_offset=True, per_sample_weights=per_edge)
