"""Pictures for the network: crops of uint8 images, batches read by index, and normalisation on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from contextual.samplers import BatchSampler
from gfml.base.errors import UserError
from gfml.data.images import ImageSet

Transform = Callable[[Tensor], Tensor]
# Channel statistics of ImageNet, which every published network here was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIO = {"256": (0.75, 1.33), "224": (3 / 4, 4 / 3)}
# Data whose test pictures are squashed to the square, and whose train pictures are made smaller before the crop.
SQUASHED = ("sop", "inshop")


def train_transform(kind: str, pipeline: str, dataset: str, size: int, scale: float, *, flip: bool) -> Transform:
    """A random crop of ``scale`` to 1 of the area, made size x size, mirrored half the time; "none": the square alone.

    uint8 [3, H, W] -> uint8 [3, size, size].
    """
    from torchvision.transforms import v2

    if kind == "none":
        return v2.Resize((size, size), antialias=True)
    steps = [v2.Resize(_larger(pipeline, size), antialias=True)] if pipeline == "256" and dataset in SQUASHED else []
    steps.append(v2.RandomResizedCrop(size, scale=(scale, 1.0), ratio=RATIO[pipeline], antialias=True))
    return v2.Compose([*steps, v2.RandomHorizontalFlip()] if flip else steps)


def test_transform(kind: str, pipeline: str, dataset: str, size: int) -> Transform:
    """Resized by 288 / 256 or 256 / 224 (SOP and In-Shop at 256: squashed), centre cut; "none": resized to the square."""
    from torchvision.transforms import v2

    if kind == "none":
        return v2.Resize((size, size), antialias=True)
    larger = _larger(pipeline, size)
    side = (larger, larger) if pipeline == "256" and dataset in SQUASHED else larger
    return v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(size)])


def _larger(pipeline: str, size: int) -> int:
    """The side before the cut: 288 for 256 pixels, 256 for 224 in either pipeline."""
    return round(size * (288 / 256 if pipeline == "256" and size != 224 else 256 / 224))


def normalised(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, channels last in memory, ImageNet's mean and deviation taken out; features stay as they are."""
    if pictures.is_floating_point():
        return pictures
    mean, std = (torch.tensor(values).view(1, 3, 1, 1).to(pictures.device, non_blocking=True) for values in (MEAN, STD))
    return pictures.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


class Pictures(Dataset):
    """Transformed pictures by (index, seed); the seed decides what is random in the transform, in any process.

    A picture that cannot be read is returned as its UserError: raised in a worker it would lose its one line.
    """

    def __init__(self, images: ImageSet, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | UserError:
        index, seed = key
        try:
            picture = torch.from_numpy(np.array(self.images.image(index))).permute(2, 0, 1)
        except UserError as error:
            return error
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            return self.transform(picture), int(self.images.labels[index])
        finally:
            torch.set_rng_state(state)


def collate(items: Sequence[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    """Pictures [B, 3, H, W] uint8 and labels [B], or the first error among them."""
    error = next((item for item in items if isinstance(item, UserError)), None)
    if error is not None:
        return error
    return torch.stack([picture for picture, _ in items]), torch.tensor([label for _, label in items])


class TrainBatches:
    """Batches of an epoch on the device: ``len`` and iteration, for :func:`gfml.engine.train.fit`. Workers are kept."""

    def __init__(
        self, images: ImageSet, transform: Transform, sampler: BatchSampler, device: torch.device, workers: int
    ) -> None:
        self.sampler, self.device = sampler, device
        self._loader = DataLoader(
            Pictures(images, transform),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )

    def __call__(self, epoch: int) -> TrainBatches:
        """The batches of epoch 1, 2, ..."""
        self.sampler.epoch = epoch
        return self

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            yield _placed(batch, self.device)


def in_order(
    images: ImageSet, transform: Transform, batch_size: int, device: torch.device, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every picture once, in order."""
    keys = [
        [(index, 0) for index in range(start, min(start + batch_size, len(images)))]
        for start in range(0, len(images), batch_size)
    ]
    loader = DataLoader(
        Pictures(images, transform),
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),
    )
    for batch in loader:
        yield _placed(batch, device)


def _placed(batch: tuple[Tensor, Tensor] | UserError, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(batch, UserError):
        raise UserError(f"{batch} with --skip-bad-images")
    pictures, labels = batch
    return normalised(pictures.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
