"""Batches: what meets, how often, and that everything repeats by (seed, epoch)."""

from __future__ import annotations

import numpy as np
import pytest

from contextual.samplers import (
    BatchSampler,
    Plan,
    check_single_images,
    class_balanced,
    default_batches,
    half_batches,
    hierarchical,
    paired,
)
from gfml.base.errors import UserError

LABELS = np.repeat(np.arange(12), [4, 5, 6, 7, 8, 9, 10, 4, 4, 3, 2, 30])


def test_a_batch_has_whole_classes_and_no_picture_twice_where_there_are_enough() -> None:
    batches = class_balanced(LABELS, 16, 4, 30, np.random.default_rng(0))
    assert batches.shape == (30, 16)
    for batch in batches:
        groups = LABELS[batch].reshape(4, 4)
        assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == 4
        for group in batch.reshape(4, 4):
            if (LABELS[group[0]] == LABELS).sum() >= 4:
                assert len(set(group.tolist())) == 4


def test_all_classes_are_seen_about_equally_often_and_their_company_changes() -> None:
    batches = class_balanced(LABELS, 16, 4, 30, np.random.default_rng(0))
    seen = np.bincount(LABELS[batches].ravel(), minlength=12) / 4
    assert seen.max() - seen.min() <= 1
    companies = {tuple(sorted(set(LABELS[batch].tolist()))) for batch in batches}
    assert len(companies) > 20


def test_steps_an_epoch_are_the_published_ones() -> None:
    classes = Plan("classes", 128, 4)
    assert default_batches("256", "cub", 5_864, 100, classes) == 15
    assert default_batches("256", "cars", 8_054, 98, classes) == 30
    assert default_batches("256", "inshop", 25_882, 3_997, classes) == 600
    assert default_batches("224", "cub", 5_864, 100, classes) == 45
    assert default_batches("224", "cars", 8_054, 98, Plan("classes", 64, 4)) == 126
    assert default_batches("224", "sop", 59_551, 11_318, Plan("halves", 128, 4)) == 84_480 // 128
    assert default_batches("256", "elsewhere", 1_000, 20, Plan("classes", 40, 4)) == 25


def test_inaturalist_gives_576_batches_and_drops_249_halves_of_plants() -> None:
    classes = np.array([85, 71, 77, 743, 171, 1263, 123, 85, 2136, 92, 157])
    halves = half_batches(np.repeat(np.arange(11), 50 * classes), 70)
    assert halves.tolist() == [24, 20, 22, 208, 48, 353, 34, 24, 598, 26, 44]
    pairs = paired(halves)
    assert len(pairs) == 576
    assert halves[8] - sum(8 in pair for pair in pairs) == 249
    assert all(one != other for one, other in pairs)


def test_a_hierarchical_batch_is_two_halves_of_two_super_classes() -> None:
    supers = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    batches = hierarchical(LABELS, supers, 16, 4, 3, np.random.default_rng(1))
    assert len(batches) <= 30
    for batch in batches:
        above = supers[LABELS[batch]].reshape(2, 8)
        assert (above == above[:, :1]).all() and above[0, 0] != above[1, 0]
    used = np.bincount(supers[LABELS[batches]].ravel()) / 8
    assert (used <= half_batches(supers[LABELS], 3)).all()


@pytest.mark.parametrize("plan", [Plan("classes", 16, 4, 5), Plan("shuffle", 16, 0), Plan("halves", 16, 4, 7)])
def test_an_epoch_is_a_function_of_seed_and_epoch(plan: Plan) -> None:
    supers = np.arange(12) % 3

    def epoch(seed: int, number: int) -> list:
        sampler = BatchSampler(LABELS, plan, seed=seed, supers=supers, pairs=3)
        sampler.epoch = number
        batches = list(sampler)
        assert len(batches) == len(sampler)
        return batches

    assert epoch(1, 2) == epoch(1, 2)
    assert epoch(1, 2) != epoch(1, 3) and epoch(1, 2) != epoch(2, 2)


def test_processes_share_out_the_batch_in_order() -> None:
    plan = Plan("classes", 16, 4, 3)
    whole = list(BatchSampler(LABELS, plan, seed=5))
    parts = [list(BatchSampler(LABELS, plan, seed=5, rows=rows)) for rows in (slice(0, 8), slice(8, 16))]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole


def test_shuffling_uses_every_picture_once_and_leaves_the_rest_out() -> None:
    batches = BatchSampler(LABELS, Plan("shuffle", 16, 0), seed=0).batches(1)
    assert batches.shape == (len(LABELS) // 16, 16) and len(np.unique(batches)) == batches.size


@pytest.mark.parametrize(
    ("plan", "supers", "words"),
    [
        (Plan("classes", 64, 4, 2), None, "found 12 training classes, wanted 16"),
        (Plan("classes", 15, 4, 2), None, "whole classes"),
        (Plan("halves", 16, 4), None, "give --hierarchical 0"),
        (Plan("shuffle", 500, 0), None, "lower --batch-size"),
    ],
)
def test_what_cannot_fill_a_batch_is_named(plan: Plan, supers: None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        BatchSampler(LABELS, plan, seed=0, supers=supers)


def test_classes_with_one_image_are_named() -> None:
    with pytest.raises(UserError, match="training class b, wanted two or more"):
        check_single_images(np.array([0, 0, 1, 2, 2]), ("a", "b", "c"))
    check_single_images(np.array([0, 0, 1, 1]), ("a", "b"))
