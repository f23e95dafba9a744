"""Recorded steps give the numbers of plain ones; what cannot be recorded is left alone with a reason."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gfml.base.errors import UserError
from gfml.engine.capture import MOST_FORMS, WARM_UP, StepCapture, capture_problem, graph_key, replayed
from gfml.engine.train import fit, plain_step
from gfml.mirror import MirrorGradient
from gfml.program.steps import ProjectedStep
from gfml.ranking.sampling import Triples

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from stand_in import Replayed

del sys.path[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(20, 4))

    def loss(self, batch: Triples) -> dict[str, Tensor]:
        scores = (self.table[batch.users] * (self.table[batch.pos] - self.table[batch.neg])).sum(1)
        return {"loss": nn.functional.softplus(-scores).mean(), "norm": self.table.square().sum(), "share": 0.5}

    def project(self) -> None:
        self.table.data.clamp_(-1, 1)


STEPS = {
    "plain": lambda model, optimizer: partial(plain_step, clip_norm=1.0),
    "projected": lambda model, optimizer: ProjectedStep(plain_step, model),
    "mirror": lambda model, optimizer: MirrorGradient(optimizer),
    "fused mirror, projected": lambda model, optimizer: ProjectedStep(MirrorGradient(optimizer, mode="fused"), model),
}


def batches(count: int, last: int = 5) -> list[Triples]:
    generator = torch.Generator().manual_seed(1)
    sizes = ([8, 8, 8, last] * count)[:count]
    return [Triples(*torch.randint(20, (3, size), generator=generator).unbind()) for size in sizes]


class Scheduled:
    """A step whose rate falls with its count."""

    def __init__(self, inner: Callable) -> None:
        self.inner, self.count = inner, 0

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = 0.1 / (1 + self.count)

    def __call__(self, closure, optimizer) -> dict:
        self.prepare(optimizer)
        self.count += 1
        return {**self.inner(closure, optimizer), "lr": optimizer.param_groups[0]["lr"]}

    def graph_key(self) -> object:
        return graph_key(self.inner)

    def replayed(self) -> None:
        self.count += 1
        replayed(self.inner)


STEPS |= {
    "scheduled": lambda model, optimizer: Scheduled(partial(plain_step, clip_norm=1.0)),
    "scheduled mirror": lambda model, optimizer: Scheduled(MirrorGradient(optimizer, mode="sgd_mirror")),
}


def pair(
    kind: str, *, lr: float = 0.1, make: type = torch.optim.AdamW
) -> tuple[StepCapture, Callable[[Triples], dict], Model, list[Replayed]]:
    model = Model()
    optimizer = make(model.parameters(), lr=lr)
    made: list[Replayed] = []
    capture = StepCapture(
        model, optimizer, STEPS[kind](model, optimizer), model.loss,
        record=lambda call: made.append(Replayed(capture, call)) or made[-1],
    )  # fmt: skip
    other = copy.deepcopy(model)
    opt = make(other.parameters(), lr=lr)
    step = STEPS[kind](other, opt)

    def plain(batch: Triples) -> dict:
        return step(lambda: other.loss(batch), opt)

    plain.optimizer = opt
    return capture, plain, other, made


@pytest.mark.parametrize("kind", STEPS)
def test_recorded_steps_are_the_steps(kind: str) -> None:
    capture, plain, other, made = pair(kind)
    for batch in batches(40):
        found, wanted = capture(batch), plain(batch)
        assert capture.optimizer.param_groups[0]["lr"].__class__ is float  # the tensor is the recording's alone
        assert {name: float(value) for name, value in found.items()} == {n: float(v) for n, v in wanted.items()}
    assert not capture.reason and sum(one.replays for one in made) >= 25
    assert torch.equal(capture.model.table, other.table)


@pytest.mark.parametrize(
    ("make", "setting", "recordings"),
    [(torch.optim.AdamW, "lr", 2), (torch.optim.AdamW, "weight_decay", 4), (torch.optim.SGD, "lr", 4)],
    ids=["AdamW reads its rate", "AdamW decay", "SGD rate"],
)
def test_a_form_is_recorded_once_and_anew_when_a_setting_changes(make: type, setting: str, recordings: int) -> None:
    capture, plain, other, made = pair("plain", make=make)
    for number, batch in enumerate(batches(24)):
        if number == 12:
            for optimizer in (capture.optimizer, plain.optimizer):
                optimizer.param_groups[0][setting] = 0.02
        capture(batch), plain(batch)
    assert len(made) == recordings and not capture.reason  # two forms
    assert torch.equal(capture.model.table, other.table)
    assert not capture.optimizer.param_groups[0].get("capturable")


def test_a_state_that_is_loaded_brings_its_rate() -> None:
    capture, plain, other, _ = pair("plain")
    for number, batch in enumerate(batches(12, last=8)):
        if number == 6:
            for optimizer in (capture.optimizer, plain.optimizer):
                state = copy.deepcopy(optimizer.state_dict())
                state["param_groups"][0]["lr"] = 0.03
                optimizer.load_state_dict(state)
                capture.forget()  # the moments are other tensors
        capture(batch), plain(batch)
    assert not capture.reason and torch.equal(capture.model.table, other.table)


def test_terms_of_a_step_outlive_the_next() -> None:
    capture, *_ = pair("plain")
    kept = [capture(batch)["loss"] for batch in batches(20, last=8)]
    assert len({float(value) for value in kept}) == 20


def test_batches_of_many_forms_are_left_alone() -> None:
    capture, plain, other, _ = pair("plain")
    for size in range(1, MOST_FORMS + 4):
        batch = Triples(*torch.randint(20, (3, size)).unbind())
        capture(batch), plain(batch)
    assert "forms" in capture.reason and torch.equal(capture.model.table, other.table)
    capture, *_ = pair("plain")
    capture.required = True
    with pytest.raises(UserError, match="`cuda_graph 1`"):
        for size in range(1, MOST_FORMS + 4):
            capture(Triples(*torch.randint(20, (3, size)).unbind()))


@pytest.mark.parametrize("kind", ("plain", "mirror"))
def test_a_recording_that_fails_leaves_a_step_as_it_is(kind: str) -> None:
    capture, plain, other, _ = pair(kind)

    def broken(call: Callable[[], None]) -> None:
        before = capture.model.table.detach().clone(), copy.deepcopy(capture.optimizer.state_dict())
        call()
        capture.model.table.data.copy_(before[0])
        capture.optimizer.load_state_dict(before[1])
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    capture.record = broken
    for batch in batches(12, last=8):
        capture(batch), plain(batch)
    assert capture.reason == "operation not permitted when stream is capturing"
    assert torch.equal(capture.model.table, other.table)


def test_what_cannot_be_recorded_is_named() -> None:
    model, cuda = Model(), torch.device("cuda")
    adam, plain = (torch.optim.Adam(model.parameters(), fused=fused) for fused in (True, False))
    rmsprop, slowing = torch.optim.RMSprop(model.parameters()), torch.optim.Adagrad(model.parameters(), lr_decay=0.1)
    assert "cpu" in capture_problem(model, plain_step, adam, torch.device("cpu"))
    assert capture_problem(model, plain_step, adam, cuda) is None
    assert capture_problem(model, plain_step, torch.optim.SGD(model.parameters()), cuda) is None
    assert capture_problem(model, plain_step, torch.optim.Adagrad(model.parameters()), cuda) is None
    for optimizer in (plain, rmsprop, slowing):
        assert "counts its steps on the host" in capture_problem(model, plain_step, optimizer, cuda)
    assert "mirror" in capture_problem(model, ProjectedStep(MirrorGradient(adam, rng="replay"), model), adam, cuda)
    model.host_state = "it counts"
    assert capture_problem(model, plain_step, adam, cuda) == "it counts"

    class Counting:
        def __call__(self, closure, optimizer):
            return plain_step(closure, optimizer)

    capture = StepCapture(model, adam, Counting(), model.loss, record=lambda call: None)
    for batch in batches(WARM_UP + 2):
        capture(batch)
    assert capture.reason == "a Counting does things on the host"


def test_fit_insists_only_where_it_is_asked_to() -> None:
    model = Model()
    how = {
        "batches": lambda epoch: batches(4),
        "loss_fn": model.loss,
        "evaluate": None,
        "select": None,
        "run": None,
        "epochs": 1,
        "progress": False,
    }
    optimizer = torch.optim.Adam(model.parameters())
    for mode in ("auto", "0"):
        fit(model, optimizer, cuda_graph=mode, **how)
    with pytest.raises(UserError, match="the device is cpu"):
        fit(model, optimizer, cuda_graph="1", **how)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", STEPS)
def test_cuda_graphs_give_the_numbers_of_plain_steps(kind: str) -> None:
    runs = []
    for graphs in (True, False):
        model = Model().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        step = STEPS[kind](model, optimizer)
        capture = StepCapture(model, optimizer, step, model.loss)
        if not graphs:
            capture.reason = "for comparison"
        terms = [capture(Triples(batch.users.cuda(), batch.pos.cuda(), batch.neg.cuda())) for batch in batches(40)]
        runs.append((model.table.detach().cpu(), [float(term["loss"]) for term in terms], capture))
    assert not runs[0][2].reason and runs[0][2]._forms
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
