"""Loss terms, projected features, attention and Gaussians against loops, closed forms and limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gfml import losses as core
from mirror_grad.parts import features as features_module
from mirror_grad.parts import gaussian, losses
from mirror_grad.parts.features import ProjectedFeatures, distinct, halve_fixed, project_rows, projected
from mirror_grad.parts.fusion import AttentionFusion


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_guarded_bpr_is_bpr_for_moderate_scores_and_fades_for_hopeless_ones():
    pos, neg = rows(30), rows(30, seed=1)
    torch.testing.assert_close(losses.guarded_bpr(pos, neg), core.bpr(pos, neg), rtol=1e-8, atol=0)
    hopeless = torch.tensor([-60.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(losses.guarded_bpr(hopeless, torch.zeros(1)), hopeless)[0].abs() < 1e-10
    assert torch.autograd.grad(core.bpr(hopeless, torch.zeros(1, dtype=torch.float64)), hopeless)[0] == pytest.approx(
        -1
    )


def test_dot_bpr_by_loop():
    user, pos, neg = rows(6, 4), rows(6, 4, seed=1), rows(6, 4, seed=2)
    wanted = sum(math.log1p(math.exp(float(u @ n - u @ p))) for u, p, n in zip(user, pos, neg)) / 6
    assert losses.dot_bpr(user, pos, neg).item() == pytest.approx(wanted, rel=1e-12)


def test_regularisers_by_loop():
    blocks = rows(5, 3), rows(5, 2, seed=1)
    squares = [sum(float(x) ** 2 for x in block.flatten()) for block in blocks]
    assert losses.half_square_sum(*blocks).item() == pytest.approx(sum(squares) / 2, rel=1e-12)
    assert losses.unsquared_norms(*blocks).item() == pytest.approx(sum(map(math.sqrt, squares)) / 5, rel=1e-12)
    zero = torch.zeros(5, 3, requires_grad=True)
    assert not torch.autograd.grad(losses.unsquared_norms(zero), zero)[0].any()


@pytest.mark.parametrize("published", [True, False])
def test_ranking_terms_add_up(published):
    user, pos, neg = rows(6, 4), rows(6, 4, seed=1), rows(6, 4, seed=2)
    terms = losses.ranking_terms(user, pos, neg, (user, pos), 0.3, published=published)
    reg = losses.unsquared_norms(user, pos) if published else core.half_mean_square(user, pos)
    torch.testing.assert_close(terms["loss"], terms["bpr"] + 0.3 * reg)
    torch.testing.assert_close(terms["bpr"], losses.dot_bpr(user, pos, neg), rtol=1e-8, atol=0)


def test_cosine_gap():
    online, target = rows(7, 4).requires_grad_(), rows(7, 4, seed=1).requires_grad_()
    wanted = 1 - sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(online.detach(), target.detach())) / 7
    gap = losses.cosine_gap(online, target)
    assert gap.item() == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(gap, losses.cosine_gap(online, 7 * target))
    assert torch.autograd.grad(gap, target, allow_unused=True)[0] is None
    assert losses.cosine_gap(online, online).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_info_nce_by_loop(temperature):
    first, second = rows(6, 4), rows(6, 4, seed=1)
    total = 0.0
    for i in range(6):
        cosines = [float(F.cosine_similarity(first[i], second[j], dim=0)) for j in range(6)]
        exps = [math.exp(c / temperature) for c in cosines]
        total -= math.log(exps[i] / sum(exps))
    assert losses.info_nce(first, second, temperature).item() == pytest.approx(total / 6, rel=1e-12)


def test_info_nce_of_repeated_rows():
    first, second, ids = rows(5, 4), rows(5, 4, seed=1), torch.tensor([3, 0, 3, 3, 1])
    wanted = losses.info_nce(first[ids], second[ids], 0.3)
    torch.testing.assert_close(losses.info_nce(first, second, 0.3, ids), wanted)


def test_info_nce_limits():
    same = rows(1, 4).expand(9, 4)
    assert losses.info_nce(same, same, 0.2).item() == pytest.approx(math.log(9))
    assert losses.info_nce(rows(9, 4), rows(9, 4), 0.2) < losses.info_nce(rows(9, 4), rows(9, 4, seed=1), 0.2)
    assert losses.info_nce(rows(9, 4), rows(9, 4), 1e-4).isfinite()


def test_gradients_of_the_terms():
    x, y = rows(4, 3).requires_grad_(), rows(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: losses.info_nce(a, b, 0.5), (x, y))
    assert torch.autograd.gradcheck(lambda a: losses.cosine_gap(a, y), (x,))
    assert torch.autograd.gradcheck(losses.unsquared_norms, (x, y))
    assert torch.autograd.gradcheck(lambda a, b: losses.guarded_bpr((a * b).sum(1), b.sum(1)), (x, y))


@pytest.mark.parametrize("block", [1, 3, 128])
def test_projected_rows_equal_gather_and_multiply_with_gradients_of_first_and_second_order(monkeypatch, block):
    monkeypatch.setattr(features_module, "ROWS_PER_BLOCK", block)
    table, weight = rows(6, 5).requires_grad_(), rows(2, 5, seed=1).requires_grad_()
    ids = torch.tensor([4, 0, 4, 5])
    torch.testing.assert_close(project_rows(table, weight, ids), table[ids] @ weight.T)
    assert torch.autograd.gradcheck(lambda t, w: project_rows(t, w, ids), (table, weight))
    assert torch.autograd.gradgradcheck(lambda t, w: project_rows(t, w, ids).square(), (table, weight))
    assert torch.autograd.gradcheck(lambda w: project_rows(table.detach(), w, ids), (weight,))


def test_projected_rows_in_single_precision_equal_those_in_double(monkeypatch):
    table, weight, ids = rows(300, 40).float(), rows(8, 40, seed=1).float(), torch.arange(290)
    wanted = table[ids].double() @ weight.T.double()
    torch.testing.assert_close(project_rows(table, weight, ids).double(), wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(project_rows(table, weight, ids).double(), wanted, rtol=1e-5, atol=1e-5)


def test_features_in_bfloat16_are_multiplied_as_rounded_and_keep_gradients_in_the_weights_type():
    part = projected({"text": rows(300, 40).float()}, 8, trained=False)["text"]
    exact, weight, ids = part.table.double(), part.linear.weight, torch.arange(290)
    halve_fixed(part)
    assert part.table.dtype == torch.bfloat16
    up = rows(290, 8, seed=2).float()
    (part(ids) * up).sum().backward()
    assert part(ids).dtype == part().dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(part(ids), part()[ids])
    wanted = exact[ids] @ weight.detach().double().T + part.linear.bias.detach().double()
    assert (part(ids) - wanted).norm() / wanted.norm() < 2**-7
    gradient = up.double().T @ exact[ids]
    assert 0 < (weight.grad - gradient).norm() / gradient.norm() < 2**-7


def test_features_that_are_trained_keep_their_type():
    part = projected({"text": rows(6, 5).float()}, 3, trained=True)
    halve_fixed(part)
    assert part["text"].table.dtype == torch.float32


@pytest.mark.parametrize("trained", [True, False])
def test_projected_features(trained):
    part = projected({"text": rows(6, 5).float()}, 3, trained=trained)["text"]
    assert isinstance(part, ProjectedFeatures) and ("table" in part.state_dict()) == trained
    torch.testing.assert_close(part(torch.tensor([2, 2, 0])), part()[[2, 2, 0]])
    part(torch.tensor([1, 3])).sum().backward()
    if trained:
        assert part.table.grad.any(1).tolist() == [False, True, False, True, False, False]


def test_distinct_rows():
    ids = torch.tensor([5, 2, 5, 9, 2])
    found, place = distinct(ids)
    assert found.tolist() == [2, 5, 9] and torch.equal(found[place], ids)


def test_attention_weights_sum_to_one_and_equal_views_are_their_own_mean():
    fusion = AttentionFusion(4).double()
    views = rows(6, 4), rows(6, 4, seed=1), rows(6, 4, seed=2)
    common, weights = fusion(*views)
    assert weights.shape == (6, 3) and torch.allclose(weights.sum(1), torch.ones(6, dtype=torch.float64))
    wanted = sum(weights[:, m, None] * view for m, view in enumerate(views))
    torch.testing.assert_close(common, wanted)
    torch.testing.assert_close(fusion(views[0], views[0])[0], views[0])


def test_product_of_experts():
    mean, log_variance = rows(5, 3), rows(5, 3, seed=1)
    twice = gaussian.product_of_experts((mean, log_variance), (mean, log_variance))
    torch.testing.assert_close(twice[0], mean)
    torch.testing.assert_close(twice[1].exp(), log_variance.exp() / 2, rtol=1e-6, atol=1e-8)
    other = rows(5, 3, seed=2), rows(5, 3, seed=3)
    found = gaussian.product_of_experts((mean, log_variance), other)
    v1, v2 = log_variance.exp(), other[1].exp()
    torch.testing.assert_close(found[0], (mean * v2 + other[0] * v1) / (v1 + v2), rtol=1e-6, atol=1e-6)


def test_kl_to_the_standard_normal():
    assert gaussian.kl_to_standard(torch.zeros(4, 3), torch.zeros(4, 3)) == 0
    mean, log_variance = rows(4, 3), rows(4, 3, seed=1)
    own = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(gaussian.kl_to_standard(mean, log_variance), wanted)
    assert wanted > 0


def test_samples_have_the_moments():
    torch.manual_seed(0)
    mean, log_variance = torch.full((20000, 1), 2.0), torch.full((20000, 1), math.log(9.0))
    drawn = gaussian.sample(mean, log_variance, 0.1)
    assert drawn.mean().item() == pytest.approx(2.0, abs=0.02) and drawn.std().item() == pytest.approx(0.3, rel=0.03)
    assert torch.equal(gaussian.sample(mean, log_variance, 0.0), mean)
