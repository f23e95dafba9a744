"""Which pictures meet in a batch. Every plan is a function of (labels, settings, seed, epoch): [steps, B] indices.

pytorch-metric-learning's MPerClassSampler draws from one process-wide generator and keeps the order of its classes
from epoch to epoch, so a continued run could not repeat its batches; the same rule is 20 lines here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gfml.base.errors import UserError

# Half-batches per pair of super-classes, and pairs, of the published hierarchical sampler.
HALVES, PAIRS = 10, {"sop": 66, "inat": 70}


@dataclass(frozen=True)
class Plan:
    """How an epoch's batches are drawn.

    kind: "classes": B / m classes with m pictures each; "halves": two super-classes, half a batch from each;
    "shuffle": every picture once, the incomplete last batch left out. num_batches: None for "halves" without a limit.
    """

    kind: str
    batch_size: int
    per_class: int
    num_batches: int | None = None


class BatchSampler:
    """Batches of (index, seed): seed decides the picture's random crop, whichever process reads it.

    epoch is set before every pass. rank, size: this process's consecutive part of every batch.
    """

    def __init__(
        self,
        labels: np.ndarray,
        plan: Plan,
        *,
        seed: int,
        supers: np.ndarray | None = None,
        pairs: int = PAIRS["sop"],
        rows: slice = slice(None),
    ) -> None:
        self.labels, self.plan, self.seed, self.supers, self.pairs, self.rows = labels, plan, seed, supers, pairs, rows
        self.epoch = 1
        check_plan(labels, plan, supers)
        self._length = len(self.batches(1))

    def __len__(self) -> int:
        return self._length

    def batches(self, epoch: int) -> np.ndarray:
        """int64 [steps, B] of one epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        plan = self.plan
        if plan.kind == "shuffle":
            return shuffled(len(self.labels), plan.batch_size, rng)[: plan.num_batches]
        if plan.kind == "classes":
            return class_balanced(self.labels, plan.batch_size, plan.per_class, plan.num_batches, rng)
        return hierarchical(self.labels, self.supers, plan.batch_size, plan.per_class, self.pairs, rng)[
            : plan.num_batches
        ]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self.batches(self.epoch)
        seeds = np.random.default_rng((self.seed, self.epoch, 1)).integers(2**62, size=batches.shape)
        for indices, own in zip(batches, seeds, strict=True):
            yield list(zip(indices[self.rows].tolist(), own[self.rows].tolist(), strict=True))


def check_plan(labels: np.ndarray, plan: Plan, supers: np.ndarray | None = None) -> None:
    """UserError when the data cannot fill a batch as the plan asks."""
    if plan.kind == "shuffle":
        if len(labels) < plan.batch_size:
            raise UserError(
                f"found {len(labels)} training images, wanted at least a batch of {plan.batch_size}: lower --batch-size"
            )
        return
    wanted, found = plan.batch_size // plan.per_class, len(np.unique(labels))
    if plan.batch_size % plan.per_class:
        raise UserError(
            f"found a batch of {plan.batch_size} and {plan.per_class} images per class, wanted whole classes: mend --batch-size or --IPC"
        )
    if plan.kind == "classes" and found < wanted:
        least = -(-plan.batch_size // found)
        raise UserError(
            f"found {found} training classes, wanted {wanted} for --batch-size {plan.batch_size} and --IPC {plan.per_class}: "
            f"give --batch-size {found * plan.per_class} or less, or --IPC {least} or more"
        )
    if plan.kind == "halves" and (supers is None or len(np.unique(supers)) < 2):
        raise UserError(
            "a hierarchical batch needs classes of two super-classes, which this data has not: give --hierarchical 0"
        )


def check_single_images(labels: np.ndarray, classes: Sequence[str]) -> None:
    """UserError that names the training classes with one image: such a picture has no positive but its own copy."""
    single = [classes[label] for label in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 1)]
    if single:
        others = f" and {len(single) - 3} more" if len(single) > 3 else ""
        raise UserError(
            f"found one image in the training class {', '.join(single[:3])}{others}, wanted two or more: add images, "
            "or give --single-images drop to leave such classes out, or repeat to draw the image several times"
        )


def shuffled(number: int, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Every index once, in whole batches. Returns [number // B, B]."""
    steps = number // batch_size
    return rng.permutation(number)[: steps * batch_size].reshape(steps, batch_size)


def class_balanced(
    labels: np.ndarray, batch_size: int, per_class: int, num_batches: int, rng: np.random.Generator
) -> np.ndarray:
    """B / m different classes in a batch, m pictures of each side by side. Returns [num_batches, B].

    Classes come from a shuffled list that is dealt out and shuffled anew, so all meet about equally often and the groups
    change (the published sampler repeats one grouping within an epoch). Pictures are drawn without repetition where
    the class has m.
    """
    members, groups = _members(labels), batch_size // per_class
    classes = list(members)
    batches, order = [], np.empty(0, dtype=np.int64)
    while len(batches) < num_batches:
        if len(order) < groups:
            order = rng.permutation(len(classes))
        chosen, order = order[:groups], order[groups:]
        batches.append(np.concatenate([_draw(members[classes[c]], per_class, rng) for c in chosen]))
    return np.stack(batches)


def half_batches(supers_of_images: np.ndarray, pairs: int) -> np.ndarray:
    """How many half-batches every super-class gets: round(2 * 10 * pairs * its share of the images). Returns [S]."""
    counts = np.bincount(supers_of_images)
    return np.round(2 * HALVES * pairs * counts / counts.sum()).astype(np.int64)


def paired(halves: np.ndarray) -> list[tuple[int, int]]:
    """Super-classes of every batch: each in turn meets every other that has halves left, round and round.

    Ends when fewer than two super-classes have any left; the leftovers are not used.
    """
    left, pairs = halves.copy(), []
    while (left > 0).sum() >= 2:
        for one in range(len(left)):
            for other in range(len(left)):
                if other != one and left[one] > 0 and left[other] > 0:
                    left[[one, other]] -= 1
                    pairs.append((one, other))
    return pairs


def hierarchical(
    labels: np.ndarray, supers: np.ndarray, batch_size: int, per_class: int, pairs: int, rng: np.random.Generator
) -> np.ndarray:
    """Batches of two halves from two super-classes, each (B / 2) / m classes of m pictures. Returns [steps, B].

    supers [C]: super-class 0, 1, ... of every class. A super-class deals its classes out from shuffled lists, so one
    that has fewer than a half needs shows a class twice in it.
    """
    members, groups = _members(labels), batch_size // 2 // per_class
    dealers = {s: _deal(np.flatnonzero(supers == s), rng) for s in np.unique(supers).tolist()}
    batches = []
    for pair in paired(half_batches(supers[labels], pairs)):
        classes = [next(dealers[s]) for s in pair for _ in range(groups)]
        batches.append(np.concatenate([_draw(members[c], per_class, rng) for c in classes]))
    rng.shuffle(batches)
    return np.stack(batches)


def _deal(classes: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(classes).tolist()


def _members(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Indices of every class that has any."""
    order = np.argsort(labels, kind="stable")
    known, starts = np.unique(labels[order], return_index=True)
    return dict(zip(known.tolist(), np.split(order, starts[1:]), strict=True))


def _draw(members: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(members, number, replace=len(members) < number)


def default_batches(pipeline: str, dataset: str, num_images: int, num_classes: int, plan: Plan) -> int | None:
    """Steps an epoch as published; for other data about one pass over the images. None: as many as the plan gives.

    256: floor(C / (B / m)) groups of classes, passed 5 times (CUB) or 10 times, at most 42 batches (In-Shop: 600).
    224: rounds of 96 classes, as many as come nearest to one pass; a round gives 96 m / B batches.
    """
    if plan.kind == "shuffle":
        return None
    if plan.kind == "halves":
        return 84_480 // plan.batch_size if pipeline == "224" else None
    groups = plan.batch_size // plan.per_class
    if pipeline == "256" and dataset in ("cub", "cars", "inshop"):
        passes, most = (5 if dataset == "cub" else 10), (600 if dataset == "inshop" else 42)
        return max(1, min(most, num_classes // groups * passes))
    if pipeline == "224" and dataset in ("cub", "cars") and 96 % groups == 0:
        return max(1, round(num_images / (96 * plan.per_class)) * (96 // groups))
    return max(1, round(num_images / plan.batch_size))
