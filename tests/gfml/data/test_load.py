"""From flags to data: own files and folders, the cache, the validation part, contradictions."""

from __future__ import annotations

import argparse
import gzip
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.data import cache
from gfml.data.options import DataSettings, DemoSettings, load_dataset, load_from_args
from gfml.program.cli import Parser, add_settings


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GFML_DATA", raising=False)


def ratings_csv(path, num_users=40, num_items=25, seed=0):
    rng = np.random.default_rng(seed)
    keys = np.unique(rng.integers(num_users * num_items, size=500))
    pairs = [divmod(key, num_items) for key in keys.tolist()]
    lines = [f"user{u},{i},{rng.integers(1, 6)},{rng.integers(10_000)}" for u, i in pairs]
    path.write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n")
    return len(pairs)


def parse(*tokens: str) -> argparse.Namespace:
    parser = Parser()
    add_settings(parser, DataSettings)
    add_settings(parser, DemoSettings)
    return parser.parse_args(tokens)


def size(data) -> int:
    return data.train.nnz + data.valid.nnz + data.test.nnz


def test_flags_reach_the_loader(tmp_path):
    count = ratings_csv(tmp_path / "own.csv")
    data = load_from_args(parse("--dataset", str(tmp_path / "own.csv")))
    assert size(data) == count and data.name == "own" and data.user_ids[0] == "user0"
    assert 0.05 < data.valid.nnz / count < 0.2 and 0.05 < data.test.nnz / count < 0.2
    options = ("--threshold", "3", "--kcore", "2", "--split", "time", "--split-ratios", "8", "1", "1", "--no-cache")
    timed = load_from_args(parse("--dataset", str(tmp_path / "own.csv"), *options))
    assert 0 < size(timed) < count and timed.valid.nnz and timed.test.nnz
    assert parse("--val_ratio", "0.2").val_ratio == parse("--val-ratio", "0.2").val_ratio == 0.2
    assert parse().dataset == "demo" and parse().cache and not parse("--no-cache").cache


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from gfml.data.options import DataSettings; from gfml.program.cli import parser_of;"
        "parser_of('p', '', DataSettings).format_help(); print(sorted({'torch', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_validation_is_cut_only_where_there_is_none(tmp_path):
    ratings_csv(tmp_path / "own.csv")
    none = load_dataset(tmp_path / "own.csv", split="per-user", split_ratios=(0.8, 0, 0.2), val_ratio=0)
    assert none.valid.nnz == 0
    cut = load_dataset(tmp_path / "own.csv", split="per-user", split_ratios=(0.8, 0, 0.2), val_ratio=0.25)
    assert cut.valid.nnz > 0 and cut.train.nnz + cut.valid.nnz == none.train.nnz
    assert (cut.test != none.test).nnz == 0
    shipped = load_dataset(tmp_path / "own.csv", split="leave-one-out", val_ratio=0)
    assert shipped.valid.nnz > 0


def test_folder_of_lists(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.txt.gz").write_bytes(gzip.compress(b"0 1 2 3 4\n1 2 \n2\n"))
    (folder / "test.txt").write_bytes(b"0 5\r\n1 2 3\r\n")
    data = load_dataset(folder)
    assert data.name == "mine" and data.train.shape == (3, 6) and data.valid.nnz == 1
    assert data.notes["test pairs also in train or valid, dropped"] == 1
    assert data.notes["lines without items in train.txt.gz"] == 1
    assert data.notes["users without train pairs"] == 1
    again = load_dataset(folder, split="global", split_ratios=(0.5, 0, 0.5), val_ratio=0)
    assert (again.train.nnz, again.test.nnz) == (3, 4)
    (folder / "test.txt").unlink()
    only_train = load_dataset(folder, val_ratio=0)
    assert only_train.test.nnz == 0 and only_train.notes["test part"] == "empty"


def test_mcl_pickles_under_their_name(tmp_path):
    folder = tmp_path / "amazon-digital-music"
    folder.mkdir()
    rated = (np.array([0, 0, 1, 5]), np.array([0, 1, 2, 9]), np.array([5.0, 4.0, 4.0, 3.0]))
    (folder / "train.pkl").write_bytes(pickle.dumps(rated))
    (folder / "test.pkl").write_bytes(pickle.dumps((np.array([1]), np.array([0]), np.array([5.0]))))
    data = load_dataset("amazon-music", data_root=tmp_path, val_ratio=0)
    assert data.train.shape == (2, 3) and data.train.nnz == 3  # the rating of 3 and its ids are gone
    assert load_dataset("amazon-music", data_root=tmp_path, val_ratio=0, threshold=3).train.nnz == 4


def test_generated_data():
    demo = load_dataset("demo", demo_users=200, demo_items=100, demo_interactions=3000)
    assert demo.train.shape == (200, 100) and size(demo) == 3000 and demo.valid.nnz and demo.test.nnz
    assert demo.true_item_mass.shape == (100,)
    shape = {"demo_users": 200, "demo_items": 100, "demo_interactions": 1500, "demo_noise": 0.5, "demo_tail": 0.5}
    whole, cored = load_dataset("synthetic", **shape), load_dataset("synthetic", **shape, kcore=6)
    assert cored.num_items < 100 and cored.true_item_mass.shape == (cored.num_items,)
    assert np.array_equal(cored.true_item_mass, whole.true_item_mass[cored.item_ids])
    assert cored.user_activity.min() >= 1 and size(cored) < 1500
    assert load_dataset("demo").num_users == 1500


# Cache ------------------------------------------------------------------------------------------


def files_in(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npz"))


def equal(one, other) -> bool:
    same_ids = np.array_equal(one.user_ids, other.user_ids) and np.array_equal(one.item_ids, other.item_ids)
    return one.fingerprint == other.fingerprint and same_ids and one.notes == other.notes and one.name == other.name


def test_cache_serves_the_same_and_never_the_stale(tmp_path):
    source, where = tmp_path / "own.csv", tmp_path / "parsed"
    ratings_csv(source)
    first = load_dataset(source, cache_dir=where)
    assert len(files_in(where)) == 1
    assert equal(load_dataset(source, cache_dir=where), first)
    assert equal(load_dataset(source, cache=False), first)
    text = source.read_text()
    source.write_text(text + "user0,24,5,1\nnew,24,5,1\n")  # same name, other bytes
    changed = load_dataset(source, cache_dir=where)
    assert "new" in changed.user_ids and len(files_in(where)) == 2
    source.write_text(text)
    assert equal(load_dataset(source, cache_dir=where), first)
    swapped = {"user_col": "movieId", "item_col": "userId"}
    for options in ({"threshold": 3}, {"kcore": 8}, {"split_seed": 1}, {"split": "global"}, swapped):
        other = load_dataset(source, cache_dir=where, **options)
        assert equal(other, load_dataset(source, cache=False, **options)) and other.fingerprint != first.fingerprint
    assert len(files_in(where)) == 7


@pytest.mark.parametrize("damage", [lambda raw: raw[:100], lambda raw: b"", lambda raw: raw.replace(b"own", b"0wn"),
                                    lambda raw: raw[:1000] + b"\xff\xff" + raw[1002:]])  # fmt: skip
def test_damaged_cache_is_rebuilt(tmp_path, caplog, damage):
    source, where = tmp_path / "own.csv", tmp_path / "parsed"
    ratings_csv(source)
    first = load_dataset(source, cache_dir=where)
    stored = next(where.glob("*.npz"))
    stored.write_bytes(damage(stored.read_bytes()))
    with caplog.at_level(logging.WARNING, "gfml.data"):
        assert equal(load_dataset(source, cache_dir=where), first)
        assert len(caplog.records) == 1 and "damaged" in caplog.text and str(stored) in caplog.text
        assert equal(load_dataset(source, cache_dir=where), first)
        assert len(caplog.records) == 1  # mended


def test_cached_file_of_other_data_is_not_served(tmp_path):
    where = tmp_path / "parsed"
    for seed in range(2):
        ratings_csv(tmp_path / f"own{seed}.csv", seed=seed)
        load_dataset(tmp_path / f"own{seed}.csv", cache_dir=where)
    one, other = sorted(where.glob("*.npz"))
    one.write_bytes(other.read_bytes())
    for seed in range(2):
        path = tmp_path / f"own{seed}.csv"
        assert equal(load_dataset(path, cache_dir=where), load_dataset(path, cache=False))


def test_unwritable_cache_is_done_without(tmp_path, caplog):
    ratings_csv(tmp_path / "own.csv")
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING, "gfml.data"):
        assert size(load_dataset(tmp_path / "own.csv", cache_dir=tmp_path / "file" / "below")) > 0
    assert "not cached" in caplog.text


def test_default_cache_place(tmp_path):
    ratings_csv(tmp_path / "own.csv")
    load_dataset(tmp_path / "own.csv")
    assert len(files_in(tmp_path / "cache" / "gfml" / "parsed")) == 1 == len(files_in(cache.default_cache_dir()))


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "gowala"}, "unknown data set 'gowala': .*did you mean 'gowalla'"),
        ({"dataset": "absent.csv"}, "no file or folder absent.csv"),
        ({"dataset": "no/such/folder"}, "no file or folder no/such/folder"),
        ({"dataset": "{folder}"}, "holds no train.txt"),
        ({"dataset": "{own}", "split": "native"}, "own ships no split of its own"),
        (
            {"dataset": "{own}", "split": "leave-one-out", "split_ratios": (8, 1, 1)},
            "`split leave-one-out` has no ratios",
        ),
        ({"dataset": "{own}", "kcore": -1}, "found `kcore -1`"),
        ({"dataset": "{own}", "val_ratio": 1.0, "split_ratios": (8, 0, 2)}, "validation ratio of 1.0"),
        ({"dataset": "{own}", "demo_users": 5}, "demo_users and the like"),
        ({"dataset": "{own}", "time_col": "when"}, "no column 'when' for `time_col`"),
        ({"dataset": "gowalla", "user_col": "who"}, "`user_col` names a column"),
        ({"dataset": "demo", "threshold": 3}, "has no ratings"),
        ({"dataset": "demo", "demo_tail": -1}, "wants tail_exponent >= 0"),
        ({"dataset": "demo", "split": "time"}, "needs a time column"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, arguments, message):
    ratings_csv(tmp_path / "own.csv")
    (tmp_path / "empty").mkdir()
    name = arguments.pop("dataset").format(own=tmp_path / "own.csv", folder=tmp_path / "empty")
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(name, **arguments)
    assert "\n" not in str(caught.value)


def test_a_table_of_users_beside_is_counted(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = "\n".join(f"0{user}\ti{item}" for user in range(4) for item in range(6))
    (folder / "shop.inter").write_text(f"user_id:token\titem_id:token\n{rows}\n")
    (folder / "shop.user").write_text('user_id:token\tage:float\n00\t7\n03\t9\n3\t5"\nzz\t1\n')
    note = load_dataset(folder).notes["shop.user"]
    assert note == "4 users, 2 of the 4 in the data among them; nothing else of it is used"
    (folder / "shop.user").write_text("user_id:token\n00\n01\n02\n03\n")
    assert load_dataset(folder).notes["shop.user"].startswith("4 users, 4 of the 4 ")  # not the cached note


CUTS = {  # what --split and the like make of user u's ten pairs, in the order of their times: train, valid, test
    "leave-one-out": ("--split leave-one-out", [range(8), [8], [9]]),
    "leave-k-out": ("--split leave-k-out --leave-k 2", [range(6), [6, 7], [8, 9]]),
    "user-time": ("--split user-time --split-ratios 0.5 0.2 0.3", [range(5), [5, 6], [7, 8, 9]]),
    "time": ("--split time --split-ratios 0.6 0.2 0.2", [range(6), [6, 7], [8, 9]]),
    "one date": ("--split time --split-date 2020-01-09 --val-ratio 0", [range(8), [], [8, 9]]),
    "two dates": ("--split time --split-date 2020-01-04 2020-01-09", [range(3), [3, 4, 5, 6, 7], [8, 9]]),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("backwards", [False, True])
def test_each_cut_by_its_flags(tmp_path, name, backwards):
    flags, wanted = CUTS[name]
    lines = [f"{user},i{day},2020-01-{day + 1:02d}" for user in "uv" for day in range(10)]
    path = tmp_path / "own.csv"
    path.write_text("user,item,time\n" + "\n".join(lines[::-1] if backwards else lines) + "\n")
    data = load_from_args(parse("--dataset", str(path), "--no-cache", *flags.split()))
    for part, days in zip(("train", "valid", "test"), wanted, strict=True):
        for user in range(2):
            assert [data.item_ids[item] for item in data.split(part)[[user]].indices] == [f"i{day}" for day in days]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("flags", "kept", "last"),
    [("--duplicates first", "abc", "b"), ("--duplicates last", "abc", "a"), ("--duplicates sum", "abc", "b"),
     ("--duplicates first --threshold 4", "ac", "a"), ("--duplicates last --threshold 4", "ac", "a"),
     ("--duplicates sum --threshold 5", "ac", "c"), ("--duplicates sum --threshold 7", "c", None)],
)  # fmt: skip
def test_repeated_pairs_by_their_flag(tmp_path, flags, kept, last, backwards):
    """a: rated 1 on day 1 and 5 on day 9; b: 3 on day 5; c: 9 on day 2."""
    lines = ["u,a,1,2020-01-01", "u,c,9,2020-01-02", "u,b,3,2020-01-05", "u,a,5,2020-01-09"]
    path = tmp_path / "own.csv"
    path.write_text("user,item,rating,time\n" + "\n".join(lines[::-1] if backwards else lines) + "\n")
    data = load_from_args(
        parse("--dataset", str(path), "--no-cache", "--split", "leave-one-out", "--val-ratio", "0", *flags.split())
    )
    assert sorted(data.item_ids) == list(kept)
    assert [data.item_ids[item] for item in data.test.indices] == ([] if last is None else [last])
    assert ("merged" in data.notes["rows"]) == ("first --threshold" not in flags)


RATED = "user,item,rating,time\na,1,5,10\na,2,3,20\na,1,2,30\na,3,4,5\nb,1,1,1\nb,2,4,2\nb,3,2,3\nc,1,5,1\nc,2,4,9\nc,3,3,5\nc,2,1,2\n"


@pytest.mark.parametrize(
    ("duplicates", "twice"), [("first", {"a": 5, "c": 1}), ("last", {"a": 2, "c": 4}), ("sum", {"a": 7, "c": 5})]
)
def test_ratings_of_the_test_part(duplicates: str, twice: dict[str, int], tmp_path: Path) -> None:
    """Of a pair that is there twice the rating that the choice of duplicates says; none without being asked."""
    (tmp_path / "r.csv").write_text(RATED, encoding="utf-8")
    single = {("a", "2"): 3, ("a", "3"): 4, ("b", "1"): 1, ("b", "2"): 4, ("b", "3"): 2, ("c", "1"): 5, ("c", "3"): 3}
    wanted = single | {("a", "1"): twice["a"], ("c", "2"): twice["c"]}
    seen = set()
    for seed in range(6):
        how = {"split_seed": seed, "duplicates": duplicates, "cache_dir": tmp_path / "cache"}
        data = load_dataset(tmp_path / "r.csv", rated=True, **how)
        again = load_dataset(tmp_path / "r.csv", rated=True, **how)  # from the cache
        plain = load_dataset(tmp_path / "r.csv", **how)
        assert plain.fingerprint == data.fingerprint and plain.test_ratings is None
        users, items = data.rated_test.nonzero()
        pairs = [(str(data.user_ids[u]), str(data.item_ids[i])) for u, i in zip(users, items, strict=True)]
        assert data.test_ratings.tolist() == again.test_ratings.tolist() == [wanted[pair] for pair in pairs]
        seen |= {*pairs}
    assert len(seen) > 5


def test_no_ratings_to_keep(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("user,item\na,1\na,2\na,3\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no ratings, wanted them for `graded`"):
        load_dataset(tmp_path / "r.csv", rated=True, cache=False)
    with pytest.raises(UserError, match="has no ratings"):
        load_dataset("demo", rated=True)


def test_ratings_below_zero_are_no_gains(tmp_path: Path) -> None:
    """Truth rated 5 and -3, of which a list has the 5 alone: 5 / (5 - 3 / log2(3)) would be an NDCG of 1.6."""
    rows = "".join(f"u,{item},{5 - 8 * (item % 2)}\n" for item in range(40))
    (tmp_path / "r.csv").write_text(f"user,item,rating\n{rows}", encoding="utf-8")
    assert load_dataset(tmp_path / "r.csv", cache=False).test.nnz == 4
    with pytest.raises(UserError, match="found a rating of -3 .*none below 0 for `graded`"):
        load_dataset(tmp_path / "r.csv", rated=True, cache=False)
    assert load_dataset(tmp_path / "r.csv", rated=True, threshold=0, cache=False).test_ratings.tolist() == [5, 5]
