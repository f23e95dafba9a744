"""The contextual loss, its companions and the hybrid: functions of similarities, and pytorch-metric-learning losses.

Notation: B embeddings, normalised here; S [B, B] their cosine similarities; Y_ij = 1 where labels agree. The functions
take S from :func:`cosine_similarities`, the classes take embeddings and labels:

    loss = ContextualLoss(k=4)(embeddings, labels)

Under several processes gather embeddings and labels first (pytorch-metric-learning's DistributedLossWrapper does):
neighbours are those of the whole batch. Half precision is lifted to float32, autocast is off inside: near s = 1 half
precision moves distances by as much as eps.

Source: Liao, Tsiligkaridis, Kulis, Supervised Metric Learning to Rank for Retrieval via Contextual Similarity
Optimization, ICML 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor
from torch.nn import functional

from contextual import fused
from contextual.fused import Settings, Weights
from contextual.names import BACKENDS, LAM_CONVENTIONS
from contextual.similarity import FULL, Steps, check, contextual_similarity

NORMALISE = ("b2", "b")


class Terms(NamedTuple):
    """Of one batch. loss: with gradient; the rest without: the unweighted terms, and the sizes |N(i)| and |R(i)| of
    neighbourhoods [B]; None for what was not computed."""

    loss: Tensor
    contextual: Tensor | None
    contrastive: Tensor | None
    reg: Tensor | None
    size: Tensor | None
    mutual: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """Scalars by name: the terms; neighbours and mutual: mean sizes; covering: share of pictures whose
        neighbourhood is the whole batch, which then says nothing."""
        found = {"loss": self.loss, "contextual": self.contextual, "contrastive": self.contrastive, "reg": self.reg}
        if self.size is not None:
            covering = (self.size >= len(self.size)).to(self.size.dtype).mean()
            found |= {"neighbours": self.size.mean(), "covering": covering}
        if self.mutual is not None:
            found["mutual"] = self.mutual.mean()
        return {name: value for name, value in found.items() if value is not None}


def hybrid_weights(lam: float, gamma: float, convention: str) -> Weights:
    """What lam and gamma weigh in the two published programs.

    context   lam L_ctx + (1 - lam - gamma) L_con + gamma L_reg      256 x 256, there 0.4 and 0.1
    contrast  (1 - lam) L_ctx + lam L_con + gamma L_reg              224 x 224, there 0.05 or 0.2, and 0.1
    """
    if convention not in LAM_CONVENTIONS:
        raise ValueError(f"unknown lam convention {convention!r}: choose one of {', '.join(LAM_CONVENTIONS)}")
    if convention == "context":
        weights = Weights(lam, 1 - lam - gamma, gamma)
    else:
        weights = Weights(1 - lam, lam, gamma)
    if min(weights) < -1e-9:
        raise ValueError(f"lam {lam} and gamma {gamma} give {weights}, wanted no weight below 0")
    return Weights(*(max(weight, 0.0) for weight in weights))


def cosine_similarities(embeddings: Tensor) -> Tensor:
    """S = F F^T of the normalised rows F, in float32 (float64 stays) whatever autocast says.

    Shape: [B, D] -> [B, B]. A zero row has similarity 0 to all. TF32 moves S by 1e-3: leave it off for this product.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return fused.gram(functional.normalize(_full(embeddings), dim=1))


def contextual_loss(
    sim: Tensor,
    labels: Tensor,
    *,
    k: int = 4,
    eps: float = 0.05,
    slope: float = 10.0,
    backend: str = "fused",
    steps: Steps = FULL,
) -> Tensor:
    """1 / B^2 times the sum over i != j of (W^_ij - Y_ij)^2, W^ the contextual similarity.

    Shape: sim [B, B], labels [B]; returns a scalar in [0, (B - 1) / B]. k: neighbours, the picture included: the
    batch's pictures per class. eps: slack in squared-distance units. slope: derivative that stands for the step's; it
    scales the gradient and leaves the value. backend: fused (closed form) or reference (autograd), equal; ablated
    ``steps`` have no closed form and need reference.
    Divided by B^2, not by the number of pairs: with a fixed number of pictures per class it falls as 1 / B.
    """
    weights = Weights(1, 0, 0)
    return hybrid(sim, labels, weights, k=k, eps=eps, slope=slope, backend=backend, steps=steps).loss


def contrastive_loss(sim: Tensor, labels: Tensor, *, pos_margin: float = 0.9, neg_margin: float = 0.6) -> Tensor:
    """Sum of max(0, pos_margin - s) over positive pairs and of max(0, s - neg_margin) over negative ones, each
    divided by its number of active pairs; a kind without active pairs gives 0. No pair of a picture with itself.
    """
    weights = Weights(0, 1, 0)
    return hybrid(sim, labels, weights, pos_margin=pos_margin, neg_margin=neg_margin).loss


def similarity_regulariser(sim: Tensor, target: float = 0.25) -> Tensor:
    """(mean of all B^2 similarities - target)^2: keeps the batch from spreading to orthogonality."""
    return (sim.mean() - target).square()


def hybrid(
    sim: Tensor,
    labels: Tensor,
    weights: Weights,
    *,
    k: int = 4,
    eps: float = 0.05,
    slope: float = 10.0,
    pos_margin: float = 0.75,
    neg_margin: float = 0.6,
    reg_sim: float = 0.25,
    backend: str = "fused",
    steps: Steps = FULL,
) -> Terms:
    """weights.context L_ctx + weights.contrast L_con + weights.reg L_reg; a term of weight 0 is not computed.

    Arguments as in :func:`contextual_loss` and :func:`contrastive_loss`; reg_sim: the mean similarity wanted.
    """
    _check(sim, labels, k if weights.context else 2, backend, steps)
    settings = Settings(k, eps, slope, pos_margin, neg_margin, reg_sim)
    if backend == "fused":
        return _fused(_full(sim), labels, weights, settings)
    with torch.autocast(sim.device.type, enabled=False):
        return _reference(_full(sim), labels, weights, settings, steps)


def _fused(sim: Tensor, labels: Tensor, weights: Weights, own: Settings) -> Terms:
    """One gradient, of the weighted sum; the terms themselves have none."""
    needs, inner = sim.requires_grad and torch.is_grad_enabled(), sim.detach()
    if weights.context and (found := fused.listed(inner, labels, weights, own)) is not None:
        loss = fused.attach(sim, found.loss, found.gradient, sim) if needs else found.loss
        return Terms(loss, *found.parts, found.size, found.mutual)
    values: list[Tensor | None] = [None, None, None]
    grad = size = mutual = None
    if weights.context:
        with torch.autocast(sim.device.type, enabled=False):
            values[0], grad, size, mutual = fused.contextual(
                inner, labels, k=own.k, eps=own.eps, slope=own.slope, needs_grad=needs
            )
    if needs:
        grad = torch.zeros_like(inner) if grad is None else grad.mul_(weights.context)
    if weights.contrast:
        margins = {"pos_margin": own.pos_margin, "neg_margin": own.neg_margin}
        values[1] = fused.contrastive(inner, labels, **margins, onto=grad, weight=weights.contrast)
    if weights.reg:
        values[2] = fused.similarity_target(inner, own.reg_sim, onto=grad, weight=weights.reg)
    total = sum(weight * value for weight, value in zip(weights, values, strict=True) if value is not None)
    return Terms(fused.attach(sim, total, torch.mul, grad) if needs else total, *values, size, mutual)


def _reference(sim: Tensor, labels: Tensor, weights: Weights, own: Settings, steps: Steps) -> Terms:
    same, others = labels[:, None] == labels, ~torch.eye(len(sim), dtype=torch.bool, device=sim.device)
    parts: list[Tensor | None] = [None, None, None]
    size = mutual = None
    if weights.context:
        context = contextual_similarity(sim, k=own.k, eps=own.eps, slope=own.slope, steps=steps)
        parts[0] = ((context.similarity - same.to(sim.dtype)).square() * others).sum() / len(sim) ** 2
        size = context.neighbours.detach().sum(1)
        mutual = None if context.mutual is None else context.mutual.detach().sum(1)
    if weights.contrast:
        parts[1] = _active_mean(own.pos_margin - sim, same & others) + _active_mean(sim - own.neg_margin, ~same)
    if weights.reg:
        parts[2] = similarity_regulariser(sim, own.reg_sim)
    loss = sum((weight * part for weight, part in zip(weights, parts, strict=True) if part is not None), sim.sum() * 0)
    return Terms(loss, *(None if part is None else part.detach() for part in parts), size, mutual)


def _active_mean(excess: Tensor, mask: Tensor) -> Tensor:
    """Mean of max(0, excess) over the masked places where it is above 0; 0, with a graph, when there is none."""
    hinge = excess.clamp_min(0) * mask
    return hinge.sum() / (hinge.detach() > 0).sum().clamp_min(1)


def _check(sim: Tensor, labels: Tensor, k: int, backend: str, steps: Steps) -> None:
    check(sim, k)
    if labels.shape != sim.shape[:1]:
        raise ValueError(
            f"found labels {tuple(labels.shape)} for similarities {tuple(sim.shape)}, wanted [B] and [B, B]"
        )
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "fused" and steps != FULL:
        raise ValueError("ablated steps have no closed form: choose the backend reference")


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class SimilarityLoss(BaseMetricLossFunction):
    """A pytorch-metric-learning loss of the cosine similarities of one batch: no miner, no reference set."""

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict:
        if labels is None:
            raise ValueError("found no labels, wanted one per embedding")
        if indices_tuple is not None:
            raise ValueError("found mined pairs, wanted none: the loss reads the whole batch; leave the miner out")
        if ref_emb is not embeddings:
            raise ValueError("found a reference set, wanted none: neighbours are those of the batch")
        value = self.of_similarities(cosine_similarities(embeddings), labels)
        return {"loss": {"losses": value, "indices": None, "reduction_type": "already_reduced"}}

    def of_similarities(self, sim: Tensor, labels: Tensor) -> Tensor:
        """The loss of cosine similarities [B, B] with labels [B]: what a subclass defines."""
        raise NotImplementedError


class ContextualHybridLoss(SimilarityLoss):
    """:func:`hybrid` of a batch of embeddings [B, D] with labels [B].

    The weights are those of the 256 x 256 program; ``ContextualHybridLoss(*hybrid_weights(0.05, 0.1, "contrast"))``
    is the 224 x 224 one. normalize: "b2", as published, or "b": the contextual term times B, which does not shrink as
    the batch grows. ``terms`` holds the :class:`Terms` of the last batch.
    """

    def __init__(
        self,
        context: float = 0.4,
        contrast: float = 0.5,
        reg: float = 0.1,
        *,
        k: int = 4,
        eps: float = 0.05,
        slope: float = 10.0,
        pos_margin: float = 0.75,
        neg_margin: float = 0.6,
        reg_sim: float = 0.25,
        normalize: str = "b2",
        backend: str = "fused",
        steps: Steps = FULL,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if normalize not in NORMALISE:
            raise ValueError(f"unknown normalize {normalize!r}: choose one of {', '.join(NORMALISE)}")
        if not isinstance(self.distance, CosineSimilarity):
            raise ValueError(f"found distance {type(self.distance).__name__}, wanted CosineSimilarity")
        if not any((context, contrast, reg)):
            raise ValueError("found three weights of 0, wanted at least one above")
        self.weights, self.normalize = Weights(context, contrast, reg), normalize
        self.settings = {
            "k": k, "eps": eps, "slope": slope, "pos_margin": pos_margin, "neg_margin": neg_margin, "reg_sim": reg_sim,
            "backend": backend, "steps": steps,
        }  # fmt: skip
        self.terms: Terms | None = None

    def of_similarities(self, sim: Tensor, labels: Tensor) -> Tensor:
        weights = self.weights
        if self.normalize == "b":
            weights = weights._replace(context=weights.context * len(sim))
        terms = hybrid(sim, labels, weights, **self.settings)
        self.terms = terms._replace(loss=terms.loss.detach())
        return terms.loss


class ContextualLoss(ContextualHybridLoss):
    """:func:`contextual_loss` of a batch of embeddings [B, D] with labels [B]."""

    def __init__(self, k: int = 4, eps: float = 0.05, slope: float = 10.0, **kwargs: object) -> None:
        super().__init__(1.0, 0.0, 0.0, k=k, eps=eps, slope=slope, **kwargs)
