"""SMORE (Ong and Khong, Spectrum-based Modality Representation Fusion, WSDM 2025; arXiv 2412.14978)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import losses
from gfml.ranking.encoders import Tables
from gfml.ranking.graph import sum_of_items
from gfml.ranking.sampling import Triples
from gfml.ranking.sparse import SparseMatrix
from gfml.ranking.topk import FactorScorer
from mirror_grad.models import settings
from mirror_grad.parts.features import projected
from mirror_grad.parts.graphs import LightPropagation, user_block, weighted_item_graph
from mirror_grad.parts.losses import dot_bpr, info_nce
from mirror_grad.parts.modes import evaluating

if TYPE_CHECKING:
    from mirror_grad.data import MultimodalData

TEMPERATURE = 0.2
FUSED = "fusion"


class SMORE(nn.Module):
    """Projected features filtered in their spectrum over the channels purify the item vectors.

        spectrum_m = FFT(W_m f_m + b_m);  x_m = e * sigmoid(gate_m(FFT^-1(c_m spectrum_m))), smoothed over graph m
        fusion: spectrum = c * product of the modalities' spectra, graph = larger entry of the modalities' graphs
        C = LightGCN rows; side = mean of prefer_f(C) x_f and prefer_m(C) * softmax(query_m(x_f)) * x_m; output C + side
        loss = BPR + reg_weight * |batch rows|^2 / (2 B) + cl_loss * [InfoNCE(side_p, C_p) + InfoNCE(side_u, C_u)]

    c: learned complex weights of the frequencies; users: R_hat x, softmax over the channels.
    Written from a description of the method, without numbers of the published code to compare with.
    """

    Settings = settings.SMORE

    def __init__(
        self, data: MultimodalData, settings: settings.SMORE, *, behaviour: str, embedding_dim: int, seed: int
    ) -> None:
        super().__init__()
        self.settings = settings
        self.tables = Tables(data.num_users, data.num_items, embedding_dim)
        train = data.interactions.train
        self.light = LightPropagation(train)
        self.to_users = SparseMatrix.from_scipy(user_block(train))
        self.features = projected(data.features, embedding_dim, trained=settings.train_features)
        sizes = {"image": settings.image_knn_k, "text": settings.text_knn_k}
        graphs = {name: weighted_item_graph(f, sizes[name], data.cache_dir) for name, f in data.features.items()}
        graphs[FUSED] = larger_entries(*graphs.values())
        self.item_graphs = nn.ModuleDict({name: SparseMatrix.from_scipy(graph) for name, graph in graphs.items()})
        bins = embedding_dim // 2 + 1
        self.filter = nn.ParameterDict({name: nn.Parameter(torch.randn(bins, 2)) for name in graphs})
        self.gate = nn.ModuleDict({name: nn.Linear(embedding_dim, embedding_dim) for name in graphs})
        self.prefer = nn.ModuleDict({name: nn.Linear(embedding_dim, embedding_dim) for name in graphs})
        self.query = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(embedding_dim, embedding_dim),
                    nn.Tanh(),
                    nn.Linear(embedding_dim, embedding_dim, bias=False),
                )
                for name in data.features
            }
        )

    def filtered(self) -> dict[str, Tensor]:
        """Projected features of each modality, and their fusion, after the filters: [I, D] each."""
        rows = {name: part() for name, part in self.features.items()}
        width = next(iter(rows.values())).shape[1]
        spectra = {name: torch.fft.rfft(x, dim=1, norm="ortho") for name, x in rows.items()}
        product = None
        for spectrum in spectra.values():
            product = spectrum if product is None else product * spectrum
        spectra[FUSED] = product
        weights = {name: torch.view_as_complex(weight) for name, weight in self.filter.items()}
        return {n: torch.fft.irfft(weights[n] * s, n=width, dim=1, norm="ortho") for n, s in spectra.items()}

    def of_items(self) -> dict[str, Tensor]:
        """Items as each modality and their fusion see them: [I, D] each."""
        ids, views = self.tables.nodes[self.tables.num_users :], {}
        for name, rows in self.filtered().items():
            items = ids * self.gate[name](rows).sigmoid()
            for _ in range(self.settings.n_layers):
                items = self.item_graphs[name](items)
            views[name] = items
        return views

    def side(self, content: Tensor, views: dict[str, Tensor]) -> Tensor:
        """What the modalities say of nodes, by their content."""
        total = 0.0
        for name, view in views.items():
            own = view if name == FUSED else self.query[name](views[FUSED]).softmax(1) * view
            preference = F.dropout(self.prefer[name](content).sigmoid(), self.settings.dropout, self.training)
            total = total + preference * own
        return total / len(views)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """(side, content) of all nodes, [U + I, D] each."""
        content = self.light(self.tables.nodes, self.settings.n_ui_layers)
        views = {name: torch.cat([self.to_users(items), items]) for name, items in self.of_items().items()}
        return self.side(content, views), content

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        side, content = self.outputs()
        first = self.tables.num_users
        ids = torch.cat([batch.users, first + batch.pos, first + batch.neg])
        final = F.embedding(ids, side + content).chunk(3)
        terms = {"bpr": dot_bpr(*final), "reg": losses.half_mean_square(*final)}
        for name, rows in {"user": batch.users, "item": first + batch.pos}.items():
            terms[f"nce_{name}"] = info_nce(side, content, TEMPERATURE, rows)
        contrast = self.settings.cl_loss * (terms["nce_item"] + terms["nce_user"])
        return {"loss": terms["bpr"] + self.settings.reg_weight * terms["reg"] + contrast, **terms}

    @evaluating
    def scorer(self) -> FactorScorer:
        return FactorScorer(*self.light.split(sum(self.outputs())))

    @evaluating
    def new_users(self, histories: sp.csr_array) -> Tensor:
        """Vectors of users with these histories (binary CSR [n, I]), from their items: [n, D]."""
        views = {name: sum_of_items(self.light.graph, items, histories) for name, items in self.of_items().items()}
        content = self.light.of_new_users(self.tables.nodes, self.settings.n_ui_layers, histories)
        return self.side(content, views) + content


def larger_entries(*graphs: sp.csr_array) -> sp.csr_array:
    """The largest value at every place that any of the graphs has; an absent entry does not count as 0."""
    result = graphs[0]
    for other in graphs[1:]:
        both = (result != 0).multiply(other != 0)
        result = result.maximum(other).multiply(both) + (result + other).multiply((result != 0) != (other != 0))
    return sp.csr_array(result)
