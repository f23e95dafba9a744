"""Readers: round trips over what writers may produce, and one clear line for what they cannot accept."""

from __future__ import annotations

import gzip
import pickle
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.base.errors import UserError
from gfml.data import readers
from gfml.data.splits import Split, prepare

BLANKS = st.sampled_from([" ", "  ", "\t", " \t "])
LISTS = st.dictionaries(st.integers(0, 30), st.lists(st.integers(0, 2**26), max_size=6), min_size=1, max_size=8)


def pairs(records: readers.Records) -> list[tuple[int, int]]:
    return list(zip(records.ids("users").tolist(), records.ids("items").tolist(), strict=True))


def written(tmp_path, text: str | bytes, name: str = "train.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def one_line(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@settings(max_examples=60, deadline=None)
@given(lists=LISTS, data=st.data())
def test_adjacency_round_trip(tmp_path_factory, lists, data):
    lines = []
    for user, items in lists.items():
        blanks = data.draw(st.lists(BLANKS, min_size=len(items) + 2, max_size=len(items) + 2))
        cells = [str(user), *map(str, items)]
        lines.append("".join(cell + blank for cell, blank in zip(cells, blanks, strict=False)))
        lines += data.draw(st.lists(st.sampled_from(["", " "]), max_size=1))
    text = data.draw(st.sampled_from(["\n", "\r\n"])).join(lines)
    path = written(tmp_path_factory.mktemp("lists"), text + data.draw(st.sampled_from(["", "\n", " \r\n"])))
    records = readers.read_adjacency(path)
    assert pairs(records) == [(user, item) for user, items in lists.items() for item in items]
    assert records.min_size[0] == max(lists) + 1
    empty = sum(not items for items in lists.values())
    assert records.notes == ({"lines without items in train.txt": empty} if empty else {})


def test_ids_above_float_precision_survive(tmp_path):
    big = 2**53 + 1
    lists = readers.read_adjacency(written(tmp_path, f"{2**24 + 1} {big} {2**63 - 1}\n"))
    assert lists.items.tolist() == [big, 2**63 - 1]
    table = readers.read_table(written(tmp_path, f"user,item\n{big},1\n{2**63 - 1},2\n", "big.csv"))
    assert table.ids("users").tolist() == [big, 2**63 - 1]
    sparse = readers.read_adjacency(written(tmp_path, f"{2**40} {2**24 + 1} 5\n0 5\n"))
    data = prepare(sparse, "sparse", Split(ratios=(1, 0, 0)))
    assert data.train.shape == (2, 2)  # labels, not a table of 2^40 rows
    assert data.user_ids.tolist() == [0, 2**40] and data.item_ids.tolist() == [5, 2**24 + 1]


@pytest.mark.parametrize(
    ("text", "odd", "line"),
    [
        ("0 1\n1 x2\n", "x2", 2),
        ("0 1\n\n1 2 1.5\n", "1.5", 3),
        ("0 1\n1 -3\n", "-3", 2),
        ("-1 3\n", "-1", 1),
        (f"0 {2**63}\n", str(2**63), 1),
        ("007 7\n7 0\n", "007", 1),
        ("0 1\n1 \xe9\n".encode("latin-1"), "é", 2),
    ],
)
def test_ids_of_lists_that_are_no_plain_numbers_are_names(tmp_path, text, odd, line):
    records = readers.read_adjacency(written(tmp_path, text))
    lines = text.decode("latin-1") if isinstance(text, bytes) else text
    rows = [row.split() for row in lines.splitlines() if row]
    assert {(str(u), str(i)) for u, i in pairs(records)} == {(row[0], item) for row in rows for item in row[1:]}
    assert records.notes["ids of train.txt"] == f"names, not numbers, as {odd!r} in line {line} is none"
    with pytest.raises(UserError, match="line 1: found '1,2', wanted ids separated by blanks"):
        readers.read_adjacency(written(tmp_path, "0 1,2\n"))


@pytest.mark.parametrize("content", [b"", b" \r\n\n", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path, content):
    with pytest.raises(UserError, match="is empty"):
        readers.read_adjacency(written(tmp_path, content))


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(UserError, match="no file .*absent.txt"):
        readers.read_adjacency(tmp_path / "absent.txt")
    whole = gzip.compress(b"0 1 2 3\n" * 500)
    for broken in (whole[:-9], whole[: len(whole) // 2], whole[:20] + b"\xff" + whole[21:]):
        with pytest.raises(UserError, match="truncated or damaged"):
            readers.read_adjacency(written(tmp_path, broken, "train.txt.gz"))
    assert pairs(readers.read_adjacency(written(tmp_path, whole, "unusual.name")))[:3] == [(0, 1), (0, 2), (0, 3)]


# LastFM and MovieLens ---------------------------------------------------------------------------


def test_lastfm_is_one_based_and_reads_scientific_counts(tmp_path):
    train = written(tmp_path, "1\t4489\t13\r\n1892\t1\t3.2466e+05\r\n", "data1.txt")
    test = written(tmp_path, "2\t2\t7\n", "test1.txt")
    records = readers.read_lastfm({"train": train, "test": test})
    assert records.ratings.tolist() == [13, 324660, 7]
    data = prepare(records, "lastfm")
    assert data.train.shape == (1892, 4489)
    assert data.train[0, 4488] == data.train[1891, 0] == data.test[1, 1] == 1
    assert data.user_ids[0] == data.item_ids[0] == 1


def test_lastfm_refuses_zero_based_ids(tmp_path):
    path = written(tmp_path, "1\t1\t1\n0\t1\t1\n", "data1.txt")
    with pytest.raises(UserError, match="row 2: found user 0, wanted ids from 1"):
        readers.read_lastfm({"train": path})


def test_movielens_both_formats(tmp_path):
    dat = readers.read_movielens(written(tmp_path, "7::1193::5::978300760\n9::661::3::978302109\n", "ratings.dat"))
    tab = readers.read_movielens(written(tmp_path, "7\t1193\t5\t978300760\n9\t661\t3\t978302109\n", "u.data"))
    for records in (dat, tab):
        assert pairs(records) == [(7, 1193), (9, 661)]
        assert records.ratings.tolist() == [5, 3] and records.times.tolist() == [978300760, 978302109]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t2\t3\t4\n1\t2\t3\n", "line 2: found 3 cells, wanted 4"),
        ("1\t2\tgood\t4\n", "line 1: found 'good', wanted a number in column 3"),
        ("1\t2\tnan\t4\n", "found 'nan'"),
        ("1\t2.0\t3\t4\n", "found '2.0', wanted an id"),
        ("1\t2\t3\tsoon\n", "wanted a number in column 4"),
        ("1\t2\t3\n", "line 1: found 3 fields, wanted 4 fields"),
    ],
)
def test_bad_numbers_are_named(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        readers.read_movielens(written(tmp_path, text, "u.data"))
    assert message in one_line(caught)


# Arrays -----------------------------------------------------------------------------------------


def test_pairs_npz(tmp_path):
    path = tmp_path / "pairs.npz"
    np.savez(path, user=np.array([1, 6040], np.uint16), movie=np.array([3952, 1], np.uint16), ge3=np.array([1, 0]))
    assert pairs(readers.read_pairs_npz(path)) == [(1, 3952), (6040, 1)]
    np.savez(path, user=np.array([{}], dtype=object), movie=np.array([1]))
    with pytest.raises(UserError, match="no readable .npz"):
        readers.read_pairs_npz(path)
    np.savez(path, movie=np.array([1]))
    with pytest.raises(UserError, match="wanted user and item"):
        readers.read_pairs_npz(path)
    with pytest.raises(UserError, match="no readable .npz"):
        readers.read_pairs_npz(written(tmp_path, b"PK\x03\x04 broken", "broken.npz"))


# Pickles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("convert", [list, lambda ids: np.array(ids, np.int32), lambda ids: [np.int64(x) for x in ids]])
def test_mcl_triples(tmp_path, protocol, convert):
    content = (convert([0, 1, 1]), convert([5, 6, 7]), np.array([3.0, 4.0, 5.0]))
    records = readers.read_mcl_pickle(written(tmp_path, pickle.dumps(content, protocol), "train.pkl"))
    assert pairs(records) == [(0, 5), (1, 6), (1, 7)] and records.ratings.tolist() == [3, 4, 5]
    data = prepare(readers.join_parts({"train": records}), "mcl", threshold=3, strict=True)
    assert data.train.nnz == 2  # a rating of 3 is not above 3


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_mcl_dictionaries(tmp_path, protocol):
    content = {0: [3, 4], 2: np.array([5]), np.int64(3): {9}, 4: []}
    records = readers.read_mcl_pickle(written(tmp_path, pickle.dumps(content, protocol), "train.pkl"))
    assert pairs(records) == [(0, 3), (0, 4), (2, 5), (3, 9)]


class _Evil:
    def __init__(self, target, *arguments):
        self.call = (target, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "target", [subprocess.getoutput, eval, getattr, bytearray, np.fromfile, pickle.loads, np.load, __import__]
)
def test_pickles_run_nothing(tmp_path, target):
    canary = tmp_path / "canary"
    attack = _Evil(target, f"touch {canary}")
    with pytest.raises(UserError) as caught:
        readers.read_mcl_pickle(written(tmp_path, pickle.dumps(([0], [1], attack)), "train.pkl"))
    assert "was refused" in one_line(caught) and target.__name__ in one_line(caught)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04garbage", "no readable pickle|was refused"),
        (pickle.dumps({0: [1]})[:-3], "no readable pickle|was refused"),
        (pickle.dumps("text"), "found a str, wanted"),
        (pickle.dumps(([0], [1])), "found a list|found a tuple"),
        (pickle.dumps(([0, 1], [1], [5])), "2 users, 1 items"),
        (pickle.dumps(([0], [-1], [5])), "item id -1"),
        (pickle.dumps(([0.5], [1], [5])), "user id 0.5"),
        (pickle.dumps(([0], ["x"], [5])), "item ids of type"),
        (pickle.dumps(([2**70], [1], [5])), "user ids of type|user id"),
        (pickle.dumps(np.zeros(3, dtype=[("a", "i4")])), "refused .*array type"),
    ],
)
def test_bad_pickles_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        readers.read_mcl_pickle(written(tmp_path, content, "train.pkl"))
    assert "train.pkl" in one_line(caught)
