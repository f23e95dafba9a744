"""Tables: every spelling of ids, cells and separators comes back as it was written, or one line says what is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfml.base.errors import UserError
from gfml.data import interning
from gfml.data.names import encode, from_values, merge, places
from gfml.data.readers import Columns, is_adjacency, join_parts, read_adjacency, read_table
from gfml.data.tables import open_table, utf8_bytes

# Spellings that other readers fold together, drop, or take for numbers, dates or nothing.
SPELLINGS = ("7", "007", "07", "+7", "-7", "7.0", "7e0", "1e3", "1000", "NA", "nan", "None", "null", "NULL", "N/A", "true", "True",
             str(2**63), str(2**64 - 1), str(-(2**62)), "0x10", "2017-07-14", "é", "a b", "B00X", "1_000", "inf", "-0", "0")  # fmt: skip
NAMES = st.one_of(st.sampled_from(SPELLINGS), st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters='"'), min_size=1, max_size=6))  # fmt: skip


def written(tmp_path, text: str | bytes, name: str = "own.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pairs(records) -> list[tuple[str, str]]:
    return [(str(u), str(i)) for u, i in zip(records.ids("users").tolist(), records.ids("items").tolist(), strict=True)]


def message(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Every reader, every spelling --------------------------------------------------------------------


def _frame(path, kind):
    frame = pd.DataFrame({"user_id": SPELLINGS, "item_id": SPELLINGS[::-1]})
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    elif kind in ("csv", "quoted"):
        frame.to_csv(path, index=False, quoting=csv.QUOTE_ALL if kind == "quoted" else csv.QUOTE_MINIMAL)
    else:
        frame.to_csv(path, index=False, sep="\t")


@pytest.mark.parametrize("kind", ["csv", "quoted", "tsv", "inter", "parquet", "jsonl"])
def test_every_reader_keeps_every_spelling(tmp_path, kind):
    path = tmp_path / f"own.{'csv' if kind == 'quoted' else kind}"
    _frame(path, kind)
    records = read_table(path)
    assert pairs(records) == list(zip(SPELLINGS, SPELLINGS[::-1], strict=True))
    assert len(records.user_names) == len(SPELLINGS)


def test_lists_keep_every_spelling(tmp_path):
    words = [word for word in SPELLINGS if " " not in word]
    records = read_adjacency(written(tmp_path, "".join(f"{word} {word} x\n" for word in words), "train.txt"))
    assert {user for user, _ in pairs(records)} == set(words) and len(records) == 2 * len(words)


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (["0", "7", "10"], True),
        (["9223372036854775807"], True),
        (["9223372036854775808"], False),
        (["7", "07"], False),
        (["+7"], False),
        (["-7"], False),
        (["7.0"], False),
        (["1e3"], False),
        ([" 7"], False),
    ],
)
def test_ids_are_numbers_only_where_printing_gives_the_source(ids, numbers):
    found = from_values(ids)
    assert (found.names.dtype.kind == "i") == numbers
    assert [str(name) for name in found.names[found.codes].tolist()] == ids


def test_typed_columns_are_names_too(tmp_path):
    frame = pd.DataFrame(
        {
            "user": np.array([2**63, 2**64 - 1, 5], dtype=np.uint64),
            "item": np.array([-4, 2**62, 0]),
            "other": pd.Categorical(["x", "y", "x"]),
            "whole": [3.0, 4.0, 3.0],
        }
    )
    frame.to_parquet(tmp_path / "own.parquet")
    assert pairs(read_table(tmp_path / "own.parquet")) == [(str(2**63), "-4"), (str(2**64 - 1), str(2**62)), ("5", "0")]
    floats = read_table(tmp_path / "own.parquet", Columns(user="other", item="whole"))
    assert pairs(floats) == [("x", "3"), ("y", "4"), ("x", "3")]
    assert floats.notes["column whole"] == "floating point, read as whole numbers"
    pd.DataFrame({"user": [1.5, 2.0], "item": [1, 2]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="row 1: found 1.5, wanted a whole number or text"):
        read_table(tmp_path / "bad.parquet")
    pd.DataFrame({"user": ["a", None], "item": [1, 2]}).to_parquet(tmp_path / "hole.parquet")
    with pytest.raises(UserError, match="row 2: found '', wanted a name in column user"):
        read_table(tmp_path / "hole.parquet")
    with pytest.raises(UserError, match="no readable Parquet"):
        read_table(written(tmp_path, b"PAR1 nonsense", "bad2.parquet"))


def test_joins_are_by_name(tmp_path):
    assert places(["007", "7", "x"], np.array([7, 8])).tolist() == [-1, 0, -1]
    assert places(np.array([7.0, 9.0]), np.array(["007", "7"])).tolist() == [1, -1]
    assert places(np.array([b"a", b"b"]), np.array(["b"])).tolist() == [-1, 0]
    codes, names = merge([from_values([5, 7]), from_values(["05", "7"])])
    assert names.tolist() == ["05", "5", "7"] and [part.tolist() for part in codes] == [[1, 2], [0, 2]]
    one = read_table(written(tmp_path, "user,item\n1,2\n3,4\n", "a.csv"))
    two = read_table(written(tmp_path, "user,item\n01,2\n3,9\n", "b.csv"))
    joined = join_parts({"train": one, "test": two})
    assert pairs(joined) == [("1", "2"), ("3", "4"), ("01", "2"), ("3", "9")] and joined.parts.tolist() == [0, 0, 2, 2]
    assert joined.item_names.tolist() == [2, 4, 9]


# Round trips -------------------------------------------------------------------------------------

ROWS = st.lists(st.tuples(NAMES, NAMES, st.integers(10**9, 2 * 10**9)), min_size=1, max_size=15)


def read_back(path, rows, **columns):
    records = read_table(path, Columns(user="who", item="What Else", **columns))
    assert pairs(records) == [(user, item) for user, item, _ in rows]
    assert records.times.tolist() == [time for *_, time in rows]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, separator=st.sampled_from([",", ";", "\t", "|"]), quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
       order=st.permutations(["who", "What Else", "timestamp", "junk"]), end=st.sampled_from(["\n", "\r\n"]))  # fmt: skip
def test_what_pandas_writes_is_read(tmp_path_factory, rows, separator, quoting, order, end):
    frame = pd.DataFrame(rows, columns=["who", "What Else", "timestamp"]).assign(junk="")[order]
    # In a table with tabs a quotation mark is a character: it is written as one.
    how = {"quoting": csv.QUOTE_NONE} if separator == "\t" else {"quoting": quoting}
    path = tmp_path_factory.mktemp("pandas") / "own.csv"
    frame.to_csv(path, index=False, sep=separator, lineterminator=end, **how)
    read_back(path, rows, sep=separator)


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS,
    kind=st.sampled_from(["csv", "parquet", "ndjson"]),
    order=st.permutations(["who", "What Else", "timestamp"]),
)
def test_what_polars_writes_is_read(tmp_path_factory, rows, kind, order):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(rows, schema=["who", "What Else", "timestamp"], orient="row").select(order)
    path = tmp_path_factory.mktemp("polars") / f"own.{'jsonl' if kind == 'ndjson' else kind}"
    getattr(frame, f"write_{kind}")(path)
    read_back(path, rows)


@settings(max_examples=40, deadline=None)
@given(titles=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=8), min_size=1, max_size=8))  # fmt: skip
def test_titles_survive_whatever_they_hold(tmp_path_factory, titles):
    path = tmp_path_factory.mktemp("titles") / "items.csv"
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["item_id", "title"], *enumerate(titles)])
    assert open_table(path).texts("title") == titles


# Cells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names", "rows"),
    [
        ("user,item\n1,2\n", ["user", "item"], [["1", "2"]]),
        ("user;item\n1;2,5\n3;4,5\n", ["user", "item"], [["1", "2,5"], ["3", "4,5"]]),
        ("Customer ID,Product ID,Order Date Time\nc0,p1,5\n", ["Customer ID", "Product ID", "Order Date Time"], [["c0", "p1", "5"]]),
        ("user|item|a,b\n1|2|x,y\n", ["user", "item", "a,b"], [["1", "2", "x,y"]]),
        ("user item\n1 2\n", ["user", "item"], [["1", "2"]]),
        ("user::item\n1::2\n", ["user", "item"], [["1", "2"]]),
        ("sep=;\nuser;item\n1;2\n", ["user", "item"], [["1", "2"]]),
        ("user,item,\n1,2,\n", ["user", "item", ""], [["1", "2", ""]]),
        ("user,item,\n1,2\n", ["user", "item"], [["1", "2"]]),
        ("user,item\n1,2,\n3,4, \n", ["user", "item"], [["1", "2"], ["3", "4"]]),
        ('user,item,title\n1,2,"a\nb, c"\n3,4,"x ""y"""\n', ["user", "item", "title"], [["1", "2", "a\nb, c"], ["3", "4", 'x "y"']]),
        ('user,item,title\n1,2,5" disk\n', ["user", "item", "title"], [["1", "2", '5" disk']]),
        ('user\titem\ttitle\n1\t2\t"a\n3\t4\tb"\n', ["user", "item", "title"], [["1", "2", '"a'], ["3", "4", 'b"']]),
        ("\n\nuser,item\r\n\r\n1,2\r\n", ["user", "item"], [["1", "2"]]),
        ("user,item\r1,2\r3,4", ["user", "item"], [["1", "2"], ["3", "4"]]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["plain", "bom", "utf-16", "utf-16-le", "gzip", "zstd"])
def test_cells_are_what_stands_there(tmp_path, text, names, rows, form):
    raw = {
        "plain": lambda: text.encode(),
        "bom": lambda: text.encode("utf-8-sig"),
        "utf-16": lambda: text.encode("utf-16"),
        "utf-16-le": lambda: text.encode("utf-16-le"),
        "gzip": lambda: gzip.compress(text[:9].encode()) + gzip.compress(text[9:].encode()),
        "zstd": lambda: pa.compress(text.encode(), "zstd", asbytes=True),
    }[form]()
    table = open_table(written(tmp_path, raw), wanted=("user", "item"))
    assert table.names == names
    cells = table.read(names)
    assert [list(row) for row in zip(*(cells[name].to_pylist() for name in names), strict=True)] == rows
    assert any("encoding" in note for note in table.notes) == form.startswith("utf-16")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "user,item\n1,2\n\n3,4,5\n", "line 4: found 3 cells, wanted 2"),
        ("a.csv", "user,item,x\n1,2,3\n3,4\n", "line 3: found 2 cells, wanted 3"),
        ("a.csv", "user,item\n1,2,\n3,4\n", "line 3: found 2 cells, wanted 3 separated by ',', as in the first row"),
        ("a.csv", "user,item\n1,2,\n3,4,z\n", "line 3: found 'z', wanted nothing after the last separator"),
        ("a.csv", 'user,item,t\n1,2,"a\nb"\n3,4,5,6\n', "line 4: found 4 cells, wanted 3"),
        ("a.csv", 'user,item,t\n0,1,x\n1,2,"a\n3,4,"b"\n', "in the row after line 2: a quotation mark is not closed"),
        ("a.csv", 'user,item,t\n1,2,"a\n3,4,b\n', "in the row after line 1: a quotation mark is not closed"),
        ("a.csv", "user,item\n1,2\n,3\n", "line 3: found '', wanted a name in column user"),
        ("a.csv", "user,item\n1,2\n3, \n", "line 3: found ' ', wanted a name in column item"),
        ("a.csv", "user,item\n", "a header and no rows"),
        ("a.csv", "nothing\nhere\n", "line 1: found one column 'nothing'"),
        ("a.csv", "user,item,rating\n1,2,3\n1,3,bad\n", "line 3: found 'bad', wanted a number in column rating"),
        ("a.csv", "who,what\n1,2\n", "no user column that is recognised: found who, what; name it with `user_col`, or give `header False`"),
        ("a.csv", "user_id,User ID,item\n1,2,3\n", "several columns 'user_id': found user_id, User ID, item"),
        ("a.inter", "userID\titemID\tx_label\n0\t3\t7\n", "line 2: found 7.0, wanted 0 (train), 1 (valid) or 2 (test)"),
        ("a.jsonl", '{"user":"a","item":1}\nno\n', "line 2: found 'no\\n', wanted one JSON object a line"),
        ("a.jsonl", '{"user":"a","item":1}\n\n{"user":"b"}\n', "line 3: found '', wanted a name in column item"),
        ("a.jsonl", '{"user":{"0":1,"1":2},"item":{"0":3,"1":4}}', "line 1: found '{\"0\": 1, \"1\": 2}' for user, wanted one id"),
        ("a.csv", '"user";"item";"t"\n"1";"2";"a \\"b\\""\n', "in the row after line 1: a quotation mark is not closed"),
        ("a.tsv", '"user"\t"item"\n"1"\t"2"\n', 'found "user", "item" (quotation marks are characters in this table)'),
        ("a.csv", b"PK\x03\x04\0\0", "is a zip archive or a spreadsheet: unpack it, or export the sheet as CSV"),
        ("a.csv", b"PAR1\0\0", "is a Parquet table: let its name end in .parquet"),
        ("a.csv", "us\0er,item\n1,2\n", "holds zero bytes and is no text"),
        ("a.csv", b"\xff\xfeu\0s", "starts as utf-16 and is not|found one column"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, name, text, said):
    with pytest.raises(UserError) as caught:
        read_table(written(tmp_path, text, name))
    assert any(part in message(caught) for part in said.split("|")) and name in message(caught)


def test_comments_before_a_graph_are_no_rows(tmp_path):
    """Collections of graphs begin with lines such as ``# FromNodeId ToNodeId`` and ``% bip unweighted``."""
    said = {"comment lines at the beginning of own.txt, not read": 2}
    edges = written(tmp_path, "# Directed graph\n# FromNodeId\tToNodeId\n4\t5\n4\t6\n", "own.txt")
    assert not is_adjacency(edges)
    records = read_table(edges)
    assert records.ids("users").tolist() == [4, 4] and records.ids("items").tolist() == [5, 6]
    assert records.notes.items() >= said.items()
    lists = written(tmp_path, "% a b c\n% d\n0 7 8\n1 9 7 8\n", "own.txt")
    assert is_adjacency(lists)
    records = read_adjacency(lists)
    assert records.users.tolist() == [0, 0, 1, 1, 1] and records.notes == said
    with pytest.raises(UserError, match="line 3: found .*x,y"):
        read_adjacency(written(tmp_path, "# a\n# b\n0 x,y\n1 2\n", "own.txt"))
    marked = read_table(written(tmp_path, "#user,item\n#1,2\n", "own.csv"), Columns(user="#user"))
    assert marked.ids("users").tolist() == ["#1"]


def test_columns_passed_over_are_told(tmp_path):
    path = written(tmp_path, "user,user_id,asin,parent_asin,date,timestamp\nann,1,a,b,soon,1500000000\n")
    records = read_table(path)
    assert records.ids("users").tolist() == [1] and records.ids("items").tolist() == ["b"]
    assert records.notes["user column"] == "user_id; not read: user"
    assert records.notes["item column"] == "parent_asin; not read: asin"
    assert records.notes["time column"] == "timestamp; not read: date"
    assert not {"user column", "time column"} & set(read_table(path, Columns(user="user"), uses=()).notes)
    session = "session_id:token\titem_id_list:token_seq\titem_id:token\ns\t1 2\t3\n"
    notes = read_table(written(tmp_path, session, "a.train.inter")).notes
    assert notes["lists item_id_list"] == "not read: a row counts for its item_id alone"


def test_lists_in_an_id_column_are_named(tmp_path):
    pq.write_table(pa.table({"user": ["a"], "item": [[1, 2]]}), tmp_path / "own.parquet")
    with pytest.raises(UserError, match="row 1: found 'list<.*>', wanted text or whole numbers in column item"):
        read_table(tmp_path / "own.parquet")


def test_columns_that_nobody_uses_stop_nothing(tmp_path):
    path = written(tmp_path, b"user,item,rating,time,note\n1,2,,soon,\xff\n3,4,x,,y\n")
    records = read_table(path, uses=())
    assert pairs(records) == [("1", "2"), ("3", "4")] and records.times is records.ratings is None
    assert records.notes == {"rating rating": "recognised, not thresholded (--threshold): empty: 1, x: 1"}
    assert read_table(path, Columns(rating="none"), uses=()).notes == {}
    with pytest.raises(UserError, match="line 2: found 'soon'"):
        read_table(path, Columns(rating="none"))
    assert read_table(path, Columns(rating="none", time="none")).times is None
    latin = read_table(written(tmp_path, b"user,item\nJos\xe9,1\n"))
    assert pairs(latin) == [("José", "1")] and latin.notes == {"encoding of own.csv": "latin-1, not UTF-8"}


def test_blanks_after_the_separator(tmp_path):
    style = read_table(written(tmp_path, "user, item, rating\n1, 2, 3\n4, 5, 4\n"))
    assert pairs(style) == [("1", "2"), ("4", "5")]
    assert style.notes["column item"] == "the blank before every name is taken for the separator's"
    own = read_table(written(tmp_path, "user,item\n a,2\na,3\n"))
    assert pairs(own) == [(" a", "2"), ("a", "3")]
    assert own.notes == {"column user": "1 names begin or end with a blank, kept as they are"}


# Headers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["User ID,Item ID,Time Stamp", "userId,itemid,TIMESTAMP", "USER_ID,item-id,time_stamp",
                                    " user_id , item_id , timestamp ", "user_id:token,item_id:token,timestamp:float",
                                    "reviewerID,asin,unixReviewTime", "customer.id,Parent ASIN,Date Time"])  # fmt: skip
def test_usual_names_whatever_their_spelling(tmp_path, header):
    records = read_table(written(tmp_path, f"{header}\n1,2,1500000000\n"))
    assert pairs(records) == [("1", "2")] and records.times.tolist() == [1500000000] and records.per_second == 1


def test_columns_asked_for(tmp_path):
    path = written(tmp_path, "who,What Else,stars\na,b,3\n")
    with pytest.raises(UserError, match="no column 'whom' for `user_col`: .*did you mean 'who'"):
        read_table(path, Columns(user="whom"))
    records = read_table(path, Columns(user="WHO", item="what_else"))
    assert pairs(records) == [("a", "b")] and records.ratings.tolist() == [3]
    with pytest.raises(UserError, match="column who stands for two things"):
        read_table(path, Columns(user="who", item="who"))
    with pytest.raises(UserError, match="found `sep 'ab'`, wanted one character"):
        read_table(path, Columns(sep="ab"))
    strange = written(tmp_path, "user~item\n1~2\n", "own.txt")
    assert pairs(read_table(strange, Columns(sep="~"))) == [("1", "2")]
    assert pairs(read_table(written(tmp_path, "user\titem\n1\t2\n", "own2.txt"), Columns(sep="tab"))) == [("1", "2")]


def test_tables_without_a_header(tmp_path):
    bare = read_table(written(tmp_path, "5,6,1.5,100\n7,8,2,200\n"))
    assert pairs(bare) == [("5", "6"), ("7", "8")] and bare.times.tolist() == [100, 200] and bare.per_second is None
    assert bare.notes["columns by position"] == "user 1, item 2, rating 3, time 4 (no header)"
    shop = written(tmp_path, "A1,B1,5.0,1500000000\nA2,B2,4.0,1500000001\n", "shop.csv")
    records = read_table(shop, Columns(header=False))
    assert pairs(records) == [("A1", "B1"), ("A2", "B2")] and records.ratings.tolist() == [5, 4]
    swapped = read_table(shop, Columns(user="2", item="1", rating="none", time="4", header=False))
    assert pairs(swapped) == [("B1", "A1"), ("B2", "A2")] and swapped.ratings is None
    with pytest.raises(UserError, match="no column '9' for `user_col`: found 1, 2, 3, 4"):
        read_table(shop, Columns(user="9", header=False))


def test_amazon_2018_ratings_name_the_item_first(tmp_path):
    path = written(tmp_path, "0123456789,A1B2C3D4E5F6G,5.0,1500000000\nB00ABCDEFG,A1B2C3D4E5F6H,4.0,1500000001\n")
    records = read_table(path, Columns(header=False))
    assert pairs(records) == [("A1B2C3D4E5F6G", "0123456789"), ("A1B2C3D4E5F6H", "B00ABCDEFG")]
    assert records.notes["columns by position"].startswith("item, user, rating, time")


def test_json_of_several_types_and_literals(tmp_path):
    lines = [{"user": "a", "item": 7, "more": {"x": 1}}, {"user": 5, "item": "07", "more": None}]
    records = read_table(written(tmp_path, "\n".join(map(json.dumps, lines)), "own.jsonl"))
    assert pairs(records) == [("a", "7"), ("5", "07")]
    literal = read_table(written(tmp_path, "{'reviewerID': 'A', 'asin': 'B', 'overall': 5.0}\n", "own.json.gz"))
    assert pairs(literal) == [("A", "B")] and literal.ratings.tolist() == [5]


@pytest.mark.parametrize("indent", [None, 1])
def test_one_list_of_objects_is_a_row_each(tmp_path, indent):
    rows = [{"user": "a", "item": "07"}, {"user": "b", "item": "7", "text": "x\ny"}]
    records = read_table(written(tmp_path, json.dumps(rows, indent=indent), "own.json"))
    assert pairs(records) == [("a", "07"), ("b", "7")] and records.notes["form of own.json"].startswith("one list")
    for text, said in (("[1, 2]", "a list of other things"), ('[{"user": 1}', "starts as a list and is no JSON")):
        with pytest.raises(UserError, match=said):
            open_table(written(tmp_path, text, "own.json"))


def test_inter_with_a_split_of_its_own(tmp_path):
    text = "userID\titemID\tx_label\n0\t3\t0\n0\t2\t1\n1\t0\t2\n"
    mmrec = read_table(written(tmp_path, gzip.compress(text.encode()), "toy.inter.gz"))
    assert mmrec.parts.tolist() == [0, 1, 2] and mmrec.numbered and mmrec.items.tolist() == [3, 2, 0]
    named = read_table(written(tmp_path, text.replace("3", "03"), "named.inter"))
    assert not named.numbered and pairs(named)[0] == ("0", "03")


def test_bytes_of_unknown_kind():
    notes: dict[str, object] = {}
    assert utf8_bytes("é".encode("utf-16-be") * 99, Path("x"), notes) == ("é" * 99).encode() and "utf-16-be" in str(
        notes
    )
    assert io.BytesIO(utf8_bytes(b"\xe9", Path("x"), notes)).read() == "é".encode()


def test_an_id_column_is_encoded_across_blocks(tmp_path):
    rng = np.random.default_rng(0)
    texts = [f"u{number:06d}{'x' * 40}" for number in rng.integers(5000, size=120_000)]
    path = written(tmp_path, "user,item\n" + "".join(f"{name},{row}\n" for row, name in enumerate(texts)))
    table = open_table(path)
    ids = encode(table, "user", table.read(["user"])["user"])
    assert ids.names[ids.codes].tolist() == texts and ids.names.tolist() == sorted(set(texts))


WORDS = [
    ["7", "07", "ann", "", "a" * 9, "a" * 8],
    ["x" * 200, "y"],
    ["a", "a\0", "b"],
    ["é", "e"],
    ["user-1", "item-1"],
]


def coded(chunks):
    texts = interning.Interning()
    for chunk in chunks:
        texts.add(pa.array(chunk, pa.string()))
    return texts.result()


@pytest.mark.parametrize("words", [*WORDS, [f"{'long ' * (number % 9)}{number}" for number in range(70_000)]])
@pytest.mark.parametrize("one_hash", [False, True])
def test_the_compiled_table_of_texts_answers_as_a_dictionary_does(monkeypatch, words, one_hash):
    rng = np.random.default_rng(0)
    texts = [*rng.choice(np.array(words, dtype=object), 300), *([] if one_hash else words)]
    if one_hash:  # then the bytes alone tell texts apart
        monkeypatch.setattr("gfml.kernels.texts.hashes", lambda edges, data, found: found.fill(7))
    chunks = [texts[:100], [], texts[100:]]
    monkeypatch.setattr(interning, "MANY", 1)
    parts, names = coded(chunks)
    codes = np.concatenate(parts)
    known = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    assert codes.dtype == np.int32 and codes.tolist() == [known[text] for text in texts]
    assert names.equals(pa.array(list(known), pa.string()))
    monkeypatch.setattr(interning, "MANY", 10**9)
    few = coded(chunks)
    assert np.array_equal(np.concatenate(few.codes), codes) and few.texts.equals(names)


def test_a_sliced_chunk_is_read_from_its_own_start(monkeypatch):
    monkeypatch.setattr(interning, "MANY", 1)
    texts = interning.Interning()
    texts.add(pa.array(["x", "y", "item-1234567", "item-1234568"]).slice(1, 2))
    assert texts.result().texts.to_pylist() == ["y", "item-1234567"]
