"""The data flags every program shares, and the one call that turns them into a data set."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gfml.data.interactions import Interactions
    from gfml.data.readers import Records

logger = logging.getLogger("gfml.data")

SPLIT_CHOICES = ("native", "per-user", "global", "leave-one-out", "time")


def add_data_flags(parser: argparse.ArgumentParser, *, dataset: str = "demo") -> None:
    """Add the flags of :func:`load_dataset`; their names are its keywords."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default=dataset, help="a known name, a file (CSV, TSV, .inter, Parquet, .dat) or a folder with train.txt and test.txt")
    data.add_argument("--data-root", metavar="DIR", help="where data sets lie (default: $GFML_DATA, ./data, ~/.cache/gfml/data)")
    data.add_argument("--no-download", dest="download", action="store_false", help="never fetch a missing data set")
    data.add_argument("--cache-dir", metavar="DIR", help="where parsed data is kept (default: ~/.cache/gfml/parsed)")
    data.add_argument("--no-cache", dest="cache", action="store_false", help="read the source files each time")
    for role in ("user", "item", "rating", "time"):
        data.add_argument(f"--{role}-col", metavar="NAME", help=f"column of the {role} (default: the usual names)")
    data.add_argument("--threshold", type=float, metavar="T", help="keep interactions with rating >= T (default: all)")
    data.add_argument("--kcore", type=int, default=0, metavar="K", help="keep users and items with K interactions or more (default: 0, all)")
    data.add_argument("--split", choices=SPLIT_CHOICES, help="how to cut (default: the published split, else per-user)")
    data.add_argument("--split-ratios", type=float, nargs=3, metavar=("TRAIN", "VALID", "TEST"), help="shares (default: 0.8 0.1 0.1)")
    data.add_argument("--split-seed", type=int, default=2020, metavar="SEED", help="seed of every random cut (default: 2020)")
    data.add_argument("--val-ratio", "--val_ratio", dest="val_ratio", type=float, default=0.1, metavar="R",
                      help="share of train cut off for validation if the data has none; 0: none (default: 0.1)")  # fmt: skip
    demo = parser.add_argument_group("generated data (--dataset demo or synthetic)")
    demo.add_argument("--demo-users", type=int, metavar="N", help="users (default: 1500)")
    demo.add_argument("--demo-items", type=int, metavar="N", help="items (default: 1000)")
    demo.add_argument("--demo-interactions", type=int, metavar="N", help="interactions (default: 45000)")
    demo.add_argument("--demo-tail", type=float, metavar="X", help="exponent of the power law of popularity (default: 0.8)")
    demo.add_argument("--demo-noise", type=float, metavar="X", help="share of interactions without reason (default: 0.02)")
    demo.add_argument("--demo-seed", type=int, metavar="SEED", help="seed of the generator (default: 2020)")


def load_from_args(args: argparse.Namespace) -> Interactions:
    """:func:`load_dataset` with the values that :func:`add_data_flags` put into ``args``."""
    names = [name for name in inspect.signature(load_dataset).parameters if name != "dataset"]
    return load_dataset(args.dataset, **{name: getattr(args, name) for name in names})


def load_dataset(
    dataset: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    cache: bool = True,
    user_col: str | None = None,
    item_col: str | None = None,
    rating_col: str | None = None,
    time_col: str | None = None,
    threshold: float | None = None,
    kcore: int = 0,
    split: str | None = None,
    split_ratios: Sequence[float] | None = None,
    split_seed: int = 2020,
    val_ratio: float = 0.1,
    demo_users: int | None = None,
    demo_items: int | None = None,
    demo_interactions: int | None = None,
    demo_tail: float | None = None,
    demo_noise: float | None = None,
    demo_seed: int | None = None,
) -> Interactions:
    """The data set of that name, file or folder, cut into train, valid and test.

    ``split`` None: the published split; a data set without one is cut as its registry entry says,
    a file of one's own ``per-user`` 0.8/0.1/0.1. Data without validation part loses ``val_ratio``
    of each user's train pairs to one. Raises UserError, one line, for everything a user can mend.
    """
    from gfml.data import registry

    name = registry.ALIASES.get(str(dataset), str(dataset))
    if name in registry.GENERATED:
        sizes = {"num_users": demo_users, "num_items": demo_items, "num_interactions": demo_interactions}
        data = _generated(name, {**sizes, "tail_exponent": demo_tail, "noise": demo_noise, "seed": demo_seed})
        data = _resplit(data, threshold, kcore, split, split_ratios, split_seed)
    else:
        source = _Source(name, data_root, download, dict(user_col=user_col, item_col=item_col, rating_col=rating_col, time_col=time_col))
        cut = dict(threshold=threshold, kcore=kcore, split=split, ratios=split_ratios, seed=split_seed)
        data = source.load(cut, Path(cache_dir).expanduser() if cache_dir else None, cache)
    return data if data.valid.nnz else data.with_validation(val_ratio, split_seed)


def _generated(name: str, given: dict[str, object]) -> Interactions:
    from gfml.data.synthetic import generate

    return generate(name=name, **{key: value for key, value in given.items() if value is not None})


def _resplit(
    data: Interactions, threshold: float | None, kcore: int, split: str | None, ratios: Sequence[float] | None, seed: int
) -> Interactions:
    """Generated data cut again on request; the true masses follow the users and items that stay."""
    import numpy as np

    from gfml.data.interactions import pairs_from_csr
    from gfml.data.readers import Records
    from gfml.data.splits import prepare

    if threshold is None and kcore <= 1 and split in (None, "native") and ratios is None:
        return data
    parts = [pairs_from_csr(data.split(part)) for part in ("train", "valid", "test")]
    labels = np.repeat(np.arange(3, dtype=np.int8), [len(users) for users, _ in parts])
    users, items = (np.concatenate(side) for side in zip(*parts, strict=True))
    records = Records(users, items, parts=labels, numbered=True, min_size=data.train.shape)
    kind = "per-user" if ratios is not None and split is None else split
    again = prepare(records, data.name, threshold=threshold, kcore=kcore, split=kind, ratios=_ratios(ratios), seed=seed)
    kept_users = slice(None) if again.user_ids is None else again.user_ids
    kept_items = slice(None) if again.item_ids is None else again.item_ids
    return replace(again, true_user_mass=data.true_user_mass[kept_users], true_item_mass=data.true_item_mass[kept_items])


def _ratios(given: Sequence[float] | None, usual: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> tuple[float, float, float]:
    from gfml.data.splits import check_ratios

    return check_ratios(tuple(given)) if given is not None else usual


class _Source:
    """Where the rows of one data set come from: a registry entry, a file or a folder."""

    def __init__(self, name: str, data_root: str | os.PathLike[str] | None, download: bool, columns: dict[str, str | None]) -> None:
        from gfml.data import registry
        from gfml.errors import UserError

        self.known = registry.KNOWN.get(name)
        self.columns, self.threshold, path = columns, None, Path(name).expanduser()
        if self.known is not None:
            layout, self.paths = registry.find(self.known, data_root, allow_download=download)
            self.name, self.read, self.threshold = name, lambda: layout.read(self.paths), layout.threshold
        elif path.is_dir():
            self.name, self.paths, self.read = path.resolve().name, *_folder(path)
        elif path.is_file():
            self.name, self.paths, self.read = path.name.split(".")[0], {"all": path}, lambda: _own_file(path, columns)
        elif os.sep in name or path.suffix:
            raise UserError(f"no file or folder {path}: give --dataset a path that exists or one of {', '.join(registry.known_names())}")
        else:
            from gfml.errors import choice_error

            raise choice_error("data set", name, [*registry.known_names(), *registry.ALIASES])

    def load(self, cut: dict[str, object], cache_dir: Path | None, use_cache: bool) -> Interactions:
        from gfml.data import cache

        options = {"name": self.name, "columns": self.columns, "known": self.known and self.known.name, **cut}
        options["files"] = {part: path.name for part, path in self.paths.items()}
        if not use_cache:
            return self._build(cut)
        key = cache.cache_key(self.paths.values(), options)
        return cache.cached(key, cache_dir or cache.default_cache_dir(), lambda: self._build(cut))

    def _build(self, cut: dict[str, object]) -> Interactions:
        from gfml.data import registry
        from gfml.data.splits import prepare

        records, known = self.read(), self.known
        kind, given = cut["split"], cut["ratios"]
        if kind is None and (given is not None or records.parts is None):
            kind = (known and known.split) or "per-user"
        strict = cut["threshold"] is None and self.threshold is not None
        data = prepare(
            records,
            self.name,
            threshold=self.threshold if strict else cut["threshold"],
            strict=strict,
            kcore=cut["kcore"],
            split=kind,
            ratios=_ratios(given, known.ratios if known else (0.8, 0.1, 0.1)),
            seed=cut["seed"],
        )
        if known is None:
            return data
        as_published = cut["threshold"] is None and cut["kcore"] <= 1 and cut["split"] is None and given is None
        notes = {**registry.checksum_notes(known, self.paths), **(registry.count_notes(known, data) if as_published else {})}
        return replace(data, notes={**data.notes, **notes})


def _folder(path: Path):  # -> (paths, reader)
    """A folder of adjacency lists: train.txt and test.txt, maybe valid.txt, plain or gzip."""
    from gfml.data import registry
    from gfml.data.readers import read_adjacency_parts, read_mcl_parts
    from gfml.errors import UserError

    readers = {"txt": read_adjacency_parts, "pkl": read_mcl_parts}
    for suffix, read in readers.items():
        for parts in (("train", "valid", "test"), ("train", "test"), ("train",)):
            paths = registry.present(path, registry.Layout({part: f"{part}.{suffix}" for part in parts}, read))
            if paths is not None:
                return paths, lambda paths=paths, read=read: read(paths)
    raise UserError(f"{path} holds no train.txt: wanted adjacency lists train.txt and test.txt (plain or .gz), or give one file")


def _own_file(path: Path, columns: dict[str, str | None]) -> Records:
    from gfml.data.readers import read_table

    return read_table(path, **columns)
