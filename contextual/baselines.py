"""Every loss of the two programs by name, with its miner and its proxies, called as (embeddings, labels) -> terms.

Pair, proxy and softmax losses are pytorch-metric-learning's; the contextual loss, the hybrid and the average-precision
losses are this folder's. Settings are those of the published programs:

    contrastive         margins 0.9 and 0.6 on cosines, mean over active pairs
    triplet             margin 0.05 on distances, distance-weighted sampling (cutoff 0.5, only below 1.4)
    ms, ms+miner        alpha 2, beta 50, base 0.5; the miner's epsilon 0.1
    proxy-anchor        alpha 32, margin 0.1
    proxy-nca           scale 9 (224 x 224) or 10 (256 x 256)
    normalized-softmax  temperature 0.05         cosface  margin 0.35, scale 64
    nt-xent             temperature 0.07         fast-ap  10 bins
    smooth-ap           temperature 0.01         softbin-ap  20 bins       sup-ap  see contextual.ranking_losses
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor, nn
from torch.nn import functional

from contextual.losses import ContextualHybridLoss, Weights, cosine_similarities, hybrid_weights, similarity_regulariser
from contextual.names import HAS_PROXIES, PIPELINES, REGULARISE, canonical, describe_lam
from contextual.ranking_losses import CalibratedAPLoss, RoadmapLoss, SmoothAPLoss, SoftBinAPLoss, SupAPLoss
from contextual.similarity import ABLATED
from gfml.base.errors import UserError, choice_error

PROXY_NCA_SCALE = {"256": 10, "224": 9}
# Learning rate of proxies: an absolute one, or a multiple of the base rate.
PROXY_LR, PROXY_LR_FACTOR = 1e-3, 100
# What a pipeline means by a flag that is not given.
_OF_PIPELINE = {
    "256": {"lam": 0.4, "gamma": 0.1, "lam_convention": "context", "regularise": "none", "reg_sim": 0.25},
    "224": {"lam": 0.5, "gamma": 0.1, "lam_convention": "contrast", "regularise": "additive", "reg_sim": 0.30},
}


@dataclass(frozen=True)
class LossOptions:
    """Settings of all losses. None: the pipeline's value (pos_margin: the loss's, 0.75 in the hybrid, else 0.9).

    lam, gamma: see :func:`contextual.losses.hybrid_weights`. regularise: how losses other than the hybrid take the
    similarity regulariser: none, additive (L + gamma reg) or convex ((1 - gamma) L + gamma reg). slope: of the step in
    the backward pass. alpha, mrg: Proxy-Anchor's.
    """

    lam: float | None = None
    gamma: float | None = None
    lam_convention: str | None = None
    regularise: str | None = None
    k: int = 4
    eps: float = 0.05
    slope: float = 10.0
    pos_margin: float | None = None
    neg_margin: float = 0.6
    reg_sim: float | None = None
    alpha: float = 32.0
    mrg: float = 0.1
    loss_backend: str = "fused"
    ablation: str = "none"


class RetrievalLoss(nn.Module):
    """A loss, its miner and the regulariser. Embeddings may be unnormalised and of any float type.

        contextual, hybrid  as they are
        the others          none: L;   additive: L + gamma L_reg;   convex: (1 - gamma) L + gamma L_reg

    Everything inside is float32 (float64 stays) with autocast off. Call it with the whole batch.
    """

    def __init__(
        self,
        name: str,
        loss: nn.Module,
        miner: nn.Module | None,
        regularise: str,
        gamma: float,
        reg_sim: float,
        text: str,
    ) -> None:
        super().__init__()
        self.name, self.loss, self.miner = name, loss, miner
        self.regularise, self.gamma, self.reg_sim, self.text = regularise, gamma, reg_sim, text

    def forward(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Shape: [B, D], int [B] in 0 .. num_classes - 1. {"loss": scalar, its unweighted terms without gradient}."""
        with torch.autocast(embeddings.device.type, enabled=False):
            full = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            rows = functional.normalize(full, dim=1)
            if isinstance(self.loss, ContextualHybridLoss):
                loss = self.loss(rows, labels)
                return self.loss.terms.named() | {"loss": loss}
            mined = None if self.miner is None else self.miner(rows, labels)
            base = self.loss(rows, labels, mined)
            if self.regularise == "none" or not self.gamma:
                return {"loss": base, self.name: base.detach()}
            reg = similarity_regulariser(cosine_similarities(rows), self.reg_sim)
            share = 1 - self.gamma if self.regularise == "convex" else 1.0
            return {"loss": share * base + self.gamma * reg, self.name: base.detach(), "reg": reg.detach()}

    def describe(self) -> str:
        """The loss in one line, with its weights and what lam means."""
        return self.text


def build_loss(
    name: str, *, num_classes: int, embedding_dim: int, pipeline: str = "256", options: LossOptions = LossOptions()
) -> RetrievalLoss:
    """The loss of that name, as one of the two programs sets it.

    name: any spelling in contextual.names. num_classes: of the training set (the 224 x 224 program counted images
    here, which gave its proxy baselines one proxy per picture). embedding_dim: width of what the loss is given.
    UserError for an unknown name, an ablation of a loss that has none, weights below 0.
    """
    name = canonical(name)
    if pipeline not in PIPELINES:
        raise ValueError(f"unknown pipeline {pipeline!r}: choose one of {', '.join(PIPELINES)}")
    options = _resolve(options, pipeline)
    if name in ("contextual", "hybrid"):
        loss, text = _contextual(name, options)
        return RetrievalLoss(name, loss, None, "none", options.gamma, options.reg_sim, text)
    if options.ablation != "none":
        raise UserError(
            f"found ablation {options.ablation!r} with loss {name!r}, wanted hybrid or contextual: change one of them"
        )
    if name in HAS_PROXIES and num_classes < 2:
        raise ValueError(f"found {num_classes} classes for {name}, wanted at least 2")
    loss, miner = _MAKERS[name](num_classes, embedding_dim, pipeline, options)
    text = {
        "none": name,
        "additive": f"{name} + {options.gamma:g} regulariser",
        "convex": f"{1 - options.gamma:g} {name} + {options.gamma:g} regulariser",
    }[options.regularise if options.gamma else "none"]
    return RetrievalLoss(name, loss, miner, options.regularise, options.gamma, options.reg_sim, text)


def parameter_groups(
    module: RetrievalLoss, *, pipeline: str, lr: float, loss_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of the proxies, empty where there are none.

    loss_lr: their learning rate; None: 1e-3 in the 256 x 256 program, 100 lr in the 224 x 224 one.
    """
    parameters = list(module.parameters())
    if loss_lr is None:
        loss_lr = PROXY_LR if pipeline == "256" else PROXY_LR_FACTOR * lr
    return [{"params": parameters, "lr": loss_lr, "name": "proxies"}] if parameters else []


def _resolve(options: LossOptions, pipeline: str) -> LossOptions:
    """Every None filled, every name known."""
    given = {name: value for name, value in _OF_PIPELINE[pipeline].items() if getattr(options, name) is None}
    options = replace(options, **given)
    if options.regularise not in REGULARISE:
        raise choice_error("rule of the regulariser", options.regularise, REGULARISE)
    if options.ablation not in ABLATED:
        raise choice_error("ablation", options.ablation, ABLATED)
    if options.gamma < 0 or (options.regularise == "convex" and options.gamma > 1):
        raise UserError(
            f"found gamma {options.gamma:g}, wanted at least 0, and at most 1 under the convex rule: mend --gamma"
        )
    return options


def _contextual(name: str, options: LossOptions) -> tuple[ContextualHybridLoss, str]:
    if name == "contextual":
        weights, meaning = Weights(1.0, 0.0, 0.0), ""
    else:
        weights, meaning = _weights(options), f" ({describe_lam(options.lam_convention)})"
    backend = options.loss_backend if options.ablation == "none" else "reference"
    steps = ABLATED[options.ablation]
    loss = ContextualHybridLoss(
        *weights, k=options.k, eps=options.eps, slope=options.slope,
        pos_margin=0.75 if options.pos_margin is None else options.pos_margin, neg_margin=options.neg_margin,
        reg_sim=options.reg_sim, backend=backend, steps=steps,
    )  # fmt: skip
    parts = zip(weights, ("contextual", "contrastive", "regulariser"), strict=True)
    text = " + ".join(f"{weight:.4g} {part}" for weight, part in parts if weight)
    eps = options.eps if steps.eps is None else steps.eps
    variant = "" if options.ablation == "none" else f", ablation {options.ablation}"
    return loss, f"{name}: {text}{meaning}; k {options.k}, eps {eps:g}, {backend}{variant}"


def _weights(options: LossOptions) -> Weights:
    try:
        return hybrid_weights(options.lam, options.gamma, options.lam_convention)
    except ValueError:
        found = f"lam {options.lam:g} and gamma {options.gamma:g}"
        raise UserError(
            f"found {found}, which leave a term a weight below 0: {describe_lam(options.lam_convention)}"
        ) from None


Made = tuple[nn.Module, nn.Module | None]


def _margins(options: LossOptions) -> dict[str, float]:
    return {"pos_margin": 0.9 if options.pos_margin is None else options.pos_margin, "neg_margin": options.neg_margin}


# name -> (num_classes c, embedding_dim d, pipeline p, options o) -> (loss, miner)
_MAKERS: dict[str, Callable[[int, int, str, LossOptions], Made]] = {
    "contrastive": lambda c, d, p, o: (
        losses.ContrastiveLoss(**_margins(o), distance=distances.CosineSimilarity()),
        None,
    ),
    "triplet": lambda c, d, p, o: (
        losses.TripletMarginLoss(margin=0.05),
        miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4),
    ),
    "ms": lambda c, d, p, o: (losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), None),
    "ms+miner": lambda c, d, p, o: (
        losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
        miners.MultiSimilarityMiner(epsilon=0.1),
    ),
    "proxy-anchor": lambda c, d, p, o: (losses.ProxyAnchorLoss(c, d, margin=o.mrg, alpha=o.alpha), None),
    "proxy-nca": lambda c, d, p, o: (losses.ProxyNCALoss(c, d, softmax_scale=PROXY_NCA_SCALE[p]), None),
    "normalized-softmax": lambda c, d, p, o: (losses.NormalizedSoftmaxLoss(c, d, temperature=0.05), None),
    "cosface": lambda c, d, p, o: (losses.CosFaceLoss(c, d, margin=0.35, scale=64), None),
    "nt-xent": lambda c, d, p, o: (losses.NTXentLoss(temperature=0.07), None),
    "fast-ap": lambda c, d, p, o: (losses.FastAPLoss(num_bins=10), None),
    "smooth-ap": lambda c, d, p, o: (SmoothAPLoss(), None),
    "smooth-ap+contrastive": lambda c, d, p, o: (CalibratedAPLoss(SmoothAPLoss(), **_margins(o)), None),
    "softbin-ap": lambda c, d, p, o: (SoftBinAPLoss(), None),
    "softbin-ap+contrastive": lambda c, d, p, o: (CalibratedAPLoss(SoftBinAPLoss(), **_margins(o)), None),
    "sup-ap": lambda c, d, p, o: (SupAPLoss(), None),
    "roadmap": lambda c, d, p, o: (RoadmapLoss(**_margins(o)), None),
}
