"""Data folders in the published layout: reading, features and what is missing, the user graph, bad files, real data."""

from __future__ import annotations

import gzip
import shutil
import sys

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from gfml.data.interactions import csr_from_pairs, pairs_from_csr
from mirror_grad import features, layout
from mirror_grad.data import MultimodalData, load, without_cold_users
from mirror_grad.main import PROGRAM

parse = PROGRAM.parse


def read(*words, model="VBPR", needs=True):
    return load(parse(["-m", model, "--no-cache", *map(str, words)]), needs_features=needs)


@pytest.fixture
def folder(planted, tmp_path):
    return shutil.copytree(planted, tmp_path / "planted")


def test_a_folder_is_read_whole(planted):
    data = read("-d", planted)
    assert (data.num_users, data.num_items, data.feature_source) == (80, 60, "files")
    assert [(name, tuple(table.shape), table.dtype) for name, table in data.features.items()] == [
        ("image", (60, 24), torch.float32), ("text", (60, 10), torch.float32)]  # fmt: skip
    assert data.interactions.train.nnz == 80 * 8 and data.interactions.test.nnz == 80 * 2
    assert (
        data.fingerprint
        == read("-d", planted / "planted.inter").fingerprint
        == read("-d", "planted", "--data-root", planted.parent).fingerprint
    )
    assert data.fingerprint != read("-d", planted, "--modalities", "text").fingerprint


def test_gzip_and_models_of_ids(folder):
    raw = (folder / "planted.inter").read_bytes()
    (folder / "planted.inter").unlink()
    (folder / "planted.inter.gz").write_bytes(gzip.compress(raw))
    (folder / "image_feat.npy").write_bytes(b"damaged")
    data = read("-d", folder, model="BPR", needs=False)
    assert data.num_users == 80 and data.features == {}


def test_stored_vectors_of_the_loader(tmp_path, numbers):
    """Rows by label with the filter on and off; a repeated train pair counts once and overlaps are dropped here."""
    golden = numbers("mm_dataset")
    folder = tmp_path / "small"
    folder.mkdir()
    layout.write_rows(folder / "small.inter", layout.INTER_HEAD, *golden["inter"][:, :5].T)
    for keep, prefix in ((False, "filter"), (True, "nofilter")):
        data = read("-d", folder, model="BPR", needs=False, *(["--keep-cold-users"] if keep else []))
        inter = data.interactions
        assert (inter.num_users, inter.num_items) == (golden["n_users"], golden["n_items"])
        earlier = set()
        for part, name in (("train", "train"), ("valid", "valid"), ("test", "test")):
            wanted = {tuple(row) for row in golden[f"{prefix}_{name}_rows"].tolist()} - earlier
            assert set(zip(*(side.tolist() for side in pairs_from_csr(inter.split(part))), strict=True)) == wanted
            earlier |= wanted
        assert (inter.train.toarray() == (golden["matrix_train"] > 0)).all()


def test_cold_users_are_dropped_and_counted(planted):
    inter = read("-d", planted, model="BPR", needs=False).interactions
    users, items = pairs_from_csr(inter.train)
    cold = without_cold_users(
        type(inter)("cold", csr_from_pairs(users[users != 3], items[users != 3], 80, 60), inter.valid, inter.test)
    )
    assert cold.valid[[3]].nnz == cold.test[[3]].nnz == 0 and cold.test.nnz == inter.test.nnz - 2
    assert cold.notes["pairs of users without train pairs, dropped"] == 4


# -- features


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_items_without_features(folder, how):
    table = np.load(folder / "text_feat.npy")
    table[[2, 7]] = 0
    layout.write_feature_file(folder / "text_feat.npy", table)
    data = read("-d", folder, "--fill-missing", how)
    assert torch.nonzero(~data.known["text"])[:, 0].tolist() == [2, 7] and bool(data.known["image"].all())
    wanted = np.delete(table, [2, 7], 0).mean(0) if how == "mean" else np.zeros(10)
    np.testing.assert_allclose(data.features["text"][[2, 7]], np.stack([wanted] * 2), rtol=1e-5, atol=1e-6)


def test_missing_features_say_every_way_out(folder):
    for name in ("image", "text"):
        (folder / f"{name}_feat.npy").unlink()
    with pytest.raises(UserError) as error:
        read("-d", folder)
    text = str(error.value)
    assert "\n" not in text and all(
        word in text for word in ("image_feat.npy", "tfidf-svd", "hashing", "BPR", "--features random")
    )
    assert read("-d", folder, "--features", "random").feature_source == "random"


def test_random_features_only_by_name_and_as_wide_as_published(folder):
    data = read("-d", folder, "--features", "random")
    assert {name: table.shape[1] for name, table in data.features.items()} == {"image": 4096, "text": 384}
    again = read("-d", folder, "--features", "random", "--random-widths", 5, 3)
    assert {name: table.shape[1] for name, table in again.features.items()} == {"image": 5, "text": 3}
    assert abs(float(data.features["image"].std()) - 1) < 0.01


@pytest.mark.parametrize("encoder", ["tfidf-svd", "hashing"])
def test_titles_become_features(folder, encoder):
    texts = [
        "red ball for dogs",
        "red ball for cats",
        "blue kettle",
        "blue steel kettle",
        *(f"item number {n}" for n in range(56)),
    ]
    layout.write_rows(folder / "item_text.csv", ("item_id", "title"), [str(n) for n in range(60)], texts)
    data = read("-d", folder, "--features", encoder, "--text-width", 16)
    [(name, table)] = data.features.items()
    unit = torch.nn.functional.normalize(table, dim=1)
    assert name == "text" and table.shape == (60, 16) and data.feature_source == encoder
    assert float(unit[0] @ unit[1]) > float(unit[0] @ unit[2]) + 0.3 and float(unit[2] @ unit[3]) > 0.5


def test_titles_are_matched_by_the_sources_ids(folder):
    """With an id map the file lists raw ids, in any order; items it does not know are empty."""
    layout.write_rows(folder / "i_id_mapping.csv", ("asin", "itemID"), [f"B{n:03d}" for n in range(60)], range(60))
    layout.write_rows(
        folder / "item_text.csv", ("item_id", "title"), ["B004", "B001", "B000"], ["kettle kettle", "ball", "ball"]
    )
    data = read("-d", folder, "--features", "hashing", "--text-width", 32, "--fill-missing", "zero")
    assert torch.equal(data.features["text"][0], data.features["text"][1]) and torch.nonzero(data.known["text"])[
        :, 0
    ].tolist() == [0, 1, 4]
    assert data.interactions.item_ids[4] == "B004"


def test_raw_metadata_is_a_source_of_titles(folder):
    layout.write_rows(folder / "i_id_mapping.csv", ("asin", "itemID"), [f"B{n:03d}" for n in range(60)], range(60))
    (folder / "meta.json").write_text(
        "{'asin': 'B002', 'title': 'kettle', 'categories': [['Home', 'Kitchen']]}\n{\"asin\": \"B003\", \"title\": \"ball\"}\n"
    )
    data = read("-d", folder, "--features", "hashing", "--item-text", folder / "meta.json")
    assert torch.nonzero(data.known["text"])[:, 0].tolist() == [2, 3]


def test_features_of_an_archive_are_matched_by_id(folder, tmp_path):
    table = np.arange(120, dtype=np.float32).reshape(60, 2) + 1
    np.savez(tmp_path / "f.npz", item_id=np.arange(60)[::-1], text=table[::-1])
    data = read("-d", folder, "--features", tmp_path / "f.npz")
    assert data.feature_source == "npz" and torch.equal(data.features["text"], torch.from_numpy(table))
    one = read("-d", folder, "--features", folder / "image_feat.npy")
    assert list(one.features) == ["image"]


# -- files that cannot be used


def _rows(folder):
    layout.write_feature_file(folder / "image_feat.npy", np.ones((59, 4)))


def _nan(folder):
    layout.write_feature_file(folder / "image_feat.npy", np.where(np.arange(240).reshape(60, 4) == 41, np.nan, 1.0))


def _pickle(folder):
    np.save(folder / "image_feat.npy", np.array([{"a": 1}] * 60, dtype=object), allow_pickle=True)


def _flat(folder):
    np.save(folder / "image_feat.npy", np.ones(60))


def _zero(folder):
    layout.write_feature_file(folder / "text_feat.npy", np.zeros((60, 4)))


def _label(folder):
    text = (folder / "planted.inter").read_text()
    (folder / "planted.inter").write_text("\n".join(line.rpartition("\t")[0] for line in text.splitlines()) + "\n")


def _map(folder):
    (folder / "i_id_mapping.csv").write_text("asin\titemID\nB1\tsixty\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_rows, "59 rows, wanted 60"), (_nan, "first is item 10"), (_pickle, "wanted plain arrays"), (_flat, "no table of numbers"),
        (_zero, "every text feature"), (_label, "no column x_label"), (_map, "wanted a number of an item"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        read("-d", folder)
    assert "\n" not in str(error.value)


def test_a_split_of_ones_own_needs_no_label(folder):
    _label(folder)
    assert read("-d", folder, "--split", "per-user").interactions.test.nnz > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [(("-d", "babi"), "did you mean 'baby'"), (("-d", "baby", "--features", "tfidf"), "did you mean 'tfidf-svd'")],
)
def test_unknown_names_are_answered_with_the_nearest(words, said, planted, tmp_path):
    shutil.copytree(planted, tmp_path / "baby")
    (tmp_path / "baby" / "planted.inter").rename(tmp_path / "baby" / "baby.inter")
    with pytest.raises(UserError, match=said):
        read(*words, "--data-root", tmp_path)


def test_no_titles_to_encode(folder):
    with pytest.raises(UserError, match="has no item titles"):
        read("-d", folder, "--features", "hashing")


def test_a_sentence_encoder_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"needs sentence-transformers: pip install '.\[text\]'"):
        features.encode_texts(["a"], "some/model")


# -- users who share items


def test_user_graph_is_the_stored_co_occurrence(numbers):
    toy = numbers("mm_toy")
    train = csr_from_pairs(toy["train_user"], toy["train_item"], int(toy["n_users"]), int(toy["n_items"]))
    graph = layout.shared_items(train, block=7)
    assert graph.dtype == np.int64 and (graph.toarray() == toy["user_count"]).all()
    assert graph[[int(toy["lonely_user"])]].nnz == 0
    for user in range(graph.shape[0]):
        counts = graph.data[graph.indptr[user] : graph.indptr[user + 1]]
        assert (np.diff(counts) <= 0).all()
        assert sorted(counts) == sorted(toy["ug_count"][toy["ug_ptr"][user] : toy["ug_ptr"][user + 1]])


def test_user_graph_keeps_the_most_shared_and_the_smaller_id():
    train = csr_from_pairs(np.array([0, 0, 1, 1, 2, 3, 4]), np.array([0, 1, 0, 1, 0, 1, 0]), 5, 2)
    graph = layout.shared_items(train, limit=2, block=2)
    first = graph.indices[graph.indptr[0] : graph.indptr[1]]
    assert first.tolist() == [1, 2] and graph.data[: graph.indptr[1]].tolist() == [2, 1]


def test_user_graph_is_kept_beside_and_checked(folder, tmp_path):
    data = read("-d", folder, model="BPR", needs=False)
    kept = MultimodalData(data.interactions, cache_dir=tmp_path / "cache")
    graph = kept.user_graph
    assert len(list((tmp_path / "cache").glob("users-*.npz"))) == 1
    assert (MultimodalData(data.interactions, cache_dir=tmp_path / "cache").user_graph != graph).nnz == 0
    layout.write_user_graph(folder / "user_graph.npz", graph[:, :][[*range(79)]][:, [*range(79)]])
    with pytest.raises(UserError, match="is of 79 users, the data has 80"):
        _ = data.user_graph


# -- real data


def test_published_amazon_sets_and_what_they_lack(shared_data):
    sizes = {
        "baby": (19_445, 7_050, 118_551),
        "sports": (35_598, 18_357, 218_409),
        "clothing": (39_387, 23_033, 197_338),
    }
    for name, size in sizes.items():
        data = read("-d", name, "--data-root", shared_data, model="BPR", needs=False)
        assert (data.num_users, data.num_items, data.interactions.train.nnz) == size
    with pytest.raises(UserError, match="needs item features and amazon-baby has none"):
        read("-d", "baby", "--data-root", shared_data)


@pytest.mark.parametrize("name", ["ml-1m", "ml1m-ge3"])
def test_movielens_features_belong_to_their_movies(shared_data, name):
    """By MovieLens id, also where the split numbers the movies anew."""
    data = read("-d", name, "--data-root", shared_data)
    with np.load(shared_data / "ml-1m" / "features.npz") as file:
        source = {str(movie): row for row, movie in enumerate(file["movie_id"].tolist())}
        tables = {"text": file["text"].astype(np.float32), "image": file["image"].astype(np.float32)}
    assert data.feature_source == "npz" and {k: t.shape[1] for k, t in data.features.items()} == {
        "image": 128,
        "text": 128,
    }
    ids = [str(name) for name in data.interactions.item_ids.tolist()]
    checked = 0
    for kind, table in data.features.items():
        for row in torch.nonzero(data.known[kind])[:, 0].tolist()[::50]:
            np.testing.assert_array_equal(table[row], tables[kind][source[ids[row]]])
            checked += 1
    assert checked > 100 and int(data.known["text"].sum()) > 0.98 * data.num_items
