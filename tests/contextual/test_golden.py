"""Against the stored vectors of the published programs: similarities, losses, gradients, ablations, baselines."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning import losses as pml

from contextual import similarity
from contextual.baselines import LossOptions, build_loss
from contextual.losses import (
    contextual_loss,
    contrastive_loss,
    cosine_similarities,
    hybrid,
    hybrid_weights,
    similarity_regulariser,
)
from contextual.names import ABLATIONS
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

CASES = tuple(f"c{number}" for number in range(7))
PRECISIONS = (torch.float64, torch.float32)


def rows(golden, case: str, dtype=torch.float64):
    return golden[f"{case}_emb"].to(dtype).requires_grad_()


def agree(loss, emb, golden, case: str, name: str, close, grad: str | None = None) -> None:
    """Value and gradient by the embeddings."""
    close(loss, golden[f"{case}_{name}"])
    found = torch.autograd.grad(loss, emb)[0]
    close(found, golden[f"{case}_{grad or name.replace('loss_', 'grad_')}"], grad=True)


@pytest.mark.parametrize("case", CASES)
def test_similarity_step_by_step(golden, close, case: str) -> None:
    sim, k, eps = golden[f"{case}_sim"], golden[f"{case}_k"].item(), golden[f"{case}_eps"].item()
    distance = similarity.sq_distances(sim)
    close(distance, golden[f"{case}_sqdist"])
    near = similarity.neighbourhood(distance, k, eps=eps, slope=10.0)
    half = similarity.neighbourhood(distance, k // 2, eps=eps, slope=10.0)
    assert torch.equal(near, golden[f"{case}_nbr_k"].double())
    assert torch.equal(half, golden[f"{case}_nbr_half"].double())
    inside = similarity.intersection(near, similarity.Steps(strangers=False))
    close(inside, golden[f"{case}_m_plus"])
    close(2 * similarity.intersection(near) - inside, golden[f"{case}_m_minus"])
    weights = similarity.intersection(near) * near
    close(weights, golden[f"{case}_w_tilde"])
    close(similarity.expand(weights, half * half.T), golden[f"{case}_w_asym"])
    context = similarity.contextual_similarity(sim, k=k, eps=eps)
    close(context.similarity, golden[f"{case}_w_hat"])
    assert torch.equal(context.mutual, golden[f"{case}_recip"].double())
    assert torch.equal(context.neighbours.sum(1).long(), golden[f"{case}_n_k"])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_contextual_loss(golden, close, case: str, backend: str, dtype) -> None:
    emb, k, eps = rows(golden, case, dtype), golden[f"{case}_k"].item(), golden[f"{case}_eps"].item()
    sim = cosine_similarities(emb)
    loss = contextual_loss(sim, golden[f"{case}_labels"], k=k, eps=eps, backend=backend)
    close(loss, golden[f"{case}_loss_ctx"])
    grad, by_sim = torch.autograd.grad(loss, [emb, sim])
    close(grad, golden[f"{case}_grad_ctx"], grad=True)
    close(by_sim.fill_diagonal_(0), golden[f"{case}_dsim_ctx"], grad=True)


@pytest.mark.parametrize("case", ("d0", "d1", "z0"))
def test_neighbourhoods_that_cover_the_batch_and_perfect_classes(golden, close, case: str, backend: str) -> None:
    """The published code gives NaN on the first two; on the third loss and gradient are exactly 0."""
    emb, tag = rows(golden, case), "" if case == "z0" else "fixed_"
    if tag:
        assert golden[f"{case}_orig_loss_ctx"].isnan()
    loss = contextual_loss(
        cosine_similarities(emb), golden[f"{case}_labels"], k=golden[f"{case}_k"].item(),
        eps=golden[f"{case}_eps"].item(), backend=backend,
    )  # fmt: skip
    agree(loss, emb, golden, case, f"{tag}loss_ctx", close, f"{tag}grad_ctx")
    if case == "z0":
        again = contextual_loss(cosine_similarities(emb), golden["z0_labels"], backend=backend)
        assert again.item() == 0
        assert not torch.autograd.grad(again, emb)[0].any()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("convention", ("context", "contrast"))
@pytest.mark.parametrize("case", CASES)
def test_hybrid_in_both_conventions(golden, close, case: str, convention: str, backend: str, dtype) -> None:
    name = {"context": "hyb256", "contrast": "hyb224"}[convention]
    lam, gamma, target, pos, neg = golden[f"{case}_opt_{name}"].tolist()
    emb = rows(golden, case, dtype)
    loss = hybrid(
        cosine_similarities(emb), golden[f"{case}_labels"], hybrid_weights(lam, gamma, convention),
        k=golden[f"{case}_k"].item(), eps=golden[f"{case}_eps"].item(), pos_margin=pos, neg_margin=neg, reg_sim=target,
        backend=backend,
    ).loss  # fmt: skip
    agree(loss, emb, golden, case, f"loss_{name}", close)


@pytest.mark.parametrize("case", CASES)
def test_companions(golden, close, case: str) -> None:
    labels = golden[f"{case}_labels"]
    for pos, name in ((0.9, "con_90_60"), (0.75, "con_75_60")):
        emb = rows(golden, case)
        agree(
            contrastive_loss(cosine_similarities(emb), labels, pos_margin=pos), emb, golden, case, f"loss_{name}", close
        )
    for target, name in ((0.25, "reg_25"), (0.30, "reg_30")):
        emb = rows(golden, case)
        agree(similarity_regulariser(cosine_similarities(emb), target), emb, golden, case, f"loss_{name}", close)


@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("case", CASES)
def test_ablations(golden, close, case: str, number: int) -> None:
    emb, name = rows(golden, case), "ctx" if number == 0 else f"abl{number}"
    loss = contextual_loss(
        cosine_similarities(emb), golden[f"{case}_labels"], k=golden[f"{case}_k"].item(),
        eps=golden[f"{case}_eps"].item(), backend="reference", steps=similarity.ABLATED[list(ABLATIONS)[number]],
    )  # fmt: skip
    agree(loss, emb, golden, case, f"loss_{name}", close)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_average_precision_losses(golden, close, case: str, dtype) -> None:
    temperature, rho, offset, delta = golden[f"{case}_opt_supap"].tolist()
    settings = {"temperature": temperature, "rho": rho, "offset": offset, "delta": delta}
    bins, tau = golden[f"{case}_opt_softbin_nq"].item(), golden[f"{case}_opt_smoothap_tau"].item()
    for name, loss in {
        "fixed_loss_supap": SupAPLoss(**settings),
        "orig_loss_supap": SupAPLoss(**settings, compat=True),
        "fixed_loss_roadmap": RoadmapLoss(),
        "orig_loss_roadmap": RoadmapLoss(compat=True),
        "loss_smoothap": SmoothAPLoss(tau),
        "loss_softbinap": SoftBinAPLoss(bins),
    }.items():
        emb = rows(golden, case, dtype)
        if dtype == torch.float64:
            agree(loss(emb, golden[f"{case}_labels"]), emb, golden, case, name, close)
        else:
            close(loss(emb, golden[f"{case}_labels"]), golden[f"{case}_{name}"])
    for name, loss in (("smoothap", SmoothAPLoss()), ("softbin", SoftBinAPLoss())):
        close(CalibratedAPLoss(loss)(emb, golden[f"{case}_labels"]), golden[f"{case}_loss_{name}_combo"])


@pytest.mark.parametrize("case", CASES)
def test_average_precision_of_every_query(golden, close, case: str) -> None:
    sim, labels = golden[f"{case}_sim"], golden[f"{case}_labels"]
    temperature, rho, offset, delta = golden[f"{case}_opt_supap"].tolist()
    close(exact_ap(sim, labels), golden[f"{case}_ap_exact"])
    close(smooth_ap(sim, labels, temperature=golden[f"{case}_opt_smoothap_tau"].item()), golden[f"{case}_ap_smoothap"])
    close(softbin_ap(sim, labels, bins=golden[f"{case}_opt_softbin_nq"].item()), golden[f"{case}_ap_softbin"])
    found = sup_ap(sim, labels, temperature=temperature, rho=rho, offset=offset, delta=delta, compat=True)
    close(found, golden[f"{case}_ap_supap_orig"])


BASELINES = {
    "contrastive": "con_90_60",
    "ms": "ms",
    "ms+miner": "ms_miner",
    "proxy-anchor": "pa",
    "proxy-nca": "pnca_10",
    "normalized-softmax": "normsoftmax",
    "cosface": "cosface",
    "nt-xent": "ntxent",
    "fast-ap": "fastap",
}
# Stored by the library as columns.
TURNED = {"normalized-softmax", "cosface"}
# Their distance routine is exact to 1e-7 only.
ROUGH = {"proxy-nca", "fast-ap"}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("case", CASES)
def test_baselines(golden, case: str, name: str) -> None:
    proxies = golden[f"{case}_proxies"]
    module = build_loss(name, num_classes=len(proxies), embedding_dim=proxies.shape[1]).double()
    weights = list(module.parameters())
    for weight in weights:
        weight.data.copy_(proxies.T if name in TURNED else proxies)
    emb, stored = rows(golden, case), BASELINES[name]
    loss = module(emb, golden[f"{case}_labels"])["loss"]
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if name in ROUGH else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(loss, golden[f"{case}_loss_{stored}"], **tolerance)
    found = torch.autograd.grad(loss, [emb, *weights])
    torch.testing.assert_close(found[0], golden[f"{case}_grad_{stored}"], **tolerance)
    if f"{case}_gradp_{stored}" in golden:
        torch.testing.assert_close(found[1], golden[f"{case}_gradp_{stored}"], **tolerance)


def test_proxy_nca_has_the_scale_of_its_program(golden, close) -> None:
    proxies = golden["c0_proxies"]
    module = build_loss(
        "Proxy_NCA", num_classes=len(proxies), embedding_dim=8, pipeline="224", options=LossOptions(gamma=0.0)
    ).double()
    next(module.parameters()).data.copy_(proxies)
    close(module(golden["c0_emb"], golden["c0_labels"])["loss"], golden["c0_loss_pnca_9"])


@pytest.mark.parametrize("case", CASES)
def test_triplets_of_one_draw(golden, case: str) -> None:
    loss = build_loss("triplet", num_classes=2, embedding_dim=8).loss
    assert isinstance(loss, pml.TripletMarginLoss)
    emb = rows(golden, case)
    value = loss(emb, golden[f"{case}_labels"], tuple(golden[f"{case}_triplet_idx"]))
    torch.testing.assert_close(value, golden[f"{case}_loss_triplet"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(value, emb)[0], golden[f"{case}_grad_triplet"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_miner_keeps_the_stored_pairs(golden, case: str) -> None:
    miner = build_loss("ms+miner", num_classes=2, embedding_dim=8).miner
    anchors, positives, others, negatives = miner(golden[f"{case}_emb"], golden[f"{case}_labels"])
    for name, (left, right) in {"pos": (anchors, positives), "neg": (others, negatives)}.items():
        mask = torch.zeros_like(golden[f"{case}_ms_miner_{name}"])
        mask[left, right] = 1
        assert torch.equal(mask, golden[f"{case}_ms_miner_{name}"])


# Six unit vectors in the plane, worked out by hand and in exact arithmetic.
ANGLES = (0, 10, 25, 60, 75, 100)
LABELS = torch.tensor([0, 0, 1, 1, 0, 1])
BY_HAND = {
    (2, 0.05): (0.3646375868, (-0.865762, -0.735895, -2.382818, 0.955030, 1.203742, 1.825704)),
    (4, 0.05): (0.4097222222, (-2.132515, -3.581713, -3.757772, 2.268003, 5.077504, 2.126493)),
    (4, 0.20): (0.4097222222, (-2.675700, -3.420214, -3.374257, 2.177042, 5.094735, 2.198395)),
}


@pytest.mark.parametrize(("k", "eps"), BY_HAND)
def test_six_points_in_the_plane(k: int, eps: float, backend: str) -> None:
    angle = torch.tensor([math.radians(a) for a in ANGLES], dtype=torch.float64, requires_grad=True)
    sim = cosine_similarities(torch.stack([angle.cos(), angle.sin()], 1))
    loss = contextual_loss(sim, LABELS, k=k, eps=eps, backend=backend)
    value, slope = BY_HAND[k, eps]
    assert loss.item() == pytest.approx(value, abs=1e-10)
    grad = torch.autograd.grad(loss, angle)[0]
    assert grad.tolist() == pytest.approx(slope, abs=1e-6)
    assert grad.sum().item() == pytest.approx(0, abs=1e-12)  # turning all points at once changes nothing


def test_companions_and_hybrids_of_the_six_points(backend: str) -> None:
    angle = torch.tensor([math.radians(a) for a in ANGLES], dtype=torch.float64)
    sim = cosine_similarities(torch.stack([angle.cos(), angle.sin()], 1))
    assert contrastive_loss(sim, LABELS, pos_margin=0.75).item() == pytest.approx(0.6749216237, abs=1e-9)
    assert contrastive_loss(sim, LABELS).item() == pytest.approx(0.6332498398, abs=1e-9)
    assert similarity_regulariser(sim, 0.25).item() == pytest.approx(0.1674926044, abs=1e-9)
    for k, first, second in ((2, 0.5000651070, 0.4396010686), (4, 0.5180989612, 0.4756687769)):
        assert hybrid(
            sim, LABELS, hybrid_weights(0.4, 0.1, "context"), k=k, backend=backend
        ).loss.item() == pytest.approx(first, abs=1e-9)
        other = hybrid(sim, LABELS, hybrid_weights(0.2, 0.1, "contrast"), k=k, reg_sim=0.3, backend=backend).loss
        assert other.item() == pytest.approx(second, abs=1e-9)
    assert 1 - exact_ap(sim, LABELS).mean().item() == pytest.approx(0.2259259259, abs=1e-9)
    assert 1 - smooth_ap(sim, LABELS).mean().item() == pytest.approx(0.2363308416, abs=1e-9)
    assert 1 - sup_ap(sim, LABELS).mean().item() == pytest.approx(0.5240382418, abs=1e-9)
    assert 1 - sup_ap(sim, LABELS, compat=True).mean().item() == pytest.approx(0.5337854665, abs=1e-9)
    assert 1 - sup_ap(sim, LABELS, offset=None).mean().item() == pytest.approx(0.5241804942, abs=1e-9)
    assert 1 - softbin_ap(sim, LABELS).mean().item() == pytest.approx(0.3487839, abs=1e-7)
