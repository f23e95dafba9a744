"""Recommendations of a finished run of any recommender, or the items nearest to an item, as CSV, JSON or Parquet.

    python recsys/recommend.py runs/recsys-lastfm-lgn-bpr-1a2b3c4d --user 12 57 --top 20
    python recsys/recommend.py RUN --all-users --format json --output lists.json
    python recsys/recommend.py RUN --items 17,4012 --not sold_out.txt
    python recsys/recommend.py RUN --similar-items 4012 --titles items.csv

RUN is a run of recsys, mcl, cml_baseline, hlrm or mirror_grad. Users and items go by the names of the source data. The
data is read again as the run's config says and must not have changed. Lists are those that the test evaluation judged:
items of train and validation are left out.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gfml.base.errors import UserError, suggest
from gfml.program.cli import Parser, number

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gfml.data.interactions import Interactions
    from gfml.distances import SquaredDistance
    from gfml.program.loading import Loaded
    from gfml.ranking.topk import Scorer

# Where published data sets keep their titles.
INFO_FILES = ("movies.dat", "ml-100k.item", "*.item")
FORMATS = ("csv", "json", "parquet")
# So many ids are searched for a near one when an id is unknown; difflib takes seconds for more.
SUGGEST_AMONG = 20_000


def build_parser() -> Parser:
    """The command line of ``recsys/recommend.py``."""
    parser = Parser(prog="recommend", description="Recommendations of a finished run.")
    parser.add_argument("run", metavar="RUN", help="directory of a finished run of a recommender")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--user", nargs="+", metavar="ID", help="users, as the source data names them")
    what.add_argument("--all-users", action="store_true", help="every user")
    what.add_argument("--items", metavar="A,B,C", help="a new user who has these items")
    what.add_argument("--items-file", metavar="FILE", help="the same from a file, one item a line")
    what.add_argument("--similar-items", nargs="+", metavar="ID", help="instead: the items nearest to these items")
    parser.add_argument("--top", type=number(int, least=1), default=20, metavar="N", help="length of a list")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--exclude-known", dest="include_seen", action="store_false", default=False,
                      help="leave out what the user has in train or validation, or a new user's own items (default)")  # fmt: skip
    seen.add_argument("--include-seen", action="store_true", help="keep these items")
    parser.add_argument("--only", metavar="FILE", help="recommend items of this file alone, one id a line")
    parser.add_argument("--not", dest="without", metavar="FILE", help="recommend no item of this file, one id a line")
    parser.add_argument(
        "--item-info",
        "--titles",
        metavar="FILE",
        help="table with ids and titles (.csv, .tsv, .item, movies.dat; default: the data set's own, if any)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="form of the output (default: by the ending of --output, else csv)"
    )
    parser.add_argument("--raw-cells", action="store_true",
                        help="in CSV, keep names that a spreadsheet would run as formulas (default: an apostrophe before)")  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="file to write (default: standard output)")
    where = parser.add_argument_group("where things are")
    where.add_argument(
        "--dataset", metavar="PATH", help="name, file or folder of the data now (default: as for the run)"
    )
    where.add_argument("--data-root", metavar="DIR", help="where the data lies now (default: as for the run)")
    where.add_argument("--cache-dir", metavar="DIR", help="where parsed data is kept (default: as for the run)")
    where.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}", help="where to compute")
    where.add_argument(
        "--threads", type=number(int, least=0), default=0, metavar="N", help="CPU threads; 0: PyTorch's choice"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    # Heavy imports wait until the flags are known to be good.
    from gfml.program.loading import load

    places = {name: getattr(options, name) for name in ("dataset", "data_root", "cache_dir")}
    places = {name: value for name, value in places.items() if value is not None}
    run = load(options.run, device=options.device, threads=options.threads, **places)
    require_recommender(run)
    allowed = allowed_items(run, options.only, options.without)
    if options.similar_items:
        lists = similar_items(run, find_items(run, options.similar_items), options.top, allowed=allowed)
    elif options.items is not None or options.items_file is not None:
        lists = recommend_new(
            run, _given_items(run, options), options.top, include_seen=options.include_seen, allowed=allowed
        )
    else:
        users = range(run.interactions.num_users) if options.all_users else find_users(run, options.user)
        lists = recommend(run, users, options.top, include_seen=options.include_seen, allowed=allowed)
    titles = find_titles(options.item_info, run)
    ending = Path(options.output or "").suffix[1:].lower()
    form = options.format or (ending if ending in FORMATS else FORMATS[0])
    with _output(options.output, binary=form == "parquet") as stream:
        if form == "csv":
            write_csv(lists, stream, titles, raw=options.raw_cells)
        else:
            (write_json if form == "json" else write_parquet)(lists, stream, titles)
    return 0


def require_recommender(run: Loaded) -> None:
    """UserError for a run of a program that recommends nothing."""
    from gfml.program.recommender import Recommender

    if not isinstance(run.experiment, Recommender):
        raise UserError(
            f"{run.path} is a run of {run.program.file}, which recommends nothing: give one of a recommender"
        )


def find_users(run: Loaded, ids: Sequence[str]) -> list[int]:
    """Rows of users by the names of the source; UserError for an unknown one."""
    data = run.interactions
    return _find("user", ids, data.user_ids, data.num_users, data.name)


def find_items(run: Loaded, ids: Sequence[str]) -> list[int]:
    """Columns of items by the names of the source; UserError for an unknown one."""
    data = run.interactions
    return _find("item", ids, data.item_ids, data.num_items, data.name)


@dataclass(frozen=True)
class Lists:
    """Ranked items of some users or items.

    subject: "user" or "item", and keys, the n names. items: int64 [n, k] columns, -1 where a list ends early.
    columns: named numbers [n, k], such as the score. names: what each column of the data is called.
    """

    subject: str
    keys: Sequence[Any]
    items: np.ndarray
    columns: dict[str, np.ndarray]
    names: Sequence[Any]

    def rows(self, row: int, titles: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        """The entries of one list, best first. titles: of all items of the data, in its order."""
        for rank, item in enumerate(self.items[row].tolist()):
            if item < 0:
                return
            entry: dict[str, Any] = {"rank": rank + 1, "item": self.names[item]}
            if titles is not None:
                entry["title"] = titles[item]
            # Six significant digits: about what float32 holds.
            yield entry | {name: float(f"{values[row, rank]:.6g}") for name, values in self.columns.items()}


def allowed_items(run: Loaded, only: str | None, without: str | None) -> np.ndarray | None:
    """bool [I] of the items that may be recommended, None for all. Ids that the data does not have are counted on stderr."""
    import numpy as np

    from gfml.ranking.lists import item_rows, read_ids

    if only is None and without is None:
        return None
    data = run.interactions
    allowed = np.full(data.num_items, only is None)
    for file, flag, value in ((only, "--only", True), (without, "--not", False)):
        if file is not None:
            rows, unknown = item_rows(data, read_ids(file, flag))
            allowed[rows] = value
            if unknown:
                print(f"note: {unknown} ids of {file} are no items of {data.name}, ignored", file=sys.stderr)
    if not allowed.any():
        raise UserError(f"--only and --not leave none of the {data.num_items} items of {data.name}: check the files")
    return allowed


def _given_items(run: Loaded, options: Any) -> list[int]:
    """The items of a new user; UserError for an unknown one."""
    from gfml.ranking.lists import read_ids

    if options.items_file is None:
        try:
            return find_items(run, [name for name in options.items.split(",") if name])
        except UserError as error:
            raise UserError(f"{error}; items whose names have a comma are read from --items-file") from None
    return find_items(run, read_ids(options.items_file, "--items-file"))


def recommend(
    run: Loaded, users: Sequence[int], top: int, *, include_seen: bool = False, allowed: np.ndarray | None = None
) -> Lists:
    """The best ``top`` items of each user (rows of the data), with score and, where it means one, probability.

    allowed: bool [I], which items may be listed. A probability is the sigmoid of the score, masses of both sides
    included, where the experiment says that the score is a logit. Losses on pairs leave it uncalibrated.
    """
    import torch

    data = run.interactions
    rows = torch.as_tensor(users, dtype=torch.int64)
    _say_cold(data, rows.numpy())
    names = _names(data.user_ids, data.num_users)
    scorer = run.experiment.scorer(run.model, "test")
    seen = None if include_seen else data.train_and_valid
    return _lists(run, scorer, [names[user] for user in rows.tolist()], rows, top, seen, allowed)


def recommend_new(
    run: Loaded, items: Sequence[int], top: int, *, include_seen: bool = False, allowed: np.ndarray | None = None
) -> Lists:
    """As :func:`recommend` for a user who is not in the data and has ``items`` (columns of the data)."""
    import numpy as np
    import torch

    from gfml.data.interactions import csr_from_pairs

    own = np.asarray(items, dtype=np.int64)
    history = csr_from_pairs(np.zeros_like(own), own, 1, run.interactions.num_items)
    scorer = run.experiment.fold_in(run.model, history)
    return _lists(
        run, scorer, ["new"], torch.zeros(1, dtype=torch.int64), top, None if include_seen else history, allowed
    )


def _lists(
    run: Loaded, scorer: Scorer, keys: list[Any], rows: torch.Tensor, top: int, seen: Any, allowed: np.ndarray | None
) -> Lists:
    import numpy as np

    from gfml.ranking.lists import best_items

    data, ids = run.interactions, rows.to(run.experiment.device)
    items, scores = best_items(scorer, ids, min(top, data.num_items), seen=seen, allowed=allowed)
    columns = {"score": scores}
    if run.experiment.is_logit(run.model):
        columns["probability"] = 1 / (1 + np.exp(-scores))
    return Lists("user", keys, items.cpu().numpy(), columns, _names(data.item_ids, data.num_items))


def similar_items(run: Loaded, items: Sequence[int], top: int, *, allowed: np.ndarray | None = None) -> Lists:
    """The ``top`` nearest other items of each item (columns of the data), by ascending squared distance.

    The distance is the one that was learned (for kl from the given item to the others), or 2 - 2 cos where the model learns
    none; see :meth:`gfml.program.recommender.Recommender.item_space`.
    """
    import scipy.sparse as sp
    import torch

    from gfml.ranking.lists import best_items

    data = run.interactions
    if data.num_items < 2:
        raise UserError(f"{data.name} has one item, wanted another to compare it with")
    scorer = ItemDistances(*run.experiment.item_space(run.model))
    ids = torch.as_tensor(items, dtype=torch.int64).to(run.experiment.device)
    itself = sp.csr_array(sp.eye_array(data.num_items, format="csr", dtype="float32"))
    found, scores = best_items(scorer, ids, min(top, data.num_items - 1), seen=itself, allowed=allowed)
    names = _names(data.item_ids, data.num_items)
    return Lists("item", [names[item] for item in items], found.cpu().numpy(), {"sq_distance": -scores}, names)


class ItemDistances:
    """Minus the squared distance of items to all items (a :class:`gfml.ranking.topk.Scorer` whose users are items)."""

    def __init__(self, vectors: torch.Tensor, sq_distance: SquaredDistance) -> None:
        self.vectors, self.sq_distance = vectors, sq_distance
        self.num_users = self.num_items = len(vectors)

    def score(self, items: torch.Tensor) -> torch.Tensor:
        """Shape: items int64 [B] -> [B, I]."""
        return self.sq_distance.all_pairs(self.vectors[items], self.vectors).neg()

    def at(self, items: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The same of items [B] with their own others int64 [B, K]: [B, K]."""
        return self.sq_distance.paired(self.vectors[items], self.vectors[others]).neg()

    def factors(self) -> None:
        """None: blocks are scored in full, which keeps small distances exact."""
        return None


# -- output


def write_csv(lists: Lists, stream: IO[str], titles: Sequence[str] | None, *, raw: bool = False) -> None:
    """One line per list entry: the user (or item), rank, item, title if any, numbers. raw: formulas stay formulas."""
    from gfml.ranking.lists import safe_cell

    columns = _columns(lists, titles)
    for name, cells in columns.items():
        if name in lists.columns:
            columns[name] = [float(f"{value:.6g}") for value in cells.tolist()]
        elif not raw:
            columns[name] = [safe_cell(cell) for cell in cells]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def _columns(lists: Lists, titles: Sequence[str] | None) -> dict[str, Any]:
    """The entries of all lists, column by column."""
    import numpy as np

    rows, places = np.nonzero(lists.items >= 0)
    items = lists.items[rows, places].tolist()
    columns: dict[str, Any] = {_key(lists): [lists.keys[row] for row in rows.tolist()], "rank": (places + 1).tolist()}
    columns["item"] = [lists.names[item] for item in items]
    if titles is not None:
        columns["title"] = [titles[item] for item in items]
    return columns | {name: values[rows, places] for name, values in lists.columns.items()}


def _key(lists: Lists) -> str:
    return "user" if lists.subject == "user" else "similar_to"


def write_parquet(lists: Lists, stream: IO[bytes], titles: Sequence[str] | None) -> None:
    """The rows of :func:`write_csv` as a Parquet table; ids as they are, numbers unrounded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(_columns(lists, titles)), stream)


def write_json(lists: Lists, stream: IO[str], titles: Sequence[str] | None) -> None:
    """A list with an object for each user (or item), one a line."""
    stream.write("[\n")
    for row, name in enumerate(lists.keys):
        line = json.dumps({_key(lists): name, "items": list(lists.rows(row, titles))}, ensure_ascii=False)
        stream.write(line + (",\n" if row + 1 < len(lists.keys) else "\n"))
    stream.write("]\n")


def find_titles(file: str | None, run: Loaded) -> list[str] | None:
    """The title of every item, in the order of the data: from ``file``, or from the data set's own; None without any."""
    from gfml.data.items import info_beside, read_item_info

    data = run.interactions
    if file is None:
        info = info_beside(run.settings.dataset, run.settings.data_root, INFO_FILES, data)
        return info.titles if info is not None and any(info.titles) else None
    titles = read_item_info(file, data).titles
    if not any(titles):
        raise UserError(f"{file} has no title for any of the {data.num_items} items of {data.name}: check --item-info")
    return titles


@contextmanager
def _output(file: str | None, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A file that appears whole, or standard output, whose reader may leave early."""
    from gfml.base.files import atomic_open

    if file is not None:
        with atomic_open(file, "wb") if binary else atomic_open(file, newline="") as stream:
            yield stream
        return
    try:
        yield sys.stdout.buffer if binary else sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- parts


def _find(what: str, ids: Sequence[str], names: Iterable[Any] | None, count: int, data: str) -> list[int]:
    known = {str(name): place for place, name in enumerate(range(count) if names is None else names.tolist())}
    unknown = next((name for name in ids if name not in known), None)
    if unknown is not None:
        some = ", ".join(list(known)[:3])
        near = suggest(unknown, known) if count <= SUGGEST_AMONG else ""
        raise UserError(
            f"unknown {what} {unknown!r}, wanted one of the {count} {what}s of {data}, such as {some}{near}"
        )
    return [known[name] for name in ids]


def _names(names: np.ndarray | None, count: int) -> Sequence[Any]:
    return range(count) if names is None else names.tolist()


def _say_cold(data: Interactions, users: np.ndarray) -> None:
    cold = int((data.user_activity[users] == 0).sum())
    if cold:
        print(
            f"note: {cold} of {len(users)} users have no train interactions; their lists rest on untrained vectors",
            file=sys.stderr,
        )
