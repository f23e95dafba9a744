"""Accuracy of a classifier, overall and by class, and how well its probabilities are calibrated.

Everything by class is a function of the confusion matrix M [C, C], M[t, p] = examples of class t called p:

    recall_c  M[c, c] / sum_p M[c, p]      precision_c  M[c, c] / sum_t M[t, c]      f1_c  2 TP / (2 TP + FP + FN)

A class without examples has no recall (NaN) and is left out of means. Counts and means are float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """M[t, p], int64 [C, C]. Shape: labels, predictions int64 [N]; ValueError for a class outside 0 .. C-1.

    Examples:
        >>> confusion = confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
        >>> confusion.tolist(), balanced_accuracy(confusion)
        ([[1, 1], [0, 1]], 0.75)
    """
    both = torch.cat([labels, predictions])
    if len(both) and not (both.min() >= 0 and both.max() < num_classes):
        raise ValueError(f"found classes {both.min()} .. {both.max()}, wanted 0 .. {num_classes - 1}")
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def accuracy(confusion: Tensor) -> float:
    """Share of right answers over all examples; NaN without any."""
    return _ratio(confusion.diagonal().sum(), confusion.sum()).item()


def recalls(confusion: Tensor) -> Tensor:
    """Accuracy of every class, float64 [C]; NaN for a class without examples."""
    return _ratio(confusion.diagonal(), confusion.sum(1))


def balanced_accuracy(confusion: Tensor) -> float:
    """Mean recall: the accuracy if all classes were equally frequent."""
    return recalls(confusion).nanmean().item()


def group_accuracy(confusion: Tensor, groups: Mapping[str, Sequence[int] | np.ndarray]) -> dict[str, float]:
    """Mean recall of every group of classes; NaN for an empty group."""
    found = recalls(confusion).cpu()
    return {name: found[torch.as_tensor(np.asarray(c, np.int64))].nanmean().item() for name, c in groups.items()}


def worst_class(confusion: Tensor) -> float:
    """The lowest recall."""
    found = _present(recalls(confusion))
    return found.min().item() if len(found) else math.nan


def geometric_mean(confusion: Tensor) -> float:
    """Geometric mean of the recalls; 0 as soon as one class is never right."""
    return _present(recalls(confusion)).log().mean().exp().item()


def harmonic_mean(confusion: Tensor) -> float:
    """Harmonic mean of the recalls; 0 as soon as one class is never right."""
    return (1 / _present(recalls(confusion)).reciprocal().mean()).item()


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 over the classes that occur as a label or an answer."""
    return _ratio(2 * confusion.diagonal(), confusion.sum(0) + confusion.sum(1)).nanmean().item()


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p_label. Shape: logits [N, C], labels int64 [N]."""
    return F.cross_entropy(logits.double(), labels).item() if len(labels) else math.nan


def calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error of the answers: sum_b n_b / N |accuracy_b - confidence_b|.

    Bins of equal width, ((b - 1) / num_bins, b / num_bins], over the largest probability of each example.
    Shape: probabilities [N, C], labels int64 [N]. NaN without examples.
    Reference: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    if not len(labels):
        return math.nan
    confidence, answer = probabilities.double().max(-1)
    gap = (answer == labels).double() - confidence
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    return (gap.new_zeros(num_bins).index_add_(0, bins, gap).abs().sum() / len(labels)).item()


class Sensitivity(NamedTuple):
    """How class accuracy follows class frequency: recall_c = a + slope log(n_c), and their correlation."""

    slope: float
    correlation: float


def sensitivity(recall: Tensor, counts: np.ndarray) -> Sensitivity:
    """Least-squares slope of recall [C] over the natural log of the training counts [C], and Pearson's r.

    NaN where the counts are all equal; r also where the recalls are. Classes without recall or examples are left out.
    """
    examples = torch.as_tensor(np.asarray(counts, np.float64))
    y = recall.double().cpu()
    kept = ~y.isnan() & (examples > 0)
    x, y = _centred(examples[kept].log()), _centred(y[kept])
    xx, xy, yy = (x * x).sum(), (x * y).sum(), (y * y).sum()
    return Sensitivity(_ratio(xy, xx).item(), _ratio(xy, (xx * yy).sqrt()).item())


def classification_metrics(
    logits: Tensor, labels: Tensor, *, groups: Mapping[str, Sequence[int] | np.ndarray] | None = None
) -> dict[str, float]:
    """The scalar metrics of a split by name; accuracy of each group as ``accuracy_NAME``.

    Shape: logits [N, C], labels int64 [N].
    """
    confusion = confusion_matrix(labels, logits.argmax(-1), logits.shape[-1])
    found = {
        "accuracy": accuracy(confusion), "balanced_accuracy": balanced_accuracy(confusion),
        "worst_class": worst_class(confusion), "geometric_mean": geometric_mean(confusion),
        "harmonic_mean": harmonic_mean(confusion), "macro_f1": macro_f1(confusion), "nll": nll(logits, labels),
        "ece": calibration_error(logits.double().softmax(-1), labels),
    }  # fmt: skip
    return found | {f"accuracy_{name}": value for name, value in group_accuracy(confusion, groups or {}).items()}


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float64, NaN where whole is 0."""
    return part.double() / whole.double().where(whole != 0, torch.nan)


def _centred(values: Tensor) -> Tensor:
    """Deviations from the mean, exactly 0 where all are equal."""
    return values - values.mean() if len(values) and values.min() < values.max() else torch.zeros_like(values)


def _present(recall: Tensor) -> Tensor:
    return recall[~recall.isnan()]
