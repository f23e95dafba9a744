"""What relations must do: reduce to known methods, ignore padding and order, have the gradients they claim."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.ranking.encoders import Tables
from gfml.ranking.lists import best_items
from gfml.ranking.topk import topk_items
from hlrm.data import History, PairBatch
from hlrm.model import HingeOptions, RelationModel, TranslatedModel
from hlrm.relations import DiagonalRelation, HistoryAttention, MemoryRelation, lram, slot_weights
from hlrm.scoring import BlockScorer, MemoryScorer, neighbour_means

FORMS = {
    "memory-base": lambda: MemoryRelation(5, 4),
    "memory-base-no-user": lambda: MemoryRelation(5, 4, user_slot=False),
    "memory-base-beta": lambda: MemoryRelation(5, 4, beta=0.6),
    "memory-base-second": lambda: MemoryRelation(5, 4, diff_memory=True),
    "memory-plus": lambda: MemoryRelation(5, 4, "plus"),
    "memory-plus-user": lambda: MemoryRelation(5, 4, "plus", user_slot=True),
    "diagonal-base": lambda: DiagonalRelation(5, 4),
    "diagonal-base-user": lambda: DiagonalRelation(5, 4, user_slot=True),
    "diagonal-plus": lambda: DiagonalRelation(5, 4, "plus"),
    "attention": HistoryAttention,
}


def case(seed=0, batch=6, items=3, width=4, dim=5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    counts = torch.randint(0, width + 1, (batch,), generator=generator)
    counts[0], counts[1] = 0, width
    mask = torch.arange(width) < counts[:, None]
    return draw(batch, dim), draw(batch, items, dim), draw(batch, width, dim), mask


@pytest.fixture(params=FORMS)
def relation(request):
    torch.manual_seed(3)
    return FORMS[request.param]().double()


def test_padding_has_no_weight_no_gradient_and_no_effect(relation):
    user, items, history, mask = case()
    history.requires_grad_()
    found = relation(user, items, history, mask)
    found.vector.square().sum().backward()
    assert torch.isfinite(history.grad).all()
    assert not history.grad[~mask].any() and history.grad[mask].any()
    wide = torch.cat([history.detach(), torch.full((6, 7, 5), 1e6, dtype=torch.float64)], 1)
    wider = relation(user, items, wide, torch.cat([mask, torch.zeros(6, 7, dtype=torch.bool)], 1))
    torch.testing.assert_close(wider.vector, found.vector)
    own = found.user_weights.shape[1] - history.shape[1]
    assert not found.user_weights[:, own:][~mask].any()


def test_the_order_of_the_history_does_not_matter(relation):
    user, items, history, mask = case()
    order = torch.randperm(history.shape[1])
    found = relation(user, items, history[:, order], mask[:, order]).vector
    torch.testing.assert_close(found, relation(user, items, history, mask).vector, rtol=0, atol=1e-12)


def test_weights_are_positive_and_sum_to_one(relation):
    user, items, history, mask = case()
    found = relation(user, items, history, mask)
    filled = found.user_weights.sum(1)
    some = mask.any(1) | bool(getattr(relation, "user_slot", False))
    if getattr(relation, "beta", 1.0) == 1:
        torch.testing.assert_close(filled[some], torch.ones_like(filled[some]))
    assert (found.user_weights >= 0).all()
    if found.item_weights is not None:
        torch.testing.assert_close(found.item_weights[1].sum(0), torch.ones(3, dtype=torch.float64))


def test_gradients(relation):
    user, items, history, mask = case(batch=2, items=2, width=3)
    for tensor in (user, items, history):
        tensor.requires_grad_()
    parameters = list(relation.parameters())
    assert torch.autograd.gradcheck(lambda *args: relation(*args[:3], mask).vector, (user, items, history, *parameters))


def test_an_empty_history_of_no_places_works(relation):
    user, items, *_ = case()
    found = relation(user, items, user.new_zeros(6, 0, 5), torch.zeros(6, 0, dtype=torch.bool))
    full = relation(user, items, *case()[2:])
    torch.testing.assert_close(found.vector[0], full.vector[0])
    assert torch.isfinite(found.vector).all()


def test_an_empty_history_leaves_the_user_slot_or_nothing():
    user, items, history, _ = case()
    nothing = torch.zeros(6, 4, dtype=torch.bool)
    base = MemoryRelation(5, 4).double()
    wanted = lram(items, user[:, None], base.key, base.memory)
    torch.testing.assert_close(base(user, items, history, nothing).vector, wanted)
    torch.testing.assert_close(MemoryRelation(5, 4, "plus").double()(user, items, history, nothing).user_weights.sum(),
                               torch.zeros((), dtype=torch.float64))  # fmt: skip
    for kind in ("base", "plus"):
        assert not DiagonalRelation(5, 4, kind).double()(user, items, history, nothing).vector.any()


def test_equal_memory_rows_give_that_row_and_one_slot_gives_its_row():
    user, items, history, mask = case()
    for slots in (1, 4):
        relation = MemoryRelation(5, slots).double()
        with torch.no_grad():
            relation.memory.copy_(relation.memory[:1].expand(slots, -1).clone())
        found = relation(user, items, history, mask).vector
        torch.testing.assert_close(found, relation.memory[0].expand_as(found))


def test_relations_lie_in_the_hull_of_the_memory():
    user, items, history, mask = case()
    relation = MemoryRelation(5, 2).double()
    found = relation(user, items, history, mask).vector
    first, second = relation.memory
    share = ((found - second) @ (first - second)) / (first - second).square().sum()
    assert (share >= 0).all() and (share <= 1).all()
    torch.testing.assert_close(second + share.unsqueeze(-1) * (first - second), found)


def test_diagonal_memory_rows_merge_into_one():
    user, items, history, mask = case()
    many = DiagonalRelation(5, 20).double()
    one = DiagonalRelation(5, 1).double()
    with torch.no_grad():
        one.key.fill_(1.0)
        one.value.copy_(many.diagonals()[0][None])
    torch.testing.assert_close(one(user, items, history, mask).vector, many(user, items, history, mask).vector)


def test_printed_vector_of_the_diagonal_form():
    relation = DiagonalRelation(3, 2, "plus").double()
    key, value = torch.tensor([[1.7, -0.5, 0.3], [0, 0.4, -0.8]]), torch.tensor([[0.2, -1.8, 1], [0.6, -0.6, -0.2]])
    with torch.no_grad():
        for table in (relation.key, relation.item_key):
            table.copy_(key)
        for table in (relation.value, relation.item_value):
            table.copy_(value)
    user = torch.tensor([[0.3, -0.1, -0.1]], dtype=torch.float64)
    items = torch.tensor([[[-0.7, 0.3, 0.1], [0.2, 0.5, -0.4]]], dtype=torch.float64)
    history = torch.tensor([[[0.1, -0.8, 0.8], [0.1, -0.2, 1]]], dtype=torch.float64)
    plus = relation(user, items, history, torch.ones(1, 2, dtype=torch.bool))
    relation.kind, second = "base", (relation.item_key, relation.item_value)
    relation.item_key = relation.item_value = None
    base = relation(user, items, history, torch.ones(1, 2, dtype=torch.bool))
    assert second[0] is not None
    distance = lambda found: (user[:, None] + found.vector - items + 1e-6).norm(dim=-1)[0].tolist()  # noqa: E731
    assert distance(base) == pytest.approx([1.107931, 0.784828], abs=1e-6)
    assert distance(plus) == pytest.approx([1.109224, 0.747750], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 2.0), st.floats(0.1, 80.0))
def test_slot_weights_against_the_plain_formula(seed, beta, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator) < 0.6
    found = slot_weights(logits, mask, beta)
    for row in range(3):
        for column in range(2):
            exps = [float(logits[row, k, column].exp()) if mask[row, k] else 0.0 for k in range(4)]
            total = sum(exps)
            wanted = [value / total**beta if total else 0.0 for value in exps]
            assert found[row, :, column].tolist() == pytest.approx(wanted, rel=1e-9)


# -- models


def model_of(relation, num_users=7, num_items=12, dim=5, **options):
    torch.manual_seed(5)
    return RelationModel(Tables(num_users, num_items, dim, init="ball"), relation, HingeOptions(**options)).double()


def batch_of(num_users=7, num_items=12, width=4, size=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    history = History(draw(num_items, size, width), draw(width + 1, size))
    return PairBatch(draw(num_users, size), draw(num_items, size), draw(num_items, size), history)


def test_zero_memory_is_cml():
    batch, relation = batch_of(), MemoryRelation(5, 4)
    torch.nn.init.zeros_(relation.memory)
    with_relation, without = model_of(relation), model_of(None)
    without.encoder.load_state_dict(with_relation.encoder.state_dict())
    assert torch.equal(with_relation.loss(batch)["loss"], without.loss(batch)["loss"])
    history = History(torch.zeros(7, 4, dtype=torch.int64), torch.full((7,), 4))
    users = torch.arange(7)
    found = [model.scorer(history, train=None).score(users) for model in (with_relation, without)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("squared", [True, False])
def test_scores_of_all_items_equal_training_distances(relation, squared):
    """Block by block, user by user and in another order: the same scores, and those of the training step."""
    model = model_of(relation, squared=squared)
    generator = torch.Generator().manual_seed(2)
    history = History(torch.randint(12, (7, 4), generator=generator), torch.randint(5, (7,), generator=generator))
    wanted = -model.distances(torch.arange(7), torch.arange(12).expand(7, -1), history).detach()
    for block in (0, 1, 5):
        scorer = model.scorer(history, train=None, block=block)
        assert isinstance(scorer, (MemoryScorer, BlockScorer)) and scorer.factors() is None
        torch.testing.assert_close(scorer.score(torch.arange(7)), wanted, rtol=1e-9, atol=1e-10)
        users = torch.tensor([6, 2, 2])
        torch.testing.assert_close(scorer.score(users), wanted[users], rtol=1e-9, atol=1e-10)


def test_scores_in_single_precision(relation):
    model = model_of(relation)
    history = History(torch.randint(12, (7, 4)), torch.full((7,), 4))
    wanted = model.scorer(history, train=None).score(torch.arange(7))
    found = model.float().scorer(history, train=None).score(torch.arange(7))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_copied_relation_leaves_the_negative_its_own_vector_alone():
    model = model_of(MemoryRelation(5, 4), margin=10.0, copy_relations=True, reduction="sum")
    history = History(torch.tensor([[1]]), torch.tensor([1]))
    batch = PairBatch(torch.tensor([0]), torch.tensor([2]), torch.tensor([3]), history)
    model.loss(batch)["loss"].backward()
    user, item = model.encoder.vectors()
    relation = model.attend(batch.users, batch.pos[:, None], history).vector[0, 0]
    wanted = 2 * (user[0] + relation - item[3])  # d of -|q - n|^2 by n, the relation held fixed
    torch.testing.assert_close(model.encoder.nodes.grad[7 + 3], wanted.detach())


@pytest.mark.parametrize("compat", [False, True])
def test_every_row_is_in_the_ball_after_a_step(compat):
    model = model_of(MemoryRelation(5, 4), clip_memory=True, compat=compat)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(50)
    model.project()
    for table in (model.encoder.nodes, model.relation.key, model.relation.memory):
        assert (table.norm(dim=1) <= 1 + 1e-12).all()
    loose = model_of(MemoryRelation(5, 4))
    with torch.no_grad():
        loose.relation.memory.mul_(50)
    before = loose.relation.memory.clone()
    loose.project()
    assert torch.equal(loose.relation.memory, before)


def test_translated_scores_against_loops():
    import numpy as np
    import scipy.sparse as sp

    train = sp.csr_array((np.random.default_rng(0).random((7, 12)) < 0.3).astype(np.float32))
    model = TranslatedModel(Tables(7, 12, 5, init="ball"), neighbour_weight=0.1, distance_weight=0.1)
    scorer = model.scorer(None, train=train)
    user, item = (part.detach() for part in model.encoder.vectors())
    dense = torch.from_numpy(train.toarray())
    found = scorer.score(torch.arange(7))
    left, right = scorer.factors()
    for u in range(7):
        for i in range(12):
            taste = item[dense[u] > 0].mean(0) if dense[u].any() else torch.zeros(5)
            crowd = user[dense[:, i] > 0].mean(0) if dense[:, i].any() else torch.zeros(5)
            wanted = -float((user[u] + taste * crowd - item[i]).square().sum())
            assert float(found[u, i]) == pytest.approx(wanted, abs=1e-5)
            assert float(left[u] @ right[i] - user[u].square().sum()) == pytest.approx(wanted, abs=1e-5)
    assert torch.equal(neighbour_means(sp.csr_array((7, 12), dtype=np.float32), item), torch.zeros(7, 5))


def test_wrong_names_are_refused():
    for build in (
        lambda: MemoryRelation(5, 4, "extended"),
        lambda: DiagonalRelation(5, 4, "hlr"),
        lambda: MemoryRelation(5, 4, "plus", diff_memory=True),
        lambda: model_of(None, reduction="max"),
    ):
        with pytest.raises(ValueError):
            build()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_loss_and_scores(relation):
    model, batch = model_of(relation).float(), batch_of()
    move = lambda x: History(*(part.cuda() for part in x)) if isinstance(x, History) else x.cuda()  # noqa: E731
    wanted = model.loss(batch)["loss"].detach()
    history = History(torch.randint(12, (7, 4)), torch.full((7,), 4))
    scores = model.scorer(history, train=None).score(torch.arange(7))
    model = model.cuda()
    found = (
        model.loss(PairBatch(*(move(getattr(batch, name)) for name in ("users", "pos", "neg", "history"))))["loss"]
        .detach()
        .cpu()
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found = model.scorer(move(history), train=None).score(torch.arange(7).cuda()).cpu()
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_near_ties_are_listed_alike_alone_and_among_others(kind):
    torch.manual_seed(0)
    user, item = torch.randn(60, 8) * 0.3, torch.randn(300, 8) * 0.3
    item[150:] = item[:150] * (1 + 1e-7 * torch.randn(150, 1))  # twins that rounding alone tells apart
    counts = torch.randint(1, 13, (60,))
    history = History(torch.randint(300, (60, 12)) * (torch.arange(12) < counts[:, None]), counts)
    scorer, users = MemoryScorer(user, item, MemoryRelation(8, 6, kind), history), torch.arange(60)
    items, scores = best_items(scorer, users, 15, seen=None)
    some = users[::6]
    rows = torch.cat([topk_items(scorer, user[None], 15, seen=None) for user in some])
    assert not torch.equal(rows, topk_items(scorer, users, 15, seen=None)[some])
    for row in some.tolist():
        alone = best_items(scorer, users[[row]], 15, seen=None)
        assert torch.equal(alone[0][0], items[row]) and alone[1][0].tolist() == scores[row].tolist()
