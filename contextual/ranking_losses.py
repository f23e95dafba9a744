"""Average precision made differentiable: Smooth-AP, SupAP and ROADMAP, SoftBin-AP.

Notation: B pictures; S [B, B] their cosine similarities; P_q the pictures of query q's class, q itself included. With
h(x) standing for "ranked before" at x = s_qi - s_qj,

    rank_j = 1 + sum over i != j of h(x),   rank+_j = 1 + the same over i in P_q,
    AP_q = 1 / |P_q| sum over j in P_q of rank+_j / rank_j,   loss = 1 - mean of AP_q.

Classes of any size in any order. Only the pairs (q, j in P_q) are formed: B |P| rows of B numbers where the published
programs build B x B x B; the values are the same. Listing the pairs is the one read-back from the device.

Sources: Brown et al., Smooth-AP, ECCV 2020; Ramzi et al., ROADMAP, NeurIPS 2021; Revaud et al., Learning with Average
Precision, ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contextual.losses import SimilarityLoss, contrastive_loss

# Beyond it exp leaves single precision's useful range; the gradient is 0 there.
MAX_EXPONENT = 50.0
# (excess [E, B], is i in P_q [E, B]) -> "ranked before" [E, B]
Before = Callable[[Tensor, Tensor], Tensor]


def exact_ap(sim: Tensor, labels: Tensor) -> Tensor:
    """AP per query, ties counted as ranked before. Shape: [B, B], [B] -> [B]. No gradient."""
    return _average_precision(sim.detach(), labels, lambda excess, _: (excess >= 0).to(sim.dtype))


def smooth_ap(sim: Tensor, labels: Tensor, *, temperature: float = 0.01) -> Tensor:
    """AP per query with h(x) = sigmoid(x / temperature); the exact one as the temperature goes to 0.

    Shape: sim [B, B], labels [B] -> [B].
    """
    return _average_precision(sim, labels, lambda excess, _: _sigmoid(excess / temperature))


def sup_ap(
    sim: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.01,
    rho: float = 100.0,
    offset: float | None = 1.44,
    delta: float = 0.05,
    compat: bool = False,
) -> Tensor:
    """A lower bound of AP per query (1 minus it bounds the ranking loss from above).

        i in P_q:  h = 1 for x >= 0, without gradient;    others:  sigmoid(x / temperature)        x <= 0
                                                                    1/2 + sigmoid(x / temperature)  x <= delta
                                                                    rho (x - delta) + offset        beyond

    offset None: 1/2 + sigmoid(delta / temperature), which makes h continuous at delta. compat: rho x + offset, a slip
    of the published programs (corrected upstream in 2022) with a jump of rho delta; the slope is the same.
    Shape: sim [B, B], labels [B] -> [B].
    """
    if offset is None:
        offset = 0.5 + torch.sigmoid(torch.tensor(delta / temperature, dtype=torch.float64)).item()
    shift = 0.0 if compat else delta

    def before(excess: Tensor, positive: Tensor) -> Tensor:
        low = _sigmoid(excess / temperature)
        near = torch.where(excess > 0, 0.5 + low, low)
        negative = torch.where(excess > delta, rho * (excess - shift) + offset, near)
        return torch.where(positive, (excess >= 0).to(excess.dtype), negative)

    return _average_precision(sim, labels, before)


def softbin_ap(sim: Tensor, labels: Tensor, *, bins: int = 20) -> Tensor:
    """AP per query from a soft histogram of its similarities: sum over bins of precision times share of recall.

    Bin m is a triangle of half-width 2 / (bins - 1) around 1 - 2 m / (bins - 1); the outermost two stay flat beyond
    [-1, 1]. Precision of bin m: positive mass over mass, of bins 0 to m. The query itself counts.
    Shape: sim [B, B], labels [B] -> [B].
    """
    if bins < 2:
        raise ValueError(f"found {bins} bins, wanted at least 2")
    centres = torch.linspace(1, -1, bins, dtype=sim.dtype, device=sim.device)
    mass = (1 - (sim.clamp(-1, 1)[:, None] - centres[:, None]).abs() * ((bins - 1) / 2)).clamp_min(0)
    positive = (mass * _same(labels)[:, None]).sum(2)
    precision = positive.cumsum(1) / mass.sum(2).cumsum(1).clamp_min(1e-16)
    return (precision * positive).sum(1) / positive.sum(1)


def _average_precision(sim: Tensor, labels: Tensor, before: Before) -> Tensor:
    if labels.shape != sim.shape[:1] or sim.dim() != 2:
        raise ValueError(
            f"found similarities {tuple(sim.shape)} and labels {tuple(labels.shape)}, wanted [B, B] and [B]"
        )
    same = _same(labels)
    query, item = same.nonzero(as_tuple=True)
    positive = same[query]
    ranked = before(sim[query] - sim[query, item][:, None], positive)
    ranked = ranked.scatter(1, item[:, None], 0.0)
    ratio = (1 + (ranked * positive).sum(1)) / (1 + ranked.sum(1))
    return torch.zeros_like(sim[0]).index_add(0, query, ratio) / same.sum(1)


def _same(labels: Tensor) -> Tensor:
    return labels[:, None] == labels


def _sigmoid(exponent: Tensor) -> Tensor:
    return torch.sigmoid(exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT))


class _APLoss(SimilarityLoss):
    """1 - mean AP of a batch of embeddings [B, D] with labels [B], as a pytorch-metric-learning loss.

    average_precision(sim [B, B], labels [B], **settings) -> [B] is the subclass's.
    """

    average_precision: Callable[..., Tensor]

    def __init__(self, settings: dict[str, float | bool | None], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.settings = settings

    def of_similarities(self, sim: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(sim.device.type, enabled=False):
            return 1 - self.average_precision(sim, labels, **self.settings).mean()


class SmoothAPLoss(_APLoss):
    """1 - mean :func:`smooth_ap`. Unlike the library's class of that name right for any batch."""

    average_precision = staticmethod(smooth_ap)

    def __init__(self, temperature: float = 0.01, **kwargs: object) -> None:
        if temperature <= 0:
            raise ValueError(f"found temperature {temperature}, wanted above 0")
        super().__init__({"temperature": temperature}, **kwargs)


class SupAPLoss(_APLoss):
    """1 - mean :func:`sup_ap`, whose settings it takes."""

    average_precision = staticmethod(sup_ap)

    def __init__(self, **settings: float | bool | None) -> None:
        super().__init__(settings)


class SoftBinAPLoss(_APLoss):
    """1 - mean :func:`softbin_ap`."""

    average_precision = staticmethod(softbin_ap)

    def __init__(self, bins: int = 20, **kwargs: object) -> None:
        super().__init__({"bins": bins}, **kwargs)


class CalibratedAPLoss(SimilarityLoss):
    """weight_ap (1 - mean AP) + weight_contrast L_con: ``ap`` is one of the losses above.

    The contrastive term calibrates: AP alone knows the order of similarities, not their values.
    """

    def __init__(
        self,
        ap: _APLoss,
        weight_ap: float = 0.5,
        weight_contrast: float = 0.5,
        pos_margin: float = 0.9,
        neg_margin: float = 0.6,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.ap, self.weight_ap, self.weight_contrast = ap, weight_ap, weight_contrast
        self.margins = {"pos_margin": pos_margin, "neg_margin": neg_margin}

    def of_similarities(self, sim: Tensor, labels: Tensor) -> Tensor:
        contrast = contrastive_loss(sim, labels, **self.margins)
        return self.weight_ap * self.ap.of_similarities(sim, labels) + self.weight_contrast * contrast


class RoadmapLoss(CalibratedAPLoss):
    """ROADMAP: half SupAP, half contrastive (its own repository weighs both 1)."""

    def __init__(
        self, weight_ap: float = 0.5, weight_contrast: float = 0.5, compat: bool = False, **kwargs: object
    ) -> None:
        super().__init__(SupAPLoss(compat=compat), weight_ap, weight_contrast, **kwargs)
