from __future__ import annotations

import gzip

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.data.items import beside, info_beside, read_item_features, read_item_info, standardised
from gfml.data.options import load_dataset

# The data's items in its order; the files know 9 besides, and not 3.
IDS = np.array([7, 3, 12, 5])


def data_of(item_ids=IDS) -> Interactions:
    count = 4 if item_ids is None else len(item_ids)
    train = csr_from_pairs(np.array([0, 1]), np.array([0, 2]), 2, count)
    empty = csr_from_pairs(np.empty(0, int), np.empty(0, int), 2, count)
    return Interactions("toy", train, empty, empty, item_ids=item_ids)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_tables_are_matched_by_id_and_joined(tmp_path):
    text = np.arange(8, dtype=np.float16).reshape(4, 2)
    image = np.array([[1.0], [2], [3], [4]])
    file = save(tmp_path / "f.npz", movie_id=np.array([5, 9, 7, 12], np.uint16), text=text, image=image,
                has_text=np.array([1, 1, 1, 0], bool), has_image=np.array([1, 1, 0, 0], bool))  # fmt: skip
    table = read_item_features(file, data_of())
    assert table.values.dtype == np.float32 and table.blocks == {"text": slice(0, 2), "image": slice(2, 3)}
    assert table.values.tolist() == [[4, 5, 0], [0, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert table.known.tolist() == [True, False, False, True]
    only = read_item_features(file, data_of(), ["image"])
    assert only.values.tolist() == [[0], [0], [0], [1]] and only.known.tolist() == [False, False, False, True]


def test_rows_without_ids_are_the_items_in_order(tmp_path):
    rows = np.arange(8.0).reshape(4, 2)
    np.save(tmp_path / "f.npy", rows)
    for file in (tmp_path / "f.npy", save(tmp_path / "f.npz", anything=rows)):
        for ids in (IDS, None):
            table = read_item_features(file, data_of(ids))
            assert np.array_equal(table.values, rows) and table.known.all()


def test_ids_may_be_words(tmp_path, caplog):
    file = save(tmp_path / "f.npz", id=np.array(["b", "x", "a"]), v=np.eye(3))
    table = read_item_features(file, data_of(np.array(["a", "b", "c", "d"])))
    assert table.values.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    said = (
        "note: f.npz: 1 of 3 rows are of items that toy does not have, ignored; 2 of its 4 items have no row, all zeros"
    )
    assert caplog.messages == [said]
    read_item_features(save(tmp_path / "all.npz", id=IDS, v=np.eye(4)), data_of())
    assert caplog.messages == [said]


def test_columns_of_text_tables(tmp_path, caplog):
    (tmp_path / "f.csv").write_text("item_id,year,genres,note\n5,1990,War|Drama,x\n7,,Drama,y\n9,1991,Western,z\n")
    table = read_item_features(tmp_path / "f.csv", data_of())
    assert caplog.messages[0] == "note: f.csv: neither numbers nor genres, left out: note"
    assert list(table.blocks) == ["year", "genres"]
    assert table.values.tolist() == [[0, 1, 0, 0], [0] * 4, [0] * 4, [1990, 1, 1, 0]]
    asked = read_item_features(tmp_path / "f.csv", data_of(), ["note"])
    assert asked.values.tolist() == [[0, 1, 0], [0] * 3, [0] * 3, [1, 0, 0]]
    typed = "item_id:token\ttitle:token_seq\tyear:token\tclass:token_seq\tvec:float_seq\n12\tA B\t1990\tWar Drama\t1 2.5\n3\tC\t1991\tDrama\t-1 0\n"
    (tmp_path / "f.item.gz").write_bytes(gzip.compress(typed.encode()))
    table = read_item_features(tmp_path / "f.item.gz", data_of())
    assert list(table.blocks) == ["class", "vec"]
    assert table.values.tolist() == [[0] * 4, [1, 0, -1, 0], [1, 1, 1, 2.5], [0] * 4]
    (tmp_path / "movies.dat").write_bytes("5::Caf\xe9 (1990)::War|Drama\n7::B::Drama\n".encode("latin-1"))
    assert read_item_features(tmp_path / "movies.dat", data_of()).values.tolist() == [[1, 0], [0, 0], [0, 0], [1, 1]]
    info = read_item_info(tmp_path / "movies.dat", data_of())
    assert info.titles == ["B", "", "", "Café (1990)"]
    assert info.genres == [("Drama",), (), (), ("War", "Drama")]
    assert read_item_info(tmp_path / "f.item.gz", data_of()).genres[2] == ("War", "Drama")


def test_movies_with_plots(tmp_path):
    """The eleven columns without a header: genres are the sixth, not the third; N/A is nothing."""
    lines = '5::A: b::1990::R::1 Jan 1990::War, Drama::X::Y::Z::It "ends", 1;2.::N/A\n7::B::1991::N/A::N/A::N/A::X::Y::Z::N/A::u\n'
    (tmp_path / "extra.dat").write_text(lines, encoding="utf-8")
    info = read_item_info(tmp_path / "extra.dat", data_of())
    assert info.titles == ["B", "", "", "A: b"] and info.genres == [(), (), (), ("War", "Drama")]
    assert info.about == ["", "", "", 'It "ends", 1;2.']
    (tmp_path / "own.csv").write_text("item_id,title,description\n7,B,N/A\n3,C,a thing\n")
    assert read_item_info(tmp_path / "own.csv", data_of()).about == ["N/A", "a thing", "", ""]


def test_standardised_tables_have_no_mean_and_unit_deviation(tmp_path):
    rng = np.random.default_rng(0)
    has = rng.random(50) < 0.7
    file = save(
        tmp_path / "f.npz", a=5 + 9 * rng.standard_normal((50, 3)) * [1, 2, 3], b=rng.random((50, 2)), has_b=has
    )
    table = standardised(read_item_features(file, data_of(np.arange(50))))
    a, b = table.values[:, :3], table.values[has, 3:]
    for block in (a, b):
        np.testing.assert_allclose(block.mean(0), 0, atol=1e-5)
        assert block.std() == pytest.approx(1, abs=1e-5)
    # Columns keep their sizes against each other.
    assert a.std(0)[2] / a.std(0)[0] == pytest.approx(3, rel=0.4)
    assert (table.values[~has, 3:] == 0).all()


@pytest.mark.parametrize(
    ("make", "columns", "message"),
    [
        (lambda p: p / "none.npz", None, "there is no file .* check `features`"),
        (
            lambda p: save(p / "f.npz", id=np.array([1, 2]), v=np.eye(2)),
            None,
            "knows none of the 4 items of toy .*begin 1, 2",
        ),
        (lambda p: save(p / "f.npz", id=np.array([7, 7]), v=np.eye(2)), None, "the id 7 more than once"),
        (lambda p: save(p / "f.npz", id=np.array([7, 3]), v=np.eye(3)), None, "v has 3 rows, wanted 2"),
        (lambda p: save(p / "f.npz", v=np.eye(3)), None, "3 rows without ids, wanted one for each of the 4 items"),
        (lambda p: save(p / "f.npz", id=np.array([7, 3]), v=np.array([[1.0], [np.nan]])), None, "not finite"),
        (lambda p: save(p / "f.npz", id=np.array([7, 3])), None, "holds no table"),
        (
            lambda p: save(p / "f.npz", id=np.array([7]), text=np.eye(1)),
            ["test"],
            "has no 'test', found text; did you mean 'text'",
        ),
        (lambda p: write(p / "f.csv", "item,a\n7,x\n"), None, "no column of numbers or genres"),
        (lambda p: write(p / "f.csv", "item,a,b\n7,1,2\n3,nan,4\n"), None, "a holds numbers that are not finite"),
        (lambda p: write(p / "f.csv", "item,a\n7,-Inf\n3,1\n"), None, "a holds numbers that are not finite"),
        (lambda p: write(p / "f.csv", "item,a\n7,1\n"), ["b"], "no column 'b', found item, a"),
        (lambda p: write(p / "f.csv", "name,a\n7,1\n"), None, "no id column, found name, a"),
        (lambda p: write(p / "f.csv", "item,a\n7,1,2\n"), None, "line 2: found 3 cells, wanted 2"),
        (lambda p: write(p / "f.npz", "no archive"), None, "cannot read"),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, make, columns, message):
    with pytest.raises(UserError, match=message) as error:
        read_item_features(make(tmp_path), data_of(), columns)
    assert "\n" not in str(error.value)


def write(path, text):
    path.write_text(text)
    return path


def test_a_table_without_titles_and_genres_is_refused(tmp_path):
    with pytest.raises(UserError, match="no title and no genres, found item, a"):
        read_item_info(write(tmp_path / "f.csv", "item,a\n7,1\n"), data_of())


def test_files_beside_the_data(tmp_path):
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m" / "movies.dat.gz").write_bytes(b"")
    assert beside("ml1m", tmp_path, ["x.npz", "movies.dat"]) == tmp_path / "ml-1m" / "movies.dat.gz"
    assert beside("ml-1m", tmp_path, ["x.npz"]) is None
    own = write(tmp_path / "own.csv", "user,item\n")
    assert beside(str(own), None, ["own.csv"]) == own
    assert beside("demo", None, ["movies.dat"]) is None


@pytest.mark.parametrize("inter", ["toy.inter", "toy.train.inter", "toy.inter.gz"])
def test_titles_beside_atomic_files(tmp_path, inter, caplog):
    (tmp_path / "shop").mkdir()
    data, file = data_of(), write(tmp_path / "shop" / inter, "")
    assert info_beside(str(file), None, ["*.item"], data) is None
    write(tmp_path / "shop" / "other.item", "item_id:token\ttitle:token\n7\tNo\n")
    assert beside(str(tmp_path / "shop"), None, ["*.item"]) is None
    item = write(tmp_path / "shop" / "toy.item", "item_id:token\ttitle:token\n7\tSeven\n")
    for where, root in ((file, None), (tmp_path / "shop", None), ("shop", tmp_path)):
        assert beside(str(where), root, ["x.csv", "*.item"]) == item
        assert info_beside(str(where), root, ["*.item"], data).titles == ["Seven", "", "", ""]
    write(item, "item_id:token\tprice:float\n7\t1\n")
    assert info_beside(str(file), None, ["*.item"], data) is None
    assert "left out" in caplog.text and "no title and no genres" in caplog.text


def test_features_and_titles_of_movielens(shared_data):
    folder = shared_data / "ml-1m"
    data = load_dataset("ml1m", data_root=shared_data, split="per-user", split_ratios=(0.6, 0.2, 0.2), cache=False)
    table = read_item_features(folder / "features.npz", data)
    assert table.values.shape == (3706, 256) and table.known.sum() == 3705
    stored = np.load(folder / "features.npz")
    row, place = 100, {name: row for row, name in enumerate(stored["movie_id"].tolist())}
    assert np.array_equal(table.values[row, :128], stored["text"][place[data.item_ids[row]]].astype(np.float32))
    info = read_item_info(folder / "movies.dat.gz", data)
    assert (
        info.titles[0] == "Toy Story (1995)"
        and info.genres[0] == ("Animation", "Children's", "Comedy")
        and all(info.titles)
    )
