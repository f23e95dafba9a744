"""From raw Amazon reviews and metadata to a data folder that ``mirror_grad/main.py --dataset FOLDER`` reads; or the texts and
pictures of a data set that is there already to features that ``mirror_grad/main.py --features FOLDER`` reads.

    python mirror_grad/preprocess.py --reviews reviews_Baby.json.gz --meta meta_Baby.json.gz --out data/baby2
    python mirror_grad/preprocess.py --reviews ratings_Baby.csv --meta meta_Baby.json.gz --images image_features_Baby.b \
        --text-encoder sentence-transformers/all-MiniLM-L6-v2 --out data/baby2
    python mirror_grad/preprocess.py --features-of ml1m-ge3 --text-encoder packaged:all-MiniLM-L6-v2 \
        --image-encoder packaged:efficientnet_lite0 --out runs/ml1m-ge3-encoders

Steps: drop incomplete rows and exact repeats, k-core, number users and items by first appearance, split, text and image
features, a manifest with hashes. Text of an item: title, brand, categories and description.
Differences from the published notebooks: one seeded command, other splits, no code in the metadata is run.
Source: Zhou, MMRec, 2023 (the pipeline); McAuley et al., SIGIR 2015 (the 2014 release and its features).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base.errors import UserError
from gfml.program.cli import Options, Parser, number, run_main

SPLITS = ("random", "user-time", "global-time", "leave-last")
# The pictures that --features-of finds beside the data, the first that is there.
PICTURES_BESIDE = ("posters_64x96.zip", "posters.zip", "images.zip")


def build_parser() -> Parser:
    """The command line of ``mirror_grad/preprocess.py``."""
    parser = Parser(prog="mirror_grad/preprocess.py", description="Raw Amazon reviews and metadata to a data folder.")
    add = parser.add_argument
    add(
        "--features-of",
        metavar="DATASET",
        help="encode the texts and pictures of a data set as main.py knows it (default: those beside the data; else --meta, "
        "--image-folder)",
    )
    add("--data-root", metavar="DIR", help="where known data sets lie, for --features-of")
    add(
        "--reviews",
        metavar="FILE",
        help="reviews as JSON lines (2014, 2018 or 2023 release) or ratings as a table, with a header or as user, item, rating, "
        "time (2018: item, user); packed or not",
    )
    add(
        "--meta",
        metavar="FILE",
        help="metadata, a JSON or Python-literal object a line (asin, title, brand, categories, description); with --features-of "
        "also a table with titles, genres, descriptions",
    )
    add("--out", required=True, metavar="DIR", help="the folder to write; with --reviews its name is the data set's")
    add(
        "--kcore",
        type=number(int, least=1),
        default=5,
        metavar="K",
        help="least number of rows of a user and of an item",
    )
    add(
        "--duplicates",
        choices=("times", "first"),
        default="times",
        help="times: repeats of a pair at another time stay, as published; first: only the earliest stays",
    )
    add(
        "--split",
        choices=SPLITS,
        default="random",
        help="random: of each user at random, as released; user-time: the same sizes, latest rows held out; global-time: by "
        "quantiles of all times; leave-last: the last row to test, the one before to validation",
    )
    add(
        "--ratios",
        type=number(above=0),
        nargs=3,
        default=[0.8, 0.1, 0.1],
        metavar=("TRAIN", "VALID", "TEST"),
        help="shares of global-time",
    )
    add("--seed", type=number(int, least=0), default=999, metavar="N", help="seed of the random split and of tfidf-svd")
    _add_features(add)
    return parser


def _add_features(add: Callable[..., Any]) -> None:
    """Where text and image features come from."""
    add(
        "--text-encoder",
        default="tfidf-svd",
        metavar="NAME",
        help="tfidf-svd, hashing, a sentence-transformers model, or packaged:all-MiniLM-L6-v2, which needs no network",
    )
    add(
        "--text-width",
        type=number(int, least=1),
        default=384,
        metavar="F",
        help="width of tfidf-svd and hashing features",
    )
    add("--images", metavar="FILE", help="binary image features of the 2014 release (.b)")
    add("--image-folder", metavar="DIR", help="folder or zip archive of pictures ASIN.jpg, encoded by --image-encoder")
    add(
        "--image-encoder",
        default="resnet50",
        metavar="NAME",
        help="timm backbone for --image-folder, or packaged:efficientnet_lite0",
    )
    add(
        "--image-weights", metavar="FILE", help="state of the backbone (default: timm's pretrained weights, downloaded)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(None if argv is None else list(argv))
    if bool(options.reviews) == bool(options.features_of):
        raise UserError("wanted either --reviews, raw data, or --features-of, data that are there: give one of them")
    others = {"kcore", "duplicates", "split", "ratios", "images"} if options.features_of else {"data_root"}
    if wrong := sorted(others & options.explicit):
        raise UserError(
            f"--{wrong[0].replace('_', '-')} says nothing of --{'features-of' if options.features_of else 'reviews'}: drop it"
        )
    if options.features_of:
        return encode_known(options)
    if options.images and options.image_folder:
        raise UserError("found --images and --image-folder: give the one whose features are wanted")
    if not options.meta and not options.images and not options.image_folder:
        raise UserError(
            "found neither --meta nor --images nor --image-folder: items would have no features; give at least one"
        )
    rows = read_reviews(Path(options.reviews))
    read = len(rows) + sum(rows.dropped.values())
    rows = rows.deduplicated(options.duplicates)
    rows = rows.take(k_core_rows(rows, options.kcore), f"rows outside the {options.kcore}-core")
    if not len(rows):
        raise UserError(f"the {options.kcore}-core of {options.reviews} is empty: lower --kcore")
    users, user_names = by_appearance(rows.users)
    items, item_names = by_appearance(rows.items)
    labels = split_rows(options.split, users, rows.times, options.ratios, options.seed)
    if options.split != "random" and np.ptp(rows.times) == 0:
        if options.split == "global-time":
            raise UserError(
                "all rows have one moment, which --split global-time does not tear apart: give --split random"
            )
        rows.notes["times"] = f"all rows have one moment: --split {options.split} takes them in the order of the file"
    folder = write(options, rows, users, user_names, items, item_names, labels)
    gone = "".join(f"; {count:,} {why}, dropped" for why, count in rows.dropped.items())
    for line in (
        f"rows: {read:,} read{gone}; {len(rows):,} left",
        *(f"{key}: {value}" for key, value in rows.notes.items()),
    ):
        print(f"note: {line}")
    print(f"{folder}: {len(user_names):,} users, {len(item_names):,} items, {len(rows):,} rows")
    return 0


def encode_known(options: Options) -> int:
    """Features of the items of a data set that ``mirror_grad/main.py`` reads, as ``OUT/features.npz`` by the items' source ids."""
    from gfml.data.items import beside
    from mirror_grad import layout
    from mirror_grad.data import TEXT_FILES, item_names, load, read_texts
    from mirror_grad.main import PROGRAM

    settings = PROGRAM.of(model="BPR", dataset=options.features_of, data_root=options.data_root)
    data, name, root = load(settings, needs_features=False), settings.dataset, settings.data_root
    folder = Path(options.out).expanduser()
    if data.folder is not None and folder.resolve() == data.folder.resolve():
        raise UserError(
            f"--out {options.out} is the folder of {name} itself, whose files would be replaced: give another"
        )
    texts, pictures = (
        Path(given) if given else beside(name, root, usual)
        for given, usual in (
            (options.meta, ("movies_extrainfos.dat", *TEXT_FILES)),
            (options.image_folder, PICTURES_BESIDE),
        )
    )
    if texts is None and pictures is None:
        raise UserError(f"{name} has neither texts nor pictures beside it: give --meta or --image-folder")
    names, notes = item_names(data), dict[str, object]()
    tables = _tables(options, names, None if texts is None else read_texts(texts, data), pictures, notes)
    folder.mkdir(parents=True, exist_ok=True)
    layout.write_feature_archive(folder / "features.npz", names, {kind: table[:2] for kind, table in tables.items()})
    _manifest(options, folder, names, tables, {"items": len(names), "notes": notes})
    for line in (f"{key}: {value}" for key, value in notes.items()):
        print(f"note: {line}")
    for kind, (values, known, encoder) in tables.items():
        without = f"{int((~known).sum()):,} of {len(names):,} items have none"
        print(f"{kind}: {values.shape[1]} wide by {encoder} from {pictures if kind == 'image' else texts}; {without}")
    print(f"{folder}: python mirror_grad/main.py --dataset {name} --features {options.out}")
    return 0


# -- reading


@dataclass(frozen=True)
class Reviews:
    """Complete rows: users and items str, ratings and times float64. dropped: how many rows went, and why."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)

    def take(self, keep: np.ndarray, why: str = "") -> Reviews:
        """The rows that a mask or an index selects; those that go are counted under ``why``."""
        columns = {name: getattr(self, name)[keep] for name in ("users", "items", "ratings", "times")}
        gone = len(self) - len(columns["users"])
        return replace(self, **columns, dropped=self.dropped | {why: gone} if why and gone else self.dropped)

    def deduplicated(self, how: str) -> Reviews:
        """Without repeats of (user, item, time); with ``first``, of each (user, item) only the earliest row."""
        import numpy as np

        key = [self.users, self.items] + ([self.times] if how == "times" else [])
        order = np.lexsort((np.arange(len(self)), self.times, self.items, self.users))
        first = np.ones(len(self), dtype=bool)
        if len(self):
            first[1:] = np.any([column[order][1:] != column[order][:-1] for column in key], axis=0)
        return self.take(np.sort(order[first]), "repeated rows" if how == "times" else "later rows of a pair")


def read_reviews(path: Path) -> Reviews:
    """Rows with user, item, rating and time, in file order; incomplete ones are left out and counted.

    JSON lines of the 2014, 2018 and 2023 releases, their rating files with or without a header, or any table.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from gfml.data.names import encode
    from gfml.data.readers import (
        ITEM_NAMES,
        RATING_NAMES,
        TIME_NAMES,
        USER_NAMES,
        Columns,
        is_item_first,
        read_ratings,
        roles,
    )
    from gfml.data.tables import normal, open_table
    from gfml.data.times import read_times

    if not path.is_file():
        raise UserError(f"there is no file {path}: check --reviews")
    usual = (*USER_NAMES, *ITEM_NAMES, *RATING_NAMES, *TIME_NAMES)
    table = open_table(path, wanted=usual)
    if not {normal(name) for name in table.names} & {normal(name) for name in usual}:
        table = open_table(path, header=False)
    pick = roles(table, Columns())
    missing = [role for role in ("rating", "time") if pick[role] is None]
    if missing:
        raise UserError(
            f"{path} has no {missing[0]} column, found {', '.join(table.names)}: wanted user, item, rating and time"
        )
    names = [pick[role] for role in ("user", "item", "rating", "time")]
    cells = table.read(names)
    whole = np.ones(len(cells[names[0]]), dtype=bool)
    for column in cells.values():
        whole &= np.asarray(pc.is_valid(column))
        if pa.types.is_string(column.type):
            whole &= np.asarray(pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), False))
    if not whole.any():
        raise UserError(f"{path} has no complete row of user, item, rating and time: check --reviews")
    if not whole.all():
        cells = {name: column.filter(pa.array(whole)) for name, column in cells.items()}
    users, items = (encode(table, name, cells[name]) for name in names[:2])
    if pick["bare"] and is_item_first(users, items):
        users, items = items, users
        table.notes["columns by position"] = "item, user, rating, time: the first holds Amazon's item numbers"
    times = read_times(table, names[3], cells[names[3]])
    rows = Reviews(
        *(ids.names.astype(np.str_)[ids.codes] for ids in (users, items)),
        read_ratings(table, names[2], cells[names[2]]),
        times.values.astype(np.float64),
        notes=table.notes,
    )
    gone = int((~whole).sum())
    return replace(rows, dropped={"incomplete rows": gone} if gone else {})


def read_metadata(path: Path, names: Sequence[str], notes: dict[str, object] | None = None) -> list[str]:
    """The text of every item of ``names``: title, brand, first category path, description; "" where nothing is known."""
    from gfml.data.tables import json_objects

    if not path.is_file():
        raise UserError(f"there is no file {path}: check the path")
    wanted, texts = set(names), {}
    for _, row in json_objects(path, {} if notes is None else notes):
        found = {str(row[key]) for key in ("parent_asin", "asin") if row.get(key) is not None} & wanted
        texts |= {name: item_text(row) for name in found}
    return [texts.get(name, "") for name in names]


def item_text(row: dict[str, Any]) -> str:
    """One line of text from an item's metadata: 2014 (categories, a list of paths), 2018 (category) or 2023 (store)."""
    paths = row.get("categories") or row.get("category") or [[]]
    paths = [paths] if isinstance(paths, str) else paths
    first = paths[0] if isinstance(paths[0], list) else paths
    description = row.get("description") or ""
    words = [
        row.get("title") or "",
        row.get("brand") or row.get("store") or "",
        *first,
        *([description] if isinstance(description, str) else description),
    ]
    return " ".join(" ".join(str(word) for word in words if word).split())


# -- core, numbers, split


def k_core_rows(rows: Reviews, k: int) -> np.ndarray:
    """Mask of the rows left when users and items with fewer than k rows are removed together until none is left."""
    from gfml.data.splits import k_core

    return k_core(np.unique(rows.users, return_inverse=True)[1], np.unique(rows.items, return_inverse=True)[1], k)


def by_appearance(names: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers 0, 1, ... in order of first appearance, and the name of each number."""
    ordered, first, rows = np.unique(names, return_index=True, return_inverse=True)
    rank = np.empty(len(ordered), dtype=np.int64)
    order = np.argsort(first)
    rank[order] = np.arange(len(ordered))
    return rank[rows], ordered[order].tolist()


def split_sizes(count: int) -> tuple[int, int, int]:
    """Rows of a user for train, validation and test, as in the released data.

    n < 10: n - 2, 1, 1. Else with h = floor(n / 5): n - h, floor(h / 2), the rest of h. Fewer than 3 all train.
    """
    if count < 3:
        return count, 0, 0
    if count < 10:
        return count - 2, 1, 1
    held = count // 5
    return count - held, held // 2, held - held // 2


def split_rows(how: str, users: np.ndarray, times: np.ndarray, ratios: Sequence[float], seed: int) -> np.ndarray:
    """Labels int8 of every row: 0 train, 1 validation, 2 test."""
    if how == "global-time":
        return _by_quantiles(times, ratios)
    key = np.random.default_rng(seed).random(len(users)) if how == "random" else times
    order = np.lexsort((np.arange(len(users)), key, users))
    counts = np.bincount(users)
    sizes = np.array([_last_two(n) if how == "leave-last" else split_sizes(n) for n in counts.tolist()])
    place = np.empty(len(users), dtype=np.int64)
    place[order] = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    train, valid = sizes[users, 0], sizes[users, 1]
    return ((place >= train).astype(np.int8) + (place >= train + valid)).astype(np.int8)


def _last_two(count: int) -> tuple[int, int, int]:
    return (count, 0, 0) if count < 3 else (count - 2, 1, 1)


def _by_quantiles(times: np.ndarray, ratios: Sequence[float]) -> np.ndarray:
    """Rows before the first cut train, before the second validate; the cuts are quantiles of all times."""
    share = np.cumsum(np.asarray(ratios) / np.sum(ratios))
    first, second = np.quantile(times, [share[0], share[1]])
    return ((times >= first).astype(np.int8) + (times >= second)).astype(np.int8)


# -- writing


def write(
    options: Options,
    rows: Reviews,
    users: np.ndarray,
    user_names: list[str],
    items: np.ndarray,
    item_names: list[str],
    labels: np.ndarray,
) -> Path:
    """The whole folder; the path."""
    from mirror_grad import features, layout

    folder = Path(options.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # Rows of a user stand together, parts in order, as in the released files.
    order = np.lexsort((rows.times, labels, users))
    columns = (column[order] for column in (users, items, rows.ratings, rows.times, labels))
    layout.write_rows(folder / f"{folder.resolve().name}.inter", layout.INTER_HEAD, *columns)
    layout.write_rows(folder / "u_id_mapping.csv", ("user_id", "userID"), user_names, range(len(user_names)))
    layout.write_rows(folder / "i_id_mapping.csv", ("asin", "itemID"), item_names, range(len(item_names)))
    texts = read_metadata(Path(options.meta), item_names, rows.notes) if options.meta else None
    pictures = Path(options.image_folder) if options.image_folder else None
    tables = _tables(options, item_names, texts, pictures, rows.notes)
    if texts is not None:
        layout.write_rows(folder / "item_text.csv", ("item_id", "title"), item_names, texts)
    for kind, (values, known, _) in tables.items():
        filled = features.fill_missing(values, known, "mean") if kind == "image" else values
        layout.write_feature_file(folder / f"{kind}_feat.npy", filled)
    _manifest(options, folder, item_names, tables, {
        "users": len(user_names), "items": len(item_names), "rows": len(rows), "parts": np.bincount(labels, minlength=3).tolist(),
        "dropped": rows.dropped, "notes": {key: str(value) for key, value in rows.notes.items()},
    })  # fmt: skip
    return folder


# Features [I, F], which items have own ones, and the encoder.
Encoded = tuple[np.ndarray, np.ndarray, str]


def _tables(
    options: Options, names: list[str], texts: list[str] | None, pictures: Path | None, notes: dict[str, object]
) -> dict[str, Encoded]:
    """The features by modality. texts: one an item, "" where it has none; pictures: a folder or an archive of them."""
    from mirror_grad import features

    made: dict[str, Encoded] = {}
    if texts is not None:
        # A text without words is one blank for a sentence model, a row of zeros for the others.
        table = features.encode_texts(
            [text or " " for text in texts], options.text_encoder, options.text_width, options.seed
        )
        made["text"] = table, np.array([bool(text) for text in texts]), options.text_encoder
    if options.images:
        made["image"] = *features.read_amazon_images(Path(options.images), names), "amazon 2014"
    if pictures is not None:
        weights = Path(options.image_weights) if options.image_weights else None
        values, known = features.encode_pictures(pictures, names, options.image_encoder, weights)
        made["image"] = values, known, options.image_encoder
        there = sum(path is not None for path in features.find_pictures(pictures, names))
        if there > known.sum():
            notes["pictures that cannot be opened"] = (
                f"{there - int(known.sum()):,} of {there:,}, their items have no own features"
            )
    return made


def _manifest(
    options: Options, folder: Path, names: list[str], tables: dict[str, Encoded], facts: dict[str, object]
) -> None:
    """What the folder holds and how it was made. Items without own features are listed."""
    from mirror_grad import layout

    made = {
        kind: {"encoder": encoder, "width": values.shape[1], "missing": np.asarray(names)[~known].tolist()}
        for kind, (values, known, encoder) in tables.items()
    }
    settings = {key: value for key, value in vars(options).items() if value is not None}
    layout.write_manifest(folder, facts | {"settings": settings, "features": made})


if __name__ == "__main__":
    sys.exit(run_main(main))
