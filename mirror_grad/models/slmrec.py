"""SLMRec (Tao et al., Self-Supervised Learning for Multimedia Recommendation, TMM 2022), task FAC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from mirror_grad.data import MultimodalData
from mirror_grad.models.base import MultimodalModel
from mirror_grad.parts.blocks import batch_cross_entropy
from mirror_grad.parts.features import distinct, projected
from mirror_grad.parts.graphs import bipartite, row_mean, symmetric, with_itself

NORMALISATIONS = {
    "pre": symmetric,
    "norm": lambda adjacency: row_mean(with_itself(adjacency)),
    "gcmc": row_mean,
    "mean": lambda adjacency: with_itself(row_mean(adjacency)),
    "plain": lambda adjacency: adjacency,
}


class SLMRec(MultimodalModel):
    """One LightGCN for ids and one per modality, all with the same user table; joined by a linear layer per side.

        user = Lin[u_id ; u_v ; u_t], item = Lin'[i_id ; i_v ; i_t], item inputs e_i and W_m n(f_m) + b_m
        loss = InfoNCE(user, item) + ssl_alpha * [CE(a, g2(i_v)) + CE(g4(g3(a)), g5(i_t))],   a = g1(i_id)

    CE: cross-entropy of the batch's dot products over ssl_temp, the own pair the right one. Negatives are not used.
    score = user . item; in the published code its sigmoid, which ranks alike. Published with an optimizer decay of
    1e-4, and with a weight ``reg`` that nothing reads, which does not exist here.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        self.tables = Tables(self.num_users, self.num_items, dim)
        self.graph = SparseMatrix.from_scipy(NORMALISATIONS[self.settings.adj_type](bipartite(data.interactions.train)))
        features = {name: F.normalize(table, dim=1) for name, table in data.features.items()}
        self.features = projected(features, dim, trained=False)
        width = (1 + len(features)) * dim
        self.fuse = nn.ModuleDict({side: nn.Linear(width, dim) for side in ("user", "item")})
        sizes = {"g1": dim}
        if "image" in features:
            sizes |= {"g2": dim}
        if "text" in features:
            sizes |= {"g3": dim, "g4": dim // 2, "g5": dim // 2}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in sizes.items()})
        for layer in (*self.fuse.values(), *self.heads.values(), *(part.linear for part in self.features.values())):
            nn.init.xavier_uniform_(layer.weight)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Vectors of users [U, views * D] and items [I, views * D]: ids first, then the modalities."""
        user, item = self.tables.vectors()
        items = [item, *(part() for part in self.features.values())]
        layer = total = torch.cat([user.repeat(1, len(items)), torch.cat(items, 1)])
        for _ in range(self.settings.layer_num):
            layer = self.graph(layer)
            total = total + layer
        return self.split(total / (self.settings.layer_num + 1))

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        users, items = self.outputs()
        (user_rows, of_user), (item_rows, of_item) = distinct(batch.users), distinct(batch.pos)
        user, item = F.embedding(user_rows, users), F.embedding(item_rows, items)
        fused = F.normalize(self.fuse["user"](user), dim=1), F.normalize(self.fuse["item"](item), dim=1)
        terms = {"main": batch_cross_entropy(*fused, of_user, of_item, 1 / self.settings.temp)}
        own, *views = item.chunk(1 + len(self.features), 1)
        view, heads = dict(zip(self.features, views)), self.heads
        anchor = heads["g1"](own)
        pairs = {}
        if "image" in view:
            pairs["fac_image"] = anchor, heads["g2"](view["image"])
        if "text" in view:
            pairs["fac_text"] = heads["g4"](heads["g3"](anchor)), heads["g5"](view["text"])
        scale = 1 / self.settings.ssl_temp
        contrasts = {name: batch_cross_entropy(*pair, of_item, of_item, scale) for name, pair in pairs.items()}
        return {"loss": terms["main"] + self.settings.ssl_alpha * sum(contrasts.values()), **terms, **contrasts}

    def factors(self) -> tuple[Tensor, Tensor]:
        user, item = self.outputs()
        return self.fuse["user"](user), self.fuse["item"](item)
