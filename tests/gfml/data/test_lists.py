"""List files of every form read back to the same lists; odd rows treated as stated and counted."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.data.lists import FORMS, ListTable, ordered, read_lists, read_pairs, write_table

TABLE = ListTable(np.array(["07", "u1", "07", "07"]), np.array(["a", "b", "012", "b"]), np.array([2.0, 1, 1, 3]))


def lists_of(path):
    table, place = ordered(read_lists(path))
    found: dict[str, list[str]] = {}
    for user, item, _ in sorted(zip(table.users, table.items, place, strict=True), key=lambda row: row[2]):
        found.setdefault(str(user), []).append(str(item))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_written_and_read_back(form, tmp_path):
    file = tmp_path / f"lists.{form if form in ('csv', 'parquet') else 'tsv'}"
    write_table(file, form, TABLE)
    assert lists_of(file) == {"07": ["012", "a", "b"], "u1": ["b"]}
    scores = read_lists(file).scores
    assert scores is not None and scores.min() > 0  # programs that score unlisted items 0 rank them below


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("u1 Q0 d2 1 3.5 run\nu1 Q0 d1 2 1e-2 run\n", ["d2", "d1"]),  # TREC run
        ("u1\td1\t-4.5\nu1\td2\t-1\n", ["d2", "d1"]),  # Elliot, negative scores
        ("user_id:token\titem_id:token\tscore:float\nu1\td1\t1\nu1\td2\t2\n", ["d2", "d1"]),  # RecBole
        ("user_id,item_id,rating\nu1,d1,1\nu1,d2,2\n", ["d2", "d1"]),  # WarpRec
        ("id\ttop_0\ttop_1\nu1\td2\td1\n", ["d2", "d1"]),  # MMRec
        ("user;item\nu1;d2\nu1;d1\n", ["d2", "d1"]),  # neither rank nor score: the file's order
        ("user,item,rank,score\nu1,d1,2,9\nu1,d2,1,1\n", ["d2", "d1"]),  # the rank counts before the score
        ("u1,d1,1,x,7,8\nu1,d2,2,y,7,8\n", ["d2", "d1"]),  # six columns, but no TREC run
        ("userId;movieId;prediction\nu1;d1;1\nu1;d2;2\n", ["d2", "d1"]),
        ("id\ttop_0\ttop_1\ttop_2\nu1\td2\td1\t\n", ["d2", "d1"]),  # an empty place is no item
        ('"user","item","score"\n"u1","d1","1"\n"u1","d2","2"\n', ["d2", "d1"]),
    ],
)
def test_forms(text, wanted, tmp_path):
    (tmp_path / "lists.txt").write_text(text, encoding="utf-8")
    assert lists_of(tmp_path / "lists.txt") == {"u1": wanted}
    with gzip.open(tmp_path / "lists.gz", "wb") as stream:
        stream.write(text.encode())
    assert lists_of(tmp_path / "lists.gz") == {"u1": wanted}


@pytest.mark.parametrize(
    ("text", "wanted", "note"),
    [
        ("user,item,score\nu,a,1\nu,b,nan\nu,c,\nu,d,2\n", ["d", "a"], ("rows with an empty or NaN score, left out", 2)),
        ("user,item,rank\nu,a,\nu,b,2\nu,c,1\n", ["c", "b", "a"], ("rows without a rank, put behind the user's ranked ones", 1)),
        ("user,item\nu,b\nu,a\n", ["b", "a"], ("rows without a rank or a score, ordered as in the file", 2)),
        ("user,item,score\nu,a,1\nu,b,1\nu,c,2\n", ["c", "a", "b"], ("tied scores, ordered as in the file", 1)),
        ("user,item,rank,score\nu,a,1,2\nu,b,2,nan\n", ["a", "b"], ("rows with an empty or NaN score, ordered by rank", 1)),
        ("user,item,rank\nu,a,0\nu,b,1\nu,c,3\n", ["a", "b", "c"], ("gaps in a user's ranks, closed up (rectools keeps them)", 1)),
        ("user,item,rank,score\nu,a,1,1\nu,b,1,2\n", ["b", "a"], ("ranks that a user has twice, ordered by score, then as in the file", 1)),
    ],
)  # fmt: skip
def test_odd_rows_are_counted(text, wanted, note, tmp_path):
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    table, _ = ordered(read_lists(tmp_path / "l.csv"))
    assert table.items.tolist() == wanted and table.notes == dict([note])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item,score\nu,a,high\n", "line 2: found 'high', wanted a number"),
        ("user,price\nu,3\n", "no item column: found user, price"),
        ("user,item,score\nu,,1\n", "empty id"),
        ("lonely\n", "at least user and item"),
        ("user,item,score\nu,a,1,7\nu,b,2,7\n", "no readable table"),  # whose columns would be read one to the side
    ],
)
def test_what_cannot_be_read(text, message, tmp_path):
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_lists(tmp_path / "l.csv")


def test_pairs(tmp_path):
    for name, text in (
        ("t.tsv", "user\titem\trating\nu\ta\t4\nu\tb\t2\nu\ta\t1\n"),
        ("t.inter", "user_id:token\titem_id:token\trating:float\nu\ta\t4\nu\tb\t2\nu\ta\t1\n"),
        ("t.qrels", "u 0 a 4\nu 0 b 2\nu 0 a 1\n"),
        ("t.csv", "u,a,4\nu,b,2\nu,a,1\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        table = read_pairs(tmp_path / name)
        assert table.items.tolist() == ["a", "b"] and table.ratings.tolist() == [4, 2] and table.rated, name
        assert table.notes == {"repeated pairs, counted once": 1}
    (tmp_path / "stars.csv").write_text("userId,movieId,stars,timestamp\nu,a,4,9\n", encoding="utf-8")
    table = read_pairs(tmp_path / "stars.csv")
    assert table.rated and table.ratings.tolist() == [4] and table.notes == {"columns not read (timestamp)": 1}
    (tmp_path / "test.txt").write_text("0 5 6 7 8 9 10\n1 5\n", encoding="utf-8")
    table = read_pairs(tmp_path / "test.txt")
    assert not table.rated and table.users.tolist() == ["0"] * 6 + ["1"] and table.items.tolist()[-1] == "5"
