"""From a data set to batches: the imbalanced train part, and epochs that are functions of (seed, epoch).

All images stay in memory, or on the GPU, as uint8; a chunk of batches is cropped, mirrored and put through AutoAugment
at once. Chunks can be made by worker processes, and are the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gfml.base.errors import UserError
from gfml.data.images import ImageData, ImageSet, channel_statistics, load_images, stratified_split
from gfml.engine.distributed import World
from gfml.longtail import effective_number_weights, imbalanced_counts, select_indices
from vision.augment import AutoAugment, crop_and_flip, crop_paste, cutmix, mixup, normalize
from vision.settings import VisionSettings

# Images that are augmented at once: enough that each AutoAugment operation has several of them.
CHUNK_IMAGES = 2048
IMBALANCED = {"cimb10": "c10", "cimb100": "c100"}
AUTO_POLICY = {"cifar10": "cifar10", "cifar100": "cifar10", "cifar10-full-lossy": "cifar10", "svhn": "svhn"}
FOLDER_SIZE = 32


@dataclass(frozen=True)
class VisionData:
    """Images of one size in memory: the train part as it is trained on, and the parts that are judged.

    counts [C]: train images per class. statistics: mean and std of the channels. valid None: nothing is set aside.
    """

    source: ImageData
    image_size: int
    counts: np.ndarray
    statistics: tuple[Tensor, Tensor]

    @property
    def num_classes(self) -> int:
        return len(self.source.classes)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint


def load(settings: VisionSettings) -> VisionData:
    """The data set that the flags ask for: read, made one size, thinned out class by class, cut."""
    name = IMBALANCED.get(settings.dataset, settings.dataset)
    data = load_images(
        name, data_root=settings.data_root, download=settings.download, test_fraction=settings.test_fraction,
        split_seed=settings.split_seed, unreadable=settings.unreadable, size=settings.image_size,
    )  # fmt: skip
    if settings.image_size is None:
        data = _one_size(data)
    if data.train.array().shape[1] != data.train.array().shape[2]:
        raise UserError(
            f"{data.name} has images of {data.train.array().shape[2]} x {data.train.array().shape[1]}: give --image-size"
        )
    if settings.num_classes not in (None, len(data.classes)):
        raise UserError(
            f"found --num-classes {settings.num_classes}, wanted {len(data.classes)} for {data.name}: mend or drop the flag"
        )
    train, name = _thinned(data, settings), settings.dataset if settings.dataset in IMBALANCED else data.name
    data = replace(data, train=train, name=name, notes=(*data.notes, *_empty_classes(train)))
    data = _with_valid(data, settings.val_fraction, settings.split_seed)
    mean, std = data.statistics or channel_statistics(data.train.array())
    return VisionData(data, data.train.array().shape[1], data.train.counts, (torch.tensor(mean), torch.tensor(std)))


def _one_size(data: ImageData) -> ImageData:
    """Small images as they are; those of a folder or an archive made 32 x 32."""
    in_memory = hasattr(data.train.pictures, "array")
    return data if in_memory else data.map(lambda part: part.in_memory(FOLDER_SIZE))


def _with_valid(data: ImageData, fraction: float, seed: int) -> ImageData:
    """A validation part of its own, else ``fraction`` of each class of the train part as it is trained on; none for 0."""
    if fraction == 0:
        return replace(data, valid=None)
    if data.valid is not None:
        return data
    rest, part = stratified_split(data.train.labels, fraction, seed)
    if not len(part):
        raise UserError(
            f"{data.name} has one train image a class, none is left to validate on: add images, raise --imb-factor or drop --val_fraction"
        )
    return replace(data, train=data.train.subset(rest), valid=data.train.subset(part, f"{data.name} valid"))


def _thinned(data: ImageData, settings: VisionSettings) -> ImageSet:
    """The long-tailed train part of ``--imb-type`` and ``--imb-factor``."""
    if settings.imb_type == "balanced":
        return data.train
    try:
        counts = imbalanced_counts(settings.imb_type, len(data.classes), len(data.train), settings.imb_factor)
    except ValueError as error:
        raise UserError(f"{data.train.name}: {error}; mend --imb-factor") from None
    return data.train.subset(select_indices(data.train.labels, counts, settings.rand_number))


def _empty_classes(train: ImageSet) -> tuple[str, ...]:
    """A note on classes that the long tail left without a train image."""
    empty = [train.classes[label] for label in np.flatnonzero(train.counts == 0)]
    names = f"{', '.join(empty[:3])}{' ...' if len(empty) > 3 else ''}"
    return (f"{len(empty)} classes have no train image ({names}), as in the published draw",) if empty else ()


# -- batches


@dataclass(frozen=True)
class Batch:
    """images [B, 3, H, W] float; labels, others [B]: each image has ``keep`` of its label and 1 - keep of the other; on other
    devices than the CPU a tensor of the batches that may be mixed, since a recorded step would hold the number.

    share: weight of this process's mean loss, B W / (rows of all W processes), so that means over processes are exact.
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    keep: float | Tensor
    share: float = 1.0


@dataclass(frozen=True)
class Augmentation:
    """What happens to train images, in this order; without anything: normalisation alone."""

    crop: bool = True
    flip: bool = True
    auto: AutoAugment | None = None
    paste: bool = False
    mix: str = "none"  # cutmix, mixup or none

    def pixels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 -> uint8 [B, 3, H, W]."""
        if self.crop:
            images = crop_and_flip(images, generator, flip=self.flip)
        return images if self.auto is None else self.auto(images, generator)

    def finish(self, images: Tensor, labels: Tensor, generator: torch.Generator, share: float) -> Batch:
        """Of one batch of normalised images."""
        if self.paste:
            images = crop_paste(images, generator)
        if self.mix == "none":
            return Batch(images, labels, labels, 1.0, share)
        mixed = (cutmix if self.mix == "cutmix" else mixup)(images, generator)
        return Batch(mixed.images, labels, labels[mixed.partner], mixed.keep, share)


def augmentation(settings: VisionSettings, data: VisionData) -> Augmentation:
    """As the flags say. AutoAugment's policy is that of CIFAR-10, for SVHN its own."""
    auto = None
    if settings.autoaugment and not (settings.aa_skip_imbalanced and settings.dataset in IMBALANCED):
        name = IMBALANCED.get(settings.dataset, settings.dataset).replace("c100", "cifar100").replace("c10", "cifar10")
        auto = AutoAugment(AUTO_POLICY.get(name, "cifar10"), settings.aa_impl)
    mix = "cutmix" if settings.cutmix else "mixup" if settings.mixup else "none"
    return Augmentation(settings.crop, data.source.horizontal_flip, auto, settings.rcpaste, mix)


def class_weights(sampler: str, counts: np.ndarray) -> np.ndarray | None:
    """Weight of one image of each class [C] in drawing an epoch; None: every image once."""
    if sampler == "none":
        return None
    return 1 / np.maximum(counts, 1) if sampler == "balanced" else effective_number_weights(counts)


class TrainBatches:
    """Epochs of augmented batches of the train part.

    An epoch is a permutation, or with ``weights`` [C] N draws with replacement; the last, smaller batch is kept unless
    some process would get fewer than two images. Order and augmentation depend on (seed, epoch, process) alone.
    """

    def __init__(
        self,
        data: VisionData,
        how: Augmentation,
        *,
        batch_size: int,
        seed: int,
        world: World,
        weights: np.ndarray | None = None,
        workers: int = 0,
        most: int | None = None,
    ) -> None:
        self.how, self.batch_size, self.seed, self.world, self.workers = how, batch_size, seed, world, workers
        train = data.source.train
        device = torch.device("cpu") if workers else world.device
        self.images = torch.from_numpy(np.ascontiguousarray(train.array().transpose(0, 3, 1, 2))).to(device)
        self.labels = torch.from_numpy(train.labels).to(device)
        self.weights = None if weights is None else torch.from_numpy(weights[train.labels]).double()
        self.mean, self.std = (values.to(device) for values in data.statistics)
        last = len(train) % batch_size
        self.num_batches = len(train) // batch_size + (last >= 2 * world.size)
        self.num_batches = min(self.num_batches, most or self.num_batches)
        if self.num_batches == 0:
            raise UserError(f"{train.name} has {len(train)} images, wanted at least 2 for each process: add images")

    def epoch(self, number: int) -> Epoch:
        """The batches of epoch ``number``."""
        return Epoch(self, number)

    def order(self, number: int) -> Tensor:
        """Positions of the images of an epoch, in order: the same in every process."""
        generator = seeded(self.seed, number)
        if self.weights is None:
            return torch.randperm(len(self.labels), generator=generator)
        return torch.multinomial(self.weights, len(self.labels), replacement=True, generator=generator)

    def chunk(self, number: int, first: int, rows: Sequence[Tensor]) -> list[Batch]:
        """Batches ``first``, first + 1, ... of an epoch; rows: the positions of each batch in all processes."""
        generator = seeded(self.seed, number, first, self.world.rank)
        mine = [batch[self.world.rows(len(batch))] for batch in rows]
        where = torch.cat(mine).to(self.labels.device, non_blocking=True)
        images = normalize(self.how.pixels(self.images[where], generator), self.mean, self.std)
        sizes = [len(batch) for batch in mine]
        shares = [len(own) * self.world.size / len(batch) for own, batch in zip(mine, rows, strict=True)]
        parts = zip(images.split(sizes), self.labels[where].split(sizes), shares, strict=True)
        return [self.how.finish(part, labels, generator, share) for part, labels, share in parts]


class Epoch:
    """One pass: its length is the number of batches."""

    def __init__(self, batches: TrainBatches, number: int) -> None:
        self.batches, self.number = batches, number
        rows = batches.order(number).split(batches.batch_size)[: batches.num_batches]
        step = max(1, CHUNK_IMAGES // batches.batch_size)
        self.chunks = [(first, rows[first : first + step]) for first in range(0, len(rows), step)]

    def __len__(self) -> int:
        return self.batches.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for chunk in self._chunks():
            yield from (to_device(batch, self.batches.world.device, self.batches.how.mix != "none") for batch in chunk)

    def _chunks(self) -> Iterator[list[Batch]]:
        if not self.batches.workers:
            return (self.batches.chunk(self.number, *chunk) for chunk in self.chunks)
        # A generator of its own: the loader would otherwise draw from the global one that dropout uses.
        return iter(torch.utils.data.DataLoader(
            _Chunks(self), batch_size=None, num_workers=self.batches.workers, generator=torch.Generator(), worker_init_fn=_one_thread,
        ))  # fmt: skip


class _Chunks(torch.utils.data.Dataset):
    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.epoch.chunks)

    def __getitem__(self, index: int) -> list[Batch]:
        return self.epoch.batches.chunk(self.epoch.number, *self.epoch.chunks[index])


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def to_device(batch: Batch, device: torch.device, mixed: bool) -> Batch:
    """The batch with its tensors on the device; mixed: whether ``keep`` may be any number."""
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in ("images", "labels", "others")}
    if mixed and device.type != "cpu":
        moved["keep"] = torch.full((), batch.keep, device=device)
    return replace(batch, **moved)


def seeded(*words: int) -> torch.Generator:
    """A CPU generator that is a function of the words."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))
