"""Data as people have them through the whole program: a run on files of each form, and lists out of it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gfml import load
from gfml.base.runs import read_result
from gfml.data.interactions import Interactions
from gfml.program.cli import run_main
from gfml.program.recommend import main as recommend
from gfml.program.recommender import STEPS_BETWEEN
from recsys.main import main
from recsys.settings import DEMO_DEFAULTS, SEARCHED, RecsysSettings

FLAGS = """--epochs 2 --baselines none --report 0 --topks 3 --es_metric ndcg@3 --embedding-dim 4 --no-progress --no-cache
    --val-ratio 0.2 --run-name run --out""".split()
Pairs = list[tuple[str, str]]


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pairs]:
    """Pairs by part: 12 users, u00 to u11, each with 7 of 15 items, of which some have leading zeros."""
    draw, parts = np.random.default_rng(3), {"train": [], "valid": [], "test": []}
    for user in range(12):
        items = draw.choice(15, 7, replace=False)
        for place, item in enumerate(items):
            parts["valid" if place == 5 else "test" if place == 6 else "train"].append((f"u{user:02d}", f"{item:03d}"))
    return parts


def trained(dataset: Path, out: Path, *flags: str) -> Interactions:
    assert run_main(main, ["--dataset", str(dataset), *FLAGS, str(out), *flags]) == 0
    return load(out / "run").interactions


def named(data: Interactions, part: str) -> Pairs:
    rows, columns = data.split(part).nonzero()
    return sorted(zip(map(str, data.user_ids[rows]), map(str, data.item_ids[columns]), strict=True))


def atomic(folder: Path, part: str, rows: Pairs) -> None:
    lines = ["user_id:token\titem_id:token\trating:float", *(f"{user}\t{item}\t4" for user, item in rows)]
    (folder / f"{folder.name}.{part}.inter").write_text("\n".join(lines) + "\n")


def parquet(folder: Path, part: str, rows: Pairs) -> None:
    users, items = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items}), folder / f"{part}.parquet")


@pytest.mark.parametrize("write", [atomic, parquet])
def test_a_split_that_a_folder_ships_is_the_one_that_is_judged(
    tmp_path: Path, pairs: dict[str, Pairs], write: Callable[[Path, str, Pairs], None]
) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    for part, rows in pairs.items():
        write(folder, part, rows)
    data = trained(folder, tmp_path)
    assert {part: named(data, part) for part in pairs} == {part: sorted(rows) for part, rows in pairs.items()}


@pytest.mark.parametrize("year", [2014, 2018])
def test_amazon_reviews(tmp_path: Path, pairs: dict[str, Pairs], year: int) -> None:
    rows = [pair for part in pairs.values() for pair in part]
    lines = []
    for number, (user, item) in enumerate(rows):
        review = {"reviewerID": user, "asin": item, "reviewerName": 'A "b", c', "reviewText": "Two\nlines, 5.0"}
        review |= {"overall": float(1 + number % 5), "summary": "s", "unixReviewTime": 1_400_000_000 + 3600 * number}
        more = {"helpful": [number, 3], "reviewTime": "05 3, 2014"}
        # Of 2018: no helpful votes but votes as text, whether verified, and styles, each only in some reviews.
        if year == 2018:
            more = {"verified": number % 2 == 0, "reviewTime": "05 3, 2014"}
            more |= {"vote": f"1,{number:03d}"} if number % 3 == 0 else {}
            more |= {"style": {"Size:": " L"}} if number % 4 == 0 else {}
            more |= {"image": ["https://example.org/a.jpg"]} if number % 7 == 0 else {}
        lines.append(json.dumps(review | more))
    file = tmp_path / "reviews_Shop_5.json.gz"
    file.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    data = trained(file, tmp_path, "--split", "time", "--threshold", "2")
    kept = [pair for number, pair in enumerate(rows) if 1 + number % 5 >= 2]
    found = {part: named(data, part) for part in pairs}
    assert sorted(sum(found.values(), [])) == sorted(kept)
    # Rows stand in the order of time here, and so do the parts of a cut by time.
    assert found["train"] == sorted(kept[: len(found["train"])])
    assert found["test"] == sorted(kept[-len(found["test"]) :]) and len(found["test"]) == pytest.approx(
        0.1 * len(kept), abs=1
    )


@pytest.mark.parametrize("presplit", [False, True])
def test_titles_beside_atomic_interactions_are_in_the_lists(
    tmp_path: Path, pairs: dict[str, Pairs], presplit: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    if presplit:
        for part, rows in pairs.items():
            atomic(folder, part, rows)
    else:
        atomic(folder, "all", [pair for part in pairs.values() for pair in part])
        (folder / "films.all.inter").rename(folder / "films.inter")
    titles = [f'{item:03d}\tThe "{item}", a film\tcomedy drama' for item in reversed(range(15))]
    (folder / "films.item").write_text(
        "\n".join(["item_id:token\tmovie_title:token_seq\tclass:token_seq", *titles]) + "\n"
    )
    trained(folder if presplit else folder / "films.inter", tmp_path)
    capsys.readouterr()
    assert run_main(recommend, [str(tmp_path / "run"), "--items", "003,007", "--top", "5"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(found) == 5 and all(row["title"] == f'The "{int(row["item"])}", a film' for row in found)


def test_own_files_are_judged_every_so_many_steps(
    tmp_path: Path, pairs: dict[str, Pairs], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.csv"
    file.write_text("user,item\n" + "".join(f"{user},{item}\n" for part in pairs.values() for user, item in part))
    # No step moves anything: the first evaluation is the best.
    still = ["--batch-size", "7", "--epochs", "1000", "--lr", "1e-12", "--lr_decay", "0", "--ema_on", "0"]
    data = trained(file, tmp_path, *still, "--patience", "3")
    every = round(STEPS_BETWEEN / -(-data.train.nnz // 7))
    selection = read_result(tmp_path / "run")["selection"]
    why = f"stopped at epoch {4 * every}: no better val/ndcg@3 for 3 evaluations"
    assert (selection["epoch"], selection["stopped"]) == (every, why) and why in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "val/ndcg@3" in row] == [every * count for count in (1, 2, 3, 4)]
    assert (
        run_main(main, ["--dataset", str(file), *FLAGS, str(tmp_path), "--run-name", "short", "--eval-every", "1"]) == 0
    )
    assert read_result(tmp_path / "short")["selection"]["stopped"] == "all epochs done"


def test_flags_win_over_the_stop_of_own_files_and_known_data_keep_theirs() -> None:
    from recsys.main import PROGRAM

    def stop(*words: str) -> tuple[int | None, int | None]:
        settings: RecsysSettings = PROGRAM.parse(list(words))
        return settings.eval_every, settings.patience

    assert stop() == (DEMO_DEFAULTS["eval_every"], DEMO_DEFAULTS["patience"])
    assert stop("--dataset", "gowalla") == stop("--dataset", "ml-1m") == (10, 30)
    assert stop("--dataset", "mine.csv", "--lr", "1e-3") == (None, 30)
    assert stop("--dataset", "mine.csv") == (
        None,
        round(DEMO_DEFAULTS["patience"] * DEMO_DEFAULTS["lr"] / SEARCHED["gravity"]["lr"]),
    )
    assert stop("--dataset", "mine.csv", "--lr", "5e-3") == (None, DEMO_DEFAULTS["patience"])
    assert stop("--dataset", "mine.csv", "--eval-every", "4", "--patience", "9") == (4, 9)
    assert stop("--dataset", "gowalla", "--eval-every", "none") == (None, 30)
