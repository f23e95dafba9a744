"""Labelled images: one type, and readers for known data sets, sprites, idx files, folders, and archives with a table.

    data = load_images("cifar10", data_root="data")        # train, test and, where the data has one, valid
    batch = torch.from_numpy(data.train.array())           # [N, H, W, 3] uint8, all in memory
    data = load_images("photos/", size=96)                 # a folder of images by class, every image made 96 x 96

An :class:`ImageSet` keeps small images as one uint8 array and large ones as files that are read when asked for. Pillow,
torchvision and scikit-learn are imported by the readers that need them, not before.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from gfml.base.errors import UserError, suggest
from gfml.base.files import read_arrays
from gfml.data.registry import data_roots

if TYPE_CHECKING:
    from PIL import Image

Unreadable = Literal["error", "skip"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"})
TRAIN_NAMES, VALID_NAMES, TEST_NAMES = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")
# Mean and standard deviation of the channels, over the whole train part, pixels in 0..1.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "fashion-mnist": ((0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530)),
}
DIGITS_TEST_PER_CLASS = 50
# Tags of a TIFF: bits of a pixel, and whether 0 is white (0) or black (1).
BITS, PHOTOMETRIC = 258, 262


# -- pictures


class Pictures(Protocol):
    """N images in memory or in files; each is uint8 [H, W, 3]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...
    def take(self, indices: np.ndarray) -> Pictures: ...
    def name(self, index: int) -> str: ...
    def update_hash(self, digest: hashlib._Hash) -> None: ...


class ArrayPictures:
    """Images of one size in memory: uint8 [N, H, W, 3]."""

    def __init__(self, array: np.ndarray, source: str = "array") -> None:
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"found {array.dtype} images of shape {array.shape}, wanted uint8 [N, H, W, 3]")
        self.array, self.source = array, source

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.array[index]

    def take(self, indices: np.ndarray) -> ArrayPictures:
        return ArrayPictures(self.array[indices], self.source)

    def name(self, index: int) -> str:
        return f"image {index} of {self.source}"

    def update_hash(self, digest: hashlib._Hash) -> None:
        digest.update(repr(self.array.shape).encode() + np.ascontiguousarray(self.array).data)


class FilePictures:
    """Images in files, or in members of a zip archive, decoded when they are asked for.

    upright: turned as their EXIF data says and put on white where they are transparent, as a user's own pictures are
    meant to be seen; published sets keep their pixels.
    Safe to send to worker processes: an archive is opened anew in each.
    """

    def __init__(
        self, paths: Sequence[str], archive: str | os.PathLike[str] | None = None, *, upright: bool = False
    ) -> None:
        self.paths = np.asarray(paths, dtype=object)
        self.archive = None if archive is None else Path(archive)
        self.upright = upright
        self._zip: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self._bytes(self.paths[index]), self.name(index), upright=self.upright)

    def take(self, indices: np.ndarray) -> FilePictures:
        return FilePictures(self.paths[indices], self.archive, upright=self.upright)

    def name(self, index: int) -> str:
        path = str(self.paths[index])
        return path if self.archive is None else f"{path} in {self.archive}"

    def update_hash(self, digest: hashlib._Hash) -> None:
        """Names and sizes stand for the content: reading every file would cost as much as an epoch."""
        for path in self.paths:
            size = os.path.getsize(path) if self.archive is None else self._open().getinfo(path).file_size
            digest.update(f"{Path(path).name}\0{size}\0".encode())

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_zip": None}

    def _bytes(self, path: str) -> bytes:
        try:
            return Path(path).read_bytes() if self.archive is None else self._open().read(path)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            where = path if self.archive is None else f"{path} in {self.archive}"
            raise UserError(
                f"cannot read the image {where} ({error}): mend or remove it, or skip such images"
            ) from None

    def _open(self) -> zipfile.ZipFile:
        # A forked worker must not share its parent's file position.
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = os.getpid(), open_zip(self.archive)
        return self._zip[1]


def decode(content: bytes, name: str, *, upright: bool = False) -> np.ndarray:
    """uint8 [H, W, 3] of an encoded image; UserError names it when it cannot be decoded.

    Grey of 12 or 16 bits is scaled to 8. Floating-point, 32-bit and signed pictures have no stated range and are refused.
    upright: see :class:`FilePictures`.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":
                return _eight_bits(image, upright)
            if upright and image.has_transparency_data:
                whole = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged file raises almost anything: OSError, SyntaxError, struct.error
        what = str(error).split(" <_io")[0] or type(error).__name__
        raise UserError(f"cannot read the image {name} ({what}): mend or remove it, or skip such images") from None


def _eight_bits(image: Image.Image, upright: bool) -> np.ndarray:
    """Grey of more bits, which the library would cut off at 255, as uint8 [H, W, 3]."""
    # 16 bits have the mode "I" in two formats alone; a TIFF's is wider or has a sign.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"it has pixels of the kind {image.mode!r}, wanted 8 or 16 bits")
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    top, values = 2 ** tags.get(BITS, (16,))[0] - 1, np.asarray(image).astype(np.int64)
    if tags.get(PHOTOMETRIC) == 0:
        values = top - values
    if upright and "transparency" in image.info:
        values = np.where(values == image.info["transparency"], top, values)
    grey = ((values * 255 + top // 2) // top).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(grey[..., None], (*grey.shape, 3)))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the shorter side is scaled to ``size`` (bilinear, antialiased), then the centre is cut."""
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    factor = size / min(height, width)
    scaled = (max(size, round(width * factor)), max(size, round(height * factor)))
    picture = Image.fromarray(image).resize(scaled, Image.Resampling.BILINEAR)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


# -- sets


@dataclass(frozen=True)
class ImageSet:
    """N images with a label each: 0 <= label < C, C = len(classes)."""

    pictures: Pictures
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.pictures):
            found = f"{self.name} has {len(self.pictures)} images and {len(self.labels)} labels"
            raise UserError(f"{found}, wanted one label an image: check the files")
        if len(self.labels) and not (self.labels.min() >= 0 and self.labels.max() < len(self.classes)):
            found = f"{self.name} has labels from {self.labels.min()} to {self.labels.max()}"
            raise UserError(
                f"{found}, wanted 0 to {len(self.classes) - 1} for {len(self.classes)} classes: check the label file"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return self.pictures[index]

    @cached_property
    def counts(self) -> np.ndarray:
        """Images per class [C]."""
        return np.bincount(self.labels, minlength=len(self.classes))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of labels, class names and images (of files: their names and sizes)."""
        digest = hashlib.sha256("\0".join(self.classes).encode() + self.labels.astype("<i8").tobytes())
        self.pictures.update_hash(digest)
        return digest.hexdigest()

    def subset(self, indices: np.ndarray, name: str | None = None) -> ImageSet:
        """The images at these positions, in this order; classes stay."""
        indices = np.asarray(indices)
        return replace(self, pictures=self.pictures.take(indices), labels=self.labels[indices], name=name or self.name)

    def of_classes(self, classes: Sequence[int], name: str | None = None) -> ImageSet:
        """Only these classes, numbered anew 0, 1, ... in the order given: for tests on classes not seen in training."""
        kept = np.flatnonzero(np.isin(self.labels, classes))
        number = np.full(len(self.classes), -1, dtype=np.int64)
        number[list(classes)] = np.arange(len(classes))
        names = tuple(self.classes[label] for label in classes)
        return ImageSet(self.pictures.take(kept), number[self.labels[kept]], names, name or self.name)

    def array(self, size: int | None = None) -> np.ndarray:
        """All images in memory, uint8 [N, H, W, 3]; ``size``: each is made size x size, see :func:`resize`.

        UserError when an image cannot be read, or when they differ in size and none is given.
        """
        if isinstance(self.pictures, ArrayPictures) and (
            size is None or self.pictures.array.shape[1:3] == (size, size)
        ):
            return self.pictures.array
        images = (self.pictures[index] for index in range(len(self)))
        return self._stacked([image if size is None else resize(image, size) for image in images])

    def _stacked(self, images: list[np.ndarray]) -> np.ndarray:
        other = next((index for index, image in enumerate(images) if image.shape != images[0].shape), None)
        if other is not None:
            sizes = " and ".join(
                f"{self.pictures.name(i)} of {images[i].shape[1]} x {images[i].shape[0]}" for i in (0, other)
            )
            raise UserError(
                f"{self.name} holds images of different sizes ({sizes}), wanted one size: give an image size"
            )
        return np.stack(images) if images else np.zeros((0, 1, 1, 3), dtype=np.uint8)

    def in_memory(self, size: int | None = None) -> ImageSet:
        """The same set with :meth:`array` behind it."""
        return replace(self, pictures=ArrayPictures(self.array(size), self.name))

    def readable(self) -> tuple[ImageSet, list[str]]:
        """The images that can be decoded, and the names of those that cannot; reads every file."""
        good = np.ones(len(self), dtype=bool)
        for index in range(len(self)):
            try:
                self.pictures[index]
            except UserError:
                good[index] = False
        return self.subset(np.flatnonzero(good)), [self.pictures.name(index) for index in np.flatnonzero(~good)]

    def require_all_classes(self) -> ImageSet:
        """Itself; UserError when a class has no image."""
        empty = [self.classes[label] for label in np.flatnonzero(self.counts == 0)]
        if empty:
            others = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            raise UserError(f"{self.name} has no image of {', '.join(empty[:3])}{others}: add some or remove the class")
        return self


@dataclass(frozen=True)
class ImageData:
    """A data set in parts. ``statistics``: mean and std of the channels where they are published; ``notes``: what
    a reader of results must know, such as that only a part of the published images is here."""

    name: str
    train: ImageSet
    test: ImageSet
    valid: ImageSet | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    notes: tuple[str, ...] = ()
    horizontal_flip: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def parts(self) -> dict[str, ImageSet]:
        return {
            name: part
            for name, part in (("train", self.train), ("valid", self.valid), ("test", self.test))
            if part is not None
        }

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(part.fingerprint for part in self.parts.values()).encode()).hexdigest()

    def map(self, change: Callable[[ImageSet], ImageSet]) -> ImageData:
        """Every part changed."""
        valid = None if self.valid is None else change(self.valid)
        return replace(self, train=change(self.train), valid=valid, test=change(self.test))


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the three channels of uint8 [N, H, W, 3], pixels in 0..1."""
    values = np.arange(256) / 255
    shares = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)]) / max(
        images[..., 0].size, 1
    )
    mean = shares @ values
    std = np.sqrt(np.maximum(shares @ values**2 - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (rest, part), ascending: of each class round(fraction n), at least 1 and at most n - 1, go to the part.

    Classes with one image keep it in the rest.
    """
    generator, chosen = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(round(fraction * len(members)), 1), len(members) - 1)]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


# -- finding


def load_images(
    dataset: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    size: int | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 2020,
    unreadable: Unreadable = "error",
) -> ImageData:
    """The image data set of that name (see :data:`KNOWN`) or folder.

    data_root: where data sets lie; else $GFML_DATA, ./data, ~/.cache/gfml/data.
    download: fetch CIFAR and SVHN through torchvision if they are missing.
    size: read everything into memory, each image made size x size. None: as it is; files are read when asked for.
    test_fraction, split_seed: the cut of a folder that has no train and test folders, by class.
    unreadable: "error" raises where such an image is met; "skip" reads all at once, leaves them out and says so.
    Raises UserError, one line, for missing data, broken images, empty classes and labels out of range.
    """
    name = ALIASES.get(str(dataset), str(dataset))
    if name in KNOWN:
        data = KNOWN[name](data_roots(data_root), download, name)
    elif Path(dataset).is_dir():
        data = read_folder(Path(dataset), test_fraction, split_seed)
    else:
        names = sorted({*KNOWN, *ALIASES})
        raise UserError(
            f"unknown image data {str(dataset)!r}: give a folder or one of {', '.join(names)}{suggest(str(dataset), names)}"
        )
    if unreadable == "skip":
        data = _without_unreadable(data)
    data = replace(data, train=data.train.require_all_classes())
    return data if size is None else data.map(lambda part: part.in_memory(size))


def _without_unreadable(data: ImageData) -> ImageData:
    skipped: list[str] = []

    def keep(part: ImageSet) -> ImageSet:
        if isinstance(part.pictures, ArrayPictures):
            return part
        good, bad = part.readable()
        skipped.extend(bad)
        return good

    data = data.map(keep)
    note = f"left out {len(skipped)} unreadable images: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}"
    return replace(data, notes=(*data.notes, note)) if skipped else data


def _missing(name: str, roots: Iterable[Path], wanted: str, advice: str) -> UserError:
    return UserError(f"{name} is not below {', '.join(map(str, roots))}: wanted {wanted}; {advice}")


def _places(roots: Iterable[Path], *folders: str) -> list[Path]:
    return [place for root in roots for place in (*(root / folder for folder in folders), root)]


# -- known data


def _cifar(roots: list[Path], download: bool, name: str) -> ImageData:
    """The standard files where they lie, else the sprite folder of that name."""
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    place = next((place for place in _places(roots, name) if (place / folder).is_dir()), None)
    sprite = next((root / name for root in roots if (root / name / "train.webp").is_file()), None)
    if place is None and sprite is not None:
        return read_sprites(sprite, name)

    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    place = place or _fetched(
        roots, download, name, f"{folder}/ or {name}/train.webp", lambda root: kind(root, True, download=True)
    )
    parts = {train: _standard(kind, place, train) for train in (True, False)}
    sets = {
        train: ImageSet(
            ArrayPictures(part.data, name), np.asarray(part.targets), tuple(part.classes), f"{name} {_part(train)}"
        )
        for train, part in parts.items()
    }
    return ImageData(name, sets[True], sets[False], statistics=STATISTICS[name])


def _svhn(roots: list[Path], download: bool, name: str) -> ImageData:
    from torchvision import datasets

    def fetch(root: Path) -> None:
        for split in ("train", "test"):
            datasets.SVHN(root, split, download=True)

    place = next((place for place in _places(roots, name) if (place / "train_32x32.mat").is_file()), None)
    place = place or _fetched(roots, download, name, "train_32x32.mat and test_32x32.mat", fetch)
    parts = {split: _standard(datasets.SVHN, place, split) for split in ("train", "test")}
    sets = {
        split: ImageSet(_rows_of_pixels(part.data, name), part.labels.astype(np.int64), tuple("0123456789"), f"svhn {split}")
        for split, part in parts.items()
    }  # fmt: skip
    return ImageData(name, sets["train"], sets["test"], statistics=STATISTICS[name], horizontal_flip=False)


def _rows_of_pixels(array: np.ndarray, name: str) -> ArrayPictures:
    """[N, 3, H, W] -> [N, H, W, 3]."""
    return ArrayPictures(np.ascontiguousarray(array.transpose(0, 2, 3, 1)), name)


def _fetched(roots: list[Path], download: bool, name: str, wanted: str, fetch: Callable[[Path], object]) -> Path:
    """The first root with the data downloaded into it."""
    if not download:
        raise _missing(name, roots, wanted, "give `data_root`, or `download` to fetch it")
    try:
        fetch(roots[0] / name)
    except (OSError, RuntimeError) as error:
        raise _missing(name, roots, wanted, f"the download failed ({' '.join(str(error).split())})") from error
    return roots[0] / name


def _standard(kind: Callable[..., object], place: Path, part: object) -> object:
    try:
        return kind(place, part)
    except Exception as error:  # damaged files raise almost anything
        raise UserError(
            f"cannot read the files in {place} ({' '.join(str(error).split())}): fetch them anew"
        ) from error


def _part(train: bool) -> str:
    return "train" if train else "test"


def _sprite_folder(roots: list[Path], download: bool, name: str) -> ImageData:
    folder = next((root / name for root in roots if (root / name / "train.webp").is_file()), None)
    if folder is None:
        raise _missing(name, roots, f"{name}/train.webp, test.webp and labels.npz", "give `data_root`")
    return read_sprites(folder, name)


def _fashion(roots: list[Path], download: bool, name: str) -> ImageData:
    folder = next(
        (place for place in _places(roots, name, "FashionMNIST/raw") if list(place.glob("train*-images-idx3-ubyte*"))),
        None,
    )
    if folder is None:
        raise _missing(
            name, roots, f"{name}/train-images-idx3-ubyte.gz, its labels and the test files", "give `data_root`"
        )
    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    train, test = (
        read_idx_pair(folder, prefix, classes, f"{name} {part}")
        for prefix, part in (("train", "train"), ("t*10k", "test"))
    )
    return ImageData(name, train, test, statistics=STATISTICS[name], notes=_subset_note(name, len(train), 60_000))


def _digits(roots: list[Path], download: bool, name: str) -> ImageData:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8, made 32 x 32; 50 of each class, drawn once, are the test."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = np.round(found.images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey])
    order = np.random.default_rng(0).permutation(len(large))
    labels = found.target[order]
    rank = np.zeros(len(labels), dtype=np.int64)
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    whole = ImageSet(ArrayPictures(_colour(large[order]), name), labels.astype(np.int64), tuple("0123456789"), name)
    test = rank < DIGITS_TEST_PER_CLASS
    return ImageData(
        name,
        whole.subset(np.flatnonzero(~test), "digits train"),
        whole.subset(np.flatnonzero(test), "digits test"),
        horizontal_flip=False,
    )


def _grocery(roots: list[Path], download: bool, name: str) -> ImageData:
    folder = next((root / name for root in roots if (root / name / "images.csv").is_file()), None)
    if folder is None:
        raise _missing(name, roots, f"{name}/images.csv and images_96.zip", "give `data_root`")
    return read_zip_with_table(folder, name)


KNOWN: dict[str, Callable[[list[Path], bool, str], ImageData]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "cifar10-full-lossy": _sprite_folder,
    "svhn": _svhn,
    "fashion-mnist": _fashion,
    "grocery-store": _grocery,
}
ALIASES = {"c10": "cifar10", "c100": "cifar100", "fashion_mnist": "fashion-mnist", "grocery": "grocery-store"}
PUBLISHED_TRAIN = {"cifar10": 50_000, "cifar100": 50_000, "cifar10-full-lossy": 50_000}


def _subset_note(name: str, found: int, published: int) -> tuple[str, ...]:
    return (f"{found:,} of the {published:,} published train images of {name} are here",) if found != published else ()


# -- formats


def read_sprites(folder: Path, name: str, tile: int = 32) -> ImageData:
    """``train.webp`` and ``test.webp``, row-major tiles of ``tile`` x ``tile``, with ``labels.npz``.

    labels.npz: y_train, y_test, classes.
    """
    found = read_arrays(folder / "labels.npz", "bring the file back")
    missing = {"y_train", "y_test", "classes"} - found.keys()
    if missing:
        raise UserError(
            f"{folder / 'labels.npz'} has no {', '.join(sorted(missing))}, wanted y_train, y_test and classes"
        )
    classes = tuple(map(str, found["classes"]))
    labels = {part: found[f"y_{part}"].astype(np.int64) for part in ("train", "test")}
    sets = {
        part: ImageSet(ArrayPictures(_tiles(folder / f"{part}.webp", len(y), tile), name), y, classes, f"{name} {part}")
        for part, y in labels.items()
    }
    parent = name.partition("-full")[0]
    notes = _subset_note(name, len(sets["train"]), PUBLISHED_TRAIN.get(name, len(sets["train"])))
    if name.endswith("-lossy"):
        notes += ("the images were compressed again with loss: not for comparison with published accuracy",)
    return ImageData(name, sets["train"], sets["test"], statistics=STATISTICS.get(parent), notes=notes)


def _tiles(path: Path, count: int, tile: int) -> np.ndarray:
    """uint8 [count, tile, tile, 3] cut out of one large picture."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): bring the file back") from None
    sprite = decode(content, str(path))
    rows, columns = sprite.shape[0] // tile, sprite.shape[1] // tile
    if sprite.shape[0] % tile or sprite.shape[1] % tile or rows * columns < count:
        found = f"{path} is {sprite.shape[1]} x {sprite.shape[0]}"
        raise UserError(
            f"{found}, wanted whole tiles of {tile} x {tile} for {count} labels: the picture and labels.npz do not belong together"
        )
    tiles = sprite.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, tile, tile, 3)[:count])


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file, plain or gzip: two zero bytes, type 8, rank r, r big-endian sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): bring the file back") from None
    shape = np.frombuffer(content[4 : 4 + 4 * content[3]], dtype=">u4") if len(content) >= 4 else np.zeros(0)
    start = 4 + 4 * len(shape)
    if content[:3] != b"\0\0\x08" or len(shape) != content[3] or len(content) - start != int(np.prod(shape)):
        raise UserError(f"{path} is not a whole idx file of bytes: bring the file back")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape.astype(int))


def read_idx_pair(folder: Path, prefix: str, classes: tuple[str, ...], name: str) -> ImageSet:
    """Images and labels, ``PREFIX*-images-idx3-ubyte`` and ``PREFIX*-labels-idx1-ubyte``, with or without ``.gz``."""
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        paths = sorted(folder.glob(f"{prefix}*-{kind}-ubyte*"))
        if not paths:
            raise UserError(f"{folder} has no {prefix}*-{kind}-ubyte(.gz): bring the file back")
        found.append(read_idx(paths[0]))
    images, labels = found
    return ImageSet(ArrayPictures(_colour(images), name), labels.astype(np.int64), classes, name)


def _colour(grey: np.ndarray) -> np.ndarray:
    """[N, H, W] -> [N, H, W, 3] with equal channels."""
    return np.ascontiguousarray(np.broadcast_to(grey[..., None], (*grey.shape, 3)))


def read_folder(folder: Path, test_fraction: float = 0.2, seed: int = 2020) -> ImageData:
    """Images by class: ``train/CLASS/*`` with ``test/CLASS/*`` (and ``val/CLASS/*``), or ``CLASS/*``, then cut by class.

    Without ``test`` the ``val`` folder is the test part. Class names are those of the train folder, sorted.
    Hidden files and folders are no part of it.
    """
    below = {name.lower(): folder / name for name in class_folders(folder)}
    train, valid, test = (
        next((below[n] for n in names if n in below), None) for names in (TRAIN_NAMES, VALID_NAMES, TEST_NAMES)
    )
    if train is None:
        whole = _class_folders(folder, _class_names(folder), folder.name)
        if not 0 < test_fraction < 1:
            raise UserError(f"found a test fraction of {test_fraction}, wanted 0 < fraction < 1 to cut {folder}")
        rest, part = stratified_split(whole.labels, test_fraction, seed)
        if not len(part):
            raise UserError(f"{folder} has one image in each class, none is left to test on: add images")
        return ImageData(
            folder.name, whole.subset(rest, f"{folder.name} train"), whole.subset(part, f"{folder.name} test")
        )
    if test is None and valid is None:
        raise UserError(
            f"{folder} has train images but no test or val folder: add one, or give the train folder alone to have it cut"
        )
    classes = _class_names(train)
    sets = {
        part: _class_folders(path, classes, f"{folder.name} {part}")
        for part, path in (("train", train), ("valid", valid), ("test", test))
        if path
    }
    return ImageData(
        folder.name, sets["train"], sets.get("test") or sets["valid"], sets.get("valid") if "test" in sets else None
    )


def is_hidden(name: str) -> bool:
    """What systems and editors leave in folders: .DS_Store, ._1.png, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder of images by class, sorted; hidden ones are left out."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def image_files(folder: Path) -> list[Path]:
    """The images below a folder at any depth, sorted; hidden files and folders are left out at every level."""
    seen: set[Path] = set()

    def walk(place: Path) -> Iterator[Path]:
        # A link back to a folder above would repeat its images.
        if (real := place.resolve()) in seen:
            return
        seen.add(real)
        for path in sorted(place.iterdir()):
            if not is_hidden(path.name):
                yield from walk(path) if path.is_dir() else (path,)

    return sorted(path for path in walk(folder) if path.suffix.lower() in SUFFIXES)


def own_pictures(paths: Iterable[Path]) -> FilePictures:
    """Pictures in a user's own files."""
    return FilePictures([str(path) for path in paths], upright=True)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(class_folders(folder))
    if len(names) < 2:
        raise UserError(
            f"{folder} has {len(names)} class folders, wanted at least 2, each with its images: check the path"
        )
    return names


def _class_folders(folder: Path, classes: tuple[str, ...], name: str) -> ImageSet:
    strange = [name for name in class_folders(folder) if name not in classes]
    if strange:
        raise UserError(
            f"{folder} has the class {strange[0]!r} that the train folder has not: remove it or add train images"
        )
    paths = [image_files(folder / label) if (folder / label).is_dir() else [] for label in classes]
    if not any(paths):
        raise UserError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}) in its class folders: check the path")
    labels = np.repeat(np.arange(len(classes)), [len(part) for part in paths])
    return ImageSet(own_pictures(path for part in paths for path in part), labels, classes, name)


def read_zip_with_table(folder: Path, name: str, label: str = "fine") -> ImageData:
    """``images.csv`` (path, split, LABEL), ``classes.csv`` (LABEL, LABEL_name) and one zip archive that holds the paths.

    split is train, val or test. Classes without a row in classes.csv are named by their number.
    """
    rows = _table(folder / "images.csv", {"path", "split", label})
    archives = sorted(folder.glob("*.zip"))
    if len(archives) != 1:
        raise UserError(f"{folder} has {len(archives)} zip archives beside images.csv, wanted one")
    with open_zip(archives[0]) as archive:
        inside = set(archive.namelist())
    if lost := next((row["path"] for row in rows if row["path"] not in inside), None):
        raise UserError(
            f"{archives[0]} has no {lost}, which images.csv names: bring the archive that belongs to the table"
        )
    names = {row[label]: row[f"{label}_name"] for row in _table(folder / "classes.csv", {label, f"{label}_name"})}
    classes = tuple(names.get(str(c), str(c)) for c in range(1 + max(int(row[label]) for row in rows)))
    sets = {}
    for part in ("train", "val", "test"):
        chosen = [row for row in rows if row["split"] == part]
        labels = np.array([int(row[label]) for row in chosen], dtype=np.int64)
        sets[part] = ImageSet(
            FilePictures([row["path"] for row in chosen], archives[0]), labels, classes, f"{name} {part}"
        )
    return ImageData(name, sets["train"], sets["test"], sets["val"] if len(sets["val"]) else None)


def open_zip(path: Path | None) -> zipfile.ZipFile:
    """The archive, open for reading; UserError when it is missing or damaged."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the archive {path} ({error}): bring it back") from None


def _table(path: Path, columns: set[str]) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): bring the file back") from None
    if not rows or not columns <= rows[0].keys():
        raise UserError(
            f"{path} has the columns {', '.join(rows[0]) if rows else 'of an empty file'}, wanted {', '.join(sorted(columns))}"
        )
    return rows
