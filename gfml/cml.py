"""Collaborative Metric Learning parts that more than one program uses.

Users and items are points of one ball; relevance is minus the squared distance. Reference: Hsieh, Yang, Cui,
Lin, Belongie, Estrin, Collaborative Metric Learning, WWW 2017.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.encoders import Embedded, Tables
from gfml.losses import Hinge, project_to_ball_, warp_hinge
from gfml.topk import Factors


class Mined(NamedTuple):
    """The hinge of a batch, the vectors of (user, positive, hardest negative), and the item ids behind them."""

    hinge: Hinge
    embedded: Embedded
    items: Tensor


def mined_hinge(
    encoder: Tables,
    users: Tensor,
    pos: Tensor,
    neg: Tensor,
    *,
    margin: float,
    use_rank_weight: bool = True,
    rank_floor: bool = True,
    reduction: str = "sum",
) -> Mined:
    """CML hinge of a batch; only the hardest of the W negatives enters the graph.

    Distances to all W are taken without gradient, so memory for the backward pass is 3 B D, not (2 + W) B D.
    Shape: users, pos int64 [B]; neg int64 [B] or [B, W].
    """
    neg = neg.view(len(users), -1)
    with torch.no_grad():
        user, items = encoder(users, neg)[:2]
        sq_neg = (items - user[:, None]).square_().sum(-1)
    items = torch.stack([pos, neg.gather(1, sq_neg.argmin(1, keepdim=True)).squeeze(1)], 1)
    embedded = encoder(users, items)
    sq_distance = (embedded.items - embedded.user[:, None]).square().sum(-1)
    hinge = warp_hinge(
        sq_distance[:, 0],
        sq_neg,
        margin=margin,
        num_items=encoder.num_items,
        use_rank_weight=use_rank_weight,
        rank_floor=rank_floor,
        reduction=reduction,
        sq_hardest=sq_distance[:, 1],
    )
    return Mined(hinge, embedded, items)


class FeatureProjection(nn.Module):
    """f(x) of item features: two linear layers with ReLU and dropout, scaled, pulled into the ball.

    Shape: features [n, F] -> [n, D]. Dropout acts in training mode only.
    """

    def __init__(
        self,
        num_features: int,
        embedding_dim: int,
        *,
        hidden_dim: int = 256,
        dropout: float = 0.5,
        scale: float = 0.5,
        radius: float = 1.0,
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_features, hidden_dim)
        self.output = nn.Linear(hidden_dim, embedding_dim)
        self.dropout, self.scale, self.radius = nn.Dropout(dropout), scale, radius

    def forward(self, features: Tensor) -> Tensor:
        projected = self.output(self.dropout(F.relu(self.hidden(features)))) * self.scale
        norm = projected.norm(dim=-1, keepdim=True)
        return projected * (self.radius / norm.clamp_min(self.radius))


def feature_loss(projected: Tensor, items: Tensor) -> Tensor:
    """Sum over the given items of |f(x_j) - v_j|^2. Shape: both [n, D]."""
    return (projected - items).square().sum()


def covariance_rows(encoder: Tables, users: Tensor, pos: Tensor) -> Tensor:
    """The rows whose covariance is penalised: distinct users of the batch, then its distinct positive items."""
    nodes = torch.cat([users.unique(), pos.unique() + encoder.num_users])
    return F.embedding(nodes, encoder.nodes)


def project_batch_(encoder: Tables, users: Tensor, items: Tensor, radius: float) -> None:
    """After an optimizer step: pull the rows a batch touched back into the ball."""
    # Rows that repeat are written twice with the same values.
    nodes = torch.cat([users, items.reshape(-1) + encoder.num_users])
    project_to_ball_(encoder.nodes.data, nodes, radius)


class SquaredDistanceScorer:
    """score(u, i) = -|x_u - y_i|^2, ranked through 2 x.y - |y|^2 (a :class:`gfml.topk.Scorer`)."""

    def __init__(self, user: Tensor, item: Tensor) -> None:
        self.user, self.item = user, item
        self.num_users, self.num_items = user.shape[0], item.shape[0]

    @torch.no_grad()
    def score(self, users: Tensor) -> Tensor:
        """Minus squared distances of users [B] to every item: [B, I]."""
        user = self.user[users]
        half = torch.addmm(self.item.square().sum(1), user, self.item.T, alpha=-2)
        return half.add_(user.square().sum(1, keepdim=True)).neg_()

    @torch.no_grad()
    def factors(self) -> Factors:
        """[2 x, 1] . [y, -|y|^2]: the score without the user's own constant."""
        one = torch.ones_like(self.user[:, :1])
        return Factors(torch.cat([2 * self.user, one], 1), torch.cat([self.item, -self.item.square().sum(1, True)], 1))
