"""The loss of a batch of images and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gfml.base.errors import UserError
from gfml.engine import distributed
from gfml.engine.train import Closure, Step, Terms
from gfml.longtail import class_loss, deferred_weights
from gfml.program.steps import OuterStep
from vision.data import Batch
from vision.settings import VisionSettings

LOSS_NAMES = {"class-balanced": "cb", "ldam-drw": "ldam"}
# The published cosine falls over this many epochs, however many are trained.
ORIGINAL_COSINE = 200


class Objective(nn.Module):
    """The loss of a batch: {"loss", "accuracy"}.

    Of mixed images the loss is keep L(y) + (1 - keep) L(y'), the accuracy alike. Smoothing eps gives 1 - eps to the
    label and eps / (C - 1) to each other class, which is the library's uniform smoothing with eps C / (C - 1).
    With several processes terms carry the batch's share, so that their mean over processes is that of all images.
    """

    def __init__(self, settings: VisionSettings, counts: np.ndarray) -> None:
        super().__init__()
        self.counts, self.epochs = counts, settings.epochs
        eps, most = settings.smoothing if settings.label_smoothing else 0.0, 1 - 1 / len(counts)
        if eps > most:
            found = f"found --smoothing {eps:g} with {len(counts)} classes"
            raise UserError(f"{found}: above {most:.3g} a label would weigh less than each other class; lower it")
        try:
            self.loss = class_loss(
                LOSS_NAMES.get(settings.long_tail, settings.long_tail), counts, smoothing=eps * len(counts) / (len(counts) - 1),
                beta=settings.cb_beta, tau=settings.tau, gamma=settings.gamma, max_margin=settings.ldam_margin,
                scale=settings.ldam_scale,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(
                f"--long-tail {settings.long_tail}: {error}: raise --imb-factor, or give another loss"
            ) from None
        self.weighted = settings.long_tail in ("class-balanced", "ldam-drw")
        self.deferred = settings.long_tail == "ldam-drw"
        self.first_deferred, self.beta = math.floor(settings.drw_start * settings.epochs) + 1, settings.cb_beta

    def new_epoch(self, epoch: int) -> None:
        """Deferred weights begin after their share of the epochs."""
        if self.deferred:
            self.loss.reweigh(deferred_weights(self.counts, epoch, self.first_deferred, self.beta))

    def terms(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Of logits [B, C]."""
        logits = logits.float()
        answers = logits.detach().argmax(-1)

        def both(measure: Callable[[Tensor], Tensor]) -> Tensor:
            own = measure(batch.labels)
            mixed = isinstance(batch.keep, Tensor) or batch.keep != 1
            return batch.keep * own + (1 - batch.keep) * measure(batch.others) if mixed else own

        return {
            "loss": self._share(batch) * both(lambda labels: self.loss(logits, labels)),
            "accuracy": batch.share * both(lambda labels: (answers == labels).float().mean()),
        }

    def _share(self, batch: Batch) -> Tensor | float:
        """Weight of this process's mean loss: by numbers of images, of a weighted loss by the sums of their weights."""
        if not self.weighted or distributed.world_size() == 1:
            return batch.share
        own = self.loss.weight[batch.labels].sum()
        return own * distributed.world_size() / distributed.sum_over(own)


class Schedule:
    """Learning rate of every step as a share of ``--lr``; steps count from 0.

    natural: linear from lr / W to lr over the W warm-up steps, then a cosine to exactly min_lr at the last step.
    original, constant within an epoch e from 0: lr e / W up to e = W (so the first epoch has none), then a cosine of
        200 epochs that starts at e = W + 1.
    """

    def __init__(self, settings: VisionSettings, steps: int) -> None:
        self.kind, self.per_epoch = settings.schedule, steps
        self.lr, self.least = settings.lr, settings.min_lr
        self.warm, self.total = settings.warmup_epoch * steps, settings.epochs * steps

    def at(self, step: int) -> float:
        """The learning rate of a step."""
        if self.kind == "original":
            return self.of_epoch(step // self.per_epoch, self.warm // self.per_epoch)
        if step < self.warm:
            return self.lr * (step + 1) / self.warm
        return self._cosine((step - self.warm) / max(self.total - 1 - self.warm, 1))

    def of_epoch(self, epoch: int, warm: int) -> float:
        """The published learning rate of an epoch."""
        if epoch <= warm:
            return self.lr * epoch / warm if warm else self.lr
        return self._cosine((epoch - warm - 1) / ORIGINAL_COSINE)

    def _cosine(self, share: float) -> float:
        return self.least + 0.5 * (self.lr - self.least) * (1 + math.cos(math.pi * min(share, 1.0)))


class ScheduledStep(OuterStep):
    """Another step with the learning rate of a :class:`Schedule`; it counts the steps and reports the rate as "lr"."""

    def __init__(self, inner: Step, schedule: Schedule) -> None:
        super().__init__(inner)
        self.schedule, self.count = schedule, 0

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the rate of the next step; a recording's tensors are filled by :mod:`gfml.engine.capture`."""
        rate = self.schedule.at(self.count)
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = rate

    def __call__(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Terms:
        self.prepare(optimizer)
        self.count += 1
        return {**self.inner(closure, optimizer), "lr": optimizer.param_groups[0]["lr"]}

    def replayed(self) -> None:
        """Count a call that was replayed."""
        self.count += 1
        super().replayed()

    def state_dict(self) -> dict[str, Any]:
        """The count, and the inner step's state if it has one."""
        return {"count": self.count, "inner": super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back."""
        self.count = state["count"]
        super().load_state_dict(state["inner"])
