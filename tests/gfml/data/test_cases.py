"""Small files that go wrong elsewhere, each with its right value. ``cases/`` was made for this purpose; no data of anybody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gfml.base.errors import UserError
from gfml.data.items import read_item_features, read_item_info
from gfml.data.options import load_dataset

CASES = Path(__file__).parent / "cases"
# The folder's logs have 8 distinct pairs of each of 40 users on 30 items.
SHAPE, PAIRS = (40, 30), 320


def load(name: str, **options):
    return load_dataset(CASES / name, cache=False, val_ratio=0, **options)


def size(data) -> int:
    return data.train.nnz + data.valid.nnz + data.test.nnz


def test_leading_zeros_are_names():
    data = load("leading_zero.csv")
    assert data.user_ids.tolist() == ["007", "008", "07", "7"] and data.item_ids.tolist() == ["00012", "0012", "12"]
    assert size(data) == 4
    zeros = load("zeros.csv")
    assert (
        zeros.train.shape == SHAPE
        and "007" in zeros.user_ids
        and "0018" in zeros.item_ids
        and "7" not in zeros.user_ids
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("music.inter", {}),
        ("trail.csv", {}),
        ("named.csv", {}),
        ("export.csv", {"split": "time"}),
        ("blankrating.csv", {}),
        ("ratings_Shop.csv", {"header": False}),
        ("presplit_csv", {}),
    ],
)
def test_nothing_is_swallowed_or_shifted(name, options):
    data = load(name, **options)
    assert data.train.shape == SHAPE and size(data) == PAIRS
    assert data.notes["rows"] == "320 read; 320 left"


def test_dates_cut_alike_however_they_are_written():
    for split in ("leave-one-out", "user-time", "time"):
        assert load("dmy.csv", split=split).fingerprint == load("iso.csv", split=split).fingerprint
        clocked, epoch = load("dateclock.csv", split=split), load("log_oldest_first.csv", split=split)
        assert clocked.fingerprint == epoch.fingerprint  # the same moments, in seconds and as date and clock
    assert (
        load("dmy.csv", split="time").notes["time date"] == "dates of the form %d/%m/%Y, from 2017-07-14 to 2018-01-06"
    )


@pytest.mark.parametrize("split", ["per-user", "global", "leave-one-out", "leave-k-out", "time", "user-time"])
def test_two_orders_of_the_same_rows_are_cut_alike(split):
    newest, oldest = (load(f"log_{which}_first.csv", split=split) for which in ("newest", "oldest"))
    assert newest.fingerprint == oldest.fingerprint
    assert newest.notes["rows"] == "360 read; 40 repeated pairs, merged; 320 left"
    if split != "time":
        ordered = [load(f"log_{which}_first.csv", split=split, time_col="order") for which in ("newest", "oldest")]
        assert (ordered[0].fingerprint == ordered[1].fingerprint) == (split in ("per-user", "global"))


def test_names_that_mean_nothing_elsewhere():
    data = load("rat_na.csv", header=False)
    assert data.num_users == 40 and {"NA", "null", "None", "nan"} <= set(data.user_ids.tolist())


def test_headers():
    asked = {"user_col": "Customer ID", "item_col": "Product ID", "time_col": "Order Date Time"}
    spaced = load("spaces3.csv", split="time", **asked)
    assert (
        spaced.num_users == 40
        and size(spaced) == 360
        and spaced.notes["time Order Date Time"].startswith("seconds since 1970")
    )
    comma = load("comma_sep.inter")
    assert comma.user_ids.tolist() == [1, 2] and comma.item_ids.tolist() == [2, 3]
    with pytest.raises(UserError, match="give `header False` if the first line is data"):
        load("ratings_Shop.csv")


def test_ratings_are_counted_or_asked_for():
    assert (
        load("blankrating.csv").notes["rating rating"]
        == "recognised, not thresholded (--threshold): 4: 115, empty: 205"
    )
    assert "rating rating" not in load("blankrating.csv", rating_col="none").notes
    with pytest.raises(UserError, match="line 3: found '', wanted a number in column rating"):
        load("blankrating.csv", threshold=3)


def test_amazon_2023():
    data = load("rev2023.jsonl", split="time")
    assert data.num_users == 40 and size(data) == 360
    assert data.notes["time timestamp"] == "milliseconds since 1970, from 2017-07-14 to 2018-01-27"


def test_sequences_and_reviews_in_the_order_of_time():
    lists = [line.split() for line in (CASES / "sequences.txt").read_text().splitlines()]
    last = load("sequences.txt", split="leave-one-out", time_col="order").test
    assert [last[[int(user)]].indices.tolist() for user, *_ in lists] == [[int(items[-1])] for _, *items in lists]
    data = load("reviews2014.json", split="user-time")
    rows = [json.loads(line) for line in (CASES / "reviews2014.json").read_text().splitlines()]
    wanted = {row["reviewerID"]: row["asin"] for row in rows}  # of six the latest one is the test pair
    found = {data.user_ids[u]: data.item_ids[i] for u, i in zip(*data.test.nonzero(), strict=True)}
    assert found == wanted and data.item_ids[0] == "0000000000"


def test_a_split_that_tests_strangers_says_so():
    note = load("log_oldest_first.csv", split="time").notes["most of the test part is unknown to train"]
    assert note.startswith("4 of 4 test users and 0 of 20 test items")


def test_a_line_separator_inside_a_title():
    titles = read_item_info(CASES / "titles_ls.csv", load("log_oldest_first.csv")).titles
    assert len(titles) == 30 and titles[4] == "Title 4\u2028 x" and titles[5] == "Title 5 x"


def test_features_are_matched_by_id_whatever_their_order():
    data = load("named.csv")
    one, other = (read_item_features(CASES / name, data) for name in ("feats.npz", "feats_perm.npz"))
    assert one.known.all() and one.values.any() and (one.values == other.values).all()
