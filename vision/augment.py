"""Augmentation of whole batches: crop and flip, AutoAugment, CutMix, MixUp, RandomCropPaste.

Every function takes a generator and draws from it alone, so that a batch is a function of its seed. Images are
[B, 3, H, W] on any device; uint8 before :func:`normalize`, float after it. torchvision is imported by AutoAugment alone.

Sources: Cubuk et al., AutoAugment, CVPR 2019; Yun et al., CutMix, ICCV 2019; Zhang et al., mixup, ICLR 2018;
RandomCropPaste is the public ViT-CIFAR project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GREY = 128
# Most magnitudes have ten steps, 0 to 9.
BINS = 10
SIGNED = frozenset(
    {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}
)
ENHANCERS = {
    "Brightness": "adjust_brightness",
    "Color": "adjust_saturation",
    "Contrast": "adjust_contrast",
    "Sharpness": "adjust_sharpness",
}
PLAIN = {"AutoContrast": "autocontrast", "Equalize": "equalize", "Invert": "invert"}

Implementation = Literal["torchvision", "original"]


def crop_and_flip(images: Tensor, generator: torch.Generator, *, padding: int = 4, flip: bool = True) -> Tensor:
    """Shift each image by -padding..padding in both directions, zeros coming in, and mirror it with probability 1/2.

    Shape: images [B, 3, H, W], returned alike. The same as a random crop after zero padding.
    """
    b, _, h, w = images.shape
    top = torch.randint(0, 2 * padding + 1, (b, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (b, 1), generator=generator)
    mirrored = torch.rand(b, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(h), torch.arange(w).expand(b, w)
    columns = left + (torch.where(mirrored, columns.flip(1), columns) if flip else columns)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    return _pick(padded, rows.to(images.device, non_blocking=True), columns.to(images.device, non_blocking=True))


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[b, :, i, j] = images[b, :, rows[b, i], columns[b, j]]."""
    which = torch.arange(len(images), device=images.device)[:, None, None]
    # Indices around a slice put the sliced dimension last.
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixel / 255 - mean) / std as float32; mean, std [3] on the images' device."""
    return ((images.float() - 255 * mean[:, None, None]) / (255 * std[:, None, None])).contiguous()


# -- AutoAugment


@dataclass(frozen=True)
class AutoAugment:
    """One of 25 pairs of operations for each image, uniformly; each of the two fires with its own probability.

    Policies are torchvision's tables ("cifar10" or "svhn"). Images that get the same operation with the same magnitude
    are changed together. implementation "torchvision": as ``torchvision.transforms.v2.AutoAugment(policy, fill=128)``.
    "original": rotation always to the positive side, Solarize thresholds 256..0 instead of 255..0, shear with bicubic
    and translation with unrounded offsets, by Pillow.
    """

    policy: Literal["cifar10", "svhn"] = "cifar10"
    implementation: Implementation = "torchvision"

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [B, 3, H, W] -> the same shape; the input is left as it is."""
        policies = self.policies()
        chosen = torch.randint(len(policies), (len(images),), generator=generator)
        fires = torch.rand(len(images), 2, generator=generator)
        signs = torch.randint(0, 2, (len(images), 2), generator=generator)
        images = images.clone()
        for slot in (0, 1):
            probability = torch.tensor([pair[slot][1] for pair in policies])[chosen]
            keys = torch.where(fires[:, slot] < probability, 2 * chosen + signs[:, slot], -1)
            for key in keys.unique().tolist():
                if key >= 0:
                    rows = torch.nonzero(keys == key).flatten().to(images.device, non_blocking=True)
                    name, _, level = policies[key // 2][slot]
                    images[rows] = self.apply(images[rows], name, level, 1 - 2 * (key % 2))
        return images

    def policies(self) -> list[tuple[tuple[str, float, int | None], ...]]:
        """25 pairs of (operation, probability, magnitude step or None)."""
        from torchvision.transforms import AutoAugment as Library
        from torchvision.transforms import AutoAugmentPolicy

        return Library({"cifar10": AutoAugmentPolicy.CIFAR10, "svhn": AutoAugmentPolicy.SVHN}[self.policy]).policies

    def apply(self, images: Tensor, name: str, level: int | None, sign: int) -> Tensor:
        """One operation at step ``level`` (0..9) for uint8 [B, 3, H, W]; ``sign`` 1 or -1 where the sign is random."""
        import torchvision.transforms.v2.functional as F

        if name in PLAIN:
            return getattr(F, PLAIN[name])(images)
        amount = self.magnitude(name, level, images.shape[-1] if name.endswith("X") else images.shape[-2])
        if name in SIGNED and not (name == "Rotate" and self.implementation == "original"):
            amount *= sign
        if name in ENHANCERS:
            return getattr(F, ENHANCERS[name])(images, 1 + amount)
        if name == "Posterize":
            return F.posterize(images, int(amount))
        if name == "Solarize":
            # Thresholds above 255 change nothing, which the library refuses to be asked for.
            return F.solarize(images, amount) if amount <= 255 else images
        if name == "Rotate":
            return F.rotate(images, amount, fill=[GREY] * 3)
        return self._moved(images, name, amount)

    def magnitude(self, name: str, level: int | None, side: int) -> float:
        """The size of step ``level`` without sign: a slope, pixels, degrees, a change of a factor, bits or a threshold."""
        share = (level or 0) / (BINS - 1)
        if name == "Posterize":
            return round(8 - 4 * share)
        top = 256 if self.implementation == "original" else 255
        ends = {"Shear": (0, 0.3), "Translate": (0, 150 / 331 * side), "Rotate": (0, 30), "Solarize": (top, 0)}
        first, last = ends.get(name.rstrip("XY"), (0, 0.9))
        return first + (last - first) * share

    def _moved(self, images: Tensor, name: str, amount: float) -> Tensor:
        import torchvision.transforms.v2.functional as F

        if self.implementation == "original":
            return _pillow_affine(images, name, amount)
        across, shear = name.endswith("X"), name.startswith("Shear")
        size = math.degrees(math.atan(amount)) if shear else int(amount)
        pair = [size, 0] if across else [0, size]
        return F.affine(
            images, angle=0.0, translate=[0, 0] if shear else pair, scale=1.0, shear=pair if shear else [0.0, 0.0], fill=[GREY] * 3,
            center=[0, 0] if shear else None,
        )  # fmt: skip


def _pillow_affine(images: Tensor, name: str, amount: float) -> Tensor:
    """Shear (bicubic) or translation (nearest) of each image, grey coming in."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    place = {"ShearX": 1, "TranslateX": 2, "ShearY": 3, "TranslateY": 5}[name]
    matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    matrix[place] = amount
    kind = Image.Resampling.BICUBIC if name.startswith("Shear") else Image.Resampling.NEAREST
    done = []
    for image in images.cpu():
        picture = to_pil_image(image)
        done.append(
            pil_to_tensor(picture.transform(picture.size, Image.Transform.AFFINE, matrix, kind, fillcolor=(GREY,) * 3))
        )
    return torch.stack(done).to(images.device, non_blocking=True)


# -- mixtures of images


@dataclass(frozen=True)
class Mixed:
    """Images, the row whose label has the rest of the weight, and the weight ``keep`` of each image's own label."""

    images: Tensor
    partner: Tensor
    keep: float


def cutmix(images: Tensor, generator: torch.Generator) -> Mixed:
    """A box of another image of the batch in each image, the same box for all.

    r ~ U(0, 1); the box has a centre uniform in the image and sides H sqrt(1 - r), W sqrt(1 - r), cut at the border;
    keep is the share of pixels that stay, exactly.
    """
    h, w = images.shape[-2:]
    r, v, u = torch.rand(3, generator=generator).tolist()
    top, bottom = _ends(v * h, h * math.sqrt(1 - r), h)
    left, right = _ends(u * w, w * math.sqrt(1 - r), w)
    partner = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[partner, ..., top:bottom, left:right]
    return Mixed(mixed, partner, 1 - (bottom - top) * (right - left) / (h * w))


def _ends(centre: float, side: float, most: int) -> tuple[int, int]:
    half = side // 2
    return int(min(max(centre - half, 0), most)), int(min(max(centre + half, 0), most))


def mixup(images: Tensor, generator: torch.Generator, probability: float = 0.8) -> Mixed:
    """r x + (1 - r) x of another image, r ~ U(0, 1) for the batch; with 1 - ``probability`` the images as they are."""
    chance, r = torch.rand(2, generator=generator).tolist()
    partner = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    if chance >= probability:
        return Mixed(images, partner, 1.0)
    return Mixed(r * images + (1 - r) * images[partner], partner, r)


def crop_paste(images: Tensor, generator: torch.Generator) -> Tensor:
    """A box of each image blended into the image at another place.

    Per image r ~ U(0, 1), side int(H sqrt(1 - r)) about an integer centre, cut at the border: h x w; the corner it goes
    to is uniform where it fits; the box and the image are each mirrored with probability 1/2; a ~ U(0, 1) and the place
    gets a base + (1 - a) box. Difference from the published code: a box as large as the image is no error.
    Shape: float [B, 3, H, W], returned alike; the input is left as it is.
    """
    b, _, height, width = images.shape
    share = torch.sqrt(1 - torch.rand(b, 1, generator=generator))
    top, tall = _spans((share * height).int(), height, generator)
    left, wide = _spans((share * width).int(), width, generator)
    to_row, to_column = (_below(size - part + 1, generator) for size, part in ((height, tall), (width, wide)))
    flip_box, flip_base, blend = torch.rand(3, b, 1, generator=generator)

    rows, columns = torch.arange(height).expand(b, -1) - to_row, torch.arange(width).expand(b, -1) - to_column
    inside = ((rows >= 0) & (rows < tall))[:, :, None] & ((columns >= 0) & (columns < wide))[:, None, :]
    columns = torch.where(flip_box < 0.5, wide - 1 - columns, columns)
    where = (top + rows).clamp(0, height - 1), (left + columns).clamp(0, width - 1)
    box = _pick(images, *(index.to(images.device, non_blocking=True) for index in where))
    base = torch.where(
        (flip_base < 0.5)[:, :, None, None].to(images.device, non_blocking=True), images.flip(-1), images
    )
    weight = torch.where(inside, blend[:, :, None], 1.0)[:, None].to(images.device, non_blocking=True)
    return weight * base + (1 - weight) * box


def _spans(side: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start and length of boxes of these sides about uniform integer centres, cut at 0 and ``most``."""
    centre = _below(torch.full_like(side, most), generator)
    start, end = (centre - side // 2).clamp(min=0), (centre + side // 2).clamp(max=most)
    return start, end - start


def _below(bound: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers uniform in 0 .. bound - 1, for a bound each."""
    return torch.minimum((torch.rand(bound.shape, generator=generator) * bound).long(), bound.long() - 1)
