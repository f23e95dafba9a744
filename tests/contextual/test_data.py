"""Splits by official layout, on miniature copies of each; counts, lists, folders, and what is wrong named in one line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from contextual import data as datasets
from contextual.data import Counts, Rows, hold_out, load, read_list
from gfml.base.errors import UserError


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 10, 3), shade % 256, dtype=np.uint8)).save(path)


def cub(root: Path, classes: Iterable[int] = (1, 2, 100, 101, 102, 200), each: int = 3) -> Path:
    names = [
        (number, f"{label:03d}.Bird_{label}/{number}.jpg", label)
        for number, label in enumerate((c for c in classes for _ in range(each)), 1)
    ]
    for number, name, _ in names:
        picture(root / "images" / name, number)
    (root / "images.txt").write_text("".join(f"{number} {name}\n" for number, name, _ in names))
    (root / "image_class_labels.txt").write_text("".join(f"{number} {label}\n" for number, _, label in names))
    return root


def cars(root: Path) -> Path:
    labels = [1, 1, 98, 98, 98, 99, 99, 196]
    names = [f"car_ims/{number:06d}.jpg" for number in range(1, 9)]
    for number, name in enumerate(names):
        picture(root / name, number)
    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    rows = np.array(
        [(name, 0, 0, 1, 1, label, 0) for name, label in zip(names, labels, strict=True)],
        dtype=[(field, object) for field in fields],
    )
    scipy.io.savemat(root / "cars_annos.mat", {"annotations": rows})
    return root


def sop(root: Path) -> Path:
    rows = {"train": [(1, 1, "bicycle_final/1_0.JPG"), (1, 1, "bicycle_final/1_1.JPG"), (2, 3, "chair_final/2_0.JPG"), (2, 3, "chair_final/2_1.JPG")],
            "test": [(3, 1, "bicycle_final/3_0.JPG"), (3, 1, "bicycle_final/3_1.JPG"), (4, 3, "chair_final/4_0.JPG")]}  # fmt: skip
    for part, lines in rows.items():
        body = "".join(f"{number} {label} {above} {name}\n" for number, (label, above, name) in enumerate(lines, 1))
        (root / f"Ebay_{part}.txt").write_text("image_id class_id super_class_id path\n" + body)
        for _, _, name in lines:
            picture(root / name)
    return root


def inshop(root: Path) -> Path:
    lines = [("a/1.jpg", "id_7", "train"), ("a/2.jpg", "id_7", "train"), ("b/1.jpg", "id_2", "train"), ("c/1.jpg", "id_5", "query"),
             ("c/2.jpg", "id_5", "gallery"), ("d/1.jpg", "id_3", "query"), ("d/2.jpg", "id_3", "gallery"), ("d/3.jpg", "id_3", "gallery")]  # fmt: skip
    body = "".join(f"img/{name}    {item}   {part}\n" for name, item, part in lines)
    (root / "list_eval_partition.txt").write_text(f"{len(lines)}\nimage_name item_id evaluation_status\n{body}")
    for name, _, _ in lines:
        picture(root / "img" / name)
    return root


def inat(root: Path) -> Path:
    taxa = ["Animalia_Chordata_Aves_A", "Animalia_Chordata_Aves_B", "Animalia_Chordata_Aves_C", "Plantae_Tracheophyta_Magnoliopsida_D",
            "Plantae_Tracheophyta_Magnoliopsida_E", "Animalia_Annelida_Clitellata_F", "Animalia_Annelida_Clitellata_G"]  # fmt: skip
    for number, name in enumerate(taxa):
        for image in range(2):
            picture(root / f"{number:05d}_{name}" / f"{image}.jpg")
    return root


BUILDERS = {"cub": cub, "cars": cars, "sop": sop, "inshop": inshop, "inat": inat}
SIZES = {
    "cub": Counts(9, 3, 9, 3), "cars": Counts(5, 2, 3, 2), "sop": Counts(4, 2, 3, 2), "inshop": Counts(3, 2, 2, 2, 3), "inat": Counts(8, 4, 6, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_official_layout_gives_the_split(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BUILDERS[name](tmp_path)
    monkeypatch.setitem(datasets.COUNTS, name, SIZES[name])
    found = load(name, tmp_path)
    counts = Counts(
        len(found.train),
        found.num_classes,
        len(found.test),
        len(found.test.classes),
        len(found.gallery) if found.gallery else None,
    )
    assert counts == SIZES[name]
    assert sorted(set(found.train.labels.tolist())) == list(range(found.num_classes))
    assert not set(found.train.pictures.paths) & set(found.test.pictures.paths)
    assert found.train.image(0).shape == (12, 10, 3)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_other_counts_than_the_published_ones_stop_unless_allowed(name: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path)
    with pytest.raises(
        UserError, match=f"{name} differs from the published data: train {SIZES[name].train} .published"
    ):
        load(name, tmp_path)
    assert load(name, tmp_path, check_counts=False).name == name


def test_published_counts() -> None:
    counts = datasets.COUNTS
    assert (counts["cub"].train, counts["cub"].test, counts["cars"].train, counts["cars"].test) == (
        5_864,
        5_924,
        8_054,
        8_131,
    )
    assert (counts["sop"].train, counts["sop"].test, counts["sop"].train_classes) == (59_551, 60_502, 11_318)
    assert (counts["inshop"].train, counts["inshop"].test, counts["inshop"].gallery) == (25_882, 14_218, 12_612)
    assert counts["inat"].train_classes + counts["inat"].test_classes == 10_000


def test_class_names_and_halves_of_cub(tmp_path: Path) -> None:
    found = load("cub", cub(tmp_path), check_counts=False)
    assert found.train.classes == ("001.Bird_1", "002.Bird_2", "100.Bird_100")
    assert found.test.classes == ("101.Bird_101", "102.Bird_102", "200.Bird_200")


def test_gallery_of_inshop_shares_the_classes_of_its_queries(tmp_path: Path) -> None:
    found = load("inshop", inshop(tmp_path), check_counts=False)
    item = {
        Path(path).parent.name: label for path, label in zip(found.test.pictures.paths, found.test.labels, strict=True)
    }
    for path, label in zip(found.gallery.pictures.paths, found.gallery.labels, strict=True):
        assert item[Path(path).parent.name] == label


def test_super_classes_follow_the_training_classes(tmp_path: Path) -> None:
    assert load("sop", sop(tmp_path), check_counts=False).supers.tolist() == [0, 1]
    found = load("inat", inat(tmp_path / "inat"), check_counts=False)
    assert len(found.supers) == found.num_classes and len(set(found.supers.tolist())) == 3
    assert "not comparable" in found.notes[0]
    assert load("inat", tmp_path / "inat", split_seed=1, check_counts=False).fingerprint != found.fingerprint


def test_lists_of_the_authors_split_inaturalist(tmp_path: Path) -> None:
    folder = inat(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    for part, own in (("train", names[:4]), ("test", names[4:])):
        (folder / f"{part}.csv").write_text(
            "".join(f"{name}/{image}.jpg,{int(name[:5]) % 2},{int(name[:5])}\n" for name in own for image in range(2))
        )
    found = load("inat", folder, split_lists=(str(folder / "train.csv"), str(folder / "test.csv")), check_counts=False)
    assert (len(found.train), len(found.test), found.supers.tolist()) == (8, 6, [0, 1, 0, 1])


def write_list(path: Path, rows: Rows) -> None:
    """A list as the authors keep it."""
    lines = zip(rows.classes, rows.supers, rows.paths, strict=True)
    text = "".join(f"{number} {label} {above} {name}\n" for number, (label, above, name) in enumerate(lines))
    path.write_text("image_id class_id super_class_id path\n" + text)


def test_lists_keep_what_was_written(tmp_path: Path) -> None:
    rows = Rows(["a b.jpg", "c.jpg"], np.array([3, 5]), np.array([1, 1]))
    write_list(tmp_path / "list.txt", rows)
    found = read_list(tmp_path / "list.txt")
    assert found.paths == rows.paths and found.classes.tolist() == [3, 5] and found.supers.tolist() == [1, 1]


def test_list_files_stand_in_for_missing_annotations(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"car_ims/{number}.jpg")
    for part, labels in (("train", [1, 1]), ("test", [99, 99])):
        rows = Rows(
            [f"car_ims/{i + 2 * (part == 'test')}.jpg" for i in range(2)], np.array(labels), np.ones(2, dtype=int)
        )
        write_list(tmp_path / f"cars196_{part}.txt", rows)
    assert len(load("cars", tmp_path, check_counts=False).test) == 2


def folder_of_classes(root: Path, number: int = 6, each: int = 3) -> Path:
    for label in range(number):
        for image in range(each):
            picture(root / f"class{label}" / f"{image}.png", 40 * label + image)
    return root


def test_a_folder_of_classes_trains_on_the_first_half(tmp_path: Path) -> None:
    """Of six classes four train, so that two of them can validate."""
    found = load(str(folder_of_classes(tmp_path / "ten", number=10)), None)
    assert found.train.classes == tuple(f"class{label}" for label in range(5)) and len(found.test.classes) == 5
    found = load(str(folder_of_classes(tmp_path / "six")), None)
    assert found.train.classes == ("class0", "class1", "class2", "class3") and found.test.classes == (
        "class4",
        "class5",
    )


def test_a_folder_with_train_and_test_keeps_them_apart(tmp_path: Path) -> None:
    for part, names in (("train", "ab"), ("test", "cd")):
        for name in names:
            picture(tmp_path / part / name / "1.png")
    assert load(str(tmp_path), None).test.classes == ("c", "d")
    picture(tmp_path / "test" / "a" / "1.png")
    with pytest.raises(UserError, match="has the class 'a' in train and in test"):
        load(str(tmp_path), None)


def test_validation_takes_classes_away_from_training() -> None:
    whole = load("digits")
    found = hold_out(whole, 0.3, 7)
    assert set(found.train.classes).isdisjoint(found.valid.classes)
    assert {*found.train.classes, *found.valid.classes} == set(whole.train.classes) == set("012345")
    assert whole.test.classes == tuple("6789")
    assert len(found.train) + len(found.valid) == len(whole.train)
    assert hold_out(whole, 0.3, 7).valid.classes == found.valid.classes


def test_real_data_by_name(shared_data: Path) -> None:
    found = load("cifar100", shared_data)
    assert (found.num_classes, len(found.test.classes), len(found.train), len(found.test)) == (50, 50, 6_500, 6_500)
    found = load("grocery-store", shared_data / "grocery-store")
    assert (found.num_classes, len(found.test.classes), len(found.train) + len(found.test)) == (41, 40, 5_421)


def test_single_images_are_dropped_and_unreadable_ones_named(tmp_path: Path) -> None:
    root = folder_of_classes(tmp_path)
    for name in ("1.png", "2.png"):
        (root / "class1" / name).unlink()
    (root / "class2" / "0.png").write_bytes(b"no picture")
    whole = load(str(root), None)
    assert "class1" not in datasets.without_singles(whole).train.classes
    found = datasets.without_unreadable(whole)
    assert len(found.train) == len(whole.train) - 1
    assert "1 images of" in found.notes[0] and "class2/0.png" in found.notes[0]


def test_where_nothing_can_be_found_is_told(tmp_path: Path) -> None:
    """Of classes with one image each there is nothing to learn, and no neighbour of a query is right."""
    root = folder_of_classes(tmp_path)
    whole = load(str(root), None)
    assert datasets.require_matches(whole) is whole
    for name in whole.test.classes:
        for path in sorted((root / name).iterdir())[1:]:
            path.unlink()
    with pytest.raises(UserError, match="test has one image in each class, nothing can be found: add images"):
        datasets.require_matches(load(str(root), None))
    for name in whole.train.classes:
        for path in sorted((root / name).iterdir())[1:]:
            path.unlink()
    with pytest.raises(
        UserError, match="every training class of .* has one image: add images, or give --single-images r"
    ):
        datasets.without_singles(load(str(root), None))


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        ("cub", "images.txt", "there is no .*images.txt: put the official annotation file there"),
        ("cub", "image_class_labels.txt", "there is no .*image_class_labels.txt"),
        ("cars", "cars_annos.mat", "there is no .*cars_annos.mat"),
        ("sop", "Ebay_test.txt", "there is no .*Ebay_test.txt"),
        ("inshop", "list_eval_partition.txt", "there is no .*list_eval_partition.txt"),
        ("sop", "chair_final/2_1.JPG", "there is no image .*2_1.JPG"),
    ],
)
def test_a_missing_file_is_named(name: str, lost: str, words: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(UserError, match=words):
        load(name, tmp_path, check_counts=False)


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("sop", "Ebay_train.txt", "id label path\n1 1 x.jpg\n", "wanted the header"),
        ("sop", "Ebay_train.txt", "image_id class_id super_class_id path\n1 one 1 x.jpg\n", "line 2: found"),
        ("cub", "image_class_labels.txt", "1 1\n", "name different images"),
        ("cars", "cars_annos.mat", "not a mat file", "bring the official file back"),
        ("inshop", "list_eval_partition.txt", "1\nhead\nimg/a.jpg id_1 somewhere\n", "wanted image, item id and train"),
    ],
)
def test_a_damaged_annotation_file_is_named(name: str, file: str, content: str, words: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=words):
        load(name, tmp_path, check_counts=False)


def test_wrong_roots_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cub needs --root"):
        load("cub")
    with pytest.raises(UserError, match="there is no folder .*nowhere: give the folder of cub with --root"):
        load("cub", tmp_path / "nowhere")
    with pytest.raises(UserError, match="found 0 class folders"):
        load(str(tmp_path), None)
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="no image in the class folder 'b'"):
        load(str(tmp_path), None)


@pytest.mark.parametrize(("classes", "trained", "held"), [(6, 4, 2), (8, 4, 2), (12, 6, 2)])
def test_small_folders_have_classes_to_validate_on(tmp_path: Path, classes: int, trained: int, held: int) -> None:
    """At the defaults of --val-share and --split-seed."""
    for label in range(classes):
        for number in range(3):
            picture(tmp_path / f"c{label:02}" / f"{number}.png")
    data = load(str(tmp_path), None)
    assert data.num_classes == trained and len(data.test.classes) == classes - trained
    assert len(hold_out(data, 0.2, 2020).valid.classes) == held


def test_advice_on_too_few_classes_helps(tmp_path: Path) -> None:
    """A share is only to be lowered where that leaves classes to train on."""
    for label in range(5):
        for number in range(3):
            picture(tmp_path / f"c{label:02}" / f"{number}.png")
    data = load(str(tmp_path), None)
    for share in (0.01, 0.2, 1.0):
        with pytest.raises(UserError, match="for validation: give --select-on test$"):
            hold_out(data, share, 0)
    for label in range(5, 12):
        for number in range(3):
            picture(tmp_path / f"c{label:02}" / f"{number}.png")
    data = load(str(tmp_path), None)
    with pytest.raises(UserError, match="lower --val-share, or give --select-on test$"):
        hold_out(data, 0.9, 0)
    assert hold_out(data, 0.2, 0).num_classes == 4
