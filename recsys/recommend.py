"""Recommendations of a finished run, or the items nearest to an item, as CSV or JSON.

    python recsys/recommend.py runs/recsys-lastfm-lgn-bpr-1a2b3c4d --user 12 57 --top 20
    python recsys/recommend.py RUN --all-users --format json --output lists.json
    python recsys/recommend.py RUN --similar-items 4012 --titles items.csv

Users and items go by the names of the source data. The data is read again as the run's config says and must not
have changed. Lists are those that the test evaluation judged: items of train and validation are left out.
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
from gfml.program.cli import Options, Parser, number, resolve_device, run_main, set_threads
from recsys.options import parse

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gfml.data.interactions import Interactions
    from gfml.ranking.topk import Scorer
    from recsys.model import Recommender

# Where published data sets keep their titles.
INFO_FILES = ("movies.dat", "ml-100k.item")
# So many ids are searched for a near one when an id is unknown; difflib takes seconds for more.
SUGGEST_AMONG = 20_000
# One block of scores; a scorer holds two or three of that size at a time.
BLOCK_BYTES = 64 << 20


def build_parser() -> Parser:
    """The command line of ``recsys/recommend.py``."""
    parser = Parser(prog="recsys/recommend.py", description="Recommendations of a finished run.")
    parser.add_argument("run", metavar="RUN", help="directory of a finished run of recsys/main.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--user", nargs="+", metavar="ID", help="users, as the source data names them")
    what.add_argument("--all-users", action="store_true", help="every user")
    what.add_argument("--similar-items", nargs="+", metavar="ID", help="instead: the items nearest to these items")
    parser.add_argument("--top", type=number(int, least=1), default=20, metavar="N", help="length of a list")
    parser.add_argument("--include-seen", action="store_true", help="keep items the user has in train or validation")
    parser.add_argument(
        "--item-info",
        "--titles",
        metavar="FILE",
        help="table with ids and titles (.csv, .tsv, .item, movies.dat; default: the data set's own, if any)",
    )
    parser.add_argument("--format", choices=("csv", "json"), default="csv", help="form of the output")
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
    loaded = load_run(
        options.run, dataset=options.dataset, data_root=options.data_root, cache_dir=options.cache_dir, device=options.device,
        threads=options.threads,
    )  # fmt: skip
    if options.similar_items:
        lists = similar_items(loaded, loaded.find_items(options.similar_items), options.top)
    else:
        users = range(loaded.data.num_users) if options.all_users else loaded.find_users(options.user)
        lists = recommend(loaded, users, options.top, include_seen=options.include_seen)
    titles = find_titles(options.item_info, loaded)
    with _output(options.output) as stream:
        (write_csv if options.format == "csv" else write_json)(lists, stream, titles)
    return 0


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to score: its flags, data and trained model."""

    options: Options
    data: Interactions
    model: Recommender

    def find_users(self, ids: Sequence[str]) -> list[int]:
        """Rows of users by the names of the source; UserError for an unknown one."""
        return _find("user", ids, self.data.user_ids, self.data.num_users, self.data.name)

    def find_items(self, ids: Sequence[str]) -> list[int]:
        """Columns of items by the names of the source; UserError for an unknown one."""
        return _find("item", ids, self.data.item_ids, self.data.num_items, self.data.name)

    @property
    def scorer(self) -> Scorer:
        """The scores that the run was judged by."""
        from recsys.experiment import scorer_of

        return scorer_of(self.options, self.model)


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
            yield entry | {name: float(values[row, rank]) for name, values in self.columns.items()}


def load_run(
    path: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    data_root: str | None = None,
    cache_dir: str | None = None,
    device: str = "auto",
    threads: int = 0,
) -> LoadedRun:
    """Data and reported weights of a finished run.

    dataset, data_root, cache_dir: where the data lies now, if not where it lay. Raises UserError when there is no run,
    it is not finished, its data is gone or has changed, or its weights are damaged.
    """
    path = Path(path)
    _require_finished(path)
    moved = {
        "--dataset": dataset,
        "--data-root": data_root,
        "--cache-dir": cache_dir,
        "--device": device,
        "--threads": threads,
    }
    # The tables come from the run itself: a file that it started from may be gone.
    flags = [f"--config={path / 'config.toml'}", "--pretrain=0"]
    options = parse([*flags, *(f"{flag}={value}" for flag, value in moved.items() if value is not None)])

    # Heavy imports wait until the run is known to be there.
    from gfml.data.options import load_from_args
    from recsys.experiment import load_reported, trained_on

    target = resolve_device(options)
    set_threads(options)
    data = load_from_args(options)
    _require_same_data(path, trained_on(options, data))
    model, data = load_reported(options, data, target, path)
    return LoadedRun(options, data, model)


def recommend(run: LoadedRun, users: Sequence[int], top: int, *, include_seen: bool = False) -> Lists:
    """The best ``top`` items of each user (rows of the data), with score and, where it means one, probability.

    A probability is the sigmoid of the score, masses of both sides included: for gravity scores and their blends
    and for the dot product under loss dot. Losses on pairs (bpr_gra, mix_bpr) leave it uncalibrated.
    """
    import numpy as np
    import torch

    from gfml.ranking.topk import topk_items

    rows = torch.as_tensor(users, dtype=torch.int64)
    _say_cold(run.data, rows.numpy())
    ids = rows.to(run.model.encoder.nodes.device)
    scorer = run.scorer
    items = topk_items(
        scorer, ids, min(top, run.data.num_items), seen=None if include_seen else run.data.train_and_valid
    )
    scores = _scores_at(scorer, ids, items)
    columns = {"score": scores}
    if is_logit(run):
        columns["probability"] = 1 / (1 + np.exp(-scores))
    names = _names(run.data.user_ids, run.data.num_users)
    return Lists(
        "user",
        [names[user] for user in rows.tolist()],
        items.cpu().numpy(),
        columns,
        _names(run.data.item_ids, run.data.num_items),
    )


def similar_items(run: LoadedRun, items: Sequence[int], top: int) -> Lists:
    """The ``top`` nearest other items of each item (columns of the data), by ascending squared distance.

    The distance is the one that was learned: that of the gravity score (for kl from the given item to the others),
    for loss cml the squared Euclidean one, for dot and bpr, which learn none, 2 - 2 cos.
    """
    import scipy.sparse as sp
    import torch

    from gfml.ranking.topk import topk_items

    if run.data.num_items < 2:
        raise UserError(f"{run.data.name} has one item, wanted another to compare it with")
    scorer = ItemDistances(run.model)
    ids = torch.as_tensor(items, dtype=torch.int64).to(run.model.encoder.nodes.device)
    itself = sp.csr_array(sp.eye_array(run.data.num_items, format="csr", dtype="float32"))
    found = topk_items(scorer, ids, min(top, run.data.num_items - 1), seen=itself)
    names = _names(run.data.item_ids, run.data.num_items)
    return Lists(
        "item",
        [names[item] for item in items],
        found.cpu().numpy(),
        {"sq_distance": -_scores_at(scorer, ids, found)},
        names,
    )


class ItemDistances:
    """Minus the squared distance of items to all items (a :class:`gfml.ranking.topk.Scorer` whose users are items)."""

    def __init__(self, model: Recommender) -> None:
        from gfml.distances import SquaredDistance
        from gfml.gravity import unit_rows

        vectors = model.encoder.vectors()[1].detach()
        learned = model.loss_mode not in ("dot", "bpr", "cml")
        self.sq_distance = model.gravity.distance if learned else SquaredDistance("l2")
        unit = model.gravity.emb_norm if learned else model.loss_mode != "cml"
        self.vectors = unit_rows(vectors) if unit else vectors
        self.num_users = self.num_items = len(vectors)

    def score(self, items: torch.Tensor) -> torch.Tensor:
        """Shape: items int64 [B] -> [B, I]."""
        return self.sq_distance.all_pairs(self.vectors[items], self.vectors).neg()

    def factors(self) -> None:
        """None: blocks are scored in full, which keeps small distances exact."""
        return None


def is_logit(run: LoadedRun) -> bool:
    """Whether the sigmoid of the run's ranking score is a probability: a gravity score, or a dot product under loss dot."""
    from gfml.gravity import GravityScorer
    from recsys.model import BlendScorer

    return (run.model.loss_mode == "dot" and run.options.infer_mode in ("mat", "dot")) or isinstance(
        run.scorer, (GravityScorer, BlendScorer)
    )


# -- output


def write_csv(lists: Lists, stream: IO[str], titles: Sequence[str] | None) -> None:
    """One line per list entry: the user (or item), rank, item, title if any, numbers."""
    key = "user" if lists.subject == "user" else "similar_to"
    columns = [key, "rank", "item", *(["title"] if titles is not None else []), *lists.columns]
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for row, name in enumerate(lists.keys):
        writer.writerows({key: name} | _rounded(entry) for entry in lists.rows(row, titles))


def write_json(lists: Lists, stream: IO[str], titles: Sequence[str] | None) -> None:
    """A list with an object for each user (or item), one a line."""
    key = "user" if lists.subject == "user" else "similar_to"
    stream.write("[\n")
    for row, name in enumerate(lists.keys):
        line = json.dumps(
            {key: name, "items": [_rounded(entry) for entry in lists.rows(row, titles)]}, ensure_ascii=False
        )
        stream.write(line + (",\n" if row + 1 < len(lists.keys) else "\n"))
    stream.write("]\n")


def find_titles(file: str | None, run: LoadedRun) -> list[str] | None:
    """The title of every item, in the order of the data: from ``file``, or from the data set's own; None without any."""
    from gfml.data.items import beside, read_item_info

    found = file or beside(run.options.dataset, run.options.data_root, INFO_FILES)
    if found is None:
        return None
    titles = read_item_info(found, run.data).titles
    if file and not any(titles):
        raise UserError(
            f"{file} has no title for any of the {run.data.num_items} items of {run.data.name}: check --item-info"
        )
    return titles


def _rounded(entry: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six significant digits, about what float32 holds."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in entry.items()}


@contextmanager
def _output(file: str | None) -> Iterator[IO[str]]:
    """A file that appears whole, or standard output, whose reader may leave early."""
    from gfml.base.files import atomic_open

    if file is not None:
        with atomic_open(file, newline="") as stream:
            yield stream
        return
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- parts


def _require_finished(path: Path) -> None:
    from gfml.engine.runs import run_state

    state = run_state(path)
    if state == "not launched":
        raise UserError(f"there is no run at {path}: check the directory, or train it first with recsys/main.py")
    if state != "done":
        raise UserError(f"the run {path} is not finished ({state}): continue it with recsys/main.py --resume {path}")


def _require_same_data(path: Path, data: Interactions) -> None:
    from gfml.engine.runs import read_result

    found = read_result(path).get("data", {}).get("fingerprint")
    if found != data.fingerprint:
        raise UserError(
            f"the data has changed since {path} was trained ({str(found)[:12]}, now {data.fingerprint[:12]}): "
            "bring the old data back, say where it is with --dataset or --data-root, or train anew"
        )


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


def _scores_at(scorer: Scorer, rows: torch.Tensor, items: torch.Tensor) -> np.ndarray:
    """Scores [n, k] of the given items, float64; NaN where there is none (-1)."""
    import torch

    from gfml.ranking.topk import full_precision

    size = max(1, BLOCK_BYTES // (4 * scorer.num_items))
    with torch.no_grad(), full_precision():
        blocks = [
            scorer.score(chunk).gather(1, wanted.clamp_min(0).to(chunk.device))
            for chunk, wanted in zip(rows.split(size), items.split(size), strict=True)
        ]
    return torch.cat(blocks).double().masked_fill_((items < 0).to(blocks[0].device), torch.nan).cpu().numpy()


def _say_cold(data: Interactions, users: np.ndarray) -> None:
    cold = int((data.user_activity[users] == 0).sum())
    if cold:
        print(
            f"note: {cold} of {len(users)} users have no train interactions; their lists rest on untrained vectors",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
