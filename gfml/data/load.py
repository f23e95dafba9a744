"""From a name, a file or a folder to :class:`Interactions`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from gfml.base.errors import UserError, choice_error
from gfml.data import cache, registry
from gfml.data.interactions import Interactions, pairs_from_csr
from gfml.data.readers import PARTS, Records, read_adjacency_parts, read_mcl_parts, read_table
from gfml.data.registry import KnownDataset
from gfml.data.splits import check_ratios, prepare
from gfml.data.synthetic import generate

USUAL_RATIOS = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Cut:
    """What the user asks of filtering and splitting; None leaves it to the data set."""

    threshold: float | None = None
    kcore: int = 0
    split: str | None = None
    ratios: tuple[float, ...] | None = None
    seed: int = 2020

    @property
    def is_usual(self) -> bool:
        """Whether the data is to be as published."""
        return self.threshold is None and self.kcore <= 1 and self.split is None and self.ratios is None


@dataclass(frozen=True)
class Source:
    """Files, how to read them, and the registry entry if they belong to one."""

    name: str
    paths: Mapping[str, Path]
    read: Callable[[], Records]
    columns: Mapping[str, str | None]
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
    again = _prepare(records, name, cut)
    kept_users = slice(None) if again.user_ids is None else again.user_ids
    kept_items = slice(None) if again.item_ids is None else again.item_ids
    user_mass, item_mass = data.true_user_mass[kept_users], data.true_item_mass[kept_items]
    return replace(again, true_user_mass=user_mass, true_item_mass=item_mass)


# Read -------------------------------------------------------------------------------------------


def find_source(
    dataset: str,
    data_root: str | os.PathLike[str] | None,
    columns: Mapping[str, str | None],
    *,
    allow_download: bool = True,
) -> Source:
    """A known name, else a folder, else a file; UserError with the known names otherwise."""
    name = registry.ALIASES.get(dataset, dataset)
    known, path = registry.KNOWN.get(name), Path(dataset).expanduser()
    given = [f"--{column.replace('_', '-')}" for column, value in columns.items() if value is not None]
    if given and (known is not None or path.is_dir()):
        raise UserError(f"{given[0]} names a column of one's own table, but {dataset} is not one: drop it")
    if known is not None:
        layout, paths = registry.find(known, data_root, allow_download=allow_download)
        return Source(name, paths, lambda: layout.read(paths), columns, known, layout.threshold)
    if path.is_dir():
        layout, paths = _folder_layout(path)
        return Source(path.resolve().name, paths, lambda: layout.read(paths), columns)
    if path.is_file():
        return Source(path.name.split(".")[0], {"all": path}, lambda: read_table(path, **columns), columns)
    if os.sep in dataset or path.suffix:
        names = ", ".join(registry.known_names())
        raise UserError(f"no file or folder {path}: give --dataset a path that exists or one of {names}")
    raise choice_error("data set", dataset, [*registry.known_names(), *registry.ALIASES])


def _folder_layout(path: Path) -> tuple[registry.Layout, registry.Paths]:
    """Adjacency lists (or MCL pickles) called train, test and maybe valid."""
    for suffix, read in (("txt", read_adjacency_parts), ("pkl", read_mcl_parts)):
        for parts in (("train", "valid", "test"), ("train", "test"), ("train",)):
            layout = registry.Layout({part: f"{part}.{suffix}" for part in parts}, read)
            paths = registry.present(path, layout)
            if paths is not None:
                return layout, paths
    wanted = "adjacency lists train.txt and test.txt (plain or .gz)"
    raise UserError(f"{path} holds no train.txt: wanted {wanted}, or give one file")


def load_source(source: Source, cut: Cut, cache_dir: Path | None = None, *, use_cache: bool = True) -> Interactions:
    """Read, filter, cut and check ``source``, or take what the cache holds for the same bytes and options."""
    if not use_cache:
        return _build(source, cut)
    options = {"name": source.name, "columns": dict(source.columns), "known": source.known is not None, **asdict(cut)}
    options["files"] = {part: path.name for part, path in source.paths.items()}
    key = cache.cache_key(source.paths.values(), options)
    return cache.cached(key, cache_dir or cache.default_cache_dir(), lambda: _build(source, cut))


def _build(source: Source, cut: Cut) -> Interactions:
    known = source.known
    data = _prepare(source.read(), source.name, cut, above=source.above, known=known)
    if known is None:
        return data
    notes = registry.checksum_notes(known, source.paths)
    if cut.is_usual:
        notes |= registry.count_notes(known, data)
    return replace(data, notes={**data.notes, **notes})


def _prepare(
    records: Records, name: str, cut: Cut, *, above: float | None = None, known: KnownDataset | None = None
) -> Interactions:
    """:func:`prepare` with the data set's own defaults where the user asks nothing."""
    if cut.kcore < 0:
        raise UserError(f"found --kcore {cut.kcore}, wanted 0 or more")
    if cut.ratios is not None and cut.split in ("native", "leave-one-out"):
        raise UserError(f"--split {cut.split} has no ratios: drop --split-ratios or choose per-user, global or time")
    split = cut.split
    if split is None and (cut.ratios is not None or records.parts is None):
        split = (known and known.split) or "per-user"
    strict = cut.threshold is None and above is not None and records.ratings is not None
    usual = USUAL_RATIOS if known is None else known.ratios
    return prepare(
        records,
        name,
        threshold=above if strict else cut.threshold,
        strict=strict,
        kcore=cut.kcore,
        split=split,
        ratios=usual if cut.ratios is None else check_ratios(cut.ratios),
        seed=cut.seed,
    )
