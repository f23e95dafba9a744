"""Data sets known by name: where they are published, how they are read, and what must come out."""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError
from gfml.base.home import configs
from gfml.data.download import download, file_hash, unpack

if TYPE_CHECKING:
    from gfml.data.interactions import Interactions
    from gfml.data.readers import Records

logger = logging.getLogger("gfml.data")

Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on disk: file names by part, and their reader.

    A file may also carry ``.gz``. ``threshold``: keep ratings above it unless the user sets one.
    """

    files: Mapping[str, str]
    read: Callable[[Paths], Records]
    threshold: float | None = None


@dataclass(frozen=True)
class Counts:
    """What the published data holds, read with default options; None where nothing is published."""

    users: int
    items: int
    train: int | None = None
    valid: int | None = None
    test: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Download:
    """Files at their original public place: ``files`` one by one, or members of a zip ``archive``."""

    files: Mapping[str, str]  # name in the folder -> address, or member of the archive
    archive: str | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KnownDataset:
    """A data set of the literature.

    folders: names under a data root, the first is where a download goes.
    ratios, split: the default cut of a data set that ships none.
    sha256: of files as they are known to be, by path ``folder/name``.
    """

    name: str
    title: str
    source: str
    terms: str
    folders: tuple[str, ...]
    layouts: tuple[Layout, ...]
    expected: Counts
    split: str | None = None
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    download: Download | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


PART_FILES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
              "test": "test"}  # fmt: skip


def _reader(name: str, **how: Any) -> Callable[..., Records]:
    """A function of :mod:`gfml.data.readers`, which is imported when something is read: to know a data set by name takes
    neither SciPy nor pyarrow."""

    def read(*places: Any) -> Records:
        from gfml.data import readers

        return getattr(readers, name)(*places, **how)

    return read


def _one(read: Callable[[Path], Records]) -> Callable[[Paths], Records]:
    return lambda paths: read(paths["all"])


# What ``read`` in configs/data_sets.toml names.
READERS: Mapping[str, Callable[[Paths], Records]] = {
    "adjacency": _reader("read_adjacency_parts"),
    "pickles": _reader("read_mcl_parts"),
    "lastfm": _reader("read_lastfm"),
    "table": _one(_reader("read_table")),
    "pairs": _one(_reader("read_pairs_npz")),
    "movielens": _one(_reader("read_movielens")),
    "counted": _one(_reader("read_counted_lists")),
    "counted-as-items": _one(_reader("read_counted_lists", counts_as_items=True)),
}
ALIASES = {"amazon-digital-music": "amazon-music", "ml-1m": "ml1m", "ml-100k": "ml100k"}
GENERATED = ("demo", "synthetic")


@cache
def known_sets() -> dict[str, KnownDataset]:
    """The data sets of ``configs/data_sets.toml`` by name."""
    told = tomllib.loads((configs() / "data_sets.toml").read_text(encoding="utf-8"))
    return {name: _entry(name, **entry) for name, entry in told.items()}


def _entry(
    name: str, *, layouts: list[dict[str, Any]], expected: dict[str, int], folders: list[str], **more: Any
) -> KnownDataset:
    ways = tuple(Layout(**{**one, "read": READERS[one["read"]]}) for one in layouts)
    if "download" in more:
        more["download"] = Download(**more["download"])
    if "ratios" in more:
        more["ratios"] = tuple(more["ratios"])
    return KnownDataset(name=name, layouts=ways, expected=Counts(**expected), folders=tuple(folders), **more)


def known_names() -> list[str]:
    """Every name that ``--dataset`` takes, without aliases."""
    return [*GENERATED, *known_sets()]


def known_by(dataset: str) -> KnownDataset | None:
    """The data set of a name, of an alias, or of its own folder's name, unless a path of that name exists here."""
    name = ALIASES.get(dataset, dataset)
    if name not in known_sets() and not Path(dataset).expanduser().exists():
        # A folder that two share is the earlier one's.
        return next((known for known in known_sets().values() if known.folders[0] == dataset), None)
    return known_sets().get(name)


# Finding ----------------------------------------------------------------------------------------


def data_roots(data_root: str | os.PathLike[str] | None) -> list[Path]:
    """Where to look: the given root only; else ``$GFML_DATA``, ``./data`` and ``~/.cache/gfml/data``."""
    if data_root is not None:
        return [Path(data_root).expanduser()]
    given = os.environ.get("GFML_DATA")
    try:
        own = [Path.home() / ".cache" / "gfml" / "data"]
    except RuntimeError:  # a user without HOME and without a line in passwd, as in some containers
        own = []
    return [*([Path(given).expanduser()] if given else []), Path("data"), *own]


def folders_of(known: KnownDataset, roots: Iterable[Path]) -> list[Path]:
    """The folders where ``known`` may lie: under each root, under its ``data``, or the root itself."""
    found: list[Path] = []
    for root in roots:
        found += [root / folder for folder in known.folders]
        found += [root / "data" / folder for folder in known.folders]
        found += [root] if root.name in known.folders else []
    return found


def present(folder: Path, layout: Layout) -> Paths | None:
    """The files of ``layout`` in ``folder``, plain or packed, or None when one is missing."""
    from gfml.data.tables import PACKED

    found = {}
    for part, name in layout.files.items():
        ends = ("", *(f".{packer}" for packer in PACKED))
        paths = [path for end in ends if (path := folder / f"{name}{end}").is_file()]
        if not paths:
            return None
        found[part] = paths[0]
    return found


def table_parts(folder: Path) -> dict[str, Path]:
    """Tables of a split that a folder ships: ``train.csv``, ``NAME.valid.inter``, ``test.parquet.gz`` and the like."""
    from gfml.data.tables import PACKED, TABLE_SUFFIXES

    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        words = path.name.lower().split(".")
        while len(words) > 1 and words[-1] in PACKED:
            words.pop()
        part = PART_FILES.get(words[-2]) if len(words) in (2, 3) and words[-1] in TABLE_SUFFIXES else None
        if part is None or not path.is_file() or words[-1] in ("item", "user", "kg", "link", "net"):
            continue
        if part in found:
            raise UserError(
                f"{folder} holds {found[part].name} and {path.name}, wanted one table for {part}: give one file"
            )
        found[part] = path
    return found


def only_table(folder: Path) -> Path | None:
    """The interactions of a folder: ``FOLDER.inter``, else its only ``.inter``, else its only table."""
    from gfml.data.tables import suffix

    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    atomic = [path for path in files if suffix(path) == "inter"]
    named = [path for path in atomic if path.name.split(".")[0] == folder.resolve().name]
    others = [path for path in files if suffix(path) in ("csv", "tsv", "parquet", "jsonl")]
    return next((some[0] for some in (named, atomic, others) if len(some) == 1), None)


def locate(known: KnownDataset, roots: Iterable[Path]) -> tuple[Layout, Paths] | None:
    """The first layout of ``known`` whose files all lie under one of the roots."""
    for folder in folders_of(known, roots):
        for layout in known.layouts:
            paths = present(folder, layout)
            if paths is not None:
                return layout, paths
    return None


def fetch(known: KnownDataset, root: Path, *, progress: bool = True) -> None:
    """Download ``known`` from its original place into ``root``; UserError where there is none or it fails."""
    if known.download is None:
        raise UserError(f"{known.name} cannot be downloaded: fetch it from {known.source} and give `data_root`")
    folder = root / known.folders[0]
    logger.warning("downloading %s to %s (%s)", known.name, folder, known.terms)
    plan = known.download
    if plan.archive is None:
        for name, url in plan.files.items():
            if not (folder / name).exists():
                download(url, folder / name, plan.checksums.get(name), progress=progress)
        return
    archive = folder / plan.archive.rsplit("/", 1)[-1]
    download(plan.archive, archive, plan.checksums.get("archive"), progress=progress)
    unpack(archive, {member: folder / name for name, member in plan.files.items()})
    archive.unlink()


def find(
    known: KnownDataset, data_root: str | os.PathLike[str] | None, *, allow_download: bool = True
) -> tuple[Layout, Paths]:
    """Local files of ``known``, downloaded first if they are missing and the terms allow it.

    Raises UserError: one line with the name, the roots searched, the folder names wanted and what to do.
    """
    roots = data_roots(data_root)
    found = locate(known, roots)
    if found is None and known.download is not None and allow_download:
        try:
            fetch(known, roots[0] if data_root is not None or os.environ.get("GFML_DATA") else roots[-1])
        except UserError as error:
            if error.__cause__ is None:  # it came through, but is not what was published
                raise
            raise _not_found(known, roots, f"the download failed: {error.__cause__}") from error
        found = locate(known, roots)
    if found is None:
        raise _not_found(known, roots, "no download is offered" if known.download is None else "downloading is off")
    return found


def _not_found(known: KnownDataset, roots: list[Path], reason: str) -> UserError:
    files = " or ".join(" + ".join(layout.files.values()) for layout in known.layouts)
    searched = ", ".join(str(root / known.folders[0]) for root in roots)
    todo = f"put {files} there, from {known.source}, or give `data_root DIR`"
    return UserError(f"data set {known.name} not found in {searched} ({reason}): {todo}")


# Checking ---------------------------------------------------------------------------------------


def checksum_notes(known: KnownDataset, paths: Paths) -> dict[str, object]:
    """Names the files whose sha256 is known and differs."""
    differing = []
    for path in paths.values():
        wanted = known.sha256.get(f"{path.parent.name}/{path.name}")
        if wanted is not None and file_hash(path) != wanted:
            differing.append(path.name)
    return {"files that differ from the published ones": differing} if differing else {}


def count_notes(known: KnownDataset, data: Interactions) -> dict[str, object]:
    """Compares sizes with the published ones; a difference is one line in the log and in the notes."""
    found = {
        "users": data.num_users,
        "items": data.num_items,
        "train": data.train.nnz,
        "valid": data.valid.nnz,
        "test": data.test.nnz,
        "total": data.train.nnz + data.valid.nnz + data.test.nnz,
    }
    wanted = {what: getattr(known.expected, what) for what in found}
    differing = {what: number for what, number in wanted.items() if number not in (None, found[what])}
    wrong = [f"{what} {found[what]} (published {number})" for what, number in differing.items()]
    if not wrong:
        return {}
    logger.warning("%s differs from the published data: %s", known.name, ", ".join(wrong))
    return {"counts that differ from the published ones": wrong}
