"""Data sets for retrieval: classes to train on, other classes to validate on, others again to test on.

Published splits are made from the official annotation files and checked against the published counts: the first half
of the class ids trains (CUB, Cars), or the files say it (SOP, In-Shop). The authors' list files are read too. Small
sets follow the same rule: the first half of the classes trains.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gfml.base.errors import UserError
from gfml.data.images import (
    ArrayPictures,
    FilePictures,
    ImageSet,
    class_folders,
    image_files,
    load_images,
    own_pictures,
)


@dataclass(frozen=True)
class Counts:
    """Published numbers: training images and classes, test images and classes, gallery images."""

    train: int
    train_classes: int
    test: int
    test_classes: int
    gallery: int | None = None


COUNTS = {
    "cub": Counts(5_864, 100, 5_924, 100),
    "cars": Counts(8_054, 98, 8_131, 98),
    "sop": Counts(59_551, 11_318, 60_502, 11_316),
    "inshop": Counts(25_882, 3_997, 14_218, 3_985, 12_612),
    "inat": Counts(250_150, 5_003, 249_850, 4_997),
}
# The kingdom, phylum or class that a folder name tells -> number of iNaturalist's super-category: Amphibians, Animalia (1),
# Arachnids, Birds, Fungi, Insects, Mammals, Mollusks, Plants, Ray-finned Fishes, Reptiles.
_INAT_BY_TAXON = {"Amphibia": 0, "Arachnida": 2, "Aves": 3, "Fungi": 4, "Insecta": 5, "Mammalia": 6, "Mollusca": 7,
                  "Plantae": 8, "Actinopterygii": 9, "Reptilia": 10}  # fmt: skip
DIGITS_TRAINED = 6


@dataclass(frozen=True)
class RetrievalData:
    """Parts whose classes are disjoint. Labels are 0, 1, ... within a part, but gallery's are test's.

    valid: None when selection is on test. test is judged by itself, or against ``gallery`` where the data has one.
    supers [C]: the super-class of every training class, for hierarchical batches. flip: may pictures be mirrored?
    """

    name: str
    train: ImageSet
    test: ImageSet
    valid: ImageSet | None = None
    gallery: ImageSet | None = None
    supers: np.ndarray | None = None
    flip: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def fingerprint(self) -> str:
        """A hash of every part."""
        import hashlib

        parts = [part.fingerprint for part in (self.train, self.valid, self.test, self.gallery) if part is not None]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def sizes(self) -> str:
        """Images and classes of every part."""
        parts = {"train": self.train, "validation": self.valid, "test": self.test, "gallery": self.gallery}
        known = {name: part for name, part in parts.items() if part is not None}
        return ", ".join(f"{name} {len(part):,} of {len(part.classes):,} classes" for name, part in known.items())

    @property
    def num_classes(self) -> int:
        """Training classes."""
        return len(self.train.classes)


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    split_lists: Sequence[str] | None = None,
    split_seed: int = 2020,
    check_counts: bool = True,
) -> RetrievalData:
    """The data set of that name below ``root``, or a folder of images by class; nothing held out for validation yet.

    split_lists, split_seed: for iNat, the authors' two lists, or the draw of a split without them.
    UserError, one line: a missing folder, annotation file or image, or counts other than the published ones.
    """
    if name in ("digits", "cifar100", "grocery-store"):
        return _small(name, root)
    if name not in COUNTS:
        return read_class_folder(Path(name))
    if root is None:
        raise UserError(f"{name} needs --root, the folder with its images and annotation files{_script(name)}")
    folder = _folder(Path(root), name)
    if name == "inat":
        data = _read_inat(folder, split_lists, split_seed)
    else:
        data = {"cub": _read_cub, "cars": _read_cars, "sop": _read_sop, "inshop": _read_inshop}[name](folder)
    if check_counts:
        _check_counts(data, COUNTS[name])
    _check_files(data, folder)
    return data


def hold_out(data: RetrievalData, share: float, seed: int) -> RetrievalData:
    """Move round(share C) of the C training classes, at least 2, to validation; drawn by ``seed``.

    Only classes with two or more images are drawn: a query needs somebody to find. UserError when too few are left.
    """
    counts = data.train.counts
    usable = np.flatnonzero(counts >= 2)
    number = max(2, round(share * data.num_classes))
    if len(usable) < number or data.num_classes - number < 2:
        found = f"found {data.num_classes} training classes in {data.name}, {len(usable)} with two or more images"
        lower = "lower --val-share, or " if number > 2 and len(usable) >= 2 and data.num_classes >= 4 else ""
        raise UserError(
            f"{found}, wanted at least 2 to train on beside {number} for validation: {lower}give --select-on test"
        )
    held = np.sort(np.random.default_rng(seed).permutation(usable)[:number])
    kept = np.setdiff1d(np.arange(data.num_classes), held)
    supers = None if data.supers is None else data.supers[kept]
    valid = data.train.of_classes(held.tolist(), f"{data.name} validation")
    return replace(data, train=data.train.of_classes(kept.tolist(), f"{data.name} train"), valid=valid, supers=supers)


def without_singles(data: RetrievalData) -> RetrievalData:
    """Training classes with one image left out; UserError when all are such."""
    kept = np.flatnonzero(data.train.counts >= 2)
    dropped = data.num_classes - len(kept)
    if not dropped:
        return data
    if not len(kept):
        raise UserError(
            f"every training class of {data.name} has one image: add images, or give --single-images repeat"
        )
    supers = None if data.supers is None else data.supers[kept]
    notes = (*data.notes, f"{dropped} training classes with one image left out")
    return replace(data, train=data.train.of_classes(kept.tolist()), supers=supers, notes=notes)


def require_matches(data: RetrievalData) -> RetrievalData:
    """Itself; UserError when no test image has another of its class to be found."""
    others = data.test.counts - 1 if data.gallery is None else np.minimum(data.test.counts, data.gallery.counts)
    if not (others > 0).any():
        where = "one image in each class" if data.gallery is None else "no class that the gallery has"
        raise UserError(f"{data.test.name} has {where}, nothing can be found: add images")
    return data


def without_unreadable(data: RetrievalData) -> RetrievalData:
    """Every image read once; those that cannot be are left out and named in the notes. Classes that empty go too."""
    notes, parts = list(data.notes), {}
    for part in ("train", "valid", "test", "gallery"):
        images = getattr(data, part)
        if images is None:
            continue
        parts[part], bad = images.readable()
        if bad:
            others = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            notes.append(
                f"{len(bad)} images of {images.name} cannot be read and are left out: {', '.join(bad[:3])}{others}"
            )
    kept = np.flatnonzero(parts["train"].counts)
    supers = None if data.supers is None else data.supers[kept]
    train = parts.pop("train").of_classes(kept.tolist())
    return replace(data, train=train, supers=supers, notes=tuple(notes), **parts)


# -- lists


@dataclass(frozen=True)
class Rows:
    """One part of a list file: paths, and classes by any number."""

    paths: list[str]
    classes: np.ndarray
    supers: np.ndarray


def read_list(path: Path) -> Rows:
    """A list ``image_id class_id super_class_id path`` with that header, fields separated by blanks."""
    lines = _lines(path)
    if not lines or lines[0].split() != ["image_id", "class_id", "super_class_id", "path"]:
        raise UserError(
            f"{path} starts with {lines[0][:60]!r}, wanted the header image_id class_id super_class_id path"
            if lines
            else f"{path} is empty"
        )
    rows = [line.split(maxsplit=3) for line in lines[1:]]
    return _rows(path, rows, label=1, super_label=2, name=3)


def _rows(path: Path, rows: Sequence[Sequence[str]], *, label: int, super_label: int | None, name: int) -> Rows:
    wanted = max(label, super_label or 0, name) + 1
    for number, row in enumerate(rows, start=2):
        if len(row) < wanted or not row[label].lstrip("-").isdigit():
            raise UserError(
                f"{path}, line {number}: found {' '.join(row)[:80]!r}, wanted {wanted} fields with a class number: bring the file back"
            )
    classes = np.array([int(row[label]) for row in rows], dtype=np.int64)
    supers = (
        np.zeros(len(rows), dtype=np.int64)
        if super_label is None
        else np.array([int(row[super_label]) for row in rows], dtype=np.int64)
    )
    return Rows([row[name] for row in rows], classes, supers)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}: put the official annotation file there (scripts/download_retrieval.sh says where it is)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): bring the file back") from None


def _folder(root: Path, name: str) -> Path:
    """The data set's folder: ``root`` itself, or its usual name below ``root``."""
    usual = {
        "cub": "CUB_200_2011",
        "cars": "car196",
        "sop": "Stanford_Online_Products",
        "inshop": "inshop",
        "inat": "train_mini_resized",
    }
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the folder of {name} with --root{_script(name)}")
    return root / usual[name] if (root / usual[name]).is_dir() else root


def _script(name: str) -> str:
    return " (scripts/download_retrieval.sh fetches it)" if name in ("cub", "sop", "inat") else ""


# -- published data sets


def _read_cub(folder: Path) -> RetrievalData:
    if (folder / "images.txt").is_file() or not (folder / "cub200_train.txt").is_file():
        names = _numbered(folder / "images.txt")
        labels = _numbered(folder / "image_class_labels.txt")
        if names.keys() != labels.keys():
            raise UserError(
                f"{folder / 'images.txt'} and image_class_labels.txt name different images: bring the official files back"
            )
        classes = _integers(labels.values(), folder / "image_class_labels.txt")
        rows = Rows([f"images/{name}" for name in names.values()], classes, np.ones(len(classes), dtype=np.int64))
        return _halves(folder, "cub", rows, last_trained=100)
    return _listed(folder, "cub", "cub200")


def _read_cars(folder: Path) -> RetrievalData:
    annotations = folder / "cars_annos.mat"
    if not annotations.is_file() and (folder / "cars196_train.txt").is_file():
        return _listed(folder, "cars", "cars196")
    if not annotations.is_file():
        raise UserError(
            f"there is no {annotations}, nor cars196_train.txt beside it: put the official annotation file there"
        )
    import scipy.io

    try:
        found = scipy.io.loadmat(annotations, squeeze_me=True)["annotations"]
        names, classes = [str(row[0]) for row in found], np.array([int(row[5]) for row in found], dtype=np.int64)
    except Exception as error:  # a damaged file raises almost anything, scipy's own errors among them
        raise UserError(f"cannot read {annotations} ({error}): bring the official file back") from None
    return _halves(folder, "cars", Rows(names, classes, np.ones(len(classes), dtype=np.int64)), last_trained=98)


def _read_sop(folder: Path) -> RetrievalData:
    train, test = read_list(folder / "Ebay_train.txt"), read_list(folder / "Ebay_test.txt")
    data = _of_rows(folder, "sop", train, test)
    first = dict(zip(train.classes.tolist(), train.supers.tolist(), strict=True))
    _, supers = np.unique([first[label] for label in np.unique(train.classes).tolist()], return_inverse=True)
    return replace(data, supers=supers)


def _read_inshop(folder: Path) -> RetrievalData:
    official = next(
        (
            path
            for path in (folder / "list_eval_partition.txt", folder / "Eval" / "list_eval_partition.txt")
            if path.is_file()
        ),
        None,
    )
    if official is None and (folder / "inshop_train.txt").is_file():
        parts = {part: read_list(folder / f"inshop_{part}.txt") for part in ("train", "query", "gallery")}
    else:
        parts = _partition(official or folder / "list_eval_partition.txt")
    data = _of_rows(folder, "inshop", parts["train"], parts["query"])
    known, _labels = np.unique(parts["query"].classes, return_inverse=True)
    place = {label: number for number, label in enumerate(known.tolist())}
    strange = [label for label in parts["gallery"].classes.tolist() if label not in place]
    if strange:
        raise UserError(
            f"{folder}: the gallery has the item {strange[0]}, which no query is of: bring the official file back"
        )
    gallery_labels = np.array([place[label] for label in parts["gallery"].classes.tolist()], dtype=np.int64)
    gallery = ImageSet(_files(folder, parts["gallery"].paths), gallery_labels, data.test.classes, "inshop gallery")
    return replace(data, gallery=gallery)


def _partition(path: Path) -> dict[str, Rows]:
    """``list_eval_partition.txt``: a count, a header, then image, item id and train, query or gallery."""
    lines = _lines(path)[2:]
    rows = [line.split() for line in lines]
    wrong = next((row for row in rows if len(row) != 3 or row[2] not in ("train", "query", "gallery")), None)
    if wrong is not None or not rows:
        raise UserError(
            f"{path}: found {' '.join(wrong or [])[:80]!r}, wanted image, item id and train, query or gallery: bring the official file back"
        )
    trained = sorted({row[1] for row in rows if row[2] == "train"})
    tested = sorted({row[1] for row in rows if row[2] != "train"})
    number = {item: label for label, item in enumerate([*trained, *tested])}
    parts = {}
    for part in ("train", "query", "gallery"):
        own = [row for row in rows if row[2] == part]
        classes = np.array([number[row[1]] for row in own], dtype=np.int64)
        parts[part] = Rows([row[0] for row in own], classes, np.ones(len(own), dtype=np.int64))
    return parts


def _read_inat(folder: Path, split_lists: Sequence[str] | None, seed: int) -> RetrievalData:
    if split_lists is not None:
        train, test = (
            _rows(Path(path), [line.rsplit(",", 2) for line in _lines(Path(path))], label=2, super_label=1, name=0)
            for path in split_lists
        )
        data, notes = _of_rows(folder, "inat", train, test), ()
    else:
        train, test = _drawn_inat(folder, seed)
        data = _of_rows(folder, "inat", train, test)
        notes = (
            f"the split is drawn by --split-seed {seed}; figures are not comparable with published ones, whose split is in --split-lists",
        )
    first = dict(zip(train.classes.tolist(), train.supers.tolist(), strict=True))
    _, supers = np.unique([first[label] for label in np.unique(train.classes).tolist()], return_inverse=True)
    return replace(data, supers=supers, notes=notes)


def _drawn_inat(folder: Path, seed: int) -> tuple[Rows, Rows]:
    """Per super-category: classes shuffled, the first half (rounded down) tests, the rest trains."""
    classes = [name for name in class_folders(folder) if name[:5].isdigit()]
    if not classes:
        raise UserError(
            f"{folder} has no class folders such as 00000_Animalia_...: give the folder of train_mini's classes with --root"
        )
    above = np.array([_inat_super(name) for name in classes])
    generator, tested = np.random.default_rng(seed), set()
    for kind in np.unique(above):
        members = generator.permutation(np.flatnonzero(above == kind))
        tested |= set(members[: len(members) // 2].tolist())
    parts: tuple[list, list] = ([], [])
    for number, name in enumerate(classes):
        parts[number in tested].extend(
            (str(path.relative_to(folder)), int(name.split("_")[0]), above[number])
            for path in image_files(folder / name)
        )
    return tuple(
        Rows([row[0] for row in part], np.array([row[1] for row in part]), np.array([row[2] for row in part]))
        for part in parts
    )


def _inat_super(name: str) -> int:
    """The super-category of a class folder NUMBER_KINGDOM_PHYLUM_CLASS_...; Animalia takes what has no own one."""
    taxa = name.split("_")[1:4]
    return next((_INAT_BY_TAXON[taxon] for taxon in taxa if taxon in _INAT_BY_TAXON), 1)


def _listed(folder: Path, name: str, prefix: str) -> RetrievalData:
    return _of_rows(folder, name, read_list(folder / f"{prefix}_train.txt"), read_list(folder / f"{prefix}_test.txt"))


def _halves(folder: Path, name: str, rows: Rows, last_trained: int) -> RetrievalData:
    """Class ids up to ``last_trained`` train, the others test."""
    trained = rows.classes <= last_trained
    parts = [
        Rows([rows.paths[i] for i in np.flatnonzero(own)], rows.classes[own], rows.supers[own])
        for own in (trained, ~trained)
    ]
    return _of_rows(folder, name, *parts)


def _of_rows(folder: Path, name: str, train: Rows, test: Rows) -> RetrievalData:
    common = np.intersect1d(train.classes, test.classes)
    if len(common):
        raise UserError(
            f"{folder}: class {common[0]} is in the train and the test list, wanted disjoint classes: bring the official files back"
        )
    if not len(train.paths) or not len(test.paths):
        raise UserError(
            f"{folder}: found {len(train.paths)} train and {len(test.paths)} test images: bring the official files back"
        )
    return RetrievalData(name, _image_set(folder, f"{name} train", train), _image_set(folder, f"{name} test", test))


def _image_set(folder: Path, name: str, rows: Rows) -> ImageSet:
    known, labels = np.unique(rows.classes, return_inverse=True)
    first = {label: rows.paths[position] for position, label in reversed(list(enumerate(labels.tolist())))}
    classes = tuple(_class_name(first[number], str(label)) for number, label in enumerate(known.tolist()))
    return ImageSet(_files(folder, rows.paths), labels, classes, name)


def _class_name(path: str, label: str) -> str:
    """The folder of a class's images where it is named by the class, else its number."""
    parent = Path(path).parent.name
    return parent if any(character.isalpha() for character in parent) and label.lstrip("0") in parent else label


def _files(folder: Path, paths: Iterable[str]) -> FilePictures:
    return FilePictures([str(folder / path) for path in paths])


def _numbered(path: Path) -> dict[str, str]:
    """``NUMBER VALUE`` lines."""
    pairs = [line.split(maxsplit=1) for line in _lines(path)]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{path} has lines that are not a number and a value: bring the official file back")
    return dict(pairs)


def _integers(words: Iterable[str], path: Path) -> np.ndarray:
    try:
        return np.array([int(word) for word in words], dtype=np.int64)
    except ValueError as error:
        raise UserError(f"{path}: {error}, wanted class numbers: bring the official file back") from None


def _check_counts(data: RetrievalData, wanted: Counts) -> None:
    found = Counts(
        len(data.train),
        data.num_classes,
        len(data.test),
        len(data.test.classes),
        None if data.gallery is None else len(data.gallery),
    )
    names = [
        name
        for name in ("train", "train_classes", "test", "test_classes", "gallery")
        if getattr(found, name) != getattr(wanted, name)
    ]
    if names:
        words = ", ".join(
            f"{name.replace('_', ' ')} {getattr(found, name)} (published {getattr(wanted, name)})" for name in names
        )
        raise UserError(
            f"{data.name} differs from the published data: {words}: fetch it anew, or give --check-counts 0"
        )


def _check_files(data: RetrievalData, folder: Path) -> None:
    for part in (data.train, data.test, data.gallery):
        paths = part.pictures.paths if part is not None else ()
        missing = next((path for path in paths if not os.path.exists(path)), None)
        if missing is not None:
            raise UserError(
                f"there is no image {missing}, which the annotation files name: unpack the images of {data.name} into {folder}"
            )


# -- small sets and folders


def read_class_folder(folder: Path) -> RetrievalData:
    """Images by class: ``train/CLASS/*`` and ``test/CLASS/*`` with disjoint classes, or ``CLASS/*``, whose first half trains.

    Classes are ordered by name. Of six classes four train, two of them for validation.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give a folder of images by class with --dataset")
    train, test = folder / "train", folder / "test"
    if train.is_dir() and test.is_dir():
        parts = [_class_images(place, f"{folder.name} {place.name}") for place in (train, test)]
        common = sorted(set(parts[0].classes) & set(parts[1].classes))
        if common:
            raise UserError(
                f"{folder} has the class {common[0]!r} in train and in test, wanted disjoint classes: retrieval is judged on new ones"
            )
        return RetrievalData(folder.name, *parts)
    whole = _class_images(folder, folder.name)
    return _first_half(whole, folder.name)


def _class_images(folder: Path, name: str) -> ImageSet:
    classes = class_folders(folder)
    found = [image_files(folder / label) for label in classes]
    if len(classes) < 2 or not all(found):
        empty = next((label for label, paths in zip(classes, found, strict=True) if not paths), None)
        what = f"{len(classes)} class folders" if empty is None else f"no image in the class folder {empty!r}"
        raise UserError(f"found {what} in {folder}, wanted two or more, each with images: check the path")
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    return ImageSet(own_pictures(path for paths in found for path in paths), labels, tuple(classes), name)


def _first_half(
    whole: ImageSet, name: str, trained: int | None = None, flip: bool = True, notes: tuple[str, ...] = ()
) -> RetrievalData:
    number = len(whole.classes)
    cut = max((number + 1) // 2, min(4, number - 2)) if trained is None else trained
    if number - cut < 2:
        raise UserError(f"found {number} classes in {name}, wanted at least 4: two to train on and two to test on")
    train, test = whole.of_classes(range(cut), f"{name} train"), whole.of_classes(range(cut, number), f"{name} test")
    return RetrievalData(name, train, test, flip=flip, notes=notes)


def _small(name: str, root: str | os.PathLike[str] | None) -> RetrievalData:
    """digits, cifar100 or grocery-store: images of all parts joined, then cut by class, in memory."""
    if root is not None and not (Path(root) / name).exists() and Path(root).name == name:
        root = Path(root).parent
    found = load_images(name, data_root=root, size=96 if name == "grocery-store" else None)
    parts = list(found.parts.values())
    pictures = ArrayPictures(np.concatenate([part.array() for part in parts]), name)
    whole = ImageSet(pictures, np.concatenate([part.labels for part in parts]), found.classes, name)
    trained = DIGITS_TRAINED if name == "digits" else None
    return _first_half(whole, name, trained, flip=found.horizontal_flip, notes=found.notes)
