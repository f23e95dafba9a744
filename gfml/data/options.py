"""The data flags every program shares, and the one call that turns them into a data set."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError
from gfml.base.settings import Settings, setting, whole

if TYPE_CHECKING:
    from gfml.data.interactions import Interactions

SPLIT_CHOICES = ("native", "per-user", "global", "leave-one-out", "leave-k-out", "time", "user-time")
DUPLICATE_CHOICES = ("first", "last", "sum")


@dataclass(frozen=True)
class DataSettings(Settings):
    """data"""

    dataset: str = setting(
        "demo",
        "a known name, a file (CSV, TSV, .inter, Parquet, JSON lines) or a folder with one or with train and test",
    )
    data_root: str | None = setting(
        None, "where data sets lie (default: $GFML_DATA, ./data, ~/.cache/gfml/data)", unit="DIR", beside=True
    )
    download: bool = setting(True, "fetch a missing data set where its terms allow it", beside=True)
    cache_dir: str | None = setting(
        None, "where parsed data is kept (default: ~/.cache/gfml/parsed)", unit="DIR", beside=True
    )
    cache: bool = setting(True, "keep parsed data; otherwise read the source files each time", beside=True)
    user_col: str | None = setting(None, "column of the user (default: the usual names)", unit="NAME")
    item_col: str | None = setting(None, "column of the item (default: the usual names)", unit="NAME")
    rating_col: str | None = setting(
        None, "column of the rating (default: the usual names; none: it has none)", unit="NAME"
    )
    time_col: str | None = setting(
        None,
        "column of the time (default: the usual names; DATE,CLOCK: two columns of one moment; order: the order of the "
        "rows; none)",
        unit="NAME",
    )
    header: bool | None = setting(
        None,
        "no: the first line is data, and columns go by number, 1 user, 2 item, 3 rating, 4 time unless named so",
        bool,
        late=True,
    )
    sep: str | None = setting(
        None, "what separates cells: a character, ::, tab, comma, ... (default: found)", unit="CHAR"
    )
    time_format: str | None = setting(
        None, "form of the times: s, ms, us, ns, or a strptime form such as %%d/%%m/%%Y (default: found)", unit="FORM"
    )
    threshold: float | None = setting(None, "keep interactions with rating >= T (default: all)", float, unit="T")
    duplicates: str = setting(
        "first",
        "a repeated pair counts once: at its first time of those kept by --threshold, at its last with the rating it has "
        "there, or with the sum of its ratings",
        choices=DUPLICATE_CHOICES,
        late=True,
    )
    kcore: int = setting(0, "keep users and items with K interactions or more (0: all)", unit="K")
    split: str | None = setting(
        None,
        "how to cut: each user's pairs at random (per-user) or by time (user-time), all pairs at random (global) or by time "
        "(time), each user's last one or K (default: the published split, else per-user)",
        choices=SPLIT_CHOICES,
    )
    split_ratios: tuple[float, ...] | None = setting(
        None, "shares (default: 0.8 0.1 0.1)", float, nargs=3, unit=("TRAIN", "VALID", "TEST")
    )
    split_date: tuple[str, ...] | None = setting(
        None,
        "with --split time: where test begins, or where validation and test begin (2017-07-14)",
        nargs="+",
        unit="DATE",
    )
    leave_k: int | None = setting(None, "with --split leave-k-out: pairs of a user in each part", int, unit="K")
    split_seed: int = setting(2020, "seed of every random cut", whole, unit="SEED")
    val_ratio: float = setting(0.1, "share of train cut off for validation if the data has none", unit="R")


@dataclass(frozen=True)
class DemoSettings(Settings):
    """generated data (--dataset demo or synthetic)"""

    demo_users: int | None = setting(None, "users (default: 1500)", int, unit="N")
    demo_items: int | None = setting(None, "items (default: 1000)", int, unit="N")
    demo_interactions: int | None = setting(None, "interactions (default: 45000)", int, unit="N")
    demo_tail: float | None = setting(None, "exponent of the popularity law (default: 1.0)", float, unit="X")
    demo_noise: float | None = setting(None, "share of random interactions (default: 0.02)", float, unit="X")
    demo_seed: int | None = setting(None, "seed of the generator (default: 2020)", whole, unit="SEED")


def load_from_args(args: Any) -> Interactions:
    """:func:`load_dataset` with the values of :class:`DataSettings` and :class:`DemoSettings`."""
    names = [name for name in inspect.signature(load_dataset).parameters if name not in ("dataset", "rated")]
    rated = getattr(args, "graded", None) is not None
    return load_dataset(args.dataset, rated=rated, **{name: getattr(args, name) for name in names})


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
    header: bool | None = None,
    sep: str | None = None,
    time_format: str | None = None,
    threshold: float | None = None,
    duplicates: str = "first",
    kcore: int = 0,
    split: str | None = None,
    split_ratios: Sequence[float] | None = None,
    split_date: Sequence[str] | None = None,
    leave_k: int | None = None,
    split_seed: int = 2020,
    val_ratio: float = 0.1,
    demo_users: int | None = None,
    demo_items: int | None = None,
    demo_interactions: int | None = None,
    demo_tail: float | None = None,
    demo_noise: float | None = None,
    demo_seed: int | None = None,
    rated: bool = False,
) -> Interactions:
    """The data set of that name, file or folder, cut into train, valid and test.

    ``split`` None: the published split; a data set without one is cut as its registry entry says,
    a file of one's own ``per-user`` 0.8/0.1/0.1. Data without validation part loses ``val_ratio``
    of each user's train pairs to one. rated: with the ratings of the test pairs. Raises UserError, one line, for everything a user can mend.

    Examples:
        >>> data = load_dataset("demo", demo_users=100, demo_items=80, demo_interactions=2000)
        >>> data.num_users, data.num_items, data.train.nnz + data.valid.nnz + data.test.nnz
        (100, 80, 2000)
    """
    from gfml.data import load, registry
    from gfml.data.readers import Columns

    columns = Columns(user_col, item_col, rating_col, time_col, sep, header, time_format)
    sizes = {"num_users": demo_users, "num_items": demo_items, "num_interactions": demo_interactions}
    shape = {**sizes, "tail_exponent": demo_tail, "noise": demo_noise, "seed": demo_seed}
    if split_date is not None and len(split_date) > 2:
        raise UserError(f"found `split_date {' '.join(split_date)}`, wanted one date or two")
    ratios, dates = (None if given is None else tuple(given) for given in (split_ratios, split_date))
    cut = load.Cut(threshold, kcore, split, ratios, split_seed, duplicates, leave_k, dates, rated)
    if rated and str(dataset) in registry.GENERATED:
        raise UserError(f"{dataset} has no ratings, wanted them for `graded`: drop it or give data with stars")
    if str(dataset) in registry.GENERATED:
        data = load.load_generated(str(dataset), {key: value for key, value in shape.items() if value is not None}, cut)
    elif any(value is not None for value in shape.values()):
        raise UserError(f"demo_users and the like shape generated data, but the data set is {dataset}: drop them")
    else:
        source = load.find_source(str(dataset), data_root, columns, allow_download=download)
        data = load.load_source(source, cut, Path(cache_dir).expanduser() if cache_dir else None, use_cache=cache)
    return data if data.valid.nnz else data.with_validation(val_ratio, split_seed)
