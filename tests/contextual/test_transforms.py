"""Crops by pipeline and data set, seeds of single pictures, and the choice of queries for the page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from contextual.report import one_per_class
from contextual.transforms import MEAN, STD, Pictures, in_order, normalised, train_transform
from contextual.transforms import test_transform as plain_transform
from gfml.data.images import ArrayPictures, ImageSet


@pytest.fixture
def wide() -> Tensor:
    """[3, 40, 80], brighter to the right."""
    return torch.linspace(0, 255, 80).expand(3, 40, 80).to(torch.uint8)


@pytest.mark.parametrize(("pipeline", "size"), [("256", 256), ("224", 224), ("256", 32)])
@pytest.mark.parametrize("dataset", ["cub", "sop"])
@pytest.mark.parametrize("kind", ["big", "none"])
def test_every_picture_becomes_the_square(pipeline: str, size: int, dataset: str, kind: str, wide: Tensor) -> None:
    train = train_transform(f"{kind}train" if kind == "big" else kind, pipeline, dataset, size, 0.16, flip=True)
    test = plain_transform(f"{kind}test" if kind == "big" else kind, pipeline, dataset, size)
    for change in (train, test):
        found = change(wide)
        assert found.shape == (3, size, size) and found.dtype == torch.uint8


def test_only_sop_and_inshop_are_squashed(wide: Tensor) -> None:
    """The centre cut of a wide picture lacks its dark left end; the squashed one has nearly all of it."""
    cut, squashed = (plain_transform("bigtest", "256", name, 256)(wide) for name in ("cub", "sop"))
    assert cut.min() > 55 > 20 > squashed.min()


def test_a_crop_follows_its_seed_and_leaves_the_generator_alone() -> None:
    pictures = ArrayPictures(np.random.default_rng(0).integers(0, 255, (3, 20, 20, 3), dtype=np.uint8))
    images = ImageSet(pictures, np.array([0, 1, 1]), ("a", "b"), "three")
    read = Pictures(images, train_transform("bigtrain", "256", "cub", 16, 0.2, flip=True))
    before = torch.get_rng_state()
    one, again, other = read[1, 7], read[1, 7], read[1, 8]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])
    assert one[1] == 1


def test_pictures_come_in_order_and_normalised() -> None:
    pictures = ArrayPictures(np.stack([np.full((8, 8, 3), 10 * number, dtype=np.uint8) for number in range(5)]))
    images = ImageSet(pictures, np.arange(5), tuple("abcde"), "five")
    batches = list(in_order(images, plain_transform("none", "256", "cub", 8), 2, torch.device("cpu"), 0))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(5))
    shades = torch.cat([batch for batch, _ in batches])[:, :, 0, 0]
    torch.testing.assert_close(
        shades * torch.tensor(STD) + torch.tensor(MEAN), (10 * torch.arange(5.0) / 255)[:, None].expand(5, 3)
    )
    assert normalised(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)).is_contiguous(memory_format=torch.channels_last)


def test_queries_are_of_different_classes_while_there_are_any() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert one_per_class(np.array([1, 0, 3, 4, 5, 2]), labels, 3).tolist() == [1, 3, 5]
    assert one_per_class(np.array([1, 0, 3, 4, 5, 2]), labels, 5).tolist() == [1, 3, 5, 0, 4]
    assert len(one_per_class(np.array([1, 0]), labels, 5)) == 2
