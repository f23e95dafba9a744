from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gfml.base.errors import UserError
from gfml.engine.train import fit
from gfml.mirror import MODES, MirrorGradient, mirror_step

GOLDEN = Path(__file__).parents[1] / "golden"
RTOL, ATOL = 1e-7, 1e-11
PUBLISHED = {"counter": "epoch", "clip_halves": "second"}
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "mirror.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def toy() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "mm_toy.npz", allow_pickle=False) as file:
        return dict(file)


def as_tensors(golden: dict[str, np.ndarray], *names: str) -> list[Tensor]:
    return [torch.from_numpy(golden[name]).clone() for name in names]


def flat(params: list[Tensor]) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in params]).numpy().copy()


class Quadratic:
    """L = x'Hx/2 - b'x, the same for every batch."""

    def __init__(self, golden: dict[str, np.ndarray]) -> None:
        self.H, self.b, start = as_tensors(golden, "quad_H", "quad_b", "quad_x0")
        self.params = [start.requires_grad_()]

    def loss(self, batch: int) -> Tensor:
        (x,) = self.params
        return x @ self.H @ x / 2 - self.b @ x


class Network:
    """Two layers; the loss comes as two parts, the mean squared error and a penalty on all parameters."""

    def __init__(self, golden: dict[str, np.ndarray]) -> None:
        self.params = [p.requires_grad_() for p in as_tensors(golden, "mlp_W1", "mlp_b1", "mlp_W2", "mlp_b2")]
        self.X, self.y, self.batches = as_tensors(golden, "mlp_X", "mlp_y", "mlp_batches")
        self.reg = float(golden["mlp_reg"])

    def loss(self, batch: int) -> tuple[Tensor, Tensor]:
        W1, b1, W2, b2 = self.params
        rows = self.batches[batch]
        out = (torch.tanh(self.X[rows] @ W1.T + b1) @ W2.T + b2).squeeze(1)
        return ((out - self.y[rows]) ** 2).mean(), self.reg * sum((p**2).sum() for p in self.params)


class LightGCN:
    """Mean of 0..L propagations, pairwise loss and a penalty on the rows of the batch."""

    def __init__(self, golden: dict[str, np.ndarray], toy: dict[str, np.ndarray]) -> None:
        self.params = [p.requires_grad_() for p in as_tensors(golden, "lgcn_user0", "lgcn_item0")]
        self.layers, self.reg = int(golden["lgcn_opt_n_layers"]), float(golden["lgcn_opt_reg_weight"])
        self.rows = torch.from_numpy(golden["lgcn_rows"]).split(int(golden["lgcn_batch_size"]), dim=1)
        num_users, num_items = int(toy["n_users"]), int(toy["n_items"])
        A = torch.zeros(num_users + num_items, num_users + num_items, dtype=torch.float64)
        A[toy["train_user"], num_users + toy["train_item"]] = 1
        scale = ((A + A.T).sum(1) + 1e-7) ** -0.5
        self.A = scale[:, None] * (A + A.T) * scale

    def loss(self, batch: int) -> Tensor:
        users, positives, negatives = self.rows[batch % len(self.rows)]
        layers = [torch.cat(self.params)]
        for _ in range(self.layers):
            layers.append(self.A @ layers[-1])
        user, item = torch.stack(layers).mean(0).split([len(p) for p in self.params])
        margin = (user[users] * (item[positives] - item[negatives])).sum(1)
        ego = [self.params[0][users], self.params[1][positives], self.params[1][negatives]]
        return -(1e-10 + margin.sigmoid()).log().mean() + self.reg * sum(e.norm() for e in ego) / len(users)


def settings_of(golden: dict[str, np.ndarray], name: str) -> dict[str, object]:
    alpha1, alpha2, every = golden[f"set_{name}"]
    return {"every": 0} if math.isnan(every) else {"alpha1": alpha1, "alpha2": alpha2, "every": int(every)}


def trace(problem, mirror: MirrorGradient, plan, scheduler=None) -> dict[str, np.ndarray]:
    """Parameters after every optimizer step and batch, and the reports."""
    steps, reports = [flat(problem.params)], []
    theta = [steps[0]]
    hook = mirror.optimizer.register_step_post_hook(lambda *_: steps.append(flat(problem.params)))
    batch = 0
    for length in plan:
        mirror.new_epoch()
        for _ in range(length):
            reports.append(mirror.step(lambda i=batch: problem.loss(i)))
            theta.append(flat(problem.params))
            batch += 1
        if scheduler is not None:
            scheduler.step()
    hook.remove()
    return {
        "steps": np.stack(steps),
        "theta": np.stack(theta),
        "mirrored": np.array([r.mirrored for r in reports]),
        "loss1": np.array([float(r.loss) for r in reports]),
        "loss2": np.array([np.nan if r.mirror_loss is None else float(r.mirror_loss) for r in reports]),
    }


def check(found: dict[str, np.ndarray], golden: dict[str, np.ndarray], tag: str, names: str) -> None:
    for name in names.split():
        assert found[name].shape == golden[f"{tag}_{name}"].shape, name
        np.testing.assert_allclose(found[name], golden[f"{tag}_{name}"], rtol=RTOL, atol=ATOL, err_msg=name)


ALL_ARRAYS = "steps theta mirrored loss1 loss2"

# ---------------------------------------------------------------------- the published trainer


# Without the mirror the layout does not matter, and the vectors have one only.
@pytest.mark.parametrize(
    "setting, plan", [("off", "e12")] + [(s, p) for s in ("a", "b") for p in ("e12", "e444", "e57")]
)
@pytest.mark.parametrize("kind", ["quad_sgd", "mlp_adam"])
def test_published_trajectories_of_all_epoch_layouts(golden, kind, setting, plan):
    tag = f"{kind}_{setting}_{plan}"
    problem = Quadratic(golden) if kind == "quad_sgd" else Network(golden)
    lr = float(golden["quad_lr" if kind == "quad_sgd" else "mlp_lr"])
    optimizer = OPTIMIZERS[kind.split("_")[1]](problem.params, lr=lr)
    mirror = MirrorGradient(optimizer, **settings_of(golden, setting), **PUBLISHED)
    check(trace(problem, mirror, golden[f"plan_{plan}"]), golden, tag, ALL_ARRAYS)


@pytest.mark.parametrize("setting", ["a", "b", "off"])
@pytest.mark.parametrize("variant", ["adam_wd", "adam_clip", "adam_sched", "sgd", "adagrad", "rmsprop"])
def test_published_trajectories_of_the_network(golden, variant, setting):
    problem = Network(golden)
    name, _, extra = variant.partition("_")
    decay = {"weight_decay": float(golden["mlp_wd"])} if extra == "wd" else {}
    optimizer = OPTIMIZERS[name](problem.params, lr=float(golden["mlp_lr"]), **decay)
    clip = float(golden["mlp_clip"]) if extra == "clip" else None
    mirror = MirrorGradient(optimizer, **settings_of(golden, setting), clip=clip, **PUBLISHED)
    base, period = golden["mlp_sched"]
    scheduler, plan = None, golden["plan_e12"]
    if extra == "sched":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: base ** (e / period))
        plan = golden["plan_e444"]
    check(trace(problem, mirror, plan, scheduler), golden, f"mlp_{variant}_{setting}", ALL_ARRAYS)


def test_published_trajectory_of_clipped_sgd(golden):
    problem = Network(golden)
    optimizer = torch.optim.SGD(problem.params, lr=float(golden["mlp_lr"]))
    mirror = MirrorGradient(optimizer, **settings_of(golden, "a"), clip=float(golden["mlp_clip"]), **PUBLISHED)
    check(trace(problem, mirror, [12]), golden, "mlp_sgd_clip_a", ALL_ARRAYS)


@pytest.mark.parametrize("setting", ["a", "b", "off"])
def test_published_trajectories_with_weight_decay(golden, setting):
    problem = Quadratic(golden)
    optimizer = torch.optim.SGD(problem.params, lr=float(golden["quad_lr"]), weight_decay=float(golden["quad_wd"]))
    mirror = MirrorGradient(optimizer, **settings_of(golden, setting), **PUBLISHED)
    check(trace(problem, mirror, [12]), golden, f"quad_sgd_wd_{setting}", ALL_ARRAYS)


@pytest.mark.parametrize("setting", ["a", "b", "off"])
def test_published_lightgcn(golden, toy, setting):
    problem = LightGCN(golden, toy)
    optimizer = torch.optim.Adam(problem.params, lr=float(golden["lgcn_lr"]))
    mirror = MirrorGradient(optimizer, **settings_of(golden, setting), **PUBLISHED)
    found = trace(problem, mirror, [5, 5])
    check(found, golden, f"lgcn_{setting}", "mirrored loss1 loss2")
    tables = [golden[f"lgcn_{setting}_{side}"].reshape(2, -1) for side in ("user", "item")]
    np.testing.assert_allclose(found["theta"][[5, 10]], np.concatenate(tables, axis=1), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("setting", ["a", "b"])
@pytest.mark.parametrize(
    "kind, mode",
    [(k, m) for k in ("quad_sgd", "mlp_sgd") for m in ("fused", "sgd_mirror", "backstitch")]
    + [("mlp_adam", m) for m in ("fused", "sgd_mirror", "precond")],
)
def test_other_modes_follow_their_definition(golden, kind, mode, setting):
    problem = Quadratic(golden) if kind == "quad_sgd" else Network(golden)
    lr = float(golden["quad_lr" if kind == "quad_sgd" else "mlp_lr"])
    optimizer = OPTIMIZERS[kind.split("_")[1]](problem.params, lr=lr)
    mirror = MirrorGradient(optimizer, **settings_of(golden, setting), mode=mode)
    theta = trace(problem, mirror, [12])["theta"]
    np.testing.assert_allclose(theta, golden[f"fixed_{kind}_{setting}_{mode}"], rtol=RTOL, atol=ATOL)


# ---------------------------------------------------------------------- identities


def random_quadratic(size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return A @ A.T / size, torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["two_step", "fused", "sgd_mirror"])
def test_one_step_on_a_quadratic_is_exact(mode):
    A, start = random_quadratic()
    eye, lr, alpha1, alpha2 = torch.eye(5, dtype=torch.float64), 0.1, 0.9, 0.3
    theta = start.clone().requires_grad_()
    mirror_step(lambda: theta @ A @ theta / 2, torch.optim.SGD([theta], lr=lr), alpha1, alpha2, mode=mode)
    expected = (eye + lr * alpha2 * A) @ (eye - lr * alpha1 * A) @ start
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-14, atol=1e-15)


def test_backstitch_commutes_with_two_step_on_a_quadratic():
    A, start = random_quadratic()
    ends = []
    for mode in ("two_step", "backstitch"):
        theta = start.clone().requires_grad_()
        mirror_step(lambda t=theta: t @ A @ t / 2, torch.optim.SGD([theta], lr=0.1), 1.3, 0.3, mode=mode)
        ends.append(theta.detach())
    torch.testing.assert_close(*ends, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_repeat_is_two_ordinary_steps_of_the_scaled_loss(kind):
    """The control arm: the extra step of the same size without the inversion; it descends."""
    A, start = random_quadratic()
    theta, plain = (start.clone().requires_grad_() for _ in range(2))
    mirror_step(lambda: theta @ A @ theta / 2, kind([theta], lr=0.1), 1.3, 0.3, mode="repeat")
    optimizer = kind([plain], lr=0.1)
    for alpha in (1.3, 0.3):
        optimizer.zero_grad()
        (alpha * (plain @ A @ plain) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(theta.detach(), plain.detach(), rtol=1e-14, atol=0)


def test_one_step_descends_the_penalised_loss_up_to_third_order():
    """theta - lr grad[(a1-a2) L + a1 a2 lr/2 |grad L|^2]: halving lr divides the residual by eight."""
    start = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)

    def loss(t: Tensor) -> Tensor:
        return (t**4).sum() + torch.sin(t.sum())

    def residual(lr: float) -> float:
        theta = start.clone().requires_grad_()
        mirror_step(lambda: loss(theta), torch.optim.SGD([theta], lr=lr), 1.0, 0.4)
        x = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        penalised = 0.6 * gradient.detach() @ x + 0.4 * lr / 2 * (gradient @ gradient)
        (direction,) = torch.autograd.grad(penalised, x)
        return float((theta.detach() - (start - lr * direction)).norm())

    assert residual(2e-3) / residual(1e-3) == pytest.approx(8, rel=0.05)


def test_adam_moves_further_on_a_constant_gradient():
    alpha1, alpha2, every, lr = 1.0, 0.3, 3, 1e-3
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    mirror = MirrorGradient(torch.optim.Adam([theta], lr=lr), alpha1, alpha2, every)
    for i in range(9000):
        if i == 6000:
            before = theta.item()
        mirror.step(theta.sum)
    expected = (alpha1 - alpha2 + every - 1) / (every * math.sqrt((alpha1**2 + alpha2**2 + every - 1) / (every + 1)))
    assert (before - theta.item()) / (3000 * lr) == pytest.approx(expected, rel=0.01)


# ---------------------------------------------------------------------- off, and alpha2 = 0


def small_model(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1))


def some_batches(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(seed))


def batch_loss(model: nn.Module, x: Tensor) -> Tensor:
    return ((model(x).squeeze(1) - x.sum(1).sin()) ** 2).mean()


def run(make_optimizer, count: int = 20, dropout: float = 0.0, **settings):
    """Weights and optimizer state after `count` mirrored-or-not batches."""
    model = small_model(dropout=dropout)
    mirror = MirrorGradient(make_optimizer(model.parameters()), **settings)
    reports = [mirror.step(lambda x=x: batch_loss(model, x)) for x in some_batches(count)]
    return model, mirror, reports


BARE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    first, second = a.state_dict()["state"], b.state_dict()["state"]
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[i][k]), torch.as_tensor(second[i][k])) for i in first for k in first[i]
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("off", [{"every": 0}, {"every": None}, {"alpha2": None}])
@pytest.mark.parametrize("kind", BARE)
def test_off_is_the_bare_optimizer_bit_for_bit(kind, off, mode):
    model = small_model(dropout=0.3)
    optimizer = BARE[kind](model.parameters())
    losses = []
    for x in some_batches(20):
        optimizer.zero_grad()
        loss = batch_loss(model, x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    generator_state = torch.get_rng_state()
    other, mirror, reports = run(BARE[kind], dropout=0.3, mode=mode, clip=0.5, **off)
    assert [r.loss.item() for r in reports] == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert same_state(optimizer, mirror.optimizer)
    assert torch.equal(generator_state, torch.get_rng_state())
    assert not any(r.mirrored for r in reports)


@pytest.mark.parametrize("kind", BARE)
def test_alpha2_zero_is_plain_in_fused_and_for_stateless_sgd_only(kind):
    plain = run(BARE[kind], every=0)[0].state_dict()

    def equals_plain(mode: str) -> bool:
        weights = run(BARE[kind], alpha2=0.0, mode=mode)[0].state_dict()
        return all(torch.equal(weights[name], plain[name]) for name in plain)

    assert equals_plain("fused")
    assert equals_plain("sgd_mirror")
    assert equals_plain("two_step") == (kind == "sgd" or kind == "adagrad")


# ---------------------------------------------------------------------- counting, calls, reports


def mirrored_batches(plan: list[int], **settings) -> list[list[int]]:
    theta = torch.ones(2, requires_grad=True)
    mirror = MirrorGradient(torch.optim.SGD([theta], lr=0.01), **settings)
    found = []
    for length in plan:
        mirror.new_epoch()
        found.append([i for i in range(length) if mirror.step(lambda: (theta**2).sum()).mirrored])
    return found


def test_which_batches_are_mirrored():
    assert mirrored_batches([5, 7], every=3, counter="epoch") == [[0, 3], [0, 3, 6]]
    assert mirrored_batches([5, 7], every=3, counter="global") == [[0, 3], [1, 4]]
    assert mirrored_batches([5, 7], every=3, phase=2) == [[2], [0, 3, 6]]
    assert mirrored_batches([3], every=1) == [[0, 1, 2]]


@pytest.mark.parametrize("mode, per_mirrored", [("two_step", 2), ("backstitch", 2), ("fused", 1), ("precond", 1)])
def test_calls_and_optimizer_steps(mode, per_mirrored):
    model, x = small_model(), some_batches(1)[0]
    copy = x.clone()
    optimizer = torch.optim.Adam(model.parameters())
    mirror = MirrorGradient(optimizer, mode=mode)
    calls, steps = [], []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))

    def closure() -> Tensor:
        calls.append(1)
        return batch_loss(model, x)

    per_batch = []
    for _ in range(4):
        before = len(calls), len(steps)
        mirror.step(closure)
        per_batch.append((len(calls) - before[0], len(steps) - before[1]))
    assert per_batch == [(2, per_mirrored), (1, 1), (1, 1), (2, per_mirrored)]
    assert torch.equal(x, copy)


def test_a_scheduler_stepped_per_batch_counts_batches():
    theta = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    mirror = MirrorGradient(optimizer, every=1)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    for _ in range(3):
        mirror.step(lambda: (theta**2).sum())
        scheduler.step()
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert scheduler.last_epoch == 3


def test_closures_may_return_a_scalar_parts_or_a_dict():
    ends = []
    for form in (lambda a, b: a + b, lambda a, b: (a, b), lambda a, b: {"loss": a + b, "fit": a, "note": 3.0}):
        theta = torch.tensor([1.0, -2.0], requires_grad=True)
        mirror = MirrorGradient(torch.optim.Adam([theta], lr=0.1), every=1)
        report = mirror.step(lambda t=theta, form=form: form((t**2).sum(), t.sum()))
        ends.append(theta.detach())
        assert report.loss.item() == 4.0 and not report.loss.requires_grad
        assert report.mirror_loss.item() != 4.0
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert report.terms == {"loss": report.loss, "fit": torch.tensor(5.0), "note": 3.0}
    assert not report.terms["fit"].requires_grad


def test_a_closure_of_the_wrong_kind_is_refused():
    theta = torch.ones(2, requires_grad=True)
    for bad in (lambda: theta, lambda: {"total": theta.sum()}, lambda: 1.0 * theta.sum().item()):
        with pytest.raises((ValueError, TypeError)):
            MirrorGradient(torch.optim.SGD([theta], lr=0.1)).step(bad)


def test_as_the_step_of_fit():
    theta = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    mirror = MirrorGradient(optimizer, every=1)
    terms = mirror(lambda: {"loss": (theta**2).sum(), "fit": theta[0]}, optimizer)
    mirror_loss = terms.pop("mirror_loss")
    assert terms == {"loss": torch.tensor(5.0), "fit": torch.tensor(1.0)}
    assert mirror_loss.item() == pytest.approx(5.0 * 0.8**2)
    with pytest.raises(ValueError, match="another optimizer"):
        mirror(lambda: {"loss": (theta**2).sum()}, torch.optim.SGD([theta], lr=0.1))


def test_fit_with_the_mirror_step_equals_a_hand_written_loop():
    batches = some_batches(5)
    ends = []
    for by_hand in (True, False):
        model = small_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        mirror = MirrorGradient(optimizer, counter="epoch")
        if by_hand:
            for _ in range(2):
                mirror.new_epoch()
                losses = [mirror.step(lambda x=x, m=model: batch_loss(m, x)).loss.item() for x in batches]
        else:
            result = fit(
                model,
                optimizer,
                batches=lambda epoch: mirror.new_epoch() or batches,
                run=None,
                epochs=2,
                step=mirror,
                loss_fn=lambda x: {"loss": batch_loss(model, x)},
                select="val/epoch",
                progress=False,
                evaluate=lambda split: {"epoch": float(optimizer.state[model[0].weight]["step"])},
            )
        ends.append(flat(list(model.parameters())))
    assert np.array_equal(*ends)
    assert result.best_value == 14  # two epochs of five batches, two of them mirrored
    assert result.history[-1]["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_contexts_equal_step_and_allow_micro_batches(mode):
    ends = []
    for micro in (False, True):
        model = small_model().double()
        mirror = MirrorGradient(torch.optim.Adam(model.parameters(), lr=0.01), mode=mode, every=2, clip=0.3)
        for x in some_batches(5).double():
            if not micro:
                mirror.step(lambda x=x, m=model: batch_loss(m, x))
                continue
            contexts = [mirror.first_half, mirror.second_half] if mirror.is_mirror_step() else [mirror.ordinary_step]
            for context in contexts:
                with context():
                    for part in x.chunk(2):
                        (batch_loss(model, part) / 2).backward()
        ends.append(flat(list(model.parameters())))
    np.testing.assert_allclose(*ends, rtol=1e-12, atol=1e-14)


def test_contexts_out_of_order_are_refused():
    theta = torch.ones(2, requires_grad=True)
    mirror = MirrorGradient(torch.optim.SGD([theta], lr=0.1), every=2)
    with pytest.raises(ValueError, match="follows first_half"), mirror.second_half():
        pass
    with pytest.raises(ValueError, match="is to be mirrored"), mirror.ordinary_step():
        pass
    with mirror.first_half():
        theta.sum().backward()
    with pytest.raises(ValueError, match="half done"):
        mirror.state_dict()
    with pytest.raises(ValueError, match="once"), mirror.first_half():
        pass


# ---------------------------------------------------------------------- interactions


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counter", ["global", "epoch"])
def test_resuming_in_the_middle_of_an_epoch_changes_nothing(mode, counter, tmp_path):
    batches = some_batches(11)

    def build():
        model = small_model()
        return model, MirrorGradient(torch.optim.Adam(model.parameters(), lr=0.01), mode=mode, counter=counter, phase=1)

    whole, mirror = build()
    for x in batches:
        mirror.step(lambda x=x: batch_loss(whole, x))
    first, mirror = build()
    for x in batches[:5]:
        mirror.step(lambda x=x: batch_loss(first, x))
    torch.save({"model": first.state_dict(), "mirror": mirror.state_dict()}, tmp_path / "checkpoint.pt")
    second, mirror = build()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    mirror.load_state_dict(saved["mirror"])
    flags = [mirror.step(lambda x=x: batch_loss(second, x)).mirrored for x in batches[5:]]
    assert flags == [False, False, True, False, False, True]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_resuming_with_other_settings_is_refused():
    theta = torch.ones(2, requires_grad=True)
    state = MirrorGradient(torch.optim.SGD([theta], lr=0.1), alpha2=0.1).state_dict()
    with pytest.raises(UserError, match=r"alpha2=0\.1, the run has 0\.2"):
        MirrorGradient(torch.optim.SGD([theta], lr=0.1), alpha2=0.2).load_state_dict(state)


@pytest.mark.parametrize("rng", ["fresh", "replay"])
def test_random_draws_of_the_second_half(rng):
    theta = torch.ones(2, requires_grad=True)
    own = torch.Generator().manual_seed(5)
    mirror = MirrorGradient(torch.optim.SGD([theta], lr=0.1), every=1, rng=rng, generators=[own])
    draws = []

    def closure() -> Tensor:
        draws.append((torch.rand(3), torch.rand(3, generator=own)))
        return (theta**2).sum()

    torch.manual_seed(0)
    for _ in range(2):
        mirror.step(closure)
    for i in range(2):
        assert all(torch.equal(draws[0][i], draws[1][i]) == (rng == "replay") for i in range(2))
        assert not torch.equal(draws[1][i], draws[2][i])  # the next batch draws anew


def test_clipping_reaches_both_halves_before_alpha():
    theta = torch.tensor([30.0, -40.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    norms = []
    optimizer.register_step_pre_hook(lambda *_: norms.append(theta.grad.norm().item()))
    mirror = MirrorGradient(optimizer, 1.0, 0.25, every=2, clip=2.0)
    for _ in range(2):
        mirror.step(lambda: (theta**2).sum())
    assert norms == pytest.approx([2.0, 0.5, 2.0], rel=1e-6)


def test_clipped_fused_is_clipped_two_step_under_sgd():
    ends = []
    for mode in ("two_step", "fused", "sgd_mirror"):
        theta = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
        mirror_step(lambda t=theta: (t**4).sum(), torch.optim.SGD([theta], lr=0.1), 1.0, 0.3, mode=mode, clip=1.0)
        ends.append(theta.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "kind, mode", [(torch.optim.AdamW, m) for m in MODES] + [(torch.optim.SGD, m) for m in MODES if m != "precond"]
)
def test_weight_decay_per_mirrored_batch(kind, mode):
    """A parameter with zero gradient moves by the decay alone: (1 - lr wd)^n, n = decaying steps."""
    for wd, times in {"both": 1 + (mode in ("two_step", "backstitch", "repeat")), "first": 1, "once": 1}.items():
        theta = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        optimizer = kind([theta], lr=0.1, weight_decay=0.5)
        mirror_step(lambda t=theta: (0.0 * t).sum(), optimizer, mode=mode, wd=wd)
        assert theta.item() == pytest.approx(2.0 * 0.95**times, rel=1e-14), wd
        assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_weight_decay_once_goes_with_the_descent():
    """In backstitch the descent comes second, so `once` decays theta' and `first` decays theta."""
    lr, decay, alpha1, alpha2 = 0.1, 0.5, 1.0, 0.2
    ends = {}
    for wd in ("first", "once"):
        theta = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=lr, weight_decay=decay)
        mirror_step(lambda t=theta: (t**2).sum() / 2, optimizer, alpha1, alpha2, mode="backstitch", wd=wd)
        ends[wd] = theta.item()
    assert ends["first"] == pytest.approx(2.0 * (1 + lr * alpha2 - lr * decay) * (1 - lr * alpha1), rel=1e-14)
    assert ends["once"] == pytest.approx(2.0 * (1 + lr * alpha2) * (1 - lr * alpha1 - lr * decay), rel=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_params_restricts_the_inverted_half(mode):
    a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.1)
    plain_b = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    plain = torch.optim.Adam([plain_b], lr=0.1)
    (plain_b**2).sum().backward()
    plain.step()
    mirror_step(lambda: (a**2).sum() + (b**2).sum(), optimizer, mode=mode, params=[a])
    assert b.item() == plain_b.item()
    assert optimizer.state[b]["step"] == 1
    full = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    mirror_step(lambda: (full**2).sum(), torch.optim.Adam([full], lr=0.1), mode=mode)
    assert a.item() == full.item()


@pytest.mark.parametrize("mode", MODES)
def test_signs_of_the_second_displacement(mode):
    model = small_model().double()
    mirror = MirrorGradient(torch.optim.Adam(model.parameters(), lr=1e-4), mode=mode, every=1, diagnostics=True)
    x = some_batches(1)[0].double()
    for _ in range(5):
        report = mirror.step(lambda: batch_loss(model, x))
        found = {name: value.item() for name, value in report.diagnostics.items()}
    assert found["grad_norm"] > 0 and found["mirror_grad_norm"] > 0 and found["grad_cosine"] > 0.99
    if mode == "fused":
        assert "displacement_cosine" not in found
    elif mode == "sgd_mirror":
        assert found["displacement_cosine"] == pytest.approx(1.0)
    else:
        assert (found["displacement_cosine"] > 0) == (mode == "precond")


def test_diagnostics_are_of_the_raw_gradients():
    theta = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    mirror = MirrorGradient(optimizer, 1.0, 0.2, every=2, clip=10.0, diagnostics=True)
    report = mirror.step(lambda: (theta**2).sum() / 2)
    assert report.diagnostics["grad_norm"].item() == pytest.approx(5.0)
    assert report.diagnostics["mirror_grad_norm"].item() == pytest.approx(4.5)
    assert report.diagnostics["displacement_cosine"].item() == pytest.approx(1.0)
    assert mirror.step(lambda: (theta**2).sum()).diagnostics == {}


def test_batch_norm_statistics_move_in_both_halves():
    layer = nn.BatchNorm1d(4)
    mirror_step(lambda: (layer(some_batches(1)[0]) ** 3).sum(), torch.optim.SGD(layer.parameters(), lr=0.1))
    assert layer.num_batches_tracked.item() == 2


def test_sparse_gradients():
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=sparse)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        mirror_step(lambda t=table: (t(torch.tensor([1, 1, 4])) ** 2).sum(), optimizer)
        ends.append(table.weight.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("mode", MODES)
def test_maximize_mirrors_the_other_way(mode):
    make = torch.optim.Adam if mode == "precond" else torch.optim.SGD
    ends = []
    for sign in (1, -1):
        theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        optimizer = make([theta], lr=0.1, maximize=sign < 0)
        mirror_step(lambda t=theta, s=sign: s * (t**2).sum(), optimizer, mode=mode)
        ends.append(theta.detach())
    torch.testing.assert_close(*ends, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------- all or nothing


def poisoned(model: nn.Module, x: Tensor, calls: list[int], bad_call: int):
    def closure() -> Tensor:
        calls.append(1)
        return batch_loss(model, x) * (float("inf") if len(calls) == bad_call else 1.0)

    return closure


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad_call", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_mirrored_batch_is_done_in_full_or_not_at_all(mode, bad_call, scaled):
    batches = some_batches(3)
    ends = []
    for poison in (False, True):
        model = small_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100) if scaled else None
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        mirror = MirrorGradient(optimizer, mode=mode, every=2, scaler=scaler, guard=not scaled, module=nn.Module())
        mirror.step(lambda m=model: batch_loss(m, batches[0]))
        mirror.step(lambda m=model: batch_loss(m, batches[1]))
        if poison:
            calls: list[int] = []
            report = mirror.step(poisoned(model, batches[2], calls, bad_call))
            assert report.mirrored and report.skipped and len(calls) == bad_call
            assert (report.mirror_loss is None) == (bad_call == 1)
            assert mirror._index == 3
            if scaled:
                assert scaler.get_scale() == 512.0
        ends.append((model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0].parameters(), ends[1][0].parameters(), strict=True))
    assert same_state(ends[0][1], ends[1][1])


@pytest.mark.parametrize("mode", MODES)
def test_a_scaler_changes_nothing_but_rounding(mode):
    ends = []
    for scaled in (False, True):
        model = small_model().double()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) if scaled else None
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        mirror = MirrorGradient(optimizer, mode=mode, every=2, scaler=scaler, clip=0.5, module=nn.Module())
        skipped = [mirror.step(lambda x=x, m=model: batch_loss(m, x)).skipped for x in some_batches(6).double()]
        assert not any(skipped)
        ends.append(flat(list(model.parameters())))
    assert scaler.get_scale() == 4096.0  # grew after 3 and after 6 batches, mirrored ones counting once
    np.testing.assert_allclose(*ends, rtol=1e-12, atol=1e-14)


def test_guard_skips_an_ordinary_step():
    theta = torch.ones(2, requires_grad=True)
    mirror = MirrorGradient(torch.optim.SGD([theta], lr=0.1), every=0, guard=True, module=nn.Module())
    assert mirror.step(lambda: (theta * float("nan")).sum()).skipped
    assert torch.equal(theta.detach(), torch.ones(2))
    assert not mirror.step(lambda: theta.sum()).skipped


def normed_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad_call", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_a_skipped_batch_leaves_running_statistics_alone(mode, bad_call, scaled, every, fails):
    """A batch with NaN or an error, in either half of a mirrored one or in an ordinary one; the model is alive in eval mode."""
    model, x = normed_model(), torch.randn(8, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    mirror = MirrorGradient(optimizer, mode=mode, every=every, scaler=scaler, guard=not scaled, module=model)
    mirror.step(lambda: model(x).square().mean())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert before["1.running_mean"].abs().sum() > 0
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        bad = len(calls) == (bad_call if every else 1)
        loss = model(x * (float("nan") if bad and not fails else 1.0)).square().mean()
        if bad and fails:
            raise MemoryError
        return loss

    with contextlib.suppress(MemoryError):
        assert mirror.step(closure).skipped
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_the_first_half_alone(mode):
    """A mirrored batch counts once in them, at the parameters before the step, as in plain training."""
    model, plain, x = normed_model(), normed_model(), torch.randn(8, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    mirror = MirrorGradient(optimizer, mode=mode, every=1, module=model, statistics="first")
    mirror.step(lambda: model(x).square().mean())
    plain(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[1], name), getattr(plain[1], name))
    both = normed_model()
    MirrorGradient(torch.optim.Adam(both.parameters(), lr=0.01), mode=mode, every=1).step(
        lambda: both(x).square().mean()
    )
    assert both[1].num_batches_tracked == 2
    # A checkpoint of before the setting goes on as it was.
    state = MirrorGradient(optimizer).state_dict()
    state["settings"].pop("statistics")
    MirrorGradient(optimizer).load_state_dict(state)
    with pytest.raises(UserError, match="mirror statistics=both, the run has first"):
        MirrorGradient(optimizer, module=model, statistics="first").load_state_dict(state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaled", [False, True])
def test_halves_that_touch_other_parameters_or_none(mode, scaled):
    """A GradScaler by itself fails where there is no gradient: it has nothing to unscale and no check to read."""
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    mirror = MirrorGradient(
        torch.optim.Adam([a, b], lr=0.1), mode=mode, every=1, guard=not scaled, scaler=scaler, diagnostics=True,
        module=nn.Module(),
    )  # fmt: skip
    turns = iter([a, b])
    found = mirror.step(lambda: next(turns).square().sum())
    assert not found.skipped and found.diagnostics["grad_norm"] == found.diagnostics["mirror_grad_norm"] > 0
    assert found.diagnostics["grad_cosine"] == 0
    elsewhere = torch.ones(2, requires_grad=True)
    before = flat([a, b])
    none = mirror.step(lambda: elsewhere.sum())
    assert not none.skipped and none.diagnostics["grad_norm"] == 0 and np.isfinite(before).all()
    for turns in (iter([a, elsewhere]), iter([elsewhere, a])):
        assert mirror.step(lambda turns=turns: next(turns).square().sum()).mirrored
    mirror.every = 0
    assert not mirror.step(lambda: elsewhere.sum()).skipped


def test_what_cannot_be_mirrored_is_one_line():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(UserError, match="LBFGS calls the loss itself, several times a step"):
        MirrorGradient(torch.optim.LBFGS([theta]))
    for settings in ({"guard": True}, {"scaler": torch.amp.GradScaler("cpu")}, {"statistics": "first"}):
        with pytest.raises(UserError, match="found no network: give module=MODEL"):
            MirrorGradient(torch.optim.SGD([theta], lr=0.1), **settings)

    def closure() -> Tensor:
        loss = theta.square().sum()
        loss.backward()
        return loss

    for every in (0, 1):
        with pytest.raises(
            ValueError, match="the closure called backward itself: let it compute and return the loss alone"
        ):
            MirrorGradient(torch.optim.SGD([theta], lr=0.1), every=every).step(closure)
    assert torch.equal(theta.detach(), torch.ones(2))


def test_fused_goes_back_when_the_second_pass_fails():
    theta = torch.ones(2, requires_grad=True)
    mirror = MirrorGradient(torch.optim.SGD([theta], lr=0.1), mode="fused", every=1)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return (theta**2).sum()

    with pytest.raises(RuntimeError, match="out of memory"):
        mirror.step(closure)
    assert torch.equal(theta.detach(), torch.ones(2))
    assert mirror.step(closure).mirrored


# ---------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"alpha1": 0.2, "alpha2": 0.2}, "wanted alpha1 > alpha2 >= 0"),
        ({"alpha2": -0.1}, "wanted alpha1 > alpha2 >= 0"),
        ({"alpha1": float("nan")}, "wanted alpha1 > alpha2 >= 0"),
        ({"every": -1}, "found every=-1"),
        ({"every": 2.5}, "found every=2.5"),
        ({"phase": 3}, "wanted 0 <= phase < every=3"),
        ({"clip": 0.0}, "found clip=0.0"),
        ({"mode": "two_steps"}, "did you mean 'two_step'"),
        ({"counter": "batch"}, "unknown mirror counter"),
        ({"rng": "same"}, "unknown mirror rng"),
        ({"wd": "none"}, "unknown mirror wd"),
        ({"mode": "fused", "clip_halves": "second"}, "defined for mode two_step"),
        ({"mode": "precond"}, "needs Adam or AdamW, found SGD"),
    ],
)
def test_bad_settings_are_named(settings, words):
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(UserError, match=words) as error:
        MirrorGradient(torch.optim.SGD([theta], lr=0.1), **settings)
    assert "\n" not in str(error.value)


def test_params_must_belong_to_the_optimizer():
    theta, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="1 of 2 tensors"):
        MirrorGradient(torch.optim.SGD([theta], lr=0.1), params=[theta, other])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_no_host_sync_on_cuda(mode):
    model = small_model().cuda()
    mirror = MirrorGradient(torch.optim.Adam(model.parameters()), mode=mode, every=2, clip=1.0, diagnostics=True)
    batches = some_batches(6).cuda()
    for x in batches[:2]:
        mirror.step(lambda x=x: batch_loss(model, x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in batches[2:]:
            mirror.step(lambda x=x: batch_loss(model, x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
