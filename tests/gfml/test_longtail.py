"""Imbalance profiles as published, class weights at their limits, losses by loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfml import longtail

CIFAR10 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.fixture
def golden(stored: Callable[[str], dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in stored("imbalance_cifar").items()}


def test_counts_are_the_stored_ones(golden) -> None:
    for row, (profile, num_classes, num_samples) in enumerate(golden["counts_config"].tolist()):
        for factor, wanted in zip(golden["factors"].tolist(), golden[f"orig_counts__{row}"], strict=True):
            found = longtail.imbalanced_counts(longtail.PROFILES[profile], num_classes, num_samples, factor)
            assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("profile", "num_classes", "factor", "total"),
    [("exp", 10, 0.01, 12_406), ("exp", 10, 0.02, 13_996), ("exp", 10, 0.1, 20_431), ("exp", 10, 0.005, 11_203),
     ("exp", 100, 0.01, 10_847), ("exp", 100, 0.02, 12_608), ("exp", 100, 0.1, 19_573), ("exp", 100, 0.005, 9_502),
     ("step", 10, 0.01, 25_250), ("step", 100, 0.01, 25_250), ("balanced", 10, 0.01, 50_000)],
)  # fmt: skip
def test_totals_of_imbalanced_cifar(profile, num_classes, factor, total) -> None:
    assert longtail.imbalanced_counts(profile, num_classes, 50_000, factor).sum() == total


def test_counts_at_the_edges() -> None:
    assert longtail.imbalanced_counts("exp", 10, 50_000, 0.01).tolist() == CIFAR10
    assert longtail.imbalanced_counts("step", 3, 30, 0.1).tolist() == [10, 10, 1]
    assert longtail.imbalanced_counts("exp", 1, 30, 0.1).tolist() == [30]
    assert longtail.imbalanced_counts("exp", 4, 40, 1.0).tolist() == [10] * 4
    rare = longtail.imbalanced_counts("exp", 100, 50_000, 0.001)  # as published: the last classes are empty
    assert rare.tolist() == [int(500 * 0.001 ** (c / 99)) for c in range(100)] and rare[-1] == 0 and rare[89] == 1
    for wrong in (("linear", 10, 100, 0.1), ("exp", 10, 100, 0.0), ("exp", 10, 100, 2.0), ("exp", 10, 9, 0.5)):
        with pytest.raises(ValueError, match="wanted|unknown"):
            longtail.imbalanced_counts(*wrong)


def test_chosen_examples_are_the_stored_ones(golden) -> None:
    labels, num_classes = golden["selection_labels"], golden["selection_num_classes"].item()
    for row, (profile, seed) in enumerate(golden["selection_config"].tolist()):
        factor = golden["selection_factors"][row].item()
        counts = longtail.imbalanced_counts(longtail.PROFILES[profile], num_classes, len(labels), factor)
        found = longtail.select_indices(labels, counts, seed)
        assert found.tolist() == golden[f"orig_selection__{row}__indices"].tolist()
        assert labels[found].tolist() == golden[f"orig_selection__{row}__labels"].tolist()


def test_the_choice_is_private() -> None:
    """It neither reads nor moves the global generator, and takes all of a class that has too few."""
    labels, counts = np.arange(60) % 3, np.array([10, 30, 5])
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = longtail.select_indices(labels, counts, seed=4)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert (longtail.select_indices(labels, counts, seed=4) == first).all()
    assert (longtail.select_indices(labels, counts, seed=5) != first).any()
    assert np.bincount(labels[first]).tolist() == [10, 20, 5] and len(set(first)) == 35


def test_effective_number_weights_are_the_stored_ones(golden) -> None:
    counts, beta = golden["effective_number_counts"], golden["effective_number_beta"].item()
    weights = longtail.effective_number_weights(counts, beta)
    np.testing.assert_allclose(weights, golden["natural_effective_number_weights"], rtol=1e-9)
    np.testing.assert_allclose(weights, golden["orig_effective_number_weights"], rtol=1e-9)
    found = longtail.sampling_probability(counts, weights)
    np.testing.assert_allclose(found, golden["natural_class_sampling_probability"], rtol=1e-9)


def test_effective_number_weights_at_their_limits() -> None:
    counts = np.array(CIFAR10)
    np.testing.assert_allclose(longtail.effective_number_weights(counts, 0.0), 1)
    np.testing.assert_allclose(longtail.effective_number_weights(counts, 1e-9), 1, rtol=1e-8)
    np.testing.assert_allclose(longtail.effective_number_weights(counts, 1.0), 1 / counts)
    np.testing.assert_allclose(longtail.effective_number_weights(counts, 1 - 1e-12), 1 / counts, rtol=1e-4)
    assert longtail.effective_number_weights(np.array([3, 0]), 0.9)[1] == 0
    assert longtail.class_weights(counts).mean() == pytest.approx(1)
    inverse = longtail.effective_number_weights(counts, 1.0)
    np.testing.assert_allclose(longtail.sampling_probability(counts, inverse), 0.1)
    with pytest.raises(ValueError, match="found beta 1.5"):
        longtail.effective_number_weights(counts, 1.5)


def test_groups_by_count() -> None:
    """35, 35 and 30 classes of imbalanced CIFAR-100; the bounds 100 and 20 belong to medium."""
    counts = longtail.imbalanced_counts("exp", 100, 50_000, 0.01)
    groups = longtail.shot_groups(counts)
    assert {name: len(classes) for name, classes in groups.items()} == {"many": 35, "medium": 35, "few": 30}
    assert np.array_equal(np.sort(np.concatenate([*groups.values()])), np.arange(100))
    edges = longtail.shot_groups(np.array([101, 100, 20, 19]))
    assert {name: classes.tolist() for name, classes in edges.items()} == {"many": [0], "medium": [1, 2], "few": [3]}
    assert [len(classes) for classes in longtail.shot_groups(np.array(CIFAR10)).values()] == [8, 2, 0]


def test_groups_by_rank() -> None:
    groups = longtail.rank_groups(np.array(CIFAR10))
    assert {k: v.tolist() for k, v in groups.items()} == {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]}
    mixed = longtail.rank_groups(np.array([1, 9, 5, 7]))
    assert {k: v.tolist() for k, v in mixed.items()} == {"head": [1], "mid": [2, 3], "tail": [0]}
    for num_classes in range(1, 12):
        found = np.concatenate([*longtail.rank_groups(np.ones(num_classes)).values()])
        assert sorted(found) == [*range(num_classes)]


COUNTS = np.array([60, 30, 8, 2])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    return logits, torch.tensor([0, 1, 2, 3, 3, 1])


def loop_ce(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


def loop_loss(name: str, logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: list | None = None) -> float:
    prior, total, weight_sum, c = COUNTS / COUNTS.sum(), 0.0, 0.0, len(COUNTS)
    if name == "cb":
        weights = [(1 - 0.9) / (1 - 0.9**n) for n in COUNTS]
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        weight, factor = 1.0 if weights is None else weights[y], 1.0
        if name == "balanced-softmax":
            z = [a + math.log(p) for a, p in zip(z, prior, strict=True)]
        elif name == "logit-adjustment":
            z = [a + 2 * math.log(p) for a, p in zip(z, prior, strict=True)]
        elif name == "ldam":
            margins = [n**-0.25 for n in COUNTS]
            z = [10 * (a - (0.4 * margins[c] / max(margins) if c == y else 0)) for c, a in enumerate(z)]
        elif name == "focal":
            factor = (1 - math.exp(-loop_ce(z, y))) ** 1.5
        shares = [smoothing / c + (1 - smoothing) * (k == y) for k in range(c)]
        own = sum(share * loop_ce(z, k) for k, share in enumerate(shares))
        total, weight_sum = total + weight * factor * own, weight_sum + weight
    return total / weight_sum


OPTIONS = {"beta": 0.9, "tau": 2.0, "gamma": 1.5, "max_margin": 0.4, "scale": 10.0}


@pytest.mark.parametrize("name", longtail.LOSSES)
def test_losses_by_loops(name) -> None:
    logits, labels = batch()
    loss = longtail.class_loss(name, COUNTS, **OPTIONS).double()
    if name == "ldam":  # the stored margins are float32
        loss.margin.copy_(torch.as_tensor(0.4 * (COUNTS / 2) ** -0.25))
    if name in ("balanced-softmax", "logit-adjustment"):
        prior = torch.as_tensor(np.log(COUNTS / COUNTS.sum()))
        loss.offset.copy_((1 if name == "balanced-softmax" else 2) * prior)
    if name == "cb":
        loss.reweigh(longtail.class_weights(COUNTS, 0.9))
    assert loss(logits, labels).item() == pytest.approx(loop_loss(name, logits, labels), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())
    assert longtail.class_loss(name, COUNTS, **OPTIONS)(logits.float(), labels).item() == pytest.approx(
        loop_loss(name, logits, labels), rel=1e-5
    )


SMOOTH = [name for name in longtail.LOSSES if name != "focal"]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("weights", [None, [0.2, 0.7, 1.9, 4.0]])
def test_smoothing_by_loops(name, weights) -> None:
    """Of every loss, with its own class weights and with deferred ones: an example counts with its label's weight."""
    logits, labels = batch()
    loss = longtail.class_loss(name, COUNTS, **OPTIONS, smoothing=0.2)
    if weights is not None and name != "cb":
        loss.reweigh(np.array(weights))
    wanted = loop_loss(name, logits, labels, 0.2, weights)
    assert loss(logits.float(), labels).item() == pytest.approx(wanted, rel=1e-5)
    assert torch.autograd.gradcheck(lambda z: loss.double()(z, labels), logits.requires_grad_())


def test_smoothing_without_weights_is_the_library_s() -> None:
    logits, labels = batch()
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(longtail.class_loss("ce", COUNTS, smoothing=0.2)(logits, labels), wanted)


@pytest.mark.parametrize("name", longtail.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(name, dtype) -> None:
    """Their own rounding is all that is lost, with and without autocast, smoothed where that is defined."""
    logits, labels = batch()
    logits, smoothing = logits.to(dtype), 0.2 * (name in SMOOTH)
    loss = longtail.class_loss(name, COUNTS, **OPTIONS, smoothing=smoothing)
    wanted = loop_loss(name, logits.double(), labels, smoothing)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = loss(logits, labels)
        assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted, rel=1e-5)


def test_cosine_logits_stay_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head, x = longtail.CosineHead(8, 3), torch.randn(5, 8)
    x[0] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(x), head.float()(x)) and head(x).dtype == torch.float32
        assert head(x.half())[0].tolist() == [0, 0, 0]  # a zero row has no direction


def test_special_cases_are_cross_entropy() -> None:
    logits, labels = batch()
    wanted = F.cross_entropy(logits, labels).item()
    even = np.full(4, 25)
    for name, options in (("ce", {}), ("cb", {}), ("focal", {"gamma": 0.0}), ("balanced-softmax", {}),
                          ("logit-adjustment", {"tau": 0.0}), ("ldam", {"max_margin": 0.0, "scale": 1.0})):  # fmt: skip
        assert longtail.class_loss(name, even, **options).double()(logits, labels).item() == pytest.approx(wanted)


def test_focal_loss_of_a_sure_answer_is_zero_with_a_finite_gradient() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = longtail.Focal(2.0)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * math.log(2) / 2) and logits.grad.isfinite().all()


def test_balanced_softmax_learns_balanced_scores() -> None:
    """On one cell with class frequencies pi its best logits are equal, those of CE are log pi."""
    counts, labels = np.array([90, 9, 1]), torch.repeat_interleave(torch.arange(3), torch.tensor([90, 9, 1]))
    found = {}
    for name in ("ce", "balanced-softmax"):
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss = longtail.class_loss(name, counts).double()
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(logits.expand(100, 3), labels)
            value.backward()
            return value

        optimizer.step(closure)
        found[name] = logits.detach()
    assert (found["balanced-softmax"] - found["balanced-softmax"].mean()).abs().max() < 1e-3
    adjusted = longtail.without_prior(found["ce"][None], counts)[0]
    assert (adjusted - adjusted.mean()).abs().max() < 1e-3
    assert found["ce"][0] - found["ce"][2] == pytest.approx(math.log(90), rel=1e-3)


def test_deferred_weights_change_at_their_epoch() -> None:
    loss = longtail.class_loss("ldam", COUNTS)
    early, late = (longtail.deferred_weights(COUNTS, epoch, 160, 0.99) for epoch in (159, 160))
    np.testing.assert_allclose(early, 1)
    np.testing.assert_allclose(late, longtail.class_weights(COUNTS, 0.99))
    logits, labels = batch()
    before = loss(logits.float(), labels)
    loss.reweigh(late)
    assert loss(logits.float(), labels) != before
    assert "weight" in loss.state_dict()


def test_a_class_without_examples_has_no_prior() -> None:
    for name in ("balanced-softmax", "ldam"):
        with pytest.raises(ValueError, match="without training examples"):
            longtail.class_loss(name, np.array([3, 0]))
    with pytest.raises(ValueError, match="unknown loss 'softmax'"):
        longtail.class_loss("softmax", COUNTS)
    with pytest.raises(ValueError, match="smoothed"):
        longtail.class_loss("focal", COUNTS, smoothing=0.1)


def test_cosine_head() -> None:
    torch.manual_seed(0)
    model = longtail.use_cosine_head(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), 4)
    assert isinstance(model[2], longtail.CosineHead) and isinstance(model[0], nn.Linear)
    x = torch.randn(7, 5)
    wanted = F.cosine_similarity(x[:, None], model[2].weight[None], dim=-1)
    torch.testing.assert_close(model[2](x), wanted)
    torch.testing.assert_close(model[2](10 * x), wanted)
    with pytest.raises(ValueError, match="no linear map to 9 classes"):
        longtail.use_cosine_head(model, 9)


def test_counting_labels() -> None:
    assert longtail.count_labels([0, 2, 2], 4).tolist() == [1, 0, 2, 0]
    for wrong in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"wanted 0 \.\. 3"):
            longtail.count_labels(wrong, 4)
