"""LGMRec (Guo et al., Local and Global Graph Learning for Multimodal Recommendation, AAAI 2024; arXiv 2312.16400)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.blocks import log_sum_exps
from mirror_grad.parts.features import distinct
from mirror_grad.parts.graphs import LightPropagation, row_mean
from mirror_grad.parts.losses import dot_bpr, unsquared_norms

TEMPERATURE = 0.2


class LGMRec(MultimodalModel):
    """Ids and modalities on the user-item graph, and hyperedges learned from the features.

        C = LightGCN rows of the ids
        M_m = last of the propagations of [mean of F_m W_m over the history ; F_m W_m]
        H_i = softmax((F_m V_m + Gumbel) / t), H_u = softmax((R F_m V_m + Gumbel) / t): memberships in the hyperedges
        G_m: item <- H_i H_i^T item, user <- H_u H_i^T item, starting from the items of C
        output C + sum_m n(M_m) + alpha n(sum_m G_m);  n: rows of length 1
        loss = BPR + cl_weight * [contrast of G's modalities at the batch's users and items] + reg_weight * R

    contrast: sum over the batch of -log softmax of cosines / t against all users (or items).
    published: Gumbel noise in evaluation too, so that scores are random; R of norms, not squares. With one modality
    there is no contrast. Written from a description of the method, without numbers of the published code to compare.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.tables = Tables(self.num_users, self.num_items, dim)
        train = data.interactions.train
        self.light = LightPropagation(train)
        self.history, self.history_mean = SparseMatrix.from_scipy(train), SparseMatrix.from_scipy(row_mean(train))
        self.names = tuple(data.features)
        for name, table in data.features.items():
            self.register_buffer(f"features_{name}", table.to(torch.get_default_dtype()), persistent=False)
        widths = {name: table.shape[1] for name, table in data.features.items()}
        self.project, self.hyper = (
            nn.ModuleDict({name: nn.Linear(width, size, bias=False) for name, width in widths.items()})
            for size in (dim, self.settings.hyper_num)
        )
        for layer in (*self.project.values(), *self.hyper.values()):
            nn.init.xavier_uniform_(layer.weight)

    def modality(self, name: str) -> Tensor:
        """M_m: [U + I, D]."""
        items = self.project[name](getattr(self, f"features_{name}"))
        nodes = torch.cat([self.history_mean(items), items])
        return self.light(nodes, self.settings.n_mm_layers, combine="final")

    def memberships(self, name: str) -> tuple[Tensor, Tensor]:
        """(H_u [U, hyperedges], H_i [I, hyperedges]), rows sum to 1."""
        item = self.hyper[name](getattr(self, f"features_{name}"))
        user = self.history(item)
        if self.training or self.published:
            user, item = (logits - torch.empty_like(logits).exponential_().log() for logits in (user, item))
        return (user / TEMPERATURE).softmax(1), (item / TEMPERATURE).softmax(1)

    def hyperedges(self, name: str, items: Tensor) -> tuple[Tensor, Tensor]:
        """G_m of users and items."""
        drop = 1.0 - self.settings.keep_rate
        of_user, of_item = (F.dropout(part, drop, self.training) for part in self.memberships(name))
        users = items.new_zeros(self.num_users, items.shape[1])
        for _ in range(self.settings.n_hyper_layer):
            edges = of_item.T @ items
            items, users = of_item @ edges, of_user @ edges
        return users, items

    def views(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Final vectors of all nodes [U + I, D], and G of each modality."""
        content = self.light(self.tables.nodes, self.settings.n_ui_layers)
        items = self.split(content)[1]
        hyper = [self.hyperedges(name, items) for name in self.names]
        together = torch.cat([sum(users for users, _ in hyper), sum(items for _, items in hyper)])
        local = sum(F.normalize(self.modality(name), dim=1) for name in self.names)
        return content + local + self.settings.alpha * F.normalize(together, dim=1), hyper

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        nodes, hyper = self.views()
        rows = self.node_rows(batch, nodes)
        reg = unsquared_norms(*rows) if self.published else losses.half_mean_square(*rows)
        terms = {"bpr": dot_bpr(*rows), "reg": reg}
        loss = terms["bpr"] + self.settings.reg_weight * reg
        if len(hyper) > 1:
            (user_a, item_a), (user_b, item_b) = hyper
            terms["contrast"] = contrast(user_a, user_b, batch.users) + contrast(item_a, item_b, batch.pos)
            loss = loss + self.settings.cl_weight * terms["contrast"]
        return {"loss": loss, **terms}

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.split(self.views()[0])


def contrast(first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
    """Sum over ``ids`` of -log softmax over all rows of cos(first[id], second) / t at the same row. [n, D] each."""
    rows, place = distinct(ids)
    x, y = F.normalize(F.embedding(rows, first), dim=1), F.normalize(second, dim=1)
    number = x.new_zeros(len(rows)).index_add(0, place, x.new_ones(len(ids)))
    own = (number * (x * F.embedding(rows, y)).sum(1)).sum()
    return log_sum_exps(x, y, 1 / TEMPERATURE, weight=number) - own / TEMPERATURE
