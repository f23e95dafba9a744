"""Long-tailed classification: making data imbalanced, weighing classes, and the losses a reader expects beside CE.

With n_c training examples of class c, N = sum n_c, prior pi_c = n_c / N:

    effective number   w_c = (1 - b) / (1 - b^n_c)          b -> 0: equal weights; b -> 1: inverse frequency
    logit adjustment   CE(z + tau log pi, y)                tau 1 is balanced softmax
    LDAM               CE(s (z - m_y e_y), y), m_c = C n_c^(-1/4), largest margin given; z are cosines
    focal              mean (1 - p_y)^gamma (-log p_y)

Sources: Cui et al., Class-Balanced Loss, CVPR 2019; Ren et al., Balanced Meta-Softmax, NeurIPS 2020; Menon et al.,
Long-Tail Learning via Logit Adjustment, ICLR 2021; Cao et al., LDAM, NeurIPS 2019; Lin et al., Focal Loss, ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.distances import at_least_float32, common_floats

PROFILES = ("exp", "step", "balanced")
LOSSES = ("ce", "cb", "focal", "balanced-softmax", "logit-adjustment", "ldam")


def imbalanced_counts(profile: str, num_classes: int, num_samples: int, factor: float) -> np.ndarray:
    """Examples per class, most frequent first, of a balanced set of ``num_samples`` made imbalanced: int64 [C].

        exp       int( N/C * factor^(c / (C - 1)) )
        step      N/C for the first half of the classes, int(N/C * factor) for the second; the middle one of an odd
                  number belongs to the first half
        balanced  N/C

    factor: smallest over largest count, 0 < factor <= 1, ValueError outside that. As in the published draw a rare class
    may end with no example at all: 500 images a class and factor 0.001.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown imbalance profile {profile!r}: choose one of {', '.join(PROFILES)}")
    if not 0 < factor <= 1 or num_classes < 1:
        raise ValueError(f"found factor {factor} and {num_classes} classes, wanted 0 < factor <= 1 and classes")
    largest, position = num_samples / num_classes, np.arange(num_classes)
    if profile == "exp":
        share = np.array([factor ** (c / max(num_classes - 1, 1)) for c in position])
    else:
        share = np.where(position >= (num_classes + 1) // 2, factor if profile == "step" else 1.0, 1.0)
    counts = (largest * share).astype(np.int64)
    if counts.max() < 1:
        raise ValueError(f"found classes of {largest:.4g} examples, wanted one example at least")
    return counts


def select_indices(labels: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Positions of counts[c] random examples of every class c, classes ascending: int64 [n], sorted by class.

    The draw is the published one (numpy's legacy generator, one shuffle per class) with a generator of its own, so
    the same seed gives the same examples whatever the global generator did. A class with fewer examples gives all.
    """
    rng, chosen = np.random.RandomState(seed), []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        rng.shuffle(members)
        chosen.append(members[:count])
    return np.concatenate(chosen)


def effective_number_weights(counts: np.ndarray, beta: float = 0.9999) -> np.ndarray:
    """(1 - beta) / (1 - beta^n_c), float64 [C]; beta 0 gives 1, beta 1 the limit 1 / n_c. Empty classes get 0."""
    if not 0 <= beta <= 1:
        raise ValueError(f"found beta {beta}, wanted a number between 0 and 1")
    counts = np.asarray(counts, np.float64)
    seen = np.where(counts > 0, counts, 1.0)
    if beta == 1:
        weights = 1 / seen
    else:
        # expm1 keeps digits where beta^n is near 1
        weights = np.ones_like(seen) if beta == 0 else (1 - beta) / -np.expm1(seen * np.log(beta))
    return np.where(counts > 0, weights, 0.0)


def class_weights(counts: np.ndarray, beta: float = 0.9999) -> np.ndarray:
    """Effective-number weights scaled to mean 1 over the classes, float64 [C]."""
    weights = effective_number_weights(counts, beta)
    return weights * (len(weights) / weights.sum())


def sampling_probability(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probability that a draw of examples with these class weights gives class c: n_c w_c / sum, float64 [C]."""
    share = np.asarray(counts, np.float64) * weights
    return share / share.sum()


def shot_groups(counts: np.ndarray, *, many: int = 100, few: int = 20) -> dict[str, np.ndarray]:
    """Classes with more than ``many`` training examples, ``few`` to ``many``, and fewer than ``few``."""
    counts = np.asarray(counts)
    found = {"many": counts > many, "medium": (counts >= few) & (counts <= many), "few": counts < few}
    return {name: np.flatnonzero(chosen) for name, chosen in found.items()}


def rank_groups(counts: np.ndarray, share: float = 0.3) -> dict[str, np.ndarray]:
    """The most frequent ``share`` of the classes (head), the least frequent (tail) and those between (mid).

    Ten classes give 3, 4 and 3; ties go to the lower class first.
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    size = max(1, round(share * len(order))) if len(order) > 1 else 0
    ends = {"head": order[:size], "mid": order[size : len(order) - size], "tail": order[len(order) - size :]}
    return {name: np.sort(classes) for name, classes in ends.items()}


def log_prior(counts: np.ndarray) -> Tensor:
    """log(n_c / N), float32 [C]. ValueError for a class without examples."""
    counts = np.asarray(counts, np.float64)
    if counts.min() <= 0:
        raise ValueError("found a class without training examples, wanted one at least for its prior")
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def without_prior(logits: Tensor, counts: np.ndarray, tau: float = 1.0) -> Tensor:
    """Logits minus tau log pi: adjustment after training, for a model trained with plain CE. Shape: [B, C]."""
    logits = at_least_float32(logits)
    return logits - tau * log_prior(counts).to(logits)


class ClassLoss(nn.Module):
    """Cross entropy of transformed logits, a weighted mean over the batch:

        sum_b w_{y_b} CE(self.transform(z_b, y_b), q_b) / sum_b w_{y_b},    q_b = (1 - s) e_{y_b} + s / C

    weight: w [C], a buffer that may be changed between epochs (deferred re-weighting). smoothing: s, uniform over the
    C classes. An example counts with the weight of its label and keeps its smoothed target; the library's own
    combination weighs every class of the target instead, which trains frequent classes towards rare ones.

    Half-precision logits are computed in float32. Shape: logits [B, C], targets int64 [B] -> scalar.
    """

    weight: Tensor

    def __init__(self, num_classes: int, *, weight: np.ndarray | None = None, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weight", torch.ones(num_classes))
        if weight is not None:
            self.reweigh(weight)

    def reweigh(self, weight: np.ndarray) -> None:
        """Use other class weights [C] from now on."""
        self.weight.copy_(torch.as_tensor(weight, dtype=self.weight.dtype))

    def transform(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = self.transform(at_least_float32(logits), targets)
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.smoothing)
        weight = self.weight.to(logits.dtype)[targets]
        return (weight * losses).sum() / weight.sum()


class LogitAdjustment(ClassLoss):
    """CE(z + tau log pi, y): the logits learn to rank classes as if all were equally frequent."""

    offset: Tensor

    def __init__(self, counts: np.ndarray, *, tau: float = 1.0, smoothing: float = 0.0) -> None:
        super().__init__(len(counts), smoothing=smoothing)
        self.register_buffer("offset", tau * log_prior(counts))

    def transform(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits + self.offset.to(logits.dtype)


class LDAM(ClassLoss):
    """Margins that grow as classes get rare: CE(s (z - m_y e_y), y) with m_c = max_margin (n_c / n_min)^(-1/4).

    The logits are meant to be cosines (:class:`CosineHead`). With :func:`deferred_weights` it is LDAM-DRW.
    """

    margin: Tensor

    def __init__(
        self, counts: np.ndarray, *, max_margin: float = 0.5, scale: float = 30.0, smoothing: float = 0.0
    ) -> None:
        super().__init__(len(counts), smoothing=smoothing)
        counts = np.asarray(counts, np.float64)
        if counts.min() <= 0:
            raise ValueError("found a class without training examples, wanted one at least for its margin")
        self.scale = scale
        self.register_buffer("margin", torch.from_numpy(max_margin * (counts / counts.min()) ** -0.25).float())

    def transform(self, logits: Tensor, targets: Tensor) -> Tensor:
        margin = F.one_hot(targets, logits.shape[-1]) * self.margin.to(logits.dtype)
        return self.scale * (logits - margin)


class Focal(nn.Module):
    """mean (1 - p_y)^gamma (-log p_y): examples that are already right count less. gamma 0 is CE."""

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Shape: logits [B, C], targets int64 [B] -> scalar."""
        nll = F.cross_entropy(at_least_float32(logits), targets, reduction="none")
        # 1 - p by expm1: exact where p is near 1
        return ((-torch.expm1(-nll)).clamp_min(torch.finfo(nll.dtype).tiny) ** self.gamma * nll).mean()


def class_loss(name: str, counts: np.ndarray, *, smoothing: float = 0.0, beta: float = 0.9999, tau: float = 1.0,
               gamma: float = 1.0, max_margin: float = 0.5, scale: float = 30.0) -> nn.Module:  # fmt: skip
    """The loss with this name for training counts [C]: a module of (logits, targets).

    ce; cb, CE with effective-number weights; focal; balanced-softmax; logit-adjustment (tau); ldam.

    Examples:
        Equal logits: balanced softmax answers with the prior, here 1/10 for the rare class.

        >>> loss = class_loss("balanced-softmax", np.array([90, 10]))
        >>> loss(torch.zeros(1, 2), torch.tensor([1])).exp()
        tensor(10.)
    """
    if name == "ce":
        return ClassLoss(len(counts), smoothing=smoothing)
    if name == "cb":
        return ClassLoss(len(counts), weight=class_weights(counts, beta), smoothing=smoothing)
    if name in ("balanced-softmax", "logit-adjustment"):
        return LogitAdjustment(counts, tau=1.0 if name == "balanced-softmax" else tau, smoothing=smoothing)
    if name == "ldam":
        return LDAM(counts, max_margin=max_margin, scale=scale, smoothing=smoothing)
    if name == "focal":
        if smoothing:
            raise ValueError("focal loss has no smoothed labels: found smoothing > 0")
        return Focal(gamma)
    raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LOSSES)}")


def deferred_weights(counts: np.ndarray, epoch: int, start: int, beta: float = 0.9999) -> np.ndarray:
    """Deferred re-weighting: class weights of an epoch (from 1), equal before ``start``, then effective-number."""
    return class_weights(counts, beta if epoch >= start else 0.0)


class CosineHead(nn.Module):
    """Logits are cosines between features and class vectors, in [-1, 1], in float32 also under autocast.

    LDAM multiplies them by 30, and its margins are smaller than steps of bfloat16. Shape: [B, D] -> [B, C].
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width).uniform_(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, weight = common_floats(x, self.weight)
            return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1))


def use_cosine_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Put a :class:`CosineHead` in place of the model's last linear map to ``num_classes``, in place.

    ValueError when there is none.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    name, old = next(((n, layer) for n, layer in reversed(layers) if layer.out_features == num_classes), ("", None))
    if old is None:
        raise ValueError(f"found no linear map to {num_classes} classes in {type(model).__name__}")
    parent, _, child = name.rpartition(".")
    new = CosineHead(old.in_features, num_classes).to(old.weight.device)
    setattr(model.get_submodule(parent), child, new)
    return model


def count_labels(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Examples per class, int64 [C]; ValueError for a label outside 0 .. C-1."""
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"found labels {labels.min()} .. {labels.max()}, wanted 0 .. {num_classes - 1}")
    return np.bincount(labels, minlength=num_classes)
