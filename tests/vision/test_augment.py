"""Augmentation of batches: against libraries and plain loops, and what every mixture must keep."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.autoaugment import AutoAugmentPolicy

from vision.augment import ENHANCERS, GREY, AutoAugment, crop_and_flip, crop_paste, cutmix, mixup, normalize

POLICIES = {"cifar10": AutoAugmentPolicy.CIFAR10, "svhn": AutoAugmentPolicy.SVHN}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator(9))


# -- crop and flip


def test_crops_are_windows_of_the_padded_image(images):
    """Each result is one of the 9 x 9 windows, mirrored or not, and all offsets and both sides occur."""
    small = images[:6, :, :10, :10]
    seen = set()
    for seed in range(60):
        out = crop_and_flip(small, generator(seed))
        padded = torch.nn.functional.pad(small, (4, 4, 4, 4))
        for image, result in zip(padded, out, strict=True):
            found = [(i, j, mirrored) for i in range(9) for j in range(9) for mirrored in (0, 1)
                     if torch.equal(window := image[:, i : i + 10, j : j + 10], result.flip(-1) if mirrored else result) and window is not None]  # fmt: skip
            assert len(found) >= 1
            seen.update(found)
    assert {i for i, _, _ in seen} == {j for _, j, _ in seen} == set(range(9)) and {m for *_, m in seen} == {0, 1}


def test_cropping_without_flip_never_mirrors(images):
    ramp = torch.arange(32, dtype=torch.uint8).expand(8, 3, 32, 32) + 1
    out = crop_and_flip(ramp, generator(), flip=False).int()
    inside = (out[..., 1:] > 0) & (out[..., :-1] > 0)
    assert bool(((out[..., 1:] - out[..., :-1]) == 1)[inside].all())


def test_without_padding_and_flip_nothing_changes(images):
    assert torch.equal(crop_and_flip(images, generator(), padding=0, flip=False), images)


def test_equal_seeds_equal_batches(images):
    for change in (crop_and_flip, AutoAugment(), crop_paste):
        given = images.float() if change is crop_paste else images
        kept = given.clone()
        one, same, other = (change(given, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(given, kept)


def test_normalize_is_the_library(images):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)
    torch.testing.assert_close(normalize(images, torch.tensor(mean), torch.tensor(std)), expected, rtol=1e-5, atol=1e-5)


# -- AutoAugment


@pytest.mark.parametrize("name", POLICIES)
def test_policies_and_magnitudes_are_the_librarys(name):
    """25 pairs; every step of every operation as torchvision's."""
    library = v2.AutoAugment(POLICIES[name])
    ours = AutoAugment(name)
    assert ours.policies() == library._policies and len(ours.policies()) == 25
    for operation, (steps, _) in library._AUGMENTATION_SPACE.items():
        magnitudes = steps(10, 32, 32)
        if magnitudes is None:
            continue
        factor = 255 if operation == "Solarize" else 1
        for level in range(10):
            assert ours.magnitude(operation, level, 32) == pytest.approx(factor * float(magnitudes[level]), abs=1e-4), (
                operation
            )


@pytest.mark.parametrize("operation", v2.AutoAugment._AUGMENTATION_SPACE)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_operation_is_the_librarys(images, operation, sign):
    """A batch at once equals the library's one image at a time."""
    library = v2.AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[GREY] * 3)
    steps, signed = library._AUGMENTATION_SPACE[operation]
    for level in (0, 4, 9):
        magnitudes = steps(10, 32, 32)
        magnitude = 0.0 if magnitudes is None else float(magnitudes[level]) * (sign if signed else 1)
        expected = [
            library._apply_image_or_video_transform(image, operation, magnitude, library.interpolation, library._fill)
            for image in images[:5]
        ]
        difference = (AutoAugment().apply(images[:5], operation, level, sign).int() - torch.stack(expected).int()).abs()
        # The library's factors are rounded to float32 before they are used: a pixel may round the other way.
        assert difference.max() <= (operation in ENHANCERS) and (difference > 0).float().mean() < 0.05, (
            operation,
            level,
        )


def test_every_pair_is_drawn_and_fires_as_often_as_it_should(images, monkeypatch):
    """Operations are counted instead of applied; the expected number is the sum of the probabilities."""
    counts: dict[tuple[str, int | None], int] = {}

    def count(self, batch, name, level, sign):
        counts[name, level] = counts.get((name, level), 0) + len(batch)
        return batch

    monkeypatch.setattr(AutoAugment, "apply", count)
    many = images[:1, :, :1, :1].expand(50_000, -1, -1, -1)
    AutoAugment()(many, generator())
    expected: dict[tuple[str, int | None], float] = {}
    for pair in AutoAugment().policies():
        for name, probability, level in pair:
            expected[name, level] = expected.get((name, level), 0.0) + probability * len(many) / 25
    for key, value in expected.items():
        assert abs(counts.get(key, 0) - value) <= 5 * math.sqrt(value) + 1, key


def test_original_details():
    """Rotation to one side only, thresholds from 256, grey at the corners that come in."""
    original, white = AutoAugment(implementation="original"), torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    black = torch.zeros_like(white)
    assert torch.equal(original.apply(black, "Rotate", 9, 1), original.apply(black, "Rotate", 9, -1))
    assert not torch.equal(AutoAugment().apply(black, "Rotate", 9, 1), AutoAugment().apply(black, "Rotate", 9, -1))
    assert original.magnitude("Solarize", 0, 32) == 256 and torch.equal(original.apply(white, "Solarize", 0, 1), white)
    assert bool((AutoAugment().apply(white, "Solarize", 0, 1) == 0).all())
    for implementation in ("original", "torchvision"):
        how = AutoAugment(implementation=implementation)
        for operation in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
            moved = how.apply(black, operation, 9, 1)
            assert set(moved.unique().tolist()) >= {0, GREY}, (implementation, operation)
            assert 0.02 < (moved == GREY).float().mean() < 0.6


# -- mixtures


@pytest.mark.parametrize("seed", range(25))
def test_cutmix_keeps_exactly_the_share_it_says(seed):
    """Every pixel is the image's or the partner's, and the share of its own is ``keep``."""
    images = torch.arange(1, 7).float()[:, None, None, None].expand(6, 3, 32, 32).clone()
    mixed = cutmix(images, generator(seed))
    own, other = mixed.images == images, mixed.images == images[mixed.partner]
    assert bool((own | other).all()) and sorted(mixed.partner.tolist()) == list(range(6))
    moved = mixed.partner != torch.arange(6)
    if moved.any():
        torch.testing.assert_close(own[moved].float().mean((1, 2, 3)), torch.full((int(moved.sum()),), mixed.keep))
    assert 0 <= mixed.keep <= 1
    boxes = ~own[moved][:, 0]
    assert all(torch.equal(box, boxes[0]) for box in boxes)


def test_cutmix_draws_large_and_small_boxes():
    shares = torch.tensor([cutmix(torch.zeros(2, 3, 32, 32), generator(seed)).keep for seed in range(300)])
    # Without the border the mean of 1 - side^2 is 1/2; cut boxes leave more.
    assert 0.5 < shares.mean() < 0.72 and shares.min() < 0.15 and shares.max() > 0.95


def test_mixup_is_a_convex_sum_four_times_out_of_five():
    images = torch.rand(6, 3, 4, 4, generator=generator(3))
    plain = 0
    for seed in range(200):
        mixed = mixup(images, generator(seed))
        plain += mixed.keep == 1.0
        torch.testing.assert_close(mixed.images, mixed.keep * images + (1 - mixed.keep) * images[mixed.partner])
    assert 20 <= plain <= 62
    assert mixup(images, generator(), probability=0.0).images is images


def naive_crop_paste(image, box, corner, flip_box, flip_base, a):
    """The definition with loops: box (top, left, h, w) of the image as it was."""
    top, left, h, w = box
    front = image[:, top : top + h, left : left + w].clone()
    front = front.flip(-1) if flip_box else front
    base = image.flip(-1).clone() if flip_base else image.clone()
    i, j = corner
    base[:, i : i + h, j : j + w] = a * base[:, i : i + h, j : j + w] + (1 - a) * front
    return base


def test_crop_paste_is_the_definition():
    """The drawn numbers put into the loop give the batch's images."""
    images = torch.rand(64, 3, 32, 32, generator=generator(5))
    out = crop_paste(images, generator(8))
    draw = generator(8)
    b = 64
    side = (torch.sqrt(1 - torch.rand(b, 1, generator=draw)) * 32).int()
    ends = []
    for _ in range(2):
        centre = torch.minimum((torch.rand(b, 1, generator=draw) * 32).long(), torch.tensor(31))
        ends.append(((centre - side // 2).clamp(min=0), (centre + side // 2).clamp(max=32)))
    corners = []
    for start, end in ends:
        room = 32 - (end - start) + 1
        corners.append(torch.minimum((torch.rand(b, 1, generator=draw) * room).long(), room - 1))
    flip_box, flip_base, a = torch.rand(3, b, 1, generator=draw)
    for n in range(b):
        (top, bottom), (left, right) = ((int(start[n]), int(end[n])) for start, end in ends)
        box = (top, left, bottom - top, right - left)
        expected = naive_crop_paste(
            images[n], box, (int(corners[0][n]), int(corners[1][n])), flip_box[n] < 0.5, flip_base[n] < 0.5, a[n]
        )
        torch.testing.assert_close(out[n], expected)


def test_crop_paste_stays_in_range():
    images = torch.rand(32, 3, 32, 32, generator=generator(5)) * 4 - 2
    for seed in range(20):
        out = crop_paste(images, generator(seed))
        assert out.shape == images.shape
        assert bool(
            (out.amax((2, 3)) <= images.amax((2, 3)) + 1e-6).all()
            and (out.amin((2, 3)) >= images.amin((2, 3)) - 1e-6).all()
        )
