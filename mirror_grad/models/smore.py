"""SMORE (Ong and Khong, Spectrum-based Modality Representation Fusion, WSDM 2025; arXiv 2412.14978)."""

from __future__ import annotations

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_grad.data import MultimodalData
from mirror_grad.models.mgcn import MGCN
from mirror_grad.parts.graphs import weighted_item_graph

FUSED = "fusion"


class SMORE(MGCN):
    """Projected features filtered in their spectrum over the channels purify the item vectors.

        spectrum_m = FFT(W_m f_m + b_m);  x_m = e * sigmoid(gate_m(FFT^-1(c_m spectrum_m))), smoothed over graph m
        fusion: spectrum = c * product of the modalities' spectra, graph = larger entry of the modalities' graphs
        C = LightGCN rows; side = mean of prefer_f(C) x_f and prefer_m(C) * softmax(query_m(x_f)) * x_m; output C + side
        loss = BPR + reg_weight * |batch rows|^2 / (2 B) + cl_loss * [InfoNCE(side_p, C_p) + InfoNCE(side_u, C_u)]

    c: learned complex weights of the frequencies; users: R_hat x, softmax over the channels.
    Written from a description of the method, without numbers of the published code to compare with.
    """

    def build(self, data: MultimodalData, dim: int) -> None:
        sizes = {"image": self.settings.image_knn_k, "text": self.settings.text_knn_k}
        graphs = {name: weighted_item_graph(f, sizes[name], data.cache_dir) for name, f in data.features.items()}
        self.build_views(data, dim, graphs | {FUSED: larger_entries(*graphs.values())})
        bins = dim // 2 + 1
        self.filter = nn.ParameterDict({name: nn.Parameter(torch.randn(bins, 2)) for name in self.item_graphs})
        self.build_gates(dim)
        layers = {n: (nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim, bias=False)) for n in data.features}
        self.query = nn.ModuleDict({name: nn.Sequential(*parts) for name, parts in layers.items()})

    def content(self) -> dict[str, Tensor]:
        """Projected features of each modality, and their fusion, after the filters: [I, D] each."""
        rows = super().content()
        width = next(iter(rows.values())).shape[1]
        spectra = {name: torch.fft.rfft(x, dim=1, norm="ortho") for name, x in rows.items()}
        product = None
        for spectrum in spectra.values():
            product = spectrum if product is None else product * spectrum
        spectra[FUSED] = product
        weights = {name: torch.view_as_complex(weight) for name, weight in self.filter.items()}
        return {n: torch.fft.irfft(weights[n] * s, n=width, dim=1, norm="ortho") for n, s in spectra.items()}

    def side(self, ids: Tensor, views: dict[str, Tensor]) -> Tensor:
        total = 0.0
        for name, view in views.items():
            own = view if name == FUSED else self.query[name](views[FUSED]).softmax(1) * view
            preference = F.dropout(self.prefer[name](ids).sigmoid(), self.settings.dropout, self.training)
            total = total + preference * own
        return total / len(views)


def larger_entries(*graphs: sp.csr_array) -> sp.csr_array:
    """The largest value at every place that any of the graphs has; an absent entry does not count as 0."""
    result = graphs[0]
    for other in graphs[1:]:
        both = (result != 0).multiply(other != 0)
        result = result.maximum(other).multiply(both) + (result + other).multiply((result != 0) != (other != 0))
    return sp.csr_array(result)
