"""Evaluation as a property of a method, not of who calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

P, T, M = ParamSpec("P"), TypeVar("T"), TypeVar("M", bound=nn.Module)


def evaluating(method: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], T]:
    """The method of a module runs in eval mode and without gradient; the mode is as before afterwards."""

    @functools.wraps(method)
    def run(module: M, *args: P.args, **options: P.kwargs) -> T:
        training = module.training
        module.eval()
        try:
            with torch.no_grad():
                return method(module, *args, **options)
        finally:
            module.train(training)

    return run
