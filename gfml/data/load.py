"""From a name, a file or a folder to :class:`Interactions`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from gfml.base.errors import UserError, choice_error
from gfml.data import cache, registry
from gfml.data.interactions import Interactions, check_gains, pairs_from_csr
from gfml.data.names import places
from gfml.data.readers import (
    PARTS,
    USER_NAMES,
    Columns,
    Records,
    is_adjacency,
    read_adjacency,
    read_adjacency_parts,
    read_mcl_parts,
    read_pairs_npz,
    read_table,
    read_table_parts,
)
from gfml.data.registry import KnownDataset
from gfml.data.splits import TIMED, Split, check_ratios, keep_positive, prepare, ratings_of
from gfml.data.synthetic import generate
from gfml.data.tables import open_table, suffix
from gfml.data.times import moment

USUAL_RATIOS = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Cut:
    """What the user asks of filtering and splitting; None leaves it to the data set. rated: keep the ratings of test."""

    threshold: float | None = None
    kcore: int = 0
    split: str | None = None
    ratios: tuple[float, ...] | None = None
    seed: int = 2020
    duplicates: str = "first"
    leave: int | None = None
    dates: tuple[str, ...] | None = None
    rated: bool = False

    @property
    def is_usual(self) -> bool:
        """Whether the data is to be as published."""
        return replace(self, kcore=self.kcore if self.kcore > 1 else 0, rated=False) == Cut(seed=self.seed)

    def uses(self, above: float | None, known: KnownDataset | None) -> frozenset[str]:
        """Which of ``rating`` and ``time`` this cut looks at."""
        rated = self.threshold is not None or above is not None or self.duplicates == "sum"
        kind = self.split or (known and known.split)
        timed = kind in TIMED or self.duplicates == "last"
        return frozenset([*(["rating"] if rated else []), *(["time"] if timed else [])])


@dataclass(frozen=True)
class Source:
    """Files, how to read them, and the registry entry if they belong to one.

    read: takes what of ``rating`` and ``time`` is used.
    """

    name: str
    paths: Mapping[str, Path]
    read: Callable[[Collection[str]], Records]
    columns: Columns
    known: KnownDataset | None = None
    above: float | None = None  # keep ratings above it unless the user gives a threshold


# Generated --------------------------------------------------------------------------------------


def load_generated(name: str, shape: Mapping[str, object], cut: Cut) -> Interactions:
    """The generator's data; filtered and cut again if asked, the true masses following who stays."""
    data = generate(name=name, **shape)
    if cut.is_usual or (cut.split == "native" and replace(cut, split=None).is_usual):
        return data
    parts = [pairs_from_csr(data.split(part)) for part in PARTS]
    users, items = (np.concatenate(side) for side in zip(*parts, strict=True))
    labels = np.repeat(np.arange(3, dtype=np.int8), [len(part[0]) for part in parts])
    records = Records(users, items, parts=labels, numbered=True, min_size=data.train.shape)
    again = _prepare(records, name, cut, file_order=True)
    kept_users = slice(None) if again.user_ids is None else again.user_ids
    kept_items = slice(None) if again.item_ids is None else again.item_ids
    user_mass, item_mass = data.true_user_mass[kept_users], data.true_item_mass[kept_items]
    return replace(again, true_user_mass=user_mass, true_item_mass=item_mass)


# Read -------------------------------------------------------------------------------------------


def find_source(
    dataset: str, data_root: str | os.PathLike[str] | None, columns: Columns = Columns(), *, allow_download: bool = True
) -> Source:
    """A known name, else a folder, else a file, else a folder under a data root; UserError with the known names otherwise."""
    known, path = registry.known_by(dataset), Path(dataset).expanduser()
    if known is not None:
        _no_columns(dataset, columns)
        layout, paths = registry.find(known, data_root, allow_download=allow_download)
        return Source(
            known.name, paths, _ordered(lambda uses: layout.read(paths), columns), columns, known, layout.threshold
        )
    if path.is_dir():
        return _folder_source(path, columns)
    if path.is_file():
        return _file_source(path, columns)
    below = next((root / dataset for root in registry.data_roots(data_root) if (root / dataset).is_dir()), None)
    if below is not None:
        return _folder_source(below, columns)
    if os.sep in dataset or path.suffix:
        names = ", ".join(registry.known_names())
        raise UserError(f"no file or folder {path}: give `dataset` a path that exists or one of {names}")
    raise choice_error("data set", dataset, [*registry.known_names(), *registry.ALIASES])


def _no_columns(dataset: str, columns: Columns) -> None:
    """Lists and published files have no columns to name; the order of their rows may still be time."""
    settings = {
        "user": "user_col",
        "item": "item_col",
        "rating": "rating_col",
        "time": "time_col",
        "sep": "sep",
        "header": "header False",
    }
    for field, setting in settings.items():
        value = getattr(columns, field)
        if value is not None and not (field == "time" and value in ("order", "none")):
            raise UserError(f"`{setting}` names a column of one's own table, but {dataset} is not one: drop it")


def _ordered(read: Callable[[Collection[str]], Records], columns: Columns) -> Callable[[Collection[str]], Records]:
    return (lambda uses: read(uses).in_order()) if columns.time == "order" else read


def _file_source(path: Path, columns: Columns) -> Source:
    """One file: a table, pairs in an ``.npz``, or adjacency lists."""
    name, paths = path.name.split(".")[0], {"all": path}
    if suffix(path) == "npz":
        _no_columns(str(path), columns)
        return Source(name, paths, _ordered(lambda uses: read_pairs_npz(path), columns), columns)
    if columns.sep is None and columns.user is None and columns.item is None and is_adjacency(path):
        _no_columns(str(path), columns)
        return Source(name, paths, _ordered(lambda uses: read_adjacency(path), columns), columns)
    return Source(name, paths, lambda uses: read_table(path, columns, uses=uses), columns)


def _folder_source(path: Path, columns: Columns) -> Source:
    """Adjacency lists or MCL pickles called train, test and maybe valid; else tables in parts; else one table."""
    name = path.resolve().name
    for ending, read in (("txt", read_adjacency_parts), ("pkl", read_mcl_parts)):
        for parts in (("train", "valid", "test"), ("train", "test"), ("train",)):
            layout = registry.Layout({part: f"{part}.{ending}" for part in parts}, read)
            paths = registry.present(path, layout)
            if paths is not None and (ending == "pkl" or is_adjacency(*paths.values())):
                _no_columns(str(path), columns)
                return Source(name, paths, _ordered(lambda uses: layout.read(paths), columns), columns)
    paths = registry.table_parts(path)
    if "train" in paths:
        return Source(name, paths, lambda uses: read_table_parts(paths, columns, uses=uses), columns)
    table = registry.only_table(path)
    if table is None:
        wanted = (
            "adjacency lists (train.txt, test.txt), tables in parts (train.csv, test.csv) or one table (NAME.inter)"
        )
        raise UserError(
            f"{path} holds no train.txt, no train.csv and no {name}.inter: wanted {wanted}, or give one file"
        )
    return Source(name, {"all": table}, lambda uses: read_table(table, columns, uses=uses), columns)


def load_source(source: Source, cut: Cut, cache_dir: Path | None = None, *, use_cache: bool = True) -> Interactions:
    """Read, filter, cut and check ``source``, or take what the cache holds for the same bytes and options."""
    if not use_cache:
        return _build(source, cut)
    options = {"name": source.name, "columns": asdict(source.columns), "known": source.known is not None, **asdict(cut)}
    options["files"] = {part: path.name for part, path in source.paths.items()}
    key = cache.cache_key([*source.paths.values(), *_users_beside(source)], options)
    return cache.cached(key, cache_dir or cache.default_cache_dir(), lambda: _build(source, cut))


def _build(source: Source, cut: Cut) -> Interactions:
    known = source.known
    records = source.read(cut.uses(source.above, known))
    data = _prepare(records, source.name, cut, above=source.above, known=known, file_order=known is not None)
    if cut.rated:
        data = replace(data, test_ratings=_test_ratings(source, records, cut, data))
    if known is None:
        return replace(data, notes=data.notes | {path.name: _users_note(path, data) for path in _users_beside(source)})
    notes = registry.checksum_notes(known, source.paths)
    if cut.is_usual:
        notes |= registry.count_notes(known, data)
    return replace(data, notes={**data.notes, **notes})


def _users_beside(source: Source) -> list[Path]:
    """``NAME.user`` beside the atomic interactions ``NAME.inter`` or ``NAME.train.inter``."""
    atomic = [path for path in source.paths.values() if suffix(path) == "inter"]
    beside = {path.with_name(f"{path.name.split('.')[0]}.user") for path in atomic}
    return sorted(path for path in beside if path.is_file())


def _users_note(path: Path, data: Interactions) -> str:
    """How many users of the data a table of users has: what it says of them is used by no model."""
    try:
        table = open_table(path, separator="\t")
        listed = table.texts(table.find(USER_NAMES) or table.names[0])
    except UserError as error:
        return f"not used: {error}"
    known = places(np.arange(data.num_users) if data.user_ids is None else data.user_ids, listed) >= 0
    return f"{len(set(listed)):,} users, {int(known.sum()):,} of the {data.num_users:,} in the data among them; nothing else of it is used"


def _test_ratings(source: Source, records: Records, cut: Cut, data: Interactions) -> np.ndarray:
    """The rating of every test pair; of a repeated one that of its first or last row by time, or their sum.

    Read apart from the data where the cut needs no ratings: having them changes no pair. UserError without ratings.
    """
    if records.ratings is None or records.times is None:
        records = source.read(["rating", "time"])
    if records.ratings is None:
        raise UserError(f"{source.name} has no ratings, wanted them for `graded`: name `rating_col` or drop it")
    if records.parts is not None and cut.split in (None, "native") and cut.ratios is None:
        records = records.take(records.parts == PARTS.index("test"))
    if cut.duplicates == "first":
        threshold, strict = _threshold(records, cut, source.above)
        records = keep_positive(records, threshold, strict=strict)
    return check_gains(ratings_of(records, data, cut.duplicates))


def _threshold(records: Records, cut: Cut, above: float | None) -> tuple[float | None, bool]:
    """The least rating that is kept, and whether it must be exceeded."""
    strict = cut.threshold is None and above is not None and records.ratings is not None
    return above if strict else cut.threshold, strict


def _prepare(
    records: Records,
    name: str,
    cut: Cut,
    *,
    above: float | None = None,
    known: KnownDataset | None = None,
    file_order: bool = False,
) -> Interactions:
    """:func:`prepare` with the data set's own defaults where the user asks nothing."""
    if cut.kcore < 0:
        raise UserError(f"found `kcore {cut.kcore}`, wanted 0 or more")
    if cut.ratios is not None and cut.split in ("native", "leave-one-out", "leave-k-out"):
        raise UserError(
            f"`split {cut.split}` has no ratios: drop `split_ratios` or choose per-user, user-time, global or time"
        )
    if cut.leave is not None and (cut.split != "leave-k-out" or cut.leave < 1):
        raise UserError(f"found `leave_k {cut.leave}`, wanted a number from 1 with `split leave-k-out`")
    if cut.dates is not None and (cut.split != "time" or cut.ratios is not None):
        raise UserError("`split_date` is for `split time`, without `split_ratios`: add the one or drop the other")
    split = cut.split
    if split is None and (cut.ratios is not None or records.parts is None):
        split = (known and known.split) or "per-user"
    threshold, strict = _threshold(records, cut, above)
    usual = USUAL_RATIOS if known is None else known.ratios
    how = Split(
        split,
        usual if cut.ratios is None else check_ratios(cut.ratios),
        cut.seed,
        cut.leave or 1,
        tuple(sorted(moment(date, "`split_date`") for date in cut.dates or ())),
    )
    return prepare(
        records,
        name,
        how,
        threshold=threshold,
        strict=strict,
        kcore=cut.kcore,
        duplicates=cut.duplicates,
        file_order=file_order,
    )
