"""Classification metrics against scikit-learn, loops and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor

from gfml.metrics import classification as ours


def sample(seed: int = 0, n: int = 200, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    logits = torch.randn(n, num_classes, generator=generator) + 1.5 * torch.eye(num_classes)[labels]
    return logits, labels


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_confusion_accuracy_and_f1_are_the_library_s(pairs) -> None:
    labels, answers = (torch.tensor(side) for side in zip(*pairs, strict=True))
    confusion = ours.confusion_matrix(labels, answers, 4)
    assert np.array_equal(confusion, sk.confusion_matrix(labels, answers, labels=range(4)))
    assert ours.accuracy(confusion) == pytest.approx(sk.accuracy_score(labels, answers))
    assert ours.macro_f1(confusion) == pytest.approx(sk.f1_score(labels, answers, average="macro", zero_division=0))
    found, present = ours.recalls(confusion), sorted({*labels.tolist()})
    wanted = sk.recall_score(labels, answers, labels=present, average=None, zero_division=0)
    assert found[present].tolist() == pytest.approx(wanted.tolist())
    assert found.isnan().sum() == 4 - len(present)
    assert ours.balanced_accuracy(confusion) == pytest.approx(wanted.mean())
    assert ours.worst_class(confusion) == pytest.approx(wanted.min())


def test_means_of_recalls_by_hand() -> None:
    confusion = torch.tensor([[8, 2, 0], [5, 5, 0], [0, 8, 2]])
    assert ours.recalls(confusion).tolist() == [0.8, 0.5, 0.2]
    assert ours.geometric_mean(confusion) == pytest.approx(0.08 ** (1 / 3))
    assert ours.harmonic_mean(confusion) == pytest.approx(3 / (1.25 + 2 + 5))
    assert ours.worst_class(confusion) == pytest.approx(0.2)
    never = torch.tensor([[1, 0], [3, 0]])
    assert ours.geometric_mean(never) == ours.harmonic_mean(never) == ours.worst_class(never) == 0


def test_groups_partition_a_balanced_test_set() -> None:
    """Mean over classes equals overall accuracy, and so does the size-weighted mean over the groups."""
    labels = torch.arange(6).repeat(30)
    answers = torch.where(torch.rand(180, generator=torch.Generator().manual_seed(0)) < 0.6, labels, 5 - labels)
    confusion = ours.confusion_matrix(labels, answers, 6)
    groups = {"many": [0], "medium": np.array([1, 2, 3]), "few": [4, 5], "none": []}
    found = ours.group_accuracy(confusion, groups)
    assert math.isnan(found.pop("none"))
    assert ours.recalls(confusion).mean().item() == pytest.approx(ours.accuracy(confusion))
    assert sum(len(groups[name]) * value for name, value in found.items()) / 6 == pytest.approx(
        ours.accuracy(confusion)
    )
    assert found["few"] == pytest.approx(ours.recalls(confusion)[4:].mean().item())


def test_wrong_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wanted 0 \.\. 1"):
        ours.confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match=r"found classes -1"):
        ours.confusion_matrix(torch.tensor([0, 1]), torch.tensor([-1, 1]), 2)


def loop_ece(probabilities: Tensor, labels: Tensor, num_bins: int) -> float:
    total = 0.0
    rows = [
        (max(row), row.index(max(row)) == y) for row, y in zip(probabilities.tolist(), labels.tolist(), strict=True)
    ]
    for b in range(num_bins):
        inside = [(c, right) for c, right in rows if b / num_bins < c <= (b + 1) / num_bins]
        if inside:
            total += abs(sum(right for _, right in inside) - sum(c for c, _ in inside))
    return total / len(rows)


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_by_loops(num_bins) -> None:
    logits, labels = sample()
    probabilities = logits.double().softmax(-1)
    found = ours.calibration_error(probabilities, labels, num_bins)
    assert found == pytest.approx(loop_ece(probabilities, labels, num_bins), abs=1e-12) and found > 0.01


def test_calibration_error_of_known_cases() -> None:
    sure = torch.eye(2)[[0, 0, 1, 1]]
    assert ours.calibration_error(sure, torch.tensor([0, 0, 1, 1])) == 0
    assert ours.calibration_error(sure, torch.tensor([1, 1, 0, 0])) == 1
    # a confidence on a boundary belongs to the bin below it
    two = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    assert ours.calibration_error(two, torch.tensor([0, 1]), num_bins=2) == pytest.approx((0.5 + 0.75) / 2)
    # right half of the time at confidence 0.5: calibrated, whichever class the tie goes to
    assert ours.calibration_error(torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])) == 0


def test_nll_is_the_library_s() -> None:
    logits, labels = sample()
    wanted = sk.log_loss(labels, logits.double().softmax(-1).numpy(), labels=range(5))
    assert ours.nll(logits, labels) == pytest.approx(wanted, rel=1e-9)


def test_sensitivity_is_the_least_squares_line() -> None:
    counts = np.array([500, 100, 20, 4, 0])
    recall = torch.tensor([0.9, 0.7, 0.6, 0.2, 0.5])
    found = ours.sensitivity(recall, counts)
    slope, _ = np.polyfit(np.log(counts[:4]), recall[:4], 1)
    assert found.slope == pytest.approx(slope)
    assert found.correlation == pytest.approx(np.corrcoef(np.log(counts[:4]), recall[:4])[0, 1])
    with_gap = ours.sensitivity(torch.tensor([0.9, math.nan, 0.6, 0.2, 0.5]), counts)
    assert with_gap.slope == pytest.approx(np.polyfit(np.log([500, 20, 4]), [0.9, 0.6, 0.2], 1)[0])
    assert math.isnan(ours.sensitivity(recall, np.full(5, 7)).slope)
    flat = ours.sensitivity(torch.full((5,), 0.5), counts)
    assert flat.slope == pytest.approx(0) and math.isnan(flat.correlation)


def test_all_metrics_by_name() -> None:
    logits, labels = sample()
    found = ours.classification_metrics(logits, labels, groups={"many": [0, 1], "few": [2, 3, 4]})
    answers = logits.argmax(-1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, answers))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, answers))
    assert found["accuracy_many"] == pytest.approx(
        np.mean(sk.recall_score(labels, answers, labels=[0, 1], average=None))
    )
    assert {"worst_class", "geometric_mean", "harmonic_mean", "macro_f1", "nll", "ece", "accuracy_few"} <= {*found}
    assert all(0 <= value <= 1 for name, value in found.items() if name != "nll")


def test_no_examples_have_no_metrics() -> None:
    found = ours.classification_metrics(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert all(math.isnan(value) for value in found.values())
