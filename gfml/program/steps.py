"""What experiments share in training and judging: list lengths, checks of the data, steps, losses of several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable
from functools import partial
from typing import Any, Protocol

import torch

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions
from gfml.engine.capture import graph_key, replayed
from gfml.engine.distributed import World
from gfml.engine.train import Closure, Step, Terms, plain_step
from gfml.mirror import MirrorGradient
from gfml.ranking.evaluation import USUAL, Definitions
from gfml.ranking.sampling import Triples


class HasProject(Protocol):
    def project(self) -> None: ...


def cut_offs(topks: Collection[int], select_metric: str) -> tuple[int, ...]:
    """The list lengths to judge, ascending: those asked for and that of the metric that selects (``ndcg@20``)."""
    k = select_metric.partition("@")[2]
    return tuple(sorted({*topks, *([int(k)] if k else [])}))


def usual_lengths(settings: Any, data: Interactions) -> tuple[int, ...]:
    """The list lengths asked for; of the usual ones, where none were asked for, those that the catalogue has items for."""
    most = data.num_items
    if "topks" in settings.explicit or max(settings.topks) <= most:
        return tuple(settings.topks)
    kept = tuple(k for k in settings.topks if k <= most) or (most,)
    print(f"note: {data.name} has {most:,} items: lists of {', '.join(map(str, kept))} are judged", file=sys.stderr)
    return kept


def definitions_of(settings: Any, *, judging: bool) -> Definitions:
    """``--metrics-as``, ``--map-denominator``, ``--graded``: of the reported figures; selection keeps the usual ones."""
    if not judging:
        return USUAL
    return Definitions(tuple(settings.metrics_as or ()), settings.map_denominator, settings.graded)


def check_judgeable(data: Interactions, topks: Collection[int], select_metric: str, select_on: str) -> None:
    """UserError unless lists of these lengths can be ranked and the split that selects, and test, have interactions."""
    most, (name, _, k) = data.num_items, select_metric.partition("@")
    if (longest := max(cut_offs(topks, select_metric))) > most:
        lists = " ".join(map(str, sorted({min(length, most) for length in topks})))
        flags = [f"--topks {lists}"] * (max(topks) > most) + [f"--select-metric {name}@{most}"] * (int(k or 0) > most)
        found = f"found a list length of {longest}, wanted at most the {most} items of {data.name}"
        raise UserError(f"{found}: give {' '.join(flags)}")
    if select_on == "val" and data.valid.nnz == 0:
        found = f"{data.name} has no validation part to select on (users with fewer than 3 pairs give none)"
        raise UserError(
            f"{found}: give --split global, a larger --val-ratio or --split-ratios with a larger share for it, or --select-on test and say so"
        )
    if data.test.nnz == 0:
        known = [f"{count:,} {what}" for what, count in data.notes.items() if what.startswith("test pairs also in")]
        found = f"{data.name} has no test interactions{''.join(f' ({what})' for what in known)}, wanted at least one"
        raise UserError(
            f"{found}: give other test pairs, or --split global with --split-ratios that leave test a larger share"
        )


def build_step(settings: Any, optimizer: torch.optim.Optimizer, clip_norm: float | None = None) -> Step:
    """The ordinary step with gradient clipping, or the mirror step of :class:`gfml.program.flags.MirrorSettings`."""
    if settings.mirror == "off":
        return partial(plain_step, clip_norm=clip_norm)
    return MirrorGradient(
        optimizer,
        settings.mirror_alpha1,
        settings.mirror_alpha2,
        settings.mirror_every,
        settings.mirror,
        clip=settings.mirror_clip,
    )


def shared_loss(loss_fn: Callable[[Triples], Terms], world: World, *, reduction: str) -> Callable[[Triples], Terms]:
    """``loss_fn`` of this process's rows of each batch, scaled so that the mean of its gradients over all processes
    (:func:`gfml.engine.distributed.average_gradients`) is the gradient of the whole batch.

    reduction: sum or mean, how the loss treats the rows of a batch; every term must treat them so.
    """
    if world.size == 1:
        return loss_fn

    def compute(batch: Triples) -> Terms:
        mine = batch.rows(world.rows(len(batch)))
        # A batch smaller than the number of processes leaves some without rows; they take one that does not count.
        terms = loss_fn(mine if len(mine) else batch.rows(slice(0, 1)))
        weight = float(len(mine) > 0) if reduction == "sum" else len(mine) / len(batch)
        return {name: value * (weight * world.size) for name, value in terms.items()}

    return compute


class OuterStep:
    """A step around another one: what a subclass leaves open is the inner step's."""

    def __init__(self, inner: Step) -> None:
        self.inner = inner

    @property
    def host_state(self) -> str:
        """What cannot be recorded (:mod:`gfml.engine.capture`), if anything."""
        return getattr(self.inner, "host_state", "")

    def graph_key(self) -> Hashable:
        """What the next call does."""
        return graph_key(self.inner)

    def replayed(self) -> None:
        """Pass on that a call was replayed."""
        replayed(self.inner)

    def new_epoch(self) -> None:
        """Pass the start of an epoch on."""
        if hasattr(self.inner, "new_epoch"):
            self.inner.new_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The inner step's state, empty if it has none."""
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back."""
        if state:
            self.inner.load_state_dict(state)


class ProjectedStep(OuterStep):
    """Another step, then ``model.project()``, which pulls rows back into a ball."""

    def __init__(self, inner: Step, model: HasProject) -> None:
        super().__init__(inner)
        self.model = model

    def __call__(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Terms:
        terms = self.inner(closure, optimizer)
        self.model.project()
        return terms
