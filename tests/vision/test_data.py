"""Batches: epochs as functions of (seed, epoch), shares of processes, samplers, workers; long-tailed parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gfml.base.errors import UserError
from gfml.data.images import ArrayPictures, ImageData, ImageSet
from gfml.engine.distributed import World
from vision.augment import AutoAugment
from vision.data import Augmentation, TrainBatches, VisionData, augmentation, class_weights, load
from vision.main import PROGRAM

PLAIN = Augmentation(crop=False)
EVERYTHING = Augmentation(auto=AutoAugment(), paste=True, mix="cutmix")


def options_of(*words):
    return PROGRAM.parse([*map(str, words)]).each()[0]


def world(rank=0, size=1):
    return World(rank, size, torch.device("cpu"))


@pytest.fixture
def data():
    """30 images of 3 classes (18, 9, 3); the first pixel is the image's number."""
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(30)
    labels = np.repeat([0, 1, 2], [18, 9, 3])
    part = ImageSet(ArrayPictures(images), labels, ("a", "b", "c"), "toy train")
    return VisionData(ImageData("toy", part, part), 8, part.counts, (torch.zeros(3), torch.full((3,), 1 / 255)))


def numbers(batches):
    return [batch.images[:, 0, 0, 0].round().long().tolist() for batch in batches]


def test_an_epoch_holds_every_image_once(data):
    made = TrainBatches(data, PLAIN, batch_size=8, seed=1, world=world())
    epoch = list(made.epoch(1))
    assert len(made.epoch(1)) == len(epoch) == 4 and [len(batch.labels) for batch in epoch] == [8, 8, 8, 6]
    seen = sum(numbers(epoch), [])
    assert sorted(seen) == list(range(30)) and seen != list(range(30))
    assert torch.cat([batch.labels for batch in epoch]).tolist() == [int(data.source.train.labels[n]) for n in seen]
    assert numbers(made.epoch(1)) == numbers(epoch) != numbers(made.epoch(2))
    assert numbers(TrainBatches(data, PLAIN, batch_size=8, seed=2, world=world()).epoch(1)) != numbers(epoch)


def test_a_last_batch_that_is_too_small_is_left_out(data):
    assert TrainBatches(data, PLAIN, batch_size=29, seed=1, world=world()).num_batches == 1
    assert TrainBatches(data, PLAIN, batch_size=28, seed=1, world=world()).num_batches == 2
    assert TrainBatches(data, PLAIN, batch_size=28, seed=1, world=world(0, 2)).num_batches == 1
    with pytest.raises(UserError, match="toy train has 30 images, wanted at least 2 for each process"):
        TrainBatches(data, PLAIN, batch_size=64, seed=1, world=world(0, 16))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_each_batch(data, size):
    whole = numbers(TrainBatches(data, PLAIN, batch_size=8, seed=1, world=world()).epoch(3))
    parts = [
        list(TrainBatches(data, PLAIN, batch_size=8, seed=1, world=world(rank, size)).epoch(3)) for rank in range(size)
    ]
    for together, *batches in zip(whole, *parts, strict=True):
        assert sum(numbers(batches), []) == together
        assert sum(batch.share for batch in batches) == pytest.approx(size)
        assert all(batch.share == pytest.approx(len(batch.labels) * size / len(together)) for batch in batches)


def test_processes_augment_differently(data):
    one, other = (
        next(iter(TrainBatches(data, Augmentation(), batch_size=30, seed=1, world=world(rank, 2)).epoch(1)))
        for rank in (0, 1)
    )
    assert one.images.shape == other.images.shape and not torch.equal(one.images, other.images)


def test_workers_change_nothing(data):
    """Also not the global random numbers, which dropout uses."""
    epochs = []
    for workers in (0, 2):
        torch.manual_seed(5)
        made = TrainBatches(data, EVERYTHING, batch_size=4, seed=1, world=world(), workers=workers)
        epochs.append(([*made.epoch(1)], torch.rand(())))
    (one, drawn), (other, drawn_too) = epochs
    assert torch.equal(drawn, drawn_too)
    for first, second in zip(one, other, strict=True):
        assert (
            torch.equal(first.images, second.images)
            and torch.equal(first.others, second.others)
            and first.keep == second.keep
        )


def test_samplers_draw_classes_as_they_should(data):
    def share(sampler):
        weights = class_weights(sampler, data.counts)
        made = TrainBatches(data, PLAIN, batch_size=8, seed=1, world=world(), weights=weights)
        labels = np.concatenate([data.source.train.labels[made.order(epoch).numpy()] for epoch in range(200)])
        return np.bincount(labels, minlength=3) / len(labels)

    np.testing.assert_allclose(share("none"), [0.6, 0.3, 0.1])
    np.testing.assert_allclose(share("balanced"), [1 / 3] * 3, atol=0.02)
    effective = (1 - 0.9999 ** np.array([18, 9, 3])) ** -1 * np.array([18, 9, 3])
    np.testing.assert_allclose(share("effective"), effective / effective.sum(), atol=0.02)


def test_flags_become_augmentation(data):
    assert augmentation(options_of("--crop", 0), data) == Augmentation(crop=False, flip=True)
    assert augmentation(options_of("--cutmix", "--mixup", "--rcpaste"), data) == Augmentation(paste=True, mix="cutmix")
    for name, policy in (
        ("c10", "cifar10"),
        ("c100", "cifar10"),
        ("cimb100", "cifar10"),
        ("svhn", "svhn"),
        ("cifar10-full-lossy", "cifar10"),
    ):
        assert augmentation(options_of("--autoaugment", "--dataset", name), data).auto == AutoAugment(policy)
    skipped = ("--autoaugment", "--aa_skip_imbalanced", 1, "--dataset")
    assert (
        augmentation(options_of(*skipped, "cimb10"), data).auto is None
        and augmentation(options_of(*skipped, "c10"), data).auto is not None
    )
    assert augmentation(options_of("--autoaugment", "--aa_impl", "original"), data).auto.implementation == "original"


# -- the train part


def test_digits_are_long_tailed_and_small(tmp_path):
    data = load(options_of())
    assert data.counts.tolist() == [128, *(int(129.7 * 0.1 ** (c / 9)) for c in range(1, 10))] and data.image_size == 32
    assert len(data.source.test) == 500 and data.source.valid is None and not data.source.horizontal_flip
    assert load(options_of("--imb-type", "balanced")).counts.sum() == 1297
    assert load(options_of("--rand_number", 1)).fingerprint != data.fingerprint == load(options_of()).fingerprint


def test_validation_is_a_part_of_the_long_tail():
    """It takes no image that the long-tailed train part would not have."""
    whole, data = load(options_of()), load(options_of("--val_fraction", 0.1))
    valid = data.source.valid
    assert (valid.counts + data.counts).tolist() == whole.counts.tolist() and valid.counts.tolist() == [
        13,
        10,
        8,
        6,
        5,
        4,
        3,
        2,
        2,
        1,
    ]
    rows = {bytes(image) for image in data.source.train.array().reshape(len(data.source.train), -1)}
    assert not rows & {bytes(image) for image in valid.array().reshape(len(valid), -1)}


def test_wrong_settings_are_one_line():
    with pytest.raises(UserError, match="found --num-classes 7, wanted 10 for digits"):
        load(options_of("--num-classes", 7))


def test_a_class_without_train_images_is_kept_and_told():
    """As the published draw leaves it at so small a factor; it is trained on nothing and judged like the others."""
    data = load(options_of("--imb-factor", 0.001, "--val_fraction", 0.1))
    assert data.num_classes == 10 and data.counts[-1] == 0 and len(data.source.test) == 500
    assert data.source.notes == ("3 classes have no train image (7, 8, 9), as in the published draw",)


def test_a_train_part_with_nothing_to_set_aside_is_told(tmp_path):
    """A folder whose classes have two images: one trains, one tests."""
    for number in range(6):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "ab"[number % 2] / f"{number // 4}.png")
    words = "--dataset", tmp_path, "--model-name", "vit"
    assert len(load(options_of(*words)).source.train) == 2
    with pytest.raises(UserError, match="one train image a class, none is left to validate on.*drop --val_fraction"):
        load(options_of(*words, "--val_fraction", 0.3))


def test_cimb10_is_the_published_cut(shared_data):
    """Of 10,000 lossless images; counts by the published formula, images by the published draw."""
    data = load(options_of("--dataset", "cimb10", "--data-root", shared_data, "--num-classes", 10))
    assert data.counts.tolist() == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10] and data.source.name == "cimb10"
    assert (
        load(options_of("--dataset", "cimb10", "--imb-type", "step", "--data-root", shared_data)).counts.tolist()
        == [1000] * 5 + [10] * 5
    )


def test_images_in_an_archive_are_made_small(shared_data):
    data = load(options_of("--dataset", "grocery-store", "--data-root", shared_data, "--val_fraction", 0.1))
    assert (
        data.image_size == 32 and data.source.train.array().shape == (2640, 32, 32, 3) and len(data.source.valid) == 296
    )
