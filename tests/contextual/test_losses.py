"""Properties of the contextual loss, its companions and the hybrid; reference and closed form are the same function."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning import losses as pml
from torch.nn import functional

from contextual import fused, similarity
from contextual.losses import (
    ContextualHybridLoss,
    ContextualLoss,
    Weights,
    contextual_loss,
    contrastive_loss,
    cosine_similarities,
    hybrid,
    hybrid_weights,
    similarity_regulariser,
)
from contextual.names import ABLATIONS

BACKENDS = ("reference", "fused")
STEPS = {name: steps for name, steps in similarity.ABLATED.items() if name != "none"}


def plain():
    path = Path(__file__).with_name("reference_contextual.py")
    spec = importlib.util.spec_from_file_location("reference_contextual", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(size: int, classes: int, width: int, seed: int, noise: float = 1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    centres = torch.randn(classes, width, generator=generator, dtype=dtype)
    return centres[labels] + noise * torch.randn(size, width, generator=generator, dtype=dtype), labels


def value_and_grad(emb, labels, **settings):
    emb = emb.clone().requires_grad_()
    loss = contextual_loss(cosine_similarities(emb), labels, **settings)
    return loss.detach(), torch.autograd.grad(loss, emb)[0]


@given(
    size=st.integers(8, 24), classes=st.integers(1, 8), k=st.integers(2, 8), seed=st.integers(0, 10**6),
    eps=st.sampled_from([0.0, 0.03, 0.2, 1.0]), noise=st.sampled_from([0.2, 1.0, 5.0]),
)  # fmt: skip
def test_equal_to_loops_over_sets(size: int, classes: int, k: int, seed: int, eps: float, noise: float) -> None:
    emb, labels = batch(size, classes, 5, seed, noise)
    sim = cosine_similarities(emb)
    wanted = plain().loss(sim.tolist(), labels.tolist(), k, eps)
    for backend in BACKENDS:
        assert contextual_loss(sim, labels, k=k, eps=eps, backend=backend).item() == pytest.approx(wanted, abs=1e-12)


@given(
    size=st.integers(8, 40), classes=st.integers(1, 10), k=st.integers(2, 8), seed=st.integers(0, 10**6),
    eps=st.sampled_from([0.02, 0.1, 0.5]), slope=st.sampled_from([1.0, 10.0]), dense=st.sampled_from([0.0, 2.0]),
)  # fmt: skip
def test_closed_form_is_the_autograd_gradient(
    size: int, classes: int, k: int, seed: int, eps: float, slope: float, dense: float
) -> None:
    """With lists (dense 2) and with matrix products (dense 0)."""
    emb, labels = batch(size, classes, 6, seed)
    sim = cosine_similarities(emb)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "DENSE", dense)
        for backend in BACKENDS:
            own = sim.clone().requires_grad_()
            loss = contextual_loss(own, labels, k=k, eps=eps, slope=slope, backend=backend)
            grad = torch.autograd.grad(loss, own)[0].fill_diagonal_(0)
            found.append((loss.detach(), grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-13)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "noise"), [(128, 0.7), (128, 50.0), (256, 1.5)])
def test_closed_form_in_single_precision(size: int, noise: float) -> None:
    emb, labels = batch(size, size // 4, 64, 3, noise, torch.float32)
    (first, grad), (second, other) = (value_and_grad(emb, labels, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other, grad, rtol=1e-4, atol=1e-6)
    exact, exact_grad = value_and_grad(emb.double(), labels)
    torch.testing.assert_close(second, exact.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other, exact_grad.float(), rtol=1e-4, atol=1e-6)


def test_what_leaves_the_loss_alone(clustered, backend: str) -> None:
    emb, labels = clustered(6, 4)
    value, grad = value_and_grad(emb, labels, backend=backend)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(labels), generator=generator)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    scale = torch.rand(len(labels), 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    permuted = value_and_grad(emb[order], labels[order], backend=backend)
    torch.testing.assert_close(permuted[0], value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(permuted[1], grad[order], rtol=1e-9, atol=1e-12)
    turned = value_and_grad(emb @ turn, labels, backend=backend)
    torch.testing.assert_close(turned[1], grad @ turn, rtol=1e-9, atol=1e-12)
    scaled = value_and_grad(emb * scale, labels, backend=backend)
    torch.testing.assert_close(scaled[1], grad / scale, rtol=1e-9, atol=1e-12)
    names = torch.randperm(6, generator=generator)[labels] * 1000 + 7
    for other in (names, labels.int(), labels.double()):
        assert torch.equal(value_and_grad(emb, other, backend=backend)[1], grad)
    # The gradient has no radial part: scaling a row costs nothing.
    assert (grad * emb).sum(1).abs().max() < 1e-14


def test_shape_of_the_similarity(clustered) -> None:
    emb, _ = clustered(6, 4, noise=1.0)
    sim = cosine_similarities(emb)
    found = similarity.contextual_similarity(sim)
    assert torch.equal(found.similarity, found.similarity.T)
    assert found.similarity.min() >= 0
    assert found.similarity.max() <= 1
    assert torch.equal(found.mutual, found.mutual.T)
    assert found.mutual.diagonal().eq(1).all()
    size = found.neighbours.sum(1)
    assert found.neighbours.diagonal().eq(1).all()
    assert size.min() >= 4
    inner = similarity.contextual_similarity(sim, steps=STEPS["intersection"]).similarity
    assert not inner[found.neighbours == 0].any()
    # Common strangers, counted from common neighbours.
    far = 1 - found.neighbours
    counted = len(sim) - size[:, None] - size + found.neighbours @ found.neighbours.T
    assert torch.equal(far @ far.T, counted)


@given(seed=st.integers(0, 10**6), k=st.integers(2, 7), eps=st.sampled_from([0.0, 0.05, 0.3]))
def test_neighbourhoods_grow_with_k_and_eps_and_hold_ties(seed: int, k: int, eps: float) -> None:
    emb, _ = batch(14, 3, 4, seed)
    sim = cosine_similarities(torch.cat([emb, emb[:5]]))  # five duplicates: equal distances everywhere
    sq_distance = similarity.sq_distances(sim).fill_diagonal_(0)
    near = similarity.neighbourhood(sq_distance, k, eps=eps, slope=1.0)
    assert (near.diagonal() == 1).all()
    assert (similarity.neighbourhood(sq_distance, k + 1, eps=eps, slope=1.0) >= near).all()
    assert (similarity.neighbourhood(sq_distance, k, eps=eps + 0.1, slope=1.0) >= near).all()
    assert (similarity.neighbourhood(sq_distance, k // 2, eps=eps, slope=1.0) <= near).all()
    reach = sq_distance.sort(1).values[:, k - 1 : k]
    assert torch.equal(near, (eps - sq_distance >= -reach).double())


def test_tight_classes_far_apart_cost_nothing(backend: str) -> None:
    """Also with eight pictures per class and k = 4, when they lie within the slack of each other."""
    for per_class, classes in ((4, 6), (8, 4)):
        labels = torch.arange(classes).repeat_interleave(per_class)
        jitter = 0.01 * torch.randn(
            len(labels), classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        value, grad = value_and_grad(torch.eye(classes, dtype=torch.float64)[labels] + jitter, labels, backend=backend)
        assert value.item() == 0
        assert not grad.any()


def test_fewer_pictures_per_class_than_neighbours_cannot_be_perfect(backend: str) -> None:
    labels = torch.arange(8).repeat_interleave(2)
    value, grad = value_and_grad(torch.eye(8, dtype=torch.float64)[labels], labels, backend=backend)
    assert value.item() > 0
    assert value.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_collapsed_and_odd_batches_are_finite(backend: str, dtype) -> None:
    emb, labels = batch(12, 3, 4, 0, dtype=dtype)
    cases = {
        "all equal": (emb[:1].repeat(12, 1), labels, {}),
        "pairs of duplicates": (emb[:6].repeat(2, 1), labels, {"eps": 0.0}),
        "one class": (emb, torch.zeros(12, dtype=torch.long), {}),
        "no two alike": (emb, torch.arange(12), {}),
        "batch of k": (emb[:4], labels[:4], {}),
        "odd k": (emb, labels, {"k": 5}),
        "everything near": (emb, labels, {"eps": 5.0}),
        "opposite": (torch.cat([emb[:6], -emb[:6]]), labels, {"k": 2}),
    }
    for name, (rows, own, settings) in cases.items():
        value, grad = value_and_grad(rows, own, backend=backend, **settings)
        assert value.isfinite(), name
        assert grad.isfinite().all(), name


@given(seed=st.integers(0, 10**6), classes=st.integers(1, 12))
def test_bounds(seed: int, classes: int) -> None:
    emb, labels = batch(24, classes, 4, seed, 3.0)
    sim = cosine_similarities(emb)
    assert 0 <= contextual_loss(sim, labels).item() <= 23 / 24
    found = similarity.contextual_similarity(sim).similarity
    same = labels[:, None] == labels
    positive = ((1 - found)[same & ~torch.eye(24, dtype=torch.bool)] ** 2).sum() / 24**2
    assert positive <= (torch.bincount(labels).max() - 1) / 24


def test_the_slope_scales_the_gradient_alone(clustered, backend: str) -> None:
    emb, labels = clustered(6, 4)
    one = value_and_grad(emb, labels, slope=1.0, backend=backend)
    # Two steps are multiplied nowhere: the gradient is linear in the slope.
    for slope in (3.0, 50.0):
        other = value_and_grad(emb, labels, slope=slope, backend=backend)
        assert other[0] == one[0]
        torch.testing.assert_close(other[1], slope * one[1], rtol=1e-10, atol=1e-14)


def test_the_step_has_the_slope_everywhere_and_none_to_its_threshold() -> None:
    x = torch.tensor([-100.0, -1e-9, 0.0, 1e-9, 7.0], dtype=torch.float64, requires_grad=True)
    threshold = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    out = similarity.at_least(x, threshold, 10.0)
    assert out.tolist() == [0, 0, 1, 1, 1]
    found = torch.autograd.grad(out.sum(), [x, threshold], allow_unused=True)
    assert found[0].tolist() == [10.0] * 5
    assert found[1] is None


def test_neighbourhood_loss_pulls_positives_in_and_pushes_negatives_out(clustered) -> None:
    """Step 1 alone: dL/dS = 2 slope 2 / B^2 (N - Y), so descent raises a positive pair that is outside."""
    emb, labels = clustered(6, 4, noise=1.5)
    sim = cosine_similarities(emb).requires_grad_()
    steps = similarity.Steps(last="neighbours")
    grad = torch.autograd.grad(contextual_loss(sim, labels, backend="reference", steps=steps), sim)[0].fill_diagonal_(0)
    near, same = similarity.contextual_similarity(sim.detach()).neighbours, (labels[:, None] == labels).double()
    wanted = (40 * 2 / len(labels) ** 2 / 2 * (near - same)).fill_diagonal_(0)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)
    assert (grad[(same == 1) & (near == 0)] < 0).all()
    assert (grad[(same == 0) & (near == 1)] > 0).all()


@pytest.mark.parametrize("noisy", [False, True])
def test_free_embeddings_learn_their_classes(noisy: bool) -> None:
    """16 classes of 4 from a Gaussian start: the loss vanishes; with a fifth of the labels redrawn it falls."""
    torch.manual_seed(0)
    labels = torch.arange(16).repeat_interleave(4)
    if noisy:
        redrawn = torch.rand(64) < 0.2
        labels = torch.where(redrawn, torch.randint(16, (64,)), labels)
    emb = torch.randn(64, 32, requires_grad=True)
    loss, optimizer = ContextualLoss(), torch.optim.Adam([emb], lr=0.02)
    values = []
    for _ in range(400):
        value = loss(emb, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[0] > 0.05
    if noisy:
        assert values[-1] < 0.02
        return
    assert values[-1] < 1e-6
    nearest = cosine_similarities(emb.detach()).fill_diagonal_(-2).argmax(1)
    assert torch.equal(labels[nearest], labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_change_nothing(clustered, dtype, backend: str) -> None:
    emb, labels = clustered(6, 4)
    emb = emb.to(dtype).float()
    loss = ContextualHybridLoss(backend=backend)
    rows = emb.clone().requires_grad_()
    wanted = loss(rows, labels)
    wanted.backward()
    with torch.autocast("cpu", dtype=dtype):
        other = emb.clone().requires_grad_()
        found = loss(other, labels)
        low = loss(emb.to(dtype), labels)
        if backend == "fused":  # autograd's own products would be cast here
            found.backward()
    if backend == "reference":
        found.backward()
    assert found.dtype == low.dtype == torch.float32
    assert found == wanted == low
    assert torch.equal(other.grad, rows.grad)


def test_compiled_equals_eager(clustered, backend: str) -> None:
    """The closed form breaks the graph where it leaves tensors for lists."""
    emb, labels = clustered(4, 4)
    eager = value_and_grad(emb, labels, backend=backend)
    compiled = torch.compile(
        lambda rows: contextual_loss(cosine_similarities(rows), labels, backend=backend), backend="eager"
    )
    rows = emb.clone().requires_grad_()
    value = compiled(rows)
    torch.testing.assert_close(value.detach(), eager[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(value, rows)[0], eager[1], rtol=1e-10, atol=1e-13)


def test_the_reference_is_one_graph(clustered) -> None:
    emb, _ = clustered(4, 4)
    traced = torch.compile(
        lambda sim: similarity.contextual_similarity(sim).similarity, backend="eager", fullgraph=True
    )
    sim = cosine_similarities(emb)
    assert torch.equal(traced(sim), similarity.contextual_similarity(sim).similarity)


@pytest.mark.parametrize("dense", [0.0, 2.0])
def test_the_closed_form_can_be_used_twice_but_not_differentiated_twice(clustered, monkeypatch, dense: float) -> None:
    monkeypatch.setattr(fused, "DENSE", dense)
    emb, labels = clustered(4, 4)
    emb.requires_grad_()
    loss = ContextualHybridLoss()(emb, labels)
    first = torch.autograd.grad(loss, emb, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(3 * loss, emb)[0], 3 * first)
    with pytest.raises(RuntimeError, match="no second derivative: use backend='reference'"):
        torch.autograd.grad(ContextualLoss()(emb, labels), emb, create_graph=True)
    assert torch.autograd.gradgradcheck(lambda x: fused.gram(x).square().sum(), emb)


def test_nothing_is_differentiated_without_a_graph(clustered, backend: str) -> None:
    emb, labels = clustered(4, 4)
    wanted = ContextualHybridLoss(backend=backend)(emb.clone().requires_grad_(), labels)
    with torch.no_grad():
        found = ContextualHybridLoss(backend=backend)(emb, labels)
    assert not found.requires_grad
    assert found == wanted


def test_gradients_against_differences(clustered) -> None:
    """What is smooth: the companions and the product behind the similarities."""
    emb, labels = clustered(4, 3, width=5, noise=1.0)
    emb = (2 * emb).requires_grad_()
    margins = {"pos_margin": 0.83, "neg_margin": 0.31}
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(cosine_similarities(x), labels, **margins), emb)
    assert torch.autograd.gradcheck(lambda x: similarity_regulariser(cosine_similarities(x), 0.3), emb)
    companions = Weights(0, 0.7, 0.2)
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(
            lambda x, b=backend: hybrid(cosine_similarities(x), labels, companions, backend=b).loss, emb
        )
    assert torch.autograd.gradcheck(fused.gram, emb)


@given(seed=st.integers(0, 10**6), pos=st.sampled_from([0.5, 0.75, 0.9, 1.0]), neg=st.sampled_from([0.0, 0.3, 0.6]))
def test_contrastive_is_the_librarys(seed: int, pos: float, neg: float) -> None:
    emb, labels = batch(16, 4, 6, seed)
    theirs = pml.ContrastiveLoss(pos_margin=pos, neg_margin=neg, distance=distances.CosineSimilarity())
    for backend in BACKENDS:
        found = []
        for loss in (ContextualHybridLoss(0, 1, 0, pos_margin=pos, neg_margin=neg, backend=backend), theirs):
            rows = emb.clone().requires_grad_()
            value = loss(rows, labels)
            found.append((value.detach(), torch.autograd.grad(value, rows)[0]))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_no_active_pair_is_a_zero_that_can_be_differentiated(backend: str) -> None:
    labels = torch.arange(4).repeat_interleave(2)
    emb = torch.eye(4, dtype=torch.float64)[labels].requires_grad_()
    value = ContextualHybridLoss(0, 1, 0, pos_margin=0.9, backend=backend)(emb, labels)
    value.backward()
    assert value.item() == 0
    assert not emb.grad.any()


def test_regulariser_is_of_the_mean_vector(clustered) -> None:
    emb, _ = clustered(5, 3)
    wanted = (emb.mean(0).square().sum() - 0.25) ** 2
    torch.testing.assert_close(similarity_regulariser(cosine_similarities(emb), 0.25), wanted)


def test_hybrid_is_the_weighted_sum_of_its_terms(clustered, backend: str) -> None:
    emb, labels = clustered(6, 4)
    sim = cosine_similarities(emb).requires_grad_()
    weights, parts = Weights(0.3, 0.5, 0.2), (Weights(1, 0, 0), Weights(0, 1, 0), Weights(0, 0, 1))
    terms = hybrid(sim, labels, weights, backend=backend)
    single = [hybrid(sim, labels, part, backend=backend) for part in parts]
    total = sum(weight * one.loss for weight, one in zip(weights, single, strict=True))
    torch.testing.assert_close(terms.loss, total)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, sim)[0], torch.autograd.grad(total, sim)[0])
    for value, one in zip((terms.contextual, terms.contrastive, terms.reg), single, strict=True):
        torch.testing.assert_close(value, one.loss.detach())
        assert not value.requires_grad
    named = terms.named()
    context = similarity.contextual_similarity(sim.detach())
    assert named["neighbours"] == context.neighbours.sum(1).mean()
    assert named["mutual"] == context.mutual.sum(1).mean()
    assert named["covering"] == 0
    assert single[1].named().keys() == {"loss", "contrastive"}


def test_share_of_neighbourhoods_that_say_nothing(clustered) -> None:
    emb, labels = clustered(4, 4)
    for backend in BACKENDS:
        terms = hybrid(cosine_similarities(emb), labels, Weights(1, 0, 0), eps=5.0, backend=backend)
        assert terms.named()["covering"] == 1


def test_two_meanings_of_lam() -> None:
    assert hybrid_weights(0.4, 0.1, "context") == pytest.approx((0.4, 0.5, 0.1))
    assert hybrid_weights(0.05, 0.1, "contrast") == pytest.approx((0.95, 0.05, 0.1))
    assert hybrid_weights(0.9, 0.1, "context") == (0.9, 0.0, 0.1)
    with pytest.raises(ValueError, match="no weight below 0"):
        hybrid_weights(0.95, 0.1, "context")
    with pytest.raises(ValueError, match="unknown lam convention 'paper'"):
        hybrid_weights(0.4, 0.1, "paper")


def test_normalize_b_takes_the_batch_size_out(clustered) -> None:
    emb, labels = clustered(6, 4)
    published = ContextualHybridLoss(0.4, 0.5, 0.1)(emb, labels)
    terms = ContextualHybridLoss(0.4, 0.5, 0.1)
    terms(emb, labels)
    other = ContextualHybridLoss(0.4, 0.5, 0.1, normalize="b")(emb, labels)
    torch.testing.assert_close(other - published, 0.4 * 23 * terms.terms.contextual)


@pytest.mark.parametrize("name", STEPS)
def test_ablations_are_finite_and_differ_from_the_method(clustered, name: str) -> None:
    """Two of them change the gradient alone."""
    emb, labels = clustered(6, 4, noise=1.5)
    base = value_and_grad(emb, labels, backend="reference")
    found = value_and_grad(emb, labels, backend="reference", steps=STEPS[name])
    assert found[1].isfinite().all()
    assert not torch.allclose(found[1], base[1])
    assert (found[0] == base[0]) == (name in ("minimum", "detach-expansion", "detach-nothing"))


def test_every_named_ablation_exists() -> None:
    assert tuple(ABLATIONS) == tuple(similarity.ABLATED)


def test_wrong_input_is_named(clustered) -> None:
    emb, labels = clustered(3, 4)
    sim = cosine_similarities(emb)
    for wrong, message in (
        (lambda: contextual_loss(sim, labels, k=1), "found k = 1, wanted at least 2"),
        (lambda: contextual_loss(sim[:3, :3], labels[:3], k=4), "found a batch of 3, wanted at least k = 4"),
        (lambda: contextual_loss(sim[:5], labels[:5]), r"found similarities \(5, 12\), wanted \[B, B\]"),
        (lambda: contextual_loss(sim, labels[:5]), r"found labels \(5,\) for similarities \(12, 12\)"),
        (lambda: contextual_loss(sim, labels[:, None]), r"found labels \(12, 1\)"),
        (
            lambda: contextual_loss(sim, labels, backend="cuda"),
            "unknown backend 'cuda': choose one of fused, reference",
        ),
        (lambda: contextual_loss(sim, labels, steps=STEPS["sigmoid"]), "no closed form: choose the backend reference"),
        (lambda: ContextualHybridLoss(0, 0, 0), "three weights of 0"),
        (lambda: ContextualLoss(normalize="b3"), "unknown normalize 'b3': choose one of b2, b"),
        (lambda: ContextualLoss(distance=distances.LpDistance()), "found distance LpDistance, wanted CosineSimilarity"),
        (lambda: ContextualLoss()(emb, labels, ref_emb=emb[:4], ref_labels=labels[:4]), "found a reference set"),
        (lambda: ContextualLoss()(emb, labels, miners.MultiSimilarityMiner()(emb, labels)), "found mined pairs"),
        (lambda: ContextualLoss()(emb), "found no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_works_where_any_loss_of_the_library_does(clustered) -> None:
    from pytorch_metric_learning import reducers, regularizers

    emb, labels = clustered(6, 4)
    base = ContextualLoss()(emb, labels)
    sum_of_two = pml.MultipleLosses([ContextualLoss(), pml.MultiSimilarityLoss()], weights=[0.5, 2.0])
    torch.testing.assert_close(sum_of_two(emb, labels), 0.5 * base + 2 * pml.MultiSimilarityLoss()(emb, labels))
    decayed = ContextualLoss(embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.1)
    torch.testing.assert_close(decayed(2 * emb, labels), base + 0.1 * 2.0)
    assert ContextualLoss(reducer=reducers.MeanReducer())(emb, labels) == base


def test_each_process_gets_its_part_of_the_gradient(clustered) -> None:
    """Gathered batches hold a process's own rows, with gradient, before those of the others, without."""
    emb, labels = clustered(8, 4)
    rows = emb.clone().requires_grad_()
    whole = torch.autograd.grad(ContextualHybridLoss()(rows, labels), rows)[0]
    for own in (torch.arange(12), torch.arange(12, 32)):
        others = torch.tensor([row for row in range(32) if row not in own.tolist()])
        part = emb[own].clone().requires_grad_()
        loss = ContextualHybridLoss()(torch.cat([part, emb[others]]), torch.cat([labels[own], labels[others]]))
        torch.testing.assert_close(torch.autograd.grad(loss, part)[0], whole[own], rtol=1e-9, atol=1e-12)


def _one_of_two(rank: int, folder: str, emb, labels) -> None:
    import torch.distributed as dist
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = slice(rank * len(labels) // 2, (rank + 1) * len(labels) // 2)
    own = emb[half].clone().requires_grad_()
    loss = DistributedLossWrapper(ContextualHybridLoss())(own, labels[half])
    loss.backward()
    torch.save((loss.detach(), own.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_the_whole_batch(clustered, tmp_path) -> None:
    """Through the library's wrapper, which multiplies by the number of processes because gradients are averaged."""
    emb, labels = clustered(8, 4)
    rows = emb.clone().requires_grad_()
    whole = ContextualHybridLoss()(rows, labels)
    whole.backward()
    mp.spawn(_one_of_two, args=(str(tmp_path), emb, labels), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [value.item() for value, _ in found] == pytest.approx([2 * whole.item()] * 2, rel=1e-12)
    torch.testing.assert_close(torch.cat([grad for _, grad in found]), 2 * rows.grad, rtol=1e-9, atol=1e-12)


def test_rows_of_zeros_have_no_neighbours_by_direction() -> None:
    emb = torch.zeros(3, 4)
    assert not cosine_similarities(emb).any()
    assert functional.normalize(emb, dim=1).isfinite().all()
