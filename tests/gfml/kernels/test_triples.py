"""The kernels of pair losses in Triton's interpreter, which runs them on the CPU, against autograd in float64."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[3]
NUM_USERS, NUM_ITEMS = 4, 6
WEIGHTS = {"decay": 1e-2, "mass_decay": 2e-2, "mix_ratio": 0.3}
LOSSES = ("dot", "bpr", "gravity", "bpr_gra", "mix", "mix_bpr")
# mode of the masses, how they combine, their form, unit vectors, learned lambda, negatives, width.
CASES = (
    ("both", "product", "softplus", True, True, 1, 6),
    ("both", "sum", "relu", False, False, 3, 5),
    ("user", "sum", "exp", False, True, 2, 8),
    ("item", "sum", "softplus", True, False, 1, 3),
    ("none", "sum", "softplus", True, True, 2, 4),
)
# Each loss and each case once.
FEW = [*zip(LOSSES, (*CASES, CASES[0]), strict=True)]


def parts(case, kind, device="cpu"):
    """Tables and gravity with some rows of zeros, and the loss of autograd."""
    from gfml.gravity import Gravity
    from gfml.ranking.encoders import Tables

    mass, combine, param, norm, learned, _, width = case
    torch.manual_seed(3)
    tables = Tables(NUM_USERS, NUM_ITEMS, width, init="normal", std=0.5)
    gravity = Gravity(NUM_USERS, NUM_ITEMS, mass=mass, combine=combine, mass_param=param, mass_init="xavier", lamb=1.7,
                      learn_lamb=learned, emb_norm=norm)  # fmt: skip
    with torch.no_grad():
        tables.nodes[0] = tables.nodes[NUM_USERS + 1] = 0
    return nn.ModuleList([tables, gravity]).to(device, kind)


def by_autograd(loss, model, batch) -> dict[str, Tensor]:
    from gfml import losses

    tables, gravity = model
    items = torch.cat([batch.pos[:, None], batch.neg.view(len(batch), -1)], 1)
    user, item, *_ = tables(batch.users, items)
    raw_user, raw_item = gravity.mass.raw(batch.users, items)
    raws = (None, None) if raw_item is None else (raw_item[:, 0], raw_item[:, 1:])
    dots, scores = (user[:, None] * item).sum(-1), gravity(user, item, batch.users, items)
    return losses.pair_loss(
        loss, dot=(dots[:, 0], dots[:, 1:]), gravity=(scores[:, 0], scores[:, 1:]),
        emb_reg=losses.embedding_reg(user, item[:, 0], item[:, 1:]),
        mass=0.0 if loss in ("dot", "bpr") else losses.mass_reg(raw_user, *raws), **WEIGHTS,
    )  # fmt: skip


def triples(size: int, negatives: int, device: str = "cpu", seed: int = 1):
    from gfml.ranking.sampling import Triples

    torch.manual_seed(seed)
    neg = torch.randint(NUM_ITEMS, (size,) if negatives == 1 else (size, negatives))
    ids = torch.randint(NUM_USERS, (size,)), torch.randint(NUM_ITEMS, (size,)), neg
    return Triples(*(part.to(device) for part in ids))


def differences(loss: str, case, size: int, device: str = "cpu") -> float:
    """The largest difference of terms and gradients from those of autograd in float64, relative to the largest entry."""
    from gfml.fused import DevicePairLoss

    single, double = (parts(case, kind, device) for kind in (torch.float32, torch.float64))
    batch, found = triples(size, case[5], device), []
    for model, terms in (
        (single, DevicePairLoss(*single, loss, **WEIGHTS)(batch)), (double, by_autograd(loss, double, batch))
    ):  # fmt: skip
        (1.5 * terms["loss"]).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({name: value.detach().double().cpu() for name, value in (grads | terms).items()})
    if found[0].keys() != found[1].keys():
        raise AssertionError(f"{loss} {case}: {found[0].keys()} and {found[1].keys()}")
    return max(float((found[0][n] - w).abs().max() / max(float(w.abs().max()), 1e-3)) for n, w in found[1].items())


def lazy_steps(device: str = "cpu") -> dict[str, float]:
    """Steps of the kernel beside those without it, and the rows that they alone may move."""
    from gfml.engine.optimizers import LazyAdamW
    from gfml.fused import DevicePairLoss, touched_on_device
    from gfml.kernels import triples as kernels

    runs, wrapped = [], mock.Mock(wraps=kernels.adamw)
    for by_kernel in (True, False):
        model = parts(CASES[0], torch.float32, device)
        loss, optimizer = DevicePairLoss(*model, "mix", **WEIGHTS), LazyAdamW(model.parameters(), lr=0.05)
        start = model[0].nodes.detach().clone()
        for seed in range(2):
            batch = triples(2, 1, device, seed)
            optimizer.zero_grad(set_to_none=True)
            loss(batch)["loss"].backward()
            assert touched_on_device(model[0].nodes.grad) is not None
            if not by_kernel:
                model[0].nodes.grad.kept = model[1].mass.user.grad.kept = model[1].mass.item.grad.kept = None
            with mock.patch.object(kernels, "adamw", wrapped):
                optimizer.step()
        runs.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    untouched = set(range(NUM_USERS + NUM_ITEMS))
    for seed in range(2):
        batch = triples(2, 1, device, seed)
        untouched -= {*batch.users.tolist(), *(NUM_USERS + torch.cat([batch.pos, batch.neg.view(-1)])).tolist()}
    rows = sorted(untouched)
    return {"difference": float((runs[0] - runs[1]).abs().max()), "untouched": len(rows), "calls": wrapped.call_count,
            "moved": float((model[0].nodes.detach()[rows] - start[rows]).abs().sum())}  # fmt: skip


def repeats() -> bool:
    """Whether one user and one item in all pairs give the same bits twice."""
    from gfml.fused import DevicePairLoss
    from gfml.ranking.sampling import Triples

    grads, zeros = [], torch.zeros(40, dtype=torch.int64)
    for _ in range(2):
        model = parts(CASES[0], torch.float32)
        DevicePairLoss(*model, "mix", **WEIGHTS)(Triples(zeros + 1, zeros, zeros + 2))["loss"].backward()
        grads.append(model[0].nodes.grad)
    return torch.equal(*grads) and bool((grads[0][[1, NUM_USERS, NUM_USERS + 2]] != 0).all())


def main(chosen: str, size: int) -> None:
    torch.set_num_threads(1)
    cells = FEW if chosen == "few" else itertools.product(LOSSES, CASES)
    found = {f"{loss} {case}": differences(loss, case, size) for loss, case in cells}
    print(json.dumps({"differences": found, "lazy": lazy_steps(), "repeats": repeats()}))


@pytest.mark.parametrize("chosen, size", (("few", 6), pytest.param("all", 20, marks=pytest.mark.slow)))
def test_kernels_are_as_autograd(chosen: str, size: int) -> None:
    """Pairs of 4 users and 6 items: rows occur several times. In a process of its own: Triton asks once how to run."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, chosen, str(size)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {name: error for name, error in found["differences"].items() if not error < 1e-5} == {}
    assert found["lazy"].pop("difference") < 1e-6 and found["lazy"].pop("untouched") > 0
    assert found["lazy"] == {"moved": 0.0, "calls": 6} and found["repeats"]


class Nothing:
    """A kernel that is not run."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *inputs, **settings: None


def test_nothing_around_the_kernels_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    sys.path.insert(0, str(ROOT / "tests"))
    from stand_in import DEVICE, stand_in_device

    sys.path.remove(str(ROOT / "tests"))
    from gfml.engine.optimizers import LazyAdamW
    from gfml.fused import DevicePairLoss, touched_on_device
    from gfml.kernels import triples as kernels

    for name in ("_pairs", "_sum_rows", "_adamw"):
        monkeypatch.setattr(kernels, name, Nothing())
    with stand_in_device() as device, device:
        model = parts(CASES[0], torch.float32, DEVICE)
        loss, optimizer, batch = (
            DevicePairLoss(*model, "mix", **WEIGHTS),
            LazyAdamW(model.parameters()),
            triples(9, 2, DEVICE),
        )
        device.waits.clear()
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            loss(batch)["loss"].backward()
            assert touched_on_device(model[0].nodes.grad) and model[0].nodes.grad.device == DEVICE
            optimizer.step()
    assert not device.waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_gpu_gives_the_same(loss: str) -> None:
    assert max(differences(loss, case, 300, "cuda") for case in CASES) < 1e-4
    assert lazy_steps("cuda")["difference"] < 1e-5


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
