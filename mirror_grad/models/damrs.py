"""DA-MRS (Xv et al., Denoising and Aligning Multi-modal Content and User Feedback, KDD 2024; arXiv 2406.12501)."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.layout import shared_items
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.blocks import sum_in_blocks
from mirror_grad.parts.features import distinct
from mirror_grad.parts.graphs import LightPropagation, symmetric, with_itself
from mirror_grad.parts.modes import evaluating

# Similarities of one block of items to all: float32 numbers.
NUMBERS_PER_BLOCK = 1 << 23


class DAMRS(MultimodalModel):
    """LightGCN ids plus the mean of their views h on item graphs: by image, by text, by shared users.

        a feature graph keeps neighbours whose similarity is above average in every modality
        loss = doubting BPR + nd_weight * graded neighbours + kl_weight * divergence of the preferences

    Terms: :func:`doubting_bpr`, :func:`graded_neighbours`, :func:`preference_divergence`. Features are not trained.
    Written from a description of the method, without numbers of the published code to compare with; how the weights of
    the doubting BPR are masked, and that they carry no gradient, is our reading.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.tables = Tables(self.num_users, self.num_items, dim)
        train = data.interactions.train
        self.light = LightPropagation(train)
        graphs = agreeing_graphs(dict(data.features), self.settings.knn_k)
        graphs["session"] = session_graph(train, self.settings.knn_k, self.settings.session_min)
        self.item_graphs = nn.ModuleDict({name: SparseMatrix.from_scipy(graph) for name, graph in graphs.items()})

    def views(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Users, propagated item ids, and the views of the items on every graph."""
        user, item = self.split(self.light(self.tables.nodes, self.settings.n_ui_layers))
        ids = self.tables.nodes[self.num_users :]
        return user, item, [graph(ids) for graph in self.item_graphs.values()]

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        user, item, views = self.views()
        mean, user = sum(views) / len(views), F.embedding(batch.users, user)
        pos, neg = (F.embedding(ids, item + mean) for ids in (batch.pos, batch.neg))
        chances = [preferences(user, [F.embedding(ids, view) for view in views]) for ids in (batch.pos, batch.neg)]
        items, options = torch.cat([batch.pos, batch.neg]), self.settings
        terms = {
            "bpr": doubting_bpr((user * pos).sum(1), (user * neg).sum(1), *chances),
            "neighbours": graded_neighbours(views, items, options.num_positives, options.temperature),
            "divergence": preference_divergence(user, F.embedding(batch.pos, item), F.embedding(batch.pos, mean)),
        }
        loss = terms["bpr"] + options.nd_weight * terms["neighbours"] + options.kl_weight * terms["divergence"]
        return {"loss": loss, **terms}

    def outputs(self) -> tuple[Tensor, Tensor]:
        user, item, views = self.views()
        return user, item + sum(views) / len(views)

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        return self.light.of_new_users(self.tables.nodes, self.settings.n_ui_layers, histories)


def preferences(user: Tensor, views: list[Tensor]) -> Tensor:
    """sigmoid(u . n(h_m)) of every view, without gradient: [B, views]."""
    return torch.stack([(user * F.normalize(view, dim=1)).sum(1) for view in views], 1).detach().sigmoid()


def doubting_bpr(pos: Tensor, neg: Tensor, pos_chance: Tensor, neg_chance: Tensor) -> Tensor:
    """-mean [w+ ln s(x) + w- ln s(-x)], x = pos - neg: a label counts as far as the contents speak for it.

        w+ = mean_m a_m * exp(-var_m a_m)^2                                              a: chances of the positive
        w- = max(0, max_m b_m - mean of all b), where mean_m a_m is below its average    b: chances of the negative

    Shape: scores [B], chances [B, views] in (0, 1). Both weights lie in [0, 1].
    """
    mean = pos_chance.mean(1)
    trust = (mean * (-2 * pos_chance.var(1, unbiased=False)).exp()).clamp(0, 1)
    doubt = (neg_chance.amax(1) - neg_chance.mean()).clamp(0, 1) * (mean < mean.mean())
    return -(trust * F.logsigmoid(pos - neg) + doubt * F.logsigmoid(neg - pos)).mean()


def graded_neighbours(views: list[Tensor], ids: Tensor, count: int, temperature: float) -> Tensor:
    """-log(E_1 / E) - log(E_2 / (E - E_1)), mean over the items ``ids``, which may repeat, and over the views: a scalar.

    E, E_1, E_2: sums of exp(cos / t) over all items, over the ``count`` items of largest [softmax of the other views +
    2 x softmax of the own], and over the ``count`` nearest of the own view among the rest. Views [I, D] each.
    """
    count = min(count, (len(views[0]) - 1) // 2)
    rows, place = distinct(ids)
    unit = [F.normalize(view, dim=1) for view in views]
    share = unit[0].new_zeros(len(rows)).index_add(0, place, unit[0].new_full((len(ids),), 1 / (len(ids) * len(views))))

    def term(share: Tensor, *vectors: Tensor) -> Tensor:
        own, others = vectors[: len(views)], vectors[len(views) :]
        return (share * _graded([x @ y.T / temperature for x, y in zip(own, others)], count)).sum()

    return sum_in_blocks(term, (share, *(F.embedding(rows, x) for x in unit)), unit, len(views) * len(unit[0]))


def _graded(logits: list[Tensor], count: int) -> Tensor:
    """The sum over the views of the two terms, by the logits [n, I] of each view: [n]."""
    chances = [part.detach().softmax(1) for part in logits]
    together, total = sum(chances), 0.0
    for own, chance in zip(logits, chances):
        first = (together + chance).topk(count, sorted=False).indices
        rest = own.scatter(1, first, -torch.inf)
        second = rest.detach().topk(count, sorted=False).indices
        near = own.gather(1, first).logsumexp(1) - own.logsumexp(1)
        total = total - (near + rest.gather(1, second).logsumexp(1) - rest.logsumexp(1))
    return total


def preference_divergence(user: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Mean over users x items of KL(p | q) + KL(q | p) for the chances p, q = sigmoid(u . n(i)) of both item vectors.

    For logits a, b that is (s(a) - s(b)) (a - b): at least 0, and finite however sure both are. Shape: [B, D] each.
    """

    def term(user: Tensor, first: Tensor, second: Tensor) -> Tensor:
        a, b = user @ first.T, user @ second.T
        return ((a.sigmoid() - b.sigmoid()) * (a - b)).sum()

    unit = [F.normalize(rows, dim=1) for rows in (first, second)]
    return sum_in_blocks(term, (user,), unit, 2 * len(first)) / (len(user) * len(first))


@torch.no_grad()
def agreeing_graphs(features: dict[str, Tensor], k: int) -> dict[str, sp.csr_array]:
    """Graph of each modality: the k nearest items among those above the mean cosine of all pairs in every modality.

    Entries 1, scaled by the roots of the row sums at both ends. Block by block; a row may have fewer than k or none.
    """
    unit = {name: F.normalize(table.float(), dim=1) for name, table in features.items()}
    count = len(next(iter(unit.values())))
    mean = {name: table.sum(0).square().sum() / count**2 for name, table in unit.items()}
    chosen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in unit}
    for rows in torch.arange(count).split(max(1, NUMBERS_PER_BLOCK // count)):
        cosine = {name: table[rows] @ table.T for name, table in unit.items()}
        agreed = torch.stack([cosine[name] >= mean[name] for name in unit]).all(0)
        for name, block in cosine.items():
            values, ids = block.masked_fill(~agreed, 0.0).topk(min(k, count))
            place = (values > 0).nonzero()
            chosen[name].append((rows[place[:, 0]], ids[values > 0]))
    graphs = {}
    for name, parts in chosen.items():
        row, column = (torch.cat(part).numpy() for part in zip(*parts))
        graphs[name] = symmetric(sp.csr_array((np.ones(len(row)), (row, column)), shape=(count, count)))
    return graphs


def session_graph(train: sp.csr_array, k: int, least: int) -> sp.csr_array:
    """Items and themselves, joined to the k items with most users in common, ``least`` or more; scaled as above."""
    counts = shared_items(train.T.tocsr(), k)
    kept = counts.data >= least
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))[kept]
    joined = sp.csr_array((np.ones(len(rows)), (rows, counts.indices[kept])), shape=counts.shape)
    return symmetric(with_itself(joined))
