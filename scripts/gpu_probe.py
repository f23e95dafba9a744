"""What a program trains with, without training: the arguments its ``main`` hands to :func:`gfml.engine.train.fit`."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = "--demo-users 300 --demo-items 200 --demo-interactions 6000"
RECSYS = f"--dataset synthetic {SMALL} --embedding-dim 16 --batch-size 512 --topks 5 10 --es_metric ndcg@10 --baselines none --report 0"
VISION = "--hidden 48 --mlp-hidden 48 --num-layers 3 --head 4 --num_split 2 --patch 4 --batch-size 128 --max-epochs 2"
CONTEXTUAL = (
    "--backbone small --pretrained 0 --width 8 --embedding-size 16 --image-size 16 --batch-size 32 --IPC 8 --batches-per-epoch 8 "
    "--eval-every 1 --workers 0 --pictures 0 --baselines none --nmi 0 --ks 1 2"
)
MCL = "--demo-users 300 --demo-items 200 --demo-interactions 6000 --dim 16 --batch_size 100 --num_neg 3 --topks 5 10 --baselines none"
CML = f"--dataset demo {SMALL} --dim 16 --topks 5 10 --select-metric recall@10 --batch-size 512 --baselines none --report 0"
HLRM = f"{SMALL} --emb_size 16 --num_relations 4 --num_inter 6 --train_batch_size 512 --topk 5 --eval_size 10"
TRANSCF = HLRM.replace(" --num_relations 4", "")
MIRROR = f"--dataset synthetic {SMALL} --features random --random-widths 48 24 --embedding-dim 16 --batch-size 512 --topks 5 10 --baselines none"
# Programs by name: module and flags. Every way through a program that has code of its own on a device.
PROGRAMS: dict[str, tuple[str, str]] = {
    "recsys mf bpr": ("recsys.main", f"{RECSYS} --model mf --loss_mode bpr"),
    "recsys mf gravity": ("recsys.main", f"{RECSYS} --model mf --loss_mode gravity --learn_lamb"),
    "recsys mf mix_bpr l1": ("recsys.main", f"{RECSYS} --model mf --loss_mode mix_bpr --dist_mode l1 --num-neg 3"),
    "recsys lgn bpr": ("recsys.main", f"{RECSYS} --model lgn --loss_mode bpr"),
    "recsys lgn mix mirror": ("recsys.main", f"{RECSYS} --model lgn --loss_mode mix --mirror two_step"),
    "recsys cml": ("recsys.main", f"{RECSYS} --model cml --loss_mode cml --num-neg 4"),
    "cml pairs": ("cml_baseline.main", f"{CML} --num-neg 5"),
    "cml two-stage": ("cml_baseline.main", f"{CML} --num-neg 5 --sampler two-stage --candidates 50"),
    "cml covariance adam": ("cml_baseline.main", f"{CML} --num-neg 5 --cov-weight 1 --optimizer adam --lr 0.01"),
    "mcl": ("mcl.main", MCL),
    "mcl mix ema": ("mcl.main", f"{MCL} --mix --ema"),
    "mcl tables": ("mcl.main", f"{MCL} --encoder tables"),
    "hlrm base": ("hlrm.train", f"{HLRM} --hlrm_type base"),
    "hlrm plus": ("hlrm.train", f"{HLRM} --hlrm_type plus"),
    "hlrm unpop": ("hlrm.train", f"{HLRM} --hlrm_type plus --history-sampling unpop"),
    "hlrm diagonal": ("hlrm.train", f"{HLRM} --relation-form diagonal"),
    "hlrm transcf": ("hlrm.train", f"{TRANSCF} --model transcf"),
    "hlrm attcml": ("hlrm.train", f"{TRANSCF} --model attcml"),
    "contextual 256": ("contextual.main", CONTEXTUAL),
    "contextual 224": ("contextual.train", CONTEXTUAL),
    "contextual proxy": ("contextual.main", f"{CONTEXTUAL} --loss proxy-anchor"),
    "vision vit": ("vision.main", f"{VISION} --model-name vit"),
    "vision gravity": ("vision.main", f"{VISION} --model-name vit_gra"),
    "vision published mix": ("vision.main", f"{VISION} --model-name vit_gra --mix_on 1 --mix_mode split --split_mix 1 --mass_pos tail --cutmix"),
    "vision l1 content": ("vision.main", f"{VISION} --model-name vit_gra --dist_mode l1 --mass_from content --ema 0.9"),
}  # fmt: skip
TRAINED = (
    "BPR", "LightGCN", "VBPR", "BM3", "FREEDOM", "LayerGCN", "SELFCFED_LGN", "LATTICE", "MGCN", "DualGNN", "DRAGON", "SLMRec",
    "GRCN", "MMGCN", "MVGAE", "SMORE", "MMGCF", "PGL", "LGMRec", "DAMRS",
)  # fmt: skip
# BM3 draws a dropout for each different row on the CPU and for each place elsewhere.
QUIET = {"BM3": " --dropout 0.0"}
PROGRAMS |= {
    f"mirror {name}": ("mirror_grad.main", f"--model {name} {MIRROR}{QUIET.get(name, '')}") for name in TRAINED
}

# On CUDA these have kernels of their own, on the CPU those for CPUs.
KERNELS = {
    f"recsys mf {loss} fused{more}": ("recsys.main", f"{RECSYS} --model mf --loss_mode {loss} --kernel fused {flags}")
    for loss, more, flags in (
        ("bpr", "", "--num-neg 3"), ("gravity", "", "--learn_lamb"), ("mix", " lazy", "--optimizer lazy_adamw"), ("bpr_gra", " products", "--mass_combine product"),
    )
}  # fmt: skip


class NotRun(Exception):
    """A part of the check cannot be run here; the text says why."""


class _Caught(BaseException):
    """Ends a program at the call of ``fit``."""


def caught(name: str, device: str, *more: str, flags: str | None = None) -> SimpleNamespace:
    """The arguments of ``fit`` when a program of :data:`PROGRAMS` runs: model, optimizer, batches, loss_fn, step, ..."""
    module, own = (PROGRAMS | KERNELS)[name]
    words = [*(own if flags is None else flags).split(), "--device", device, "--no-progress", *more]
    return caught_main(importlib.import_module(module).main, words)


def caught_main(main: Callable[[Sequence[str]], int], words: list[str]) -> SimpleNamespace:
    """As :func:`caught`, for any ``main`` and its flags."""
    import gfml.engine.train
    import gfml.program.driver

    original, found = gfml.engine.train.fit, SimpleNamespace()

    def fit(model: Any, optimizer: Any, **named: Any) -> None:
        vars(found).update({"model": model, "optimizer": optimizer, **named})
        raise _Caught

    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as out:
        for module in list(sys.modules.values()):
            if getattr(module, "fit", None) is original:
                stack.enter_context(mock.patch.object(module, "fit", fit))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        with contextlib.suppress(_Caught):
            main([*words, "--out", out])
    if not vars(found):
        raise RuntimeError(f"{main.__module__} {' '.join(words)}: it ended without training")
    return found


def moved(value: Any, device: torch.device | str) -> Any:
    """A batch, of any nesting of tuples, lists and dataclasses, with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value):
        return type(value)(**{part.name: moved(getattr(value, part.name), device) for part in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device) for part in value))
    return type(value)(moved(part, device) for part in value) if isinstance(value, (tuple, list)) else value


class DrawsOfTheCPU(TorchDispatchMode):
    """What is drawn at random comes from the CPU's generator, wherever it is wanted: both devices see the same noise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or "attention" in func.name():
            return func(*args, **kwargs)
        tensors = [part for part in args if isinstance(part, Tensor)]
        where = kwargs.get("device") or (tensors[0].device if tensors else torch.device("cpu"))
        if torch.device(where).type == "cpu":
            return func(*args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        here = moved(tuple(args), "cpu")
        drawn = func(*here, **kwargs)
        if func._schema.is_mutable:
            return args[0].copy_(drawn)
        return moved(drawn, where)


def steps(
    found: SimpleNamespace,
    batches: Sequence[Any],
    device: str,
    call: Callable[[Any], Any] | None = None,
    *,
    draws: bool = True,
) -> Iterator[float]:
    """The loss of one training step for each batch, as ``fit`` makes them, by default with the CPU's draws; or of another ``call``."""
    found.model.train()
    if hasattr(found.step, "new_epoch"):
        found.step.new_epoch()
    call = call or (lambda batch: found.step(lambda: found.loss_fn(batch), found.optimizer))
    torch.manual_seed(0)
    with DrawsOfTheCPU() if draws else contextlib.nullcontext():
        for batch in batches:
            terms = call(moved(batch, device))
            if getattr(found, "ema", None) is not None:
                found.ema.update()
            yield float(terms["loss"])


def vector(model: torch.nn.Module) -> Tensor:
    """All parameters as one float64 vector on the CPU."""
    return torch.cat([parameter.detach().double().cpu().reshape(-1) for parameter in model.parameters()])
