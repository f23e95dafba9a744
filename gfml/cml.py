"""Collaborative Metric Learning parts that more than one program uses.

Users and items are points of one ball; relevance is minus the squared distance. Reference: Hsieh, Yang, Cui,
Lin, Belongie, Estrin, Collaborative Metric Learning, WWW 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.distances import common_floats
from gfml.losses import Hinge, covariance, project_to_ball_, sum_terms, warp_hinge
from gfml.ranking.encoders import Embedded, Tables
from gfml.ranking.sampling import Triples
from gfml.ranking.topk import Factors

# Coordinates of gathered negatives that stay in a core's cache; a device with its own memory takes many at once.
BLOCK, DEVICE_BLOCK = 1 << 19, 1 << 27
# One item in so many is kept from the feature network, to see by how much it misses what it was not shown.
HELD_OUT = 10


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
    weight: Tensor | None = None,
) -> Mined:
    """CML hinge of a batch; only the hardest of the W negatives enters the graph.

    Distances to all W are taken without gradient, so memory for the backward pass is 3 B D, not (2 + W) B D.
    Shape: users, pos int64 [B]; neg int64 [B] or [B, W]; weight [B] as in :class:`gfml.ranking.sampling.Triples`.
    """
    neg = neg.view(len(users), -1)
    sq_neg = sq_distances_to(encoder, users, neg)
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
        weight=weight,
    )
    return Mined(hinge, embedded, items)


@torch.no_grad()
def sq_distances_to(encoder: Tables, users: Tensor, items: Tensor) -> Tensor:
    """Squared distances of users [B] to items [B, W], without gradient, from coordinate differences: [B, W].

    Free tables are gathered block by block, so that nothing of size B W D is ever held.
    """
    if type(encoder) is not Tables:
        found = encoder(users, items)
        return (found.items - found.user[:, None]).square_().sum(-1)
    nodes, width = encoder.nodes, encoder.nodes.shape[1]
    size = max(1, (BLOCK if nodes.device.type == "cpu" else DEVICE_BLOCK) // max(1, items.shape[1] * width))
    blocks = []
    for user, item in zip(users.split(size), items.split(size), strict=True):
        gathered = F.embedding(item + encoder.num_users, nodes)
        blocks.append(gathered.sub_(F.embedding(user, nodes)[:, None]).square_().sum(-1))
    return torch.cat(blocks)


@dataclass(frozen=True)
class MetricOptions:
    """The loss of a batch: hinge, rank weight, covariance penalty, feature penalty; see :func:`metric_loss`.

    margin in squared-distance units; cov_form as in :func:`gfml.losses.covariance`; reduction sum or mean is that of
    the hinge alone and so sets its weight against the other two.
    """

    margin: float = 0.5
    use_rank_weight: bool = True
    rank_floor: bool = True
    reduction: str = "sum"
    cov_weight: float = 0.0
    cov_form: str = "squared"
    feature_weight: float = 1.0


def metric_loss(
    encoder: Tables, batch: Triples, options: MetricOptions, features: ItemFeatures | None = None
) -> tuple[dict[str, Tensor], Mined]:
    """{"loss": L_m + lambda_c L_c + lambda_f L_f, weighted parts "hinge", "covariance", "features"}, and what was mined.

    L_c is of the batch's distinct users and positives, L_f of its distinct items, negatives included.
    """
    mined = mined_hinge(
        encoder, batch.users, batch.pos, batch.neg, margin=options.margin, use_rank_weight=options.use_rank_weight,
        rank_floor=options.rank_floor, reduction=options.reduction, weight=batch.weight,
    )  # fmt: skip
    parts = {"hinge": mined.hinge.loss}
    if options.cov_weight:
        rows, weight = covariance_rows(encoder, batch.users, batch.pos)
        parts["covariance"] = options.cov_weight * covariance(rows, options.cov_form, weight)
    if features is not None and options.feature_weight:
        items = torch.cat([batch.pos, batch.neg.reshape(-1)])
        parts["features"] = options.feature_weight * features.loss(encoder, items)
    return {"loss": sum_terms(parts.values()), **parts}, mined


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
    projected, items = common_floats(projected, items)
    return (projected - items).square().sum()


class ItemFeatures(nn.Module):
    """Item features and the network that places them: it draws item vectors to itself and stands in for cold items.

    features [I, F]; known bool [I]: items that have features; cold bool [I]: items without any train interaction,
    whose vectors mean nothing. Cold items are placed by the network and do not train it.
    cold_offset: what ranking adds to the squared distances of placed items, in mean squared errors of the network, for
    which every tenth of the other items is kept from it; 0: nothing, as in the paper. See :meth:`offsets`.
    The features are no part of the state dict.
    """

    features: Tensor
    trained: Tensor
    held: Tensor
    placed: Tensor
    known: Tensor

    def __init__(
        self, projection: FeatureProjection, features: Tensor, known: Tensor, cold: Tensor, *, cold_offset: float = 0.5
    ) -> None:
        super().__init__()
        if not len(features) == len(known) == len(cold):
            raise ValueError(
                f"found {len(features)} rows, {len(known)} known and {len(cold)} cold items, wanted as many"
            )
        self.projection, self.cold_offset = projection, cold_offset
        held = torch.zeros_like(known)
        if cold_offset > 0 and bool((known & cold).any()):
            held[(known & ~cold).nonzero()[::HELD_OUT, 0]] = True
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("trained", known & ~cold & ~held, persistent=False)
        self.register_buffer("held", held, persistent=False)
        self.register_buffer("placed", known & cold, persistent=False)
        self.register_buffer("known", known, persistent=False)

    def loss(self, encoder: Tables, items: Tensor) -> Tensor:
        """:func:`feature_loss` of the distinct ``items`` that have features and train interactions. items int64 [n]."""
        if items.device.type != "cpu":
            error = self.projection(self.features[items]) - F.embedding(items + encoder.num_users, encoder.nodes)
            return (error.square().sum(1) * (first_of_each(items) & self.trained[items])).sum()
        chosen = torch.zeros_like(self.trained)
        chosen[items] = True
        rows = (chosen & self.trained).nonzero().squeeze(1)
        return feature_loss(self.projection(self.features[rows]), F.embedding(rows + encoder.num_users, encoder.nodes))

    @torch.no_grad()
    def start_(self, encoder: Tables) -> None:
        """v_j = f(x_j) for every item with features; dropout is off."""
        encoder.nodes[encoder.num_users :][self.known] = self._project(self.known).to(encoder.nodes.dtype)

    @torch.no_grad()
    def place(self, item: Tensor) -> Tensor:
        """Item vectors [I, D] with f(x_j) for the cold items that have features."""
        return item.index_put((self.placed,), self._project(self.placed))

    @torch.no_grad()
    def offsets(self, encoder: Tables) -> Tensor:
        """What ranking adds to squared distances: [I], ``cold_offset`` times the mean squared error for placed items.

        A network predicts something near the middle, and the middle is near everybody: by the distance to f(x_j) alone
        cold items displace what users would choose. If the network missed v_j by an error without direction, then
        E |u - v_j|^2 = |u - f(x_j)|^2 + E |v_j - f(x_j)|^2, a factor of 1; that hides cold items from the few users who
        want them, so smaller factors trade the recall of cold items against that of all.
        """
        vectors = encoder.nodes[encoder.num_users :][self.held]
        error = feature_loss(self._project(self.held), vectors) / max(1, len(vectors))
        return self.cold_offset * error * self.placed

    def _project(self, chosen: Tensor) -> Tensor:
        training = self.projection.training
        self.projection.eval()
        try:
            return self.projection(self.features[chosen])
        finally:
            self.projection.train(training)


class MetricLearner(nn.Module):
    """Collaborative Metric Learning: users and items as points of a ball of radius ``radius``.

    Starts from N(0, std^2) (std None: 1 / sqrt(D)) pulled into the ball; with features, items start at f(x_j).
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        embedding_dim: int,
        *,
        options: MetricOptions = MetricOptions(),
        radius: float = 1.0,
        std: float | None = None,
        features: ItemFeatures | None = None,
    ) -> None:
        super().__init__()
        std = embedding_dim**-0.5 if std is None else std
        self.encoder = Tables(num_users, num_items, embedding_dim, init="normal", std=std)
        self.options, self.radius, self.features = options, radius, features
        project_to_ball_(self.encoder.nodes.data, radius=radius)
        if features is not None:
            features.start_(self.encoder)

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        """{"loss": total, named parts}: what :func:`gfml.engine.train.fit` takes."""
        return metric_loss(self.encoder, batch, self.options, self.features)[0]

    def project(self) -> None:
        """After every optimizer step: pull all points into the ball.

        All, not the batch's: an optimizer with momentum moves points that the batch did not touch, the penalties
        touch more than the mined triples, and the whole table costs less than one batch.
        """
        project_to_ball_(self.encoder.nodes.data, radius=self.radius)

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        """User vectors [U, D] and item vectors [I, D] that rank: cold items with features stand at f(x_j)."""
        user, item = (part.detach() for part in self.encoder.vectors())
        return user, item if self.features is None else self.features.place(item)

    def offsets(self) -> Tensor | None:
        """What ranking adds to the squared distances of cold items, [I]; None for nothing."""
        if self.features is None or not bool(self.features.held.any()):
            return None
        return self.features.offsets(self.encoder)

    def scorer(self) -> SquaredDistanceScorer:
        """All-item scores: minus the squared distance."""
        return SquaredDistanceScorer(*self.vectors(), self.offsets())


def covariance_rows(encoder: Tables, users: Tensor, pos: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows whose covariance is penalised: distinct users of the batch, then its distinct positive items.

    On other devices than the CPU all rows of the batch, with a weight of 1 for the first of each and 0 for its copies.
    """
    if users.device.type == "cpu":
        return F.embedding(torch.cat([users.unique(), pos.unique() + encoder.num_users]), encoder.nodes), None
    nodes = torch.cat([users, pos + encoder.num_users])
    return F.embedding(nodes, encoder.nodes), first_of_each(nodes).to(encoder.nodes.dtype)


def first_of_each(ids: Tensor) -> Tensor:
    """bool [n]: True at one place of every different id. Of constant shape, so that a device need not be waited for."""
    ordered, place = ids.sort(stable=True)
    first = torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]])
    return torch.empty_like(first).scatter_(0, place, first)


class SquaredDistanceScorer:
    """score(u, i) = -|x_u - y_i|^2 - offset_i, ranked through 2 x.y - |y|^2 - offset (a :class:`gfml.ranking.topk.Scorer`).

    Shape: user [U, D], item [I, D], offset [I] or None for zero.
    """

    def __init__(self, user: Tensor, item: Tensor, offset: Tensor | None = None) -> None:
        self.user, self.item = common_floats(user, item)
        self.num_users, self.num_items = user.shape[0], item.shape[0]
        self._item_term = self.item.detach().square().sum(1) + (0.0 if offset is None else offset)

    @torch.no_grad()
    def score(self, users: Tensor) -> Tensor:
        """Scores of users [B] with every item: [B, I]."""
        user = self.user[users]
        negated = torch.addmm(self._item_term, user, self.item.T, alpha=-2)
        return negated.add_(user.square().sum(1, keepdim=True)).neg_()

    def at(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of users [B] with their own items int64 [B, K]: [B, K]."""
        return self.against(items)(self.user[users])

    def against(self, items: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Scores of user vectors [B, D] with all items, with items int64 [W], or each with his own, [B, W]."""
        item, term = (table if items is None else table[items] for table in (self.item, self._item_term))
        if item.dim() == 3:
            offset = term - item.square().sum(-1)
            return lambda vectors: -(vectors[:, None] - item).square().sum(-1) - offset
        return lambda vectors: 2 * vectors @ item.T - term - vectors.square().sum(1, keepdim=True)

    @torch.no_grad()
    def factors(self) -> Factors:
        """[2 x, 1] . [y, -|y|^2 - offset]: the score without the user's own constant."""
        one = torch.ones_like(self.user[:, :1])
        return Factors(torch.cat([2 * self.user, one], 1), torch.cat([self.item, -self._item_term[:, None]], 1))
