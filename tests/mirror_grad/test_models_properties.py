"""What every model must do, whatever it is; and what each does in the limits of its settings."""

from __future__ import annotations

import copy
import dataclasses
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.engine.distributed import World
from gfml.engine.train import plain_step
from gfml.mirror import MirrorGradient
from gfml.program.steps import shared_loss
from gfml.ranking.baselines import popularity
from gfml.ranking.evaluation import evaluate
from gfml.ranking.foldin import fold_in
from gfml.ranking.sampling import Triples, TripleSampler
from mirror_grad.data import MultimodalData
from mirror_grad.models import MODELS, load_model
from mirror_grad.parts.features import ProjectedFeatures, halve_fixed

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toy.py"))))
TRAINED = [name for name, entry in MODELS.items() if entry.trains]
BEHAVIOURS = [
    (name, b) for name in TRAINED for b in (("fixed", "published") if MODELS[name].has_published else ("fixed",))
]
# Parameters that the loss does not reach.
UNREACHED: dict[tuple[str, str], set[str]] = {}
# Their targets or weights are constants to the gradient but not to the loss; see the stored gradients of the first two.
STOPPED = {"BM3", "SELFCFED_LGN", "DAMRS"}


@pytest.fixture
def toy(stored):
    return stored("mm_toy")


@pytest.fixture
def data(toy):
    return kit.toy_data(toy)


def batch_for(name, toy):
    batch = kit.toy_batch(toy)
    return batch if MODELS[name].needs_negatives else Triples(batch.users, batch.pos, batch.neg[:, None][:, :0])


@pytest.mark.parametrize("name", MODELS)
def test_models_that_map_features_train_on_them_in_bfloat16(name, data, toy):
    entry = MODELS[name]
    own = (
        {"train_features": False}
        if "train_features" in {one.name for one in dataclasses.fields(entry.settings)}
        else {}
    )
    losses = []
    for halve in (False, True):
        torch.manual_seed(0)
        model = kit.build(name, data, **own).train()
        parts = [part for part in model.modules() if isinstance(part, ProjectedFeatures)]
        # What the registry says of a model is what it is made of.
        assert entry.maps_features == bool(parts)
        if not parts:
            return
        if halve:
            halve_fixed(model)
        assert all(part.table.dtype == (torch.bfloat16 if halve else torch.float32) for part in parts)
        torch.manual_seed(0)
        loss = model.loss(batch_for(name, toy))["loss"]
        loss.backward()
        losses.append(loss.item())
        assert all(one.isfinite().all() and one.dtype == torch.float32 for one in model.eval().outputs())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_settings_are_plain_and_explained(name):
    settings = MODELS[name].settings
    assert settings.__doc__ and load_model(name).__doc__
    for option in dataclasses.fields(settings):
        assert isinstance(option.default, int | float | bool | str) and len(option.metadata["setting"].help) > 9
        assert type(option.default).__name__ == option.type
        for value in (*option.metadata["setting"].grid, *option.metadata["setting"].choices):
            assert type(value) is type(option.default), option.name


def test_an_unknown_model_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'FREEDOM'"):
        load_model("FREEDON")


@pytest.mark.parametrize("name, behaviour", BEHAVIOURS)
def test_loss_is_a_finite_scalar_that_reaches_every_parameter_and_leaves_the_batch(name, behaviour, data, toy):
    torch.manual_seed(0)
    model, batch = kit.build(name, data, behaviour=behaviour).train(), batch_for(name, toy)
    before = copy.deepcopy(batch)
    model.new_epoch(1) if hasattr(model, "new_epoch") else None
    terms = model.loss(batch)
    assert all(value.shape == () and value.isfinite() for value in terms.values())
    assert all(torch.equal(getattr(before, key), getattr(batch, key)) for key in ("users", "pos", "neg"))
    terms["loss"].backward()
    missing = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert missing == UNREACHED.get((name, behaviour), set())


@pytest.mark.parametrize("name, behaviour", [pair for pair in BEHAVIOURS if pair[0] not in STOPPED])
def test_gradient_is_the_slope_of_the_loss(name, behaviour, data, toy):
    """Central differences along a random direction in float64, with equal random draws."""
    torch.manual_seed(1)
    model, batch = kit.build(name, data, behaviour=behaviour).double().train(), batch_for(name, toy)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def value(step):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
        if hasattr(model, "new_epoch"):
            model.new_epoch(1)
        torch.manual_seed(3)
        return model.loss(batch)["loss"]

    found = value(0.0)
    slope = sum(
        (g * d).sum()
        for g, d in zip(torch.autograd.grad(found, parameters, allow_unused=True), direction)
        if g is not None
    )
    step = 1e-6
    upper, lower = value(step).item(), value(-2 * step).item()
    assert slope.item() == pytest.approx((upper - lower) / (2 * step), rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_deterministic_and_survive_a_checkpoint(name, data, toy):
    torch.manual_seed(0)
    model = kit.build(name, data)
    if MODELS[name].trains:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        model.new_epoch(1) if hasattr(model, "new_epoch") else None
        model.train().loss(batch_for(name, toy))["loss"].backward()
        optimizer.step()
    first = kit.scores(model)
    assert first.shape == (30, 24) and first.isfinite().all() and not first.requires_grad
    assert torch.equal(kit.scores(model), first)
    scorer = model.train().scorer()
    assert torch.equal(scorer.score(torch.arange(30)), first) and model.training
    torch.manual_seed(7)
    other = kit.build(name, data)
    other.load_state_dict(model.state_dict())
    assert torch.equal(kit.scores(other), first)


@pytest.mark.parametrize("name", TRAINED)
def test_epochs_repeat_from_seed_and_number(name, data, toy):
    torch.manual_seed(0)
    model = kit.build(name, data, seed=4)
    twin = kit.build(name, data, seed=4)
    twin.load_state_dict(model.state_dict())
    losses = []
    for one, epochs in ((model, (1, 2, 3)), (twin, (3,))):
        for epoch in epochs:
            one.new_epoch(epoch) if hasattr(one, "new_epoch") else None
        torch.manual_seed(5)
        losses.append(one.train().loss(batch_for(name, toy))["loss"])
    assert torch.equal(*losses)


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.needs_features])
def test_one_modality_alone(name, modality, data, toy):
    alone = MultimodalData(data.interactions, {modality: data.features[modality]})
    model = kit.build(name, alone)
    if MODELS[name].trains:
        assert model.train().loss(batch_for(name, toy))["loss"].isfinite()
    assert kit.scores(model).isfinite().all()


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.needs_features])
def test_items_without_features_do_not_break_anything(name, data, toy):
    features = {key: table.clone() for key, table in data.features.items()}
    features["image"][[3, 8]] = 0.0
    features["text"][[3]] = 0.0
    model = kit.build(name, MultimodalData(data.interactions, features))
    if MODELS[name].trains:
        model.train().loss(batch_for(name, toy))["loss"].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert kit.scores(model).isfinite().all()


# U users, I items, D = 64, V = 16 and T = 12 feature columns: trainable numbers of the published constructors.
COUNTS = {
    "BPR": lambda u, i, v, t: 64 * (u + i),
    "LightGCN": lambda u, i, v, t: 64 * (u + i),
    "LayerGCN": lambda u, i, v, t: 64 * (u + i),
    "VBPR": lambda u, i, v, t: 128 * u + 64 * i + 64 * (v + t) + 64,
    "SELFCFED_LGN": lambda u, i, v, t: 64 * (u + i) + 4160,
    "BM3": lambda u, i, v, t: 64 * (u + i) + (v + t) * i + 64 * (v + t) + 128 + 4160,
    "FREEDOM": lambda u, i, v, t: 64 * (u + i) + (v + t) * i + 64 * (v + t) + 128,
    "LATTICE": lambda u, i, v, t: 64 * (u + i) + (v + t) * i + 64 * (v + t) + 128 + 2,
    "MGCN": lambda u, i, v, t: 64 * (u + i) + (v + t) * i + 64 * (v + t) + 128 + 20864,
    "ItemKNNCBF": lambda u, i, v, t: 0,
    "DualGNN": lambda u, i, v, t: 130 * u + 256 * (v + t) + 512 + 2 * 16448,
    "DRAGON": lambda u, i, v, t: 130 * u + 256 * (v + t) + 512 + 2 * 16448,
    # Without the published head for audio, 4,160 numbers that nothing reads.
    "SLMRec": lambda u, i, v, t: 64 * (u + i) + 64 * (v + t) + 128 + 2 * (192 * 64 + 64) + 4 * 4160,
    "GRCN": lambda u, i, v, t: 66 * (u + i) + 128 * u + 64 * (v + t) + 128,
    "MMGCN": lambda u, i, v, t: mmgcn_network(v, t) + 64 * (u + i) + u * (256 + t),
    # Without the published second layer and first shortcut, 20,736 numbers an expert that nothing reads.
    "MVGAE": lambda u, i, v, t: 128 * (v + t + 64 + 3) + 3 * 37376 + 3 * 128 * u + 64 * i,
    "SMORE": lambda u, i, v, t: 64 * (u + i) + (v + t) * i + 64 * (v + t) + 128 + 41670,
    "MMGCF": lambda u, i, v, t: 64 * (u + i) + 64 * (v + t) + 128,
    "PGL": lambda u, i, v, t: 128 * u + (v + t) * i + 64 * (v + t) + 128,
    "LGMRec": lambda u, i, v, t: 64 * (u + i) + 68 * (v + t),
    # Without the published projections, which no loss reaches.
    "DAMRS": lambda u, i, v, t: 64 * (u + i),
}


def mmgcn_network(image, text):
    """Weights of the published MMGCN, whose tables are no parameters."""

    def branch(w):
        return w * w + 64 * w + 64 + 64 * (w + 64) + 64 + 2 * (4096 + 4160 + 64 * 128 + 64)

    return 256 * image + 256 + branch(256) + branch(text)


def test_published_numbers_of_parameters(data):
    """The formulas above give the published counts on baby: 19,445 users, 7,050 items, features of 4,096 and 384."""
    wide = (19445, 7050, 4096, 384)
    published = {
        "VBPR": 3.23, "LightGCN": 1.70, "SELFCFED_LGN": 1.70, "BM3": 33.6, "FREEDOM": 33.6, "LATTICE": 33.6, "MGCN": 33.6,
        "GRCN": 4.52, "SLMRec": 2.03,
    }  # fmt: skip
    for name, millions in published.items():
        count = COUNTS[name](*wide) + (4160 if name == "SLMRec" else 0)
        assert count / 1e6 == pytest.approx(millions, abs=0.006 if millions < 10 else 0.06), name
    assert mmgcn_network(4096, 384) == 1_418_240
    frozen = kit.build("MMGCN", data, behaviour="published", embedding_dim=64)
    assert sum(p.numel() for p in frozen.parameters()) == mmgcn_network(16, 12)


@pytest.mark.parametrize("name", MODELS)
def test_number_of_parameters(name, data):
    model = kit.build(name, data, embedding_dim=64)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name](30, 24, 16, 12)


def planted(num_users=240, num_items=160, clusters=8, seed=0):
    """Users like the items of their cluster, whose features lie around the cluster's centre; popularity is flat."""
    rng = np.random.default_rng(seed)
    group = np.arange(num_items) % clusters
    users, items, part = [], [], []
    for user in range(num_users):
        own = rng.permutation(np.flatnonzero(group == user % clusters))[:9]
        liked = np.concatenate([own, rng.choice(num_items, 1)])
        users += [user] * 10
        items += liked.tolist()
        part += [2, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    users, items, part = map(np.asarray, (users, items, part))
    splits = [csr_from_pairs(users[part == p], items[part == p], num_users, num_items) for p in range(3)]
    splits[1:] = [(s - s.multiply(splits[0])).tocsr() for s in splits[1:]]
    for split in splits:
        split.eliminate_zeros()
        split.sort_indices()
    centre = {"image": rng.normal(size=(clusters, 20)), "text": rng.normal(size=(clusters, 10))}
    noise = {name: rng.normal(size=(num_items, c.shape[1])) for name, c in centre.items()}
    features = {name: torch.tensor(c[group] + 0.7 * noise[name], dtype=torch.float32) for name, c in centre.items()}
    return MultimodalData(Interactions("planted", *splits), features)


@pytest.fixture(scope="module")
def planted_data():
    return planted()


def recall(scorer, data):
    return evaluate(scorer, data.interactions, "test", [10]).means["recall@10"]


def trained(name, data, *, epochs=25, behaviour="fixed", mirror=None):
    """Recall@10 after training with Adam, plain or with the given mode of the mirror step."""
    torch.manual_seed(0)
    model = kit.build(name, data, embedding_dim=16, behaviour=behaviour)
    if MODELS[name].trains:
        sampler = TripleSampler(data.interactions.train, batch_size=512, seed=0, scheme="interaction")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        step = plain_step if mirror is None else MirrorGradient(optimizer, 1.0, 0.2, 3, mirror)
        for epoch in range(1, epochs + 1):
            model.new_epoch(epoch) if hasattr(model, "new_epoch") else None
            for batch in sampler.epoch(epoch):
                if not MODELS[name].needs_negatives:
                    batch = Triples(batch.users, batch.pos, batch.neg[:, None][:, :0])
                step(partial(model.train().loss, batch), optimizer)
    return recall(model.eval().scorer(), data)


@pytest.mark.parametrize("name", MODELS)
def test_planted_clusters_are_found(name, planted_data):
    """Recall@10 far above popularity after a few hundred steps: no model is silently dead."""
    assert trained(name, planted_data) > recall(popularity(planted_data.interactions), planted_data) + 0.25


def test_the_published_mvgae_ranks_at_random(planted_data):
    assert trained("MVGAE", planted_data, behaviour="published") < 2.5 * 10 / 160


@pytest.fixture(scope="module")
def plain_recall(planted_data):
    return {name: trained(name, planted_data) for name in ("VBPR", "FREEDOM")}


@pytest.mark.parametrize("mode", ["two_step", "fused", "precond", "sgd_mirror"])
@pytest.mark.parametrize("name", ["VBPR", "FREEDOM"])
def test_mirror_gradient_keeps_the_ranking(name, mode, planted_data, plain_recall):
    assert trained(name, planted_data, mirror=mode) > 0.9 * plain_recall[name]


@pytest.mark.parametrize("name", TRAINED)
def test_every_model_takes_mirrored_steps_in_every_mode(name, data, toy):
    batch = batch_for(name, toy)
    for mode in ("two_step", "fused", "precond", "sgd_mirror", "backstitch"):
        torch.manual_seed(0)
        model = kit.build(name, data).train()
        mirror = MirrorGradient(torch.optim.Adam(model.parameters(), lr=1e-3), 1.0, 0.2, 2, mode)
        model.new_epoch(1) if hasattr(model, "new_epoch") else None
        reports = [mirror.step(partial(model.loss, batch)) for _ in range(3)]
        assert [report.mirrored for report in reports] == [True, False, True]
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_processes_share_a_batch_where_the_loss_is_a_mean_over_rows(name, data, toy):
    """The mean of three processes' gradients is that of the batch for the models that say so, and for no other."""
    cpu, grads = torch.device("cpu"), []
    options = {"reg_weight": 0.1} if hasattr(MODELS[name].settings(), "reg_weight") else {}
    model, batch = kit.build(name, data, **options).double().train(), batch_for(name, toy)
    for world in (World(0, 1, cpu), *(World(rank, 3, cpu) for rank in range(3))):
        torch.manual_seed(world.rank)  # processes draw random numbers of their own
        model.new_epoch(1) if hasattr(model, "new_epoch") else None
        grads.append(kit.gradients(shared_loss(model.loss, world, reduction="mean")(batch)["loss"], model))
    whole, *parts = grads
    alike = all(
        torch.allclose(sum(part[key] for part in parts) / 3, value, rtol=1e-9, atol=1e-12)
        for key, value in whole.items()
    )
    # LATTICE is refused because it counts batches by identity, and every share is a new one.
    assert alike == (MODELS[name].rowwise or name == "LATTICE")


@pytest.mark.parametrize("name", TRAINED)
def test_nothing_is_dense_in_users_or_items_twice(name, largest_tensor):
    rng = np.random.default_rng(0)
    num_users, num_items = 6000, 5500
    users = np.repeat(np.arange(num_users), 3)
    train = csr_from_pairs(users, rng.integers(num_items, size=len(users)), num_users, num_items)
    empty = csr_from_pairs(users[:1], np.zeros(1, int), num_users, num_items)
    features = {n: torch.tensor(rng.normal(size=(num_items, 4)), dtype=torch.float32) for n in ("image", "text")}
    model = kit.build(name, MultimodalData(Interactions("wide", train, empty, empty), features), embedding_dim=4)
    batch = next(iter(TripleSampler(train, batch_size=256, seed=0, scheme="interaction").epoch(1)))
    with largest_tensor as seen:
        model.train().loss(batch)["loss"].backward()
        scorer = model.eval().scorer()
    # Searching neighbours goes block by block, of 2^24 scores at most.
    assert seen.numel <= 2**24 < num_items * num_items
    assert scorer.num_users == num_users and scorer.num_items == num_items


PROPAGATING = [name for name in TRAINED if hasattr(load_model(name), "new_users")]


@pytest.mark.parametrize("name", PROPAGATING)
def test_new_users_are_propagated_as_known_ones_without_a_vector_of_their_own(name, data):
    model, train = kit.build(name, data).eval(), data.interactions.train
    users = data.num_users
    with torch.no_grad():
        start = model.user if hasattr(model, "user") else model.tables.nodes[:users]
        start.zero_()
        if name == "LayerGCN":  # there the first layer stands for it
            start.copy_(model.graph.whole(model.tables.nodes, 1, combine="final")[:users])
    wanted = model.scorer().user
    torch.testing.assert_close(model.new_users(train), wanted, rtol=1e-4, atol=1e-5)


def test_every_recommender_takes_new_users(data):
    """By propagation where that says all of a user, else by gradient steps on the score."""
    assert set(PROPAGATING) >= {"FREEDOM", "LayerGCN", "SELFCFED_LGN", "BM3", "MGCN", "SMORE", "MMGCF", "PGL", "DAMRS"}
    histories = data.interactions.train[:3]
    for name in MODELS:
        model = kit.build(name, data).eval()
        encoder = model if hasattr(model, "new_users") else getattr(model, "encoder", None)
        new = fold_in(model.scorer(), histories, encoder)
        scores = new.score(torch.arange(3))
        assert scores.shape == (3, data.num_items) and scores.isfinite().all()
        assert torch.equal(fold_in(model.scorer(), histories[[2]], encoder).score(torch.tensor([0]))[0], scores[2])


@pytest.mark.parametrize("mode", ["off", "two_step", "sgd_mirror", "fused"])
def test_gradients_by_formula_step_as_those_of_autograd(data, toy, mode):
    found = {}
    for path in ("autograd", "formula"):
        torch.manual_seed(3)
        model = kit.build("BPR", data, reg_weight=0.3).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        step = plain_step if mode == "off" else MirrorGradient(optimizer, 1.0, 0.2, 2, mode)
        loss = model.loss if path == "autograd" else model.loss_by_formula()
        sampler = TripleSampler(data.interactions.train, batch_size=16, seed=1)
        told = [step(partial(loss, batch), optimizer) for epoch in (1, 2) for batch in sampler.epoch(epoch)]
        found[path] = [*model.parameters()], [{name: float(value) for name, value in terms.items()} for terms in told]
    torch.testing.assert_close(found["formula"], found["autograd"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [("LightGCN", {}, "vectors come from a graph"), ("BPR", {"behaviour": "published"}, "published formulas"),
     ("BPR", {"reg_weight": 0.0}, "reg_weight 0")],
)  # fmt: skip
def test_autograd_says_why(data, name, how, reason):
    assert kit.build(name, data, **how).loss_by_formula() == reason
