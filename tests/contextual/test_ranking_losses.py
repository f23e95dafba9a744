"""Average-precision losses against plain loops, and the library's Smooth-AP beside them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import losses as pml

from contextual.losses import contrastive_loss, cosine_similarities
from contextual.ranking_losses import (
    CalibratedAPLoss,
    RoadmapLoss,
    SmoothAPLoss,
    SoftBinAPLoss,
    SupAPLoss,
    exact_ap,
    smooth_ap,
    softbin_ap,
    sup_ap,
)

AP_LOSSES = (SmoothAPLoss, SupAPLoss, SoftBinAPLoss, RoadmapLoss)


def plain():
    path = Path(__file__).with_name("reference_contextual.py")
    spec = importlib.util.spec_from_file_location("reference_contextual", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, x / 0.01))))


def by_loops(sim, labels, step) -> list[float]:
    return [plain().average_precision(sim.tolist(), labels.tolist(), query, step) for query in range(len(labels))]


def batch(counts, seed: int = 0, width: int = 6, noise: float = 1.0, shuffled: bool = True):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    if shuffled:
        labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(len(counts), width, generator=generator, dtype=torch.float64)
    return centres[labels] + noise * torch.randn(len(labels), width, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize(
    "counts", [(4, 4, 4, 4), (4,) * 8, (8,) * 4, (2,) * 16, (16,) * 2, (1, 2, 3, 5, 9), (1,) * 6, (10,)]
)
def test_smooth_ap_equals_loops_for_classes_of_any_size(counts) -> None:
    emb, labels = batch(counts)
    sim = cosine_similarities(emb)
    assert smooth_ap(sim, labels).tolist() == pytest.approx(by_loops(sim, labels, sigmoid), abs=1e-12)
    assert exact_ap(sim, labels).tolist() == pytest.approx(by_loops(sim, labels, lambda x: float(x >= 0)), abs=1e-12)


@pytest.mark.skipif(not hasattr(pml, "SmoothAPLoss"), reason="this version of the library has none")
def test_the_librarys_smooth_ap_is_right_for_one_kind_of_batch_only() -> None:
    """It cuts the batch into (batch / classes) blocks of (classes) rows: right when samples are sorted by class and
    there are as many classes as samples per class. Elsewhere it returns another number, or refuses the batch. (Seen in
    2.9.0. If this fails on a later release, the library has been mended and may replace our own.)"""
    theirs = pml.SmoothAPLoss(temperature=0.01)

    def both(counts, shuffled: bool) -> tuple[float, float, float]:
        emb, labels = batch(counts, shuffled=shuffled)
        wanted = 1 - sum(by_loops(cosine_similarities(emb), labels, sigmoid)) / len(labels)
        return theirs(emb, labels).item(), SmoothAPLoss()(emb, labels).item(), wanted

    library, ours, wanted = both((4, 4, 4, 4), shuffled=False)
    assert library == pytest.approx(wanted, abs=1e-6)  # single precision inside
    assert ours == pytest.approx(wanted, abs=1e-12)
    # As many classes as samples each, but not sorted; and sorted, but of another shape.
    for counts, shuffled in (((4, 4, 4, 4), True), ((4,) * 8, False), ((8,) * 4, False)):
        library, ours, wanted = both(counts, shuffled)
        assert abs(library - wanted) > 0.005, (counts, library, wanted)
        assert ours == pytest.approx(wanted, abs=1e-12)
    emb, labels = batch((3, 4, 5))
    with pytest.raises(ValueError, match="same number of elements"):
        theirs(emb, labels)
    assert 0 < SmoothAPLoss()(emb, labels) < 1


def test_smooth_ap_becomes_exact_as_the_temperature_falls() -> None:
    emb, labels = batch((3, 5, 2, 6))
    sim = cosine_similarities(emb)
    gaps = [
        (smooth_ap(sim, labels, temperature=t) - exact_ap(sim, labels)).abs().max().item() for t in (0.1, 0.01, 1e-5)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-12


def test_sup_ap_equals_loops_and_bounds_the_exact_loss() -> None:
    """The step of positives is exact, that of others never lower than exact: ranks, so the loss, can only grow."""
    emb, labels = batch((3, 5, 2, 6), noise=2.0)
    sim = cosine_similarities(emb)

    def negative(x: float) -> float:
        return sigmoid(x) if x <= 0 else 0.5 + sigmoid(x) if x <= 0.05 else 100 * (x - 0.05) + 1.44

    wanted = []
    for query in range(len(labels)):
        positives = [j for j in range(len(labels)) if labels[j] == labels[query]]
        total = 0.0
        for j in positives:
            excess = [(sim[query, i] - sim[query, j]).item() for i in range(len(labels))]
            among = 1 + sum(excess[i] >= 0 for i in positives if i != j)
            others = sum(negative(excess[i]) for i in range(len(labels)) if i not in positives)
            total += among / (among + others)
        wanted.append(total / len(positives))
    assert sup_ap(sim, labels).tolist() == pytest.approx(wanted, abs=1e-12)
    assert (1 - sup_ap(sim, labels) >= 1 - exact_ap(sim, labels)).all()


def test_the_published_branch_of_sup_ap_has_a_jump() -> None:
    """One positive, one negative ahead of it by x: AP = (1 + 1 / (1 + 1 + h(x))) / 2 with the query first."""
    labels = torch.tensor([0, 0, 1])

    def h(x: float, **settings) -> float:
        sim = torch.eye(3, dtype=torch.float64) * 1e3
        sim[0, 1], sim[0, 2] = 0.2, 0.2 + x
        rank = 2 / (2 * sup_ap(sim, labels, **settings)[0] - 1)
        return rank.item() - 2

    assert h(0.5) == pytest.approx(100 * 0.45 + 1.44)
    assert h(0.5, compat=True) - h(0.5) == pytest.approx(100 * 0.05)
    assert h(0.05 + 1e-9, offset=None) == pytest.approx(h(0.05 - 1e-9, offset=None), abs=1e-6)
    assert h(0.05 - 1e-9, compat=True) == h(0.05 - 1e-9)
    assert h(-0.3) == pytest.approx(sigmoid(-0.3))


def test_softbin_ap_equals_a_histogram_by_loops() -> None:
    emb, labels = batch((3, 5, 2), noise=1.5)
    sim = cosine_similarities(emb)
    bins, width = 7, 2 / 6
    wanted = []
    for query in range(len(labels)):
        mass = [[max(0.0, 1 - abs(s - (1 - m * width)) / width) for s in sim[query].tolist()] for m in range(bins)]
        positive = [sum(v for v, label in zip(row, labels, strict=True) if label == labels[query]) for row in mass]
        total, ap = [sum(row) for row in mass], 0.0
        for m in range(bins):
            if sum(total[: m + 1]):
                ap += sum(positive[: m + 1]) / sum(total[: m + 1]) * positive[m] / sum(positive)
        wanted.append(ap)
    assert softbin_ap(sim, labels, bins=bins).tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("loss", AP_LOSSES)
def test_perfect_order_is_worth_the_least_and_rows_may_come_in_any_order(loss) -> None:
    labels = torch.arange(5).repeat_interleave(4)
    perfect = torch.eye(5, dtype=torch.float64)[labels]
    assert loss()(perfect, labels).item() == pytest.approx(0, abs=1e-6)
    emb, labels = batch((4, 2, 7, 3))
    rows = emb.clone().requires_grad_()
    value = loss()(rows, labels)
    grad = torch.autograd.grad(value, rows)[0]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    again = emb[order].clone().requires_grad_()
    other = loss()(again, labels[order] * 10 + 3)
    torch.testing.assert_close(other, value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(other, again)[0], grad[order], rtol=1e-8, atol=1e-11)
    assert 0 < value < 1.5


@pytest.mark.parametrize("loss", [SmoothAPLoss(temperature=0.1), SoftBinAPLoss(), SupAPLoss(temperature=0.1)])
def test_gradients_against_differences(loss) -> None:
    emb, labels = batch((3, 2, 4), width=5)
    assert torch.autograd.gradcheck(lambda rows: loss(rows, labels), emb.requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("loss", AP_LOSSES)
def test_autocast_changes_nothing_and_gradients_are_finite(loss) -> None:
    emb, labels = batch((4, 4, 4))
    emb = emb.float()
    wanted = loss()(emb, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = emb.clone().requires_grad_()
        found = loss()(rows, labels)
    assert found == wanted
    found.backward()
    assert rows.grad.isfinite().all()
    assert loss()(torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])).isfinite()


def test_calibrated_losses_are_their_sums() -> None:
    emb, labels = batch((4, 3, 5))
    sim = cosine_similarities(emb)
    contrast = contrastive_loss(sim, labels)
    for whole, ap in (
        (RoadmapLoss(), sup_ap),
        (CalibratedAPLoss(SmoothAPLoss()), smooth_ap),
        (CalibratedAPLoss(SoftBinAPLoss()), softbin_ap),
    ):
        torch.testing.assert_close(whole(emb, labels), 0.5 * (1 - ap(sim, labels).mean()) + 0.5 * contrast)
    torch.testing.assert_close(RoadmapLoss(1.0, 1.0)(emb, labels), 1 - sup_ap(sim, labels).mean() + contrast)


def test_wrong_input_is_named() -> None:
    emb, labels = batch((3, 3))
    sim = cosine_similarities(emb)
    with pytest.raises(ValueError, match=r"found similarities \(6, 6\) and labels \(4,\), wanted \[B, B\] and \[B\]"):
        smooth_ap(sim, labels[:4])
    with pytest.raises(ValueError, match="found 1 bins, wanted at least 2"):
        softbin_ap(sim, labels, bins=1)
    with pytest.raises(ValueError, match="found temperature 0, wanted above 0"):
        SmoothAPLoss(0)
    with pytest.raises(ValueError, match="found a reference set"):
        SmoothAPLoss()(emb, labels, ref_emb=emb[:2], ref_labels=labels[:2])
