"""Every program and model on fake CUDA tensors: what stays on the CPU, or waits for the device, is found without a GPU.

A fake tensor has a shape, a type and a device and no numbers. Operations refuse tensors of two devices, and whatever
needs numbers on the host (``item``, ``nonzero``, boolean indexing, ``unique``) raises: one forward pass shows both. What
fake tensors cannot do: autograd's engine wants a real CUDA context, so backward passes that are written by hand are
called by themselves, and sparse CSR tensors cannot be made, so the one product that uses them is stood in for. Whole
steps, from the drawing of batches to the update, and whole judgings run on a device that holds numbers, refuses tensors of
two devices too and counts what a GPU would wait for (stand_in.py).
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from types import CellType, FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
import gpu_probe as probe  # noqa: E402
from stand_in import DEVICE, OnDevice, Replayed, StandIn, stand_in_device  # noqa: E402

del sys.path[:2]
CUDA = torch.device("cuda", 0)
# Losses that wait for the device, and for what.
WAITING = {
    "contextual proxy": "pytorch-metric-learning asks how many proxies have positives",
    "mirror LATTICE": "the search for neighbours of a rebuilt item graph asks once whether a score is NaN",
}

# How often four steps of these wait. An epoch's first batch may bring over what a thinned graph is made of.
STEP_WAITS = {
    "contextual proxy": {"nonzero": 4, "_local_scalar_dense": 8},
    "mirror LATTICE": {"_local_scalar_dense": 12},
}
FIRST_WAITS = {f"mirror {name}": {"copy from the host": 4} for name in ("FREEDOM", "LayerGCN", "MMGCF", "PGL")}
# Whole steps of these are slow; each program has others.
SLOW = {
    "mirror MVGAE",
    "mirror DAMRS",
    "mirror GRCN",
    "mirror SMORE",
    "mirror LGMRec",
    "vision l1 content",
    "vision gravity",
}
caught = lru_cache(maxsize=None)(probe.caught)


def csr_on_device(indptr: Tensor, indices: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """The shape of the sparse product, and its demand that all parts are on one device."""
    assert indptr.device == indices.device == values.device == dense.device
    assert indptr.dtype == indices.dtype and values.shape == indices.shape
    return dense.new_empty(indptr.shape[0] - 1, dense.shape[1])


def attention_on_device(
    q: Tensor, k: Tensor, v: Tensor, column: Tensor, beta: Tensor | float, options: object
) -> tuple:
    """The shapes that attention kernels give, and their demand that all parts are on one device."""
    assert q.device == k.device == v.device == column.device and column.shape == q.shape[:3]
    assert not isinstance(beta, Tensor) or beta.device == q.device
    return torch.empty_like(v), column.new_empty(1, *column.shape)


def attention_back_on_device(dout: Tensor, out: Tensor, lse: Tensor, *more: Any) -> tuple:
    """As :func:`attention_on_device`, of the gradients."""
    q, k, v, column, beta, _ = more
    assert {part.device for part in (dout, out, lse, q, k, v, column, beta)} == {CUDA}
    return *map(torch.empty_like, (q, k, v)), torch.empty_like(lse[0]), torch.empty_like(beta)


def replace_product(monkeypatch: pytest.MonkeyPatch, product: Callable[..., Tensor]) -> None:
    """Give every module that multiplies by a sparse matrix another function for it."""
    # All are imported first: one that is imported later would take another's replacement for its own.
    for module in [*map(import_module, ("mcl.pairs", "gfml.ranking.sparse", "gfml.ranking.graph"))]:
        monkeypatch.setattr(module, "csr_times_dense", product)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_product(monkeypatch, csr_on_device)
    if find_spec("triton"):
        monkeypatch.setattr("gfml.kernels.power_law.forward", attention_on_device)
        monkeypatch.setattr("gfml.kernels.power_law.backward", attention_back_on_device)
    # Sums in blocks make their gradient along with their value.
    monkeypatch.setattr(torch.autograd, "grad", lambda value, inputs: [torch.empty_like(part) for part in inputs])


@contextmanager
def copying(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, ``copy.deepcopy`` makes fake CUDA tensors of all tensors."""

    def fake(tensor: Tensor, memo: dict[int, object]) -> Tensor:
        if id(tensor) not in memo:
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return memo[id(tensor)]

    with (
        mock.patch.object(Tensor, "__deepcopy__", fake),
        mock.patch.object(nn.Parameter, "__deepcopy__", fake),
        mock.patch.dict(copy._deepcopy_dispatch, {torch.device: lambda device, memo: CUDA}),
    ):
        yield


def on_device(value: object, mode: FakeTensorMode) -> object:
    with copying(mode):
        return copy.deepcopy(value)


@pytest.mark.parametrize("name", probe.PROGRAMS)
def test_a_step_stays_on_its_device(name: str, faked: None) -> None:
    found = caught(name, "cpu")
    mode = FakeTensorMode()
    own = found.model.loss if hasattr(found.model, "loss") else found.loss_fn
    # A nested function is copied with what it holds.
    held = [cell.cell_contents for cell in getattr(own, "__closure__", None) or ()]
    parts = own, held, found.model, next(iter(found.batches(1))), getattr(found, "ema", None)
    loss, held, model, batch, ema = on_device(parts, mode)
    if held:
        loss = FunctionType(own.__code__, own.__globals__, closure=tuple(CellType(part) for part in held))
    with mode:
        model.train()
        try:
            terms = loss(batch)
        except (DataDependentOutputException, DynamicOutputShapeException):
            assert name in WAITING, f"{name} waits for the device"
            return
        assert name not in WAITING
        with torch.autocast("cuda", dtype=torch.bfloat16):
            short = loss(batch)
        for value in (value for part in (terms, short) for value in part.values() if isinstance(value, Tensor)):
            assert value.device == CUDA and value.dtype == torch.float32  # losses are summed in float32
        if ema is not None:
            ema.update()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        torch.optim.AdamW(trained, fused=True, capturable=True).step()


# Other ways through a step, by program: optimizers, mirror steps, averages, samplers, losses.
VARIANTS: dict[str, tuple[str, ...]] = {
    "recsys mf bpr": (
        "--optimizer lazy_adamw", "--optimizer adagrad", "--ema_on 1 --ema_scope all", "--clip_grad 1 --lr_schedule cosine",
        "--sampler per_user", "--sampler interaction",
        *(f"--mirror {mode} --mirror_every 2" for mode in ("two_step", "fused", "precond", "sgd_mirror", "backstitch", "repeat")),
    ),
    "recsys mf gravity": ("--dist_mode emd", "--dist_mode kl --emb_norm 0", "--compat 1", "--mass_combine product"),
    "recsys lgn bpr": ("--dropout 1 --keepprob 0.8",),
    "cml pairs": ("--sampler popularity", "--reduction mean", "--cov-weight 1 --cov-form paper", "--clip-grad 1"),
    "mcl": ("--mode gfml", "--mode mix --dropout 1", "--ema --ema-scope all", "--mirror two_step"),
    "hlrm plus": ("--optimizer adagrad", "--optimizer sgd", "--history-sampling last", "--reduction sum --clip_memory"),
    "contextual 256": (
        "--warm 1", "--batch-norm train", "--pooling gem", "--mirror two_step", "--loss contextual", "--loss normalized-softmax",
        "--loss softbin-ap",
    ),
    "vision published mix": ("--mixup", "--long-tail logit-adjustment --imb-type exp --imb-factor 0.1", "--rcpaste", "--schedule original"),
    "mirror BPR": ("--learner sgd", "--learner adagrad", "--learner rmsprop", "--clip_grad_norm 1", "--behaviour published"),
}  # fmt: skip
VARIED = [(name, flags) for name, ways in VARIANTS.items() for flags in ways]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        pytest.param(
            name, flags, marks=() if name in ("recsys mf bpr", "hlrm plus", "mirror BPR") else pytest.mark.slow
        )
        for name, flags in VARIED
    ],
    ids=[f"{name} {flags}" for name, flags in VARIED],
)
def test_no_other_way_through_a_step_waits(name: str, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(monkeypatch) as device:
        assert not waits_of(started(name, *flags.split()), device)


# Losses of contextual that list pairs or classes, whose number only the device knows.
LISTING = ("contrastive", "triplet", "ms", "ms+miner", "proxy-anchor", "proxy-nca", "cosface", "nt-xent", "fast-ap", "smooth-ap",
           "sup-ap")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("loss", LISTING)
def test_losses_that_list_pairs_wait_and_are_said_to(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(monkeypatch) as device:
        assert waits_of(started("contextual 256", "--loss", loss), device)
    assert f"`{loss}`" in (ROOT / "docs" / "gpu.md").read_text()


def waits_of(found: SimpleNamespace, device: StandIn) -> dict[str, int]:
    """Of drawing three batches and their steps."""
    device.waits.clear()
    for batch in islice(found.batches(1), 3):
        found.step(lambda batch=batch: found.loss_fn(batch), found.optimizer)
        if getattr(found, "ema", None) is not None:
            found.ema.update()
    return dict(device.waits)


@contextmanager
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Inside, the device of stand_in.py is there, and multiplies by sparse matrices."""
    from gfml.ranking.graph import csr_times_dense

    def product(*parts: Tensor) -> Tensor:
        there = isinstance(parts[-1], OnDevice)
        return OnDevice(csr_times_dense(*(part.hidden for part in parts))) if there else csr_times_dense(*parts)

    replace_product(monkeypatch, product)
    with stand_in_device() as device, device:
        yield device


def started(name: str, *more: str) -> SimpleNamespace:
    """What a program trains with, at the start of its first epoch."""
    found = probe.caught(name, "cpu", *more)
    found.model.train()
    if hasattr(found.step, "new_epoch"):
        found.step.new_epoch()
    return found


def steps_of(found: SimpleNamespace, call: Callable[[Any], Any]) -> tuple[list[dict[str, float]], list[int]]:
    """Terms of five whole batches and of the last one, as a hidden CPU tensor has them, and how long each batch is."""
    all_batches = list(found.batches(1))
    batches = [*islice(cycle(all_batches[:-1] or all_batches), 5), all_batches[-1]]
    torch.manual_seed(0)
    terms = []
    for batch in batches:
        terms.append({name: float(value) for name, value in call(batch).items()})
        if getattr(found, "ema", None) is not None:
            found.ema.update()
    return terms, [len(next(part for part in leaves(batch) if part.dim())) for batch in batches]


def counts_of(optimizer: Any) -> list[float]:
    states = [state for part in getattr(optimizer, "parts", (optimizer,)) for state in part.state.values()]
    return [float(state["step"]) for state in states]


def leaves(batch: Any) -> list[Tensor]:
    from gfml.engine.capture import _taken_apart

    return _taken_apart(batch)[0]


# Programs whose last batch has a form of its own, and why it is not filled up.
SHORT_LAST = {
    "vision": "rows meet in mixtures of images and in batch norm",
    "cml covariance adam": "the covariance is that of the rows of the batch",
    **dict.fromkeys(
        ("mirror BM3", "mirror SELFCFED_LGN", "mirror MVGAE"), "the loss draws random numbers for its rows"
    ),
    **dict.fromkeys(
        ("mirror MGCN", "mirror SLMRec", "mirror SMORE", "mirror PGL", "mirror LGMRec", "mirror DAMRS"),
        "the loss compares rows of the batch",
    ),
}
QUICK = {"recsys mf gravity", "cml two-stage", "mcl mix ema", "hlrm transcf", "contextual 224", "vision published mix", "mirror VBPR",
         "mirror FREEDOM"}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in probe.PROGRAMS
        if name not in WAITING
    ],
)
def test_recorded_steps_of_batches_of_one_shape_are_plain_ones_of_short_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a recording must hold of a program: rates, counters, masks; and what rows without weight change."""
    from gfml.engine.capture import StepCapture, capture_problem
    from gfml.program.recommender import Recommender

    with standing_in(monkeypatch):
        found = started(name)
        assert capture_problem(found.model, found.step, found.optimizer, CUDA) is None
        made: list[Replayed] = []
        capture = StepCapture(
            found.model, found.optimizer, found.step, found.loss_fn,
            record=lambda call: made.append(Replayed(capture, call)) or made[-1],
        )  # fmt: skip
        terms, lengths = steps_of(found, capture)
        assert not capture.reason and sum(one.replays for one in made) >= 1
        monkeypatch.setattr(Recommender, "constant_batches", False)
        other = started(name)
        wanted, short = steps_of(other, lambda batch: other.step(lambda: other.loss_fn(batch), other.optimizer))
        program = name.split()[0]
        if name in SHORT_LAST or program in SHORT_LAST:
            assert len(set(lengths)) == 2
        else:
            assert len(set(lengths)) == 1 and (len(set(short)) == 2 or program in ("contextual", "mcl"))
        for one, two in zip(terms, wanted, strict=True):
            assert one == pytest.approx(two, rel=1e-5, abs=1e-7)
        for one, two in zip(found.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(one.hidden, two.hidden, rtol=1e-4, atol=1e-6)
        assert counts_of(found.optimizer) == counts_of(other.optimizer)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in probe.PROGRAMS]
)
def test_a_step_waits_at_its_checks_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing, loss, backward, update, averages and mirror steps; the loss is read back every second step."""
    from gfml.engine.train import TermMeans

    with standing_in(monkeypatch) as device:
        found = started(name)
        assert {parameter.device for parameter in found.model.parameters()} == {DEVICE}
        device.waits.clear()
        batches = list(islice(cycle(found.batches(1)), 5))
        drawing, means = dict(device.waits), TermMeans(1, check_every=2)
        device.waits.clear()
        for batch in batches[1:]:
            means.add(found.step(lambda batch=batch: found.loss_fn(batch), found.optimizer))
            if getattr(found, "ema", None) is not None:
                found.ema.update()
    assert drawing == FIRST_WAITS.get(name, {})
    assert device.waits == {"copy to the host": 2} | STEP_WAITS.get(name, {})
    assert all(np.isfinite(value) for value in means.means().values())


def test_the_stand_in_counts_what_waits() -> None:
    with stand_in_device() as device, device:
        x = torch.arange(6.0, device=DEVICE, requires_grad=True)
        (x * x).sum().backward()
        assert x.grad.device == DEVICE and not device.waits
        for call in (lambda: float(x.detach()[0]), lambda: x[x > 2], lambda: x.unique(), lambda: x.tolist(), lambda: x.cpu(),
                     lambda: torch.zeros(2).to(DEVICE), lambda: bool((x > 2).any()), lambda: x.nonzero(),
                     lambda: torch.repeat_interleave(x.long())):  # fmt: skip
            before = device.waits.total()
            call()
            assert device.waits.total() > before
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(6)
        assert (x + torch.tensor(1.0)).device == DEVICE  # a number may come from the host
        before = device.waits.total()
        assert x[torch.tensor([1, 2])].device == DEVICE and device.waits.total() == before + 1
        assert x.grad.hidden.tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "name", [name for name in probe.PROGRAMS if name.split()[0] in ("recsys", "cml", "mcl", "mirror")]
)
def test_a_block_of_scores_stays_on_its_device(name: str, faked: None) -> None:
    from gfml.ranking.topk import select

    found = caught(name, "cpu")
    mode = FakeTensorMode()
    found.model.eval()
    with torch.no_grad():
        scorer = on_device(found.model.scorer(), mode)
    with mode, torch.no_grad():
        users = torch.empty(5, dtype=torch.int64, device=CUDA)
        scores = scorer.score(users)
        ids, broken = select(scores, 7)
    assert scores.device == ids.device == broken.device == CUDA and ids.shape == (5, 7)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in QUICK and not name.startswith(("contextual", "vision")) else pytest.mark.slow
        )
        for name in probe.PROGRAMS
    ],
)
def test_judging_on_the_device_gives_the_numbers_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation figures of the untrained model; how often the host waits does not grow with users or items."""
    more = {"vision": "--val-fraction 0.1", "hlrm": "--select_metric ndcg@5"}.get(name.split()[0], "").split()

    from vision.experiment import Vision

    # Tensors of inference mode have no version, which those of the stand-in need.
    monkeypatch.setattr(Vision, "predict", torch.no_grad()(Vision.predict.__wrapped__))

    def judged(device: StandIn | None = None) -> dict[str, float]:
        found = probe.caught(name, "cpu", *more)
        found.model.eval()
        if device is not None:
            device.waits.clear()
        with torch.no_grad():
            return found.evaluate("test" if found.select.startswith("test") else "valid")

    wanted = judged()
    with standing_in(monkeypatch) as device:
        assert judged(device) == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert device.waits.total() <= 60


def toy() -> sp.csr_array:
    return sp.csr_array((np.random.default_rng(0).random((30, 400)) < 0.1).astype(np.float64))


@pytest.mark.parametrize("weights", (np.ones(400), np.arange(400)))
def test_negatives_are_drawn_without_waiting(weights: np.ndarray) -> None:
    from gfml.ranking.sampling import FreeItems

    mode = FakeTensorMode()
    free = on_device(FreeItems(toy(), weights, torch.device("cpu")), mode)
    with mode:
        assert free.draw(torch.empty(50, dtype=torch.int64, device=CUDA), None).device == CUDA


class Context(SimpleNamespace):
    """What autograd hands to a function."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Nothing is differentiated here."""

    set_materialize_grads = mark_non_differentiable


def backward_cases() -> dict[str, tuple[type, list[object]]]:
    """Functions with a backward pass of their own, and arguments."""
    from contextual.fused import _Gram, _Once
    from gfml.attention import _FusedPowerLaw, _PowerLaw
    from gfml.kernels.power_law import Options
    from gfml.ranking.graph import _Propagate, build_graph
    from gfml.ranking.sparse import SparseMatrix, _Dots, _Product
    from mcl.pairs import _PairDistances
    from mirror_grad.parts.blocks import _SumInBlocks
    from mirror_grad.parts.refine import _Refined

    matrix, ints = toy(), torch.randint(30, (8,))
    sparse, q = SparseMatrix.from_scipy(matrix), torch.randn(2, 3, 5, 4)
    pairs = [torch.randn(430, 4), ints, torch.tensor([0, *range(2, 17, 2)]), torch.randint(430, (16,))]
    cases = {
        "power law": (_PowerLaw, [q, q.clone(), torch.randn(3, 1, 5), torch.ones(3, 1, 1), 0.3]),
        "propagation": (_Propagate, [torch.randn(430, 4), build_graph(matrix), 3, "mean", None, None]),
        "product": (_Product, [sparse.values, torch.randn(400, 4), sparse, False]),
        "transposed product": (_Product, [sparse.values, torch.randn(30, 4), sparse, True]),
        "dots": (_Dots, [torch.randn(30, 4), torch.randn(400, 4), sparse]),
        "pair distances": (_PairDistances, pairs),
        "gram": (_Gram, [torch.randn(6, 4)]),
        "refinement": (_Refined, [torch.randn(9, 4), torch.randn(9, 4)]),
        "once": (
            _Once,
            [torch.randn(6, 6), torch.randn(()), lambda upstream, saved: upstream * saved, torch.randn(6, 6)],
        ),
        "blocks": (_SumInBlocks, [lambda x, y: (x @ y.T).exp().sum(), 1, 30, torch.randn(8, 4), torch.randn(30, 4)]),
    }
    if find_spec("triton"):
        column = torch.randn(1, 1, 5)
        cases["fused power law"] = (_FusedPowerLaw, [q, q.clone(), q.clone(), column, torch.ones(3, 1, 1), Options()])
    return cases


# On the CPU only, and between processes.
ELSEWHERE = {"_Fused", "_ProjectRows", "_Rows", "_Gather"}


def test_every_backward_pass_by_hand_is_looked_at() -> None:
    papers = ("gfml", "recsys", "vision", "mcl", "cml_baseline", "contextual", "hlrm", "mirror_grad")
    sources = [path.read_text() for paper in papers for path in (ROOT / paper).rglob("*.py")]
    found = {name for text in sources for name in re.findall(r"class (\w+)\(torch\.autograd\.Function\)", text)}
    assert found == ELSEWHERE | {function.__name__ for function, _ in backward_cases().values()}


@pytest.mark.parametrize(
    "name",
    (
        "power law",
        "propagation",
        "product",
        "transposed product",
        "dots",
        "pair distances",
        "gram",
        "refinement",
        "once",
        "blocks",
        "fused power law",
    ),
)
def test_backward_passes_by_hand_stay_on_their_device(name: str, faked: None) -> None:
    function, arguments = backward_cases()[name]
    mode = FakeTensorMode()
    arguments = on_device(arguments, mode)
    context = Context(needs_input_grad=(True,) * len(arguments))
    with mode, torch.no_grad():
        if "setup_context" in vars(function):
            output = function.forward(*arguments)
            function.setup_context(context, tuple(arguments), output)
        else:
            output = function.forward(context, *arguments)
        outputs = output if isinstance(output, tuple) else (output,)
        grads = function.backward(context, *(None if x is None else torch.empty_like(x) for x in outputs))
    grads = grads if isinstance(grads, tuple) else (grads,)
    assert any(isinstance(grad, Tensor) for grad in grads)
    assert all(grad.device == CUDA for grad in grads if isinstance(grad, Tensor))


def test_lazy_steps_count_on_the_device() -> None:
    """A number read on the host would be a constant of a recorded step."""
    from gfml.engine.optimizers import LazyAdamW

    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(7, 3, device=CUDA))
        parameter.grad = torch.empty_like(parameter)
        optimizer = LazyAdamW([parameter])
        for _ in range(2):
            optimizer.step()
        assert all(value.device == CUDA for value in optimizer.state[parameter].values())
