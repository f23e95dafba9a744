"""Labelled images: the type, every reader, and one clear line for everything a user can mend."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from gfml.base.errors import UserError
from gfml.data.images import (
    ArrayPictures,
    FilePictures,
    ImageSet,
    channel_statistics,
    decode,
    load_images,
    read_folder,
    read_idx,
    resize,
    stratified_split,
)


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)


def image_set(pictures, labels=None, classes=("a", "b", "c")):
    labels = np.arange(len(pictures)) % 3 if labels is None else np.asarray(labels)
    return ImageSet(ArrayPictures(pictures), labels, classes, "toy")


def png_bytes(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_tree(folder, pictures, parts=("train", "test"), classes=("cat", "dog")):
    for part in parts:
        for number, image in enumerate(pictures):
            path = folder / part / classes[number % len(classes)] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png_bytes(image))
    return folder


def write_sprites(folder, pictures, labels, classes=("a", "b"), tile=32):
    """Tiles in rows of four, the last row filled up with black."""
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        rows = -(-len(pictures) // 4)
        sprite = np.zeros((rows * tile, 4 * tile, 3), dtype=np.uint8)
        for n, image in enumerate(pictures):
            sprite[n // 4 * tile : (n // 4 + 1) * tile, n % 4 * tile : (n % 4 + 1) * tile] = image
        Image.fromarray(sprite).save(folder / f"{part}.webp", lossless=True)
    np.savez(folder / "labels.npz", y_train=labels, y_test=labels, classes=np.array(classes))
    return folder


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


# -- the type


def test_subset_and_classes(pictures):
    whole = image_set(pictures)
    part = whole.subset(np.array([5, 1]))
    assert (
        part.labels.tolist() == [2, 1] and np.array_equal(part.image(0), pictures[5]) and part.classes == whole.classes
    )
    other = whole.of_classes([2, 0])
    assert other.classes == ("c", "a") and np.bincount(other.labels).tolist() == [4, 4]
    assert np.array_equal(other.array(), pictures[np.isin(np.arange(12) % 3, [0, 2])])
    assert other.labels[:2].tolist() == [1, 0]


def test_counts_and_fingerprint_depend_on_the_content(pictures):
    whole = image_set(pictures)
    assert whole.counts.tolist() == [4, 4, 4]
    assert whole.fingerprint == image_set(pictures.copy()).fingerprint
    changed = pictures.copy()
    changed[3, 0, 0, 0] ^= 1
    assert image_set(changed).fingerprint != whole.fingerprint
    assert image_set(pictures, np.arange(12) // 4).fingerprint != whole.fingerprint


def test_labels_that_do_not_fit_are_one_line(pictures):
    with pytest.raises(UserError, match="12 images and 3 labels"):
        image_set(pictures, [0, 1, 2])
    with pytest.raises(UserError, match="labels from 0 to 3, wanted 0 to 2 for 3 classes"):
        image_set(pictures, [3, *[0] * 11])
    with pytest.raises(UserError, match="toy has no image of c: "):
        image_set(pictures, [0, 1] * 6).require_all_classes()
    with pytest.raises(ValueError, match="wanted uint8"):
        ArrayPictures(pictures.astype(float))


def test_channel_statistics_are_those_of_numpy(pictures):
    mean, std = channel_statistics(pictures)
    flat = pictures.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, flat.std(0), rtol=1e-10)
    assert channel_statistics(np.full((2, 3, 3, 3), 7, np.uint8))[1] == (1.0, 1.0, 1.0)


def test_resize_keeps_the_middle():
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    image[:, 10:30] = 200
    assert resize(image, 20).shape == (20, 20, 3) and resize(image, 20).min() == 200
    assert resize(image[:, :20], 20) is not None and np.array_equal(resize(image[:, :20], 20), image[:, :20])
    assert resize(image, 7).shape == (7, 7, 3)


def test_the_stratified_split_takes_its_share_of_every_class():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 1)
    rest, part = stratified_split(labels, 0.3, 1)
    assert sorted([*rest, *part]) == list(range(14))
    assert np.bincount(labels[part], minlength=3).tolist() == [3, 1, 0]
    assert np.array_equal(part, stratified_split(labels, 0.3, 1)[1])
    assert not np.array_equal(part, stratified_split(labels, 0.3, 2)[1])


# -- readers


def test_digits_come_with_the_library():
    data = load_images("digits")
    assert data.train.array().shape == (1297, 32, 32, 3) and data.test.counts.tolist() == [50] * 10
    assert data.train.array().max() == 255 and data.classes == tuple("0123456789")
    assert data.fingerprint == load_images("digits").fingerprint


def test_sprites_give_back_their_tiles(tmp_path, pictures):
    tiles = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    write_sprites(tmp_path / "cifar10", tiles, np.array([0, 1, 0, 1, 1, 0], dtype=np.uint8))
    data = load_images("c10", data_root=tmp_path)
    assert np.array_equal(data.train.array(), tiles) and data.test.labels.tolist() == [0, 1, 0, 1, 1, 0]
    assert data.statistics[0][0] == 0.4914 and "6 of the 50,000" in data.notes[0]


def test_sprites_that_do_not_fit_their_labels(tmp_path):
    tiles = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    folder = write_sprites(tmp_path / "cifar10", tiles, np.zeros(4, dtype=np.uint8))
    np.savez(folder / "labels.npz", y_train=np.zeros(5, int), y_test=np.zeros(4, int), classes=np.array(["a", "b"]))
    with pytest.raises(UserError, match="whole tiles of 32 x 32 for 5 labels"):
        load_images("cifar10", data_root=tmp_path)
    np.savez(folder / "labels.npz", y_train=np.zeros(4, int))
    with pytest.raises(UserError, match="has no classes, y_test"):
        load_images("cifar10", data_root=tmp_path)
    (folder / "labels.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read .*labels.npz"):
        load_images("cifar10", data_root=tmp_path)


def test_the_standard_files_come_before_sprites(tmp_path, monkeypatch):
    """CIFAR-10 in torchvision's place is read by torchvision."""
    from torchvision import datasets

    class Standard:
        def __init__(self, root, train, download=False):
            assert root == tmp_path and not download
            self.data, self.targets, self.classes = np.full((2, 32, 32, 3), 9, np.uint8), [0, 1], ["a", "b"]

    monkeypatch.setattr(datasets, "CIFAR10", Standard)
    write_sprites(tmp_path / "cifar10", np.zeros((2, 32, 32, 3), np.uint8), np.array([0, 1]))
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert load_images("c10", data_root=tmp_path).train.array().max() == 9


def test_svhn_is_turned_to_rows_of_pixels(tmp_path, monkeypatch):
    from torchvision import datasets

    channels_first = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)

    class Standard:
        def __init__(self, root, split, download=False):
            self.data, self.labels = channels_first, np.arange(12) % 10

    monkeypatch.setattr(datasets, "SVHN", Standard)
    (tmp_path / "train_32x32.mat").touch()
    data = load_images("svhn", data_root=tmp_path)
    assert not data.horizontal_flip and np.array_equal(data.train.image(3), channels_first[3].transpose(1, 2, 0))


def test_damaged_standard_files_are_named(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(UserError, match="cannot read the files in"):
        load_images("c100", data_root=tmp_path)


@pytest.mark.parametrize("name", ["c10", "c100", "svhn", "fashion-mnist", "grocery-store", "cifar10-full-lossy"])
def test_missing_data_is_one_line(name, tmp_path):
    with pytest.raises(UserError, match=r"is not below .*: wanted .*; give `data_root`") as found:
        load_images(name, data_root=tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["c10", "svhn"])
def test_missing_data_offline_is_one_line(name, tmp_path, monkeypatch):
    import urllib.request
    from urllib.error import URLError

    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(urllib.request, "urlretrieve", no_network)
    with pytest.raises(UserError, match="the download failed") as found:
        load_images(name, data_root=tmp_path, download=True)
    assert "\n" not in str(found.value)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UserError, match="unknown image data 'cifar11'.*did you mean 'cifar1"):
        load_images("cifar11")


def test_idx_files(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx_bytes(array))
    (tmp_path / "b.gz").write_bytes(gzip.compress(idx_bytes(array)))
    assert np.array_equal(read_idx(tmp_path / "a"), array) and np.array_equal(read_idx(tmp_path / "b.gz"), array)
    for content in (b"", idx_bytes(array)[:-1], b"\1" + idx_bytes(array)[1:]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError, match="not a whole idx file"):
            read_idx(tmp_path / "bad")
    (tmp_path / "bad.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read"):
        read_idx(tmp_path / "bad.gz")


def test_fashion_mnist_from_idx(tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    grey = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(grey)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(20, dtype=np.uint8) % 10))
    data = load_images("fashion-mnist", data_root=tmp_path)
    assert data.train.array().shape == (20, 28, 28, 3) and np.array_equal(data.test.array()[..., 2], grey)


def test_a_folder_by_class(tmp_path, pictures):
    data = load_images(write_tree(tmp_path / "photos", pictures))
    assert data.classes == ("cat", "dog") and len(data.train) == len(data.test) == 12
    assert np.array_equal(data.train.image(0), pictures[0]) and data.train.labels.tolist() == [0] * 6 + [1] * 6
    assert data.train.array(4).shape == (12, 4, 4, 3)


def test_a_folder_without_parts_is_cut(tmp_path, pictures):
    write_tree(tmp_path, pictures, parts=("photos",))
    data = load_images(tmp_path / "photos", test_fraction=0.5)
    assert data.train.counts.tolist() == data.test.counts.tolist() == [3, 3]
    names = {data.train.pictures.name(n) for n in range(6)} | {data.test.pictures.name(n) for n in range(6)}
    assert len(names) == 12


def test_one_image_a_class_leaves_none_to_test_on(tmp_path, pictures):
    write_tree(tmp_path, pictures[:2], parts=("photos",))
    with pytest.raises(UserError, match="has one image in each class, none is left to test on: add images"):
        load_images(tmp_path / "photos")


def test_hidden_files_and_folders_are_no_images(tmp_path, pictures):
    """At every level, and their endings do not matter; .jfif is a JPEG."""
    folder = write_tree(tmp_path / "photos", pictures)
    for place in (
        "__MACOSX",
        ".ipynb_checkpoints",
        "train/.ipynb_checkpoints",
        "train/__MACOSX",
        "train/cat/.ipynb_checkpoints",
    ):
        (folder / place).mkdir(parents=True)
        (folder / place / "x.png").write_bytes(png_bytes(pictures[0]))
    (folder / "train" / "cat" / "._0.png").write_bytes(b"no picture")
    (folder / "train" / "cat" / "more").mkdir()
    Image.fromarray(pictures[0]).save(folder / "train" / "cat" / "more" / "0.jfif", "JPEG")
    data = load_images(folder, size=4)
    assert (
        data.classes == ("cat", "dog") and data.train.counts.tolist() == [7, 6] and data.test.counts.tolist() == [6, 6]
    )


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind):
    """v 255 / 65535, rounded: the library's conversion would leave all above 255 white."""
    values = np.array([[0, 1, 128, 255], [256, 257, 30_000, 65_535], [385, 386, 32_767, 65_406]], dtype=np.uint16)
    found = decode(saved(Image.fromarray(values), kind), "x")
    wanted = [[round(int(v) * 255 / 65535) for v in row] for row in values]
    assert found.dtype == np.uint8 and found.shape == (3, 4, 3)
    assert all(found[..., channel].tolist() == wanted for channel in range(3))


def test_pixels_without_a_range_are_refused():
    """Whatever values they hold: taken for 16 bits, a 32-bit picture of 0 to 252 would be black."""
    for values in (np.zeros((2, 2), np.float32), np.full((2, 2), 70_000, np.int32), np.full((2, 2), 252, np.int32)):
        with pytest.raises(
            UserError, match="cannot read the image x.tif .it has pixels of the kind '[FI]', wanted 8 or 16 bits"
        ):
            decode(saved(Image.fromarray(values), "TIFF"), "x.tif")


def tiff(bits: int, photometric: int, rows: bytes) -> bytes:
    """A grey picture of 2 x 1 pixels."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(rows)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    rows += bytes(len(rows) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_twelve_bits_white_zero_and_a_transparent_grey():
    """The library hands these on as they stand in the file: 4095 of 4095 as a sixteenth of white, and white as black."""
    assert decode(tiff(12, 1, bytes([0xFF, 0xF8, 0x00])), "x")[0, :, 0].tolist() == [255, round(0x800 * 255 / 4095)]
    assert decode(tiff(16, 0, struct.pack("<HH", 0, 65_535)), "x")[0, :, 0].tolist() == [255, 0]
    marked = saved(Image.fromarray(np.array([[0, 257]], np.uint16)), "PNG", transparency=0)
    assert decode(marked, "x")[0, :, 0].tolist() == [0, 1]
    assert decode(marked, "x", upright=True)[0, :, 0].tolist() == [255, 1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_note_in_a_picture_is_one_line():
    """The library turns what it cannot write back into struct.error."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "abc"
    content = bytearray(saved(Image.new("RGB", (3, 2)), "WEBP", exif=exif))
    for place in range(content.index(b"EXIF"), len(content)):
        for value in (0, 3, 255):
            broken = content[:place] + bytes([value]) + content[place + 1 :]
            with contextlib.suppress(UserError):
                assert decode(bytes(broken), "x.webp", upright=True).shape[2] == 3


def test_a_link_back_to_its_folder_repeats_no_image(tmp_path, pictures):
    folder = write_tree(tmp_path / "photos", pictures)
    (folder / "train" / "cat" / "again").symlink_to(folder / "train" / "cat")
    assert load_images(folder, size=4).train.counts.tolist() == [6, 6]


def test_own_pictures_are_upright_and_on_white(tmp_path):
    """Published pictures keep their pixels, whatever their EXIF data and transparency say."""
    colours = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = saved(Image.fromarray(colours), "PNG", exif=exif)
    assert np.array_equal(decode(turned, "x"), colours)
    assert np.array_equal(decode(turned, "x", upright=True), np.rot90(colours, -1))
    alpha = np.array([[0, 255, 128]], dtype=np.uint8)
    see_through = saved(Image.fromarray(np.dstack([np.zeros((1, 3, 3), np.uint8), alpha])), "PNG")
    assert decode(see_through, "x").tolist() == [[[0] * 3] * 3]
    assert decode(see_through, "x", upright=True).tolist() == [[[255] * 3, [0] * 3, [127] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((1, 0), 1)
    marked = saved(palette, "GIF", transparency=0)
    assert decode(marked, "x", upright=True).tolist() == [[[255] * 3, [9, 8, 7]]]
    for label in "ab":
        (tmp_path / "own" / label).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "own" / label / f"{number}.png").write_bytes(turned)
    assert np.array_equal(load_images(tmp_path / "own").train.image(0), np.rot90(colours, -1))


def test_folders_that_cannot_be_used(tmp_path, pictures):
    with pytest.raises(UserError, match="has 0 class folders, wanted at least 2"):
        read_folder(tmp_path)
    write_tree(tmp_path / "a", pictures, parts=("train",))
    with pytest.raises(UserError, match="no test or val folder"):
        read_folder(tmp_path / "a")
    write_tree(tmp_path / "b", pictures)
    (tmp_path / "b" / "test" / "bird").mkdir()
    with pytest.raises(UserError, match="has the class 'bird' that the train folder has not"):
        read_folder(tmp_path / "b")
    write_tree(tmp_path / "c", pictures)
    (tmp_path / "c" / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="c train has no image of empty"):
        load_images(tmp_path / "c")


def test_an_unreadable_image_is_named_or_left_out(tmp_path, pictures):
    write_tree(tmp_path / "photos", pictures)
    broken = tmp_path / "photos" / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError, match=r"cannot read the image .*train/cat/0\.png"):
        load_images(tmp_path / "photos", size=4)
    data = load_images(tmp_path / "photos", size=4, unreadable="skip")
    assert len(data.train) == 11 and len(data.test) == 12 and "left out 1 unreadable" in data.notes[0]
    good, bad = load_images(tmp_path / "photos").train.readable()
    assert len(good) == 11 and bad == [str(broken)]


def test_images_of_different_sizes_need_a_size(tmp_path, pictures):
    write_tree(tmp_path / "photos", pictures)
    (tmp_path / "photos" / "train" / "cat" / "0.png").write_bytes(png_bytes(np.zeros((9, 9, 3), np.uint8)))
    data = load_images(tmp_path / "photos")
    with pytest.raises(UserError, match=r"different sizes \(.*0\.png of 9 x 9 and .*of 5 x 6\), wanted one size"):
        data.train.array()
    assert data.train.array(8).shape == (12, 8, 8, 3)


def write_archive(folder, pictures, names=("apple", "pear")):
    folder.mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for n, image in enumerate(pictures):
            archive.writestr(f"{n}.png", png_bytes(image))
    with open(folder / "images.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows(
            [
                ["path", "split", "fine", "coarse"],
                *([f"{n}.png", ("train", "val", "test")[n % 3], n // 3 % 2, 0] for n in range(len(pictures))),
            ]
        )
    with open(folder / "classes.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["fine", "fine_name"], *([n, name] for n, name in enumerate(names))])
    return folder


def test_an_archive_with_a_table(tmp_path, pictures):
    write_archive(tmp_path / "grocery-store", pictures)
    data = load_images("grocery-store", data_root=tmp_path)
    assert data.classes == ("apple", "pear") and [len(part) for part in data.parts.values()] == [4, 4, 4]
    assert np.array_equal(data.valid.image(1), pictures[4]) and data.valid.labels.tolist() == [0, 1, 0, 1]
    # Worker processes open the archive anew.
    assert np.array_equal(pickle.loads(pickle.dumps(data.train.pictures))[2], pictures[6])
    with zipfile.ZipFile(tmp_path / "grocery-store" / "images.zip", "w") as archive:
        archive.writestr("0.png", b"nothing")
    with pytest.raises(UserError, match="has no 1.png, which images.csv names"):
        load_images("grocery-store", data_root=tmp_path)


def test_a_damaged_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("bad.png", b"nothing")
    with pytest.raises(UserError, match=r"cannot read the image bad\.png in .*images\.zip"):
        FilePictures(["bad.png"], tmp_path / "images.zip")[0]


# -- real data


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "classes"),
    [
        ("cifar10", 10_000, 2_000, (32, 32, 3), 10),
        ("fashion-mnist", 12_000, 10_000, (28, 28, 3), 10),
        ("cifar100", 10_000, 3_000, (32, 32, 3), 100),
    ],
)
def test_shared_images(shared_data, name, train, test, shape, classes):
    data = load_images(name, data_root=shared_data)
    assert (len(data.train), len(data.test), data.train.image(7).shape, len(data.classes)) == (
        train,
        test,
        shape,
        classes,
    )
    assert len(set(data.train.counts)) == 1
    mean, std = channel_statistics(data.train.array())
    np.testing.assert_allclose([mean, std], data.statistics, atol=0.008)


def test_shared_groceries(shared_data):
    data = load_images("grocery-store", data_root=shared_data)
    assert [len(part) for part in data.parts.values()] == [2640, 296, 2485] and len(data.classes) == 81
    assert data.classes[0] == "Golden-Delicious" and min(data.train.image(5).shape[:2]) == 96
