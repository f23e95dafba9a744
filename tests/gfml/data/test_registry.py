"""Known data sets: finding, downloading, checking; and the real ones where they are at hand."""

from __future__ import annotations

import hashlib
import http.server
import logging
import threading
import zipfile
from dataclasses import replace

import pytest

from gfml.base.errors import UserError
from gfml.data import download as downloads
from gfml.data import registry
from gfml.data.options import load_dataset

TRAIN, TEST = b"0 1 2 3\n1 0 2\n", b"0 0\n1 1\n"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; knows ranges; can hang up in the middle."""

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404, "Not Found")
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if begin and begin >= len(content):
            return self.send_error(416, "Range Not Satisfiable")
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        stop = self.server.hang_up_after
        self.wfile.write(content[begin:] if stop is None else content[begin : begin + stop])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    running.files, running.ranges, running.hang_up_after = {}, [], None
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


# Download ---------------------------------------------------------------------------------------


def test_download_checks_and_renames(server, tmp_path):
    server.files["/train.txt"] = TRAIN
    target = tmp_path / "new" / "train.txt"
    downloads.download(f"{server.url}/train.txt", target, sha256(TRAIN), progress=False)
    assert target.read_bytes() == TRAIN and [path.name for path in target.parent.iterdir()] == ["train.txt"]


def test_interrupted_download_is_continued(server, tmp_path):
    content = bytes(range(256)) * 40
    server.files["/big"], server.hang_up_after = content, 1000
    target = tmp_path / "big"
    with pytest.raises(UserError, match="cannot download"):
        downloads.download(f"{server.url}/big", target, sha256(content), progress=False)
    assert not target.exists() and (tmp_path / "big.part").stat().st_size == 1000
    server.hang_up_after = None
    downloads.download(f"{server.url}/big", target, sha256(content), progress=False)
    assert target.read_bytes() == content and server.ranges == [None, "bytes=1000-"]


def test_leftover_that_is_too_long_is_dropped(server, tmp_path):
    server.files["/a"] = TRAIN
    (tmp_path / "a.part").write_bytes(b"x" * 500)
    downloads.download(f"{server.url}/a", tmp_path / "a", sha256(TRAIN), progress=False)
    assert (tmp_path / "a").read_bytes() == TRAIN


def test_wrong_content_is_refused(server, tmp_path):
    server.files["/a"] = b"an error page"
    with pytest.raises(UserError, match="wanted"):
        downloads.download(f"{server.url}/a", tmp_path / "a", sha256(TRAIN), progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["{}/absent", "http://127.0.0.1:9/closed"])
def test_unreachable_is_one_line(server, tmp_path, url):
    with pytest.raises(UserError, match="cannot download .*`data_root`") as caught:
        downloads.download(url.format(server.url), tmp_path / "a", progress=False)
    assert "\n" not in str(caught.value)


def known(server, **changes) -> registry.KnownDataset:
    files = {"train.txt": f"{server.url}/train.txt", "test.txt": f"{server.url}/test.txt"}
    toy = replace(
        registry.known_sets()["gowalla"],
        name="toy",
        folders=("toy",),
        expected=registry.Counts(2, 4, 5, 0, 2),
        download=registry.Download(files, checksums={"train.txt": sha256(TRAIN)}),
        sha256={},
    )
    return replace(toy, **changes)


@pytest.fixture
def toy(server, monkeypatch) -> registry.KnownDataset:
    server.files = {"/train.txt": TRAIN, "/test.txt": TEST}
    entry = known(server)
    monkeypatch.setitem(registry.known_sets(), "toy", entry)
    return entry


def test_missing_data_set_is_downloaded_once(server, toy, tmp_path):
    data = load_dataset("toy", data_root=tmp_path, cache=False, val_ratio=0)
    assert (data.train.nnz, data.test.nnz, data.num_items) == (5, 2, 4) and data.notes == {}
    assert (tmp_path / "toy" / "train.txt").read_bytes() == TRAIN
    asked = len(server.ranges)
    load_dataset("toy", data_root=tmp_path, cache=False)
    assert len(server.ranges) == asked == 2


def test_archive_is_unpacked(server, toy, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr("inner/train.txt", TRAIN)
        archive.writestr("inner/test.txt", TEST)
    server.files["/toy.zip"] = (tmp_path / "made.zip").read_bytes()
    members = {"train.txt": "inner/train.txt", "test.txt": "inner/test.txt"}
    plan = registry.Download(members, f"{server.url}/toy.zip", {"archive": sha256(server.files["/toy.zip"])})
    monkeypatch.setitem(registry.known_sets(), "toy", replace(toy, download=plan))
    load_dataset("toy", data_root=tmp_path / "root", cache=False)
    assert sorted(path.name for path in (tmp_path / "root" / "toy").iterdir()) == ["test.txt", "train.txt"]


def test_offline_and_missing_is_one_clear_line(server, toy, tmp_path, monkeypatch):
    server.files.clear()
    monkeypatch.delenv("GFML_DATA", raising=False)
    with pytest.raises(UserError) as caught:
        load_dataset("toy", data_root=tmp_path)
    message = str(caught.value)
    assert (
        "\n" not in message and str(tmp_path / "toy") in message and "`data_root DIR`" in message and "404" in message
    )
    with pytest.raises(UserError, match="downloading is off"):
        load_dataset("toy", data_root=tmp_path, download=False)
    with pytest.raises(
        UserError, match="citeulike-a not found in .*no download is offered.*train.txt.*`data_root DIR`"
    ):
        load_dataset("citeulike-a", data_root=tmp_path)


def test_roots_are_searched_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("GFML_DATA", str(tmp_path / "first"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert [str(root) for root in registry.data_roots(None)] == [
        str(tmp_path / "first"), "data", str(tmp_path / "home" / ".cache" / "gfml" / "data"),
    ]  # fmt: skip
    assert registry.data_roots(tmp_path) == [tmp_path]


@pytest.mark.parametrize("place", ["gowalla", "data/gowalla"])
@pytest.mark.parametrize("root", [".", "gowalla"])
def test_folders_that_are_recognised(tmp_path, place, root):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "train.txt").write_bytes(TRAIN)
    (folder / "test.txt").write_bytes(TEST)
    found = registry.locate(registry.known_sets()["gowalla"], [tmp_path / root])
    assert (found is not None) == (root == "." or place == "gowalla")


def test_differences_from_the_published_data_are_noted(toy, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(registry.known_sets(), "toy", replace(toy, sha256={"toy/test.txt": "0" * 64}))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "train.txt").write_bytes(b"0 1 2\n1 0\n")
    (tmp_path / "toy" / "test.txt").write_bytes(TEST)
    with caplog.at_level(logging.WARNING, "gfml.data"):
        data = load_dataset("toy", data_root=tmp_path, cache=False)
    wrong = data.notes["counts that differ from the published ones"]
    assert wrong == ["items 3 (published 4)", "train 3 (published 5)"]
    assert data.notes["files that differ from the published ones"] == ["test.txt"]
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()


def test_every_entry_says_where_it_is_from():
    for name, entry in registry.known_sets().items():
        assert entry.name == name and entry.source and entry.terms and entry.folders and entry.layouts
        assert all(address.startswith("https://") for address in _addresses(entry))
        assert all(len(digest) == 64 for digest in entry.sha256.values())
    assert set(registry.ALIASES.values()) <= set(registry.known_sets())


@pytest.mark.parametrize("name", ("gowalla", "amazon-music", "amazon-baby", "ml1m", "citeulike-a", "citeulike-t"))
def test_a_data_set_answers_to_its_folder(name, tmp_path, monkeypatch):
    folder = registry.known_sets()[name].folders[0]
    monkeypatch.chdir(tmp_path)
    assert registry.known_by(folder) is registry.known_by(name) is registry.known_sets()[name]
    assert registry.known_by("mcl-nothing") is None


def test_a_folder_of_that_name_is_read_as_it_is(tmp_path, monkeypatch):
    """Below a data root the folder is the known set, with its parts; as a path it is somebody's own table."""
    folder = tmp_path / "root" / "mmrec-baby"
    folder.mkdir(parents=True)
    lines = ["userID:token\titemID:token\tx_label:float", "0\t0\t0", "0\t1\t2", "1\t1\t0", "1\t0\t1"]
    (folder / "baby.inter").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    by_name, by_folder = (
        load_dataset(n, data_root=tmp_path / "root", cache=False) for n in ("amazon-baby", "mmrec-baby")
    )
    assert by_folder.name == by_name.name == "amazon-baby" and by_folder.fingerprint == by_name.fingerprint
    assert (by_folder.train.nnz, by_folder.valid.nnz, by_folder.test.nnz) == (2, 1, 1)
    monkeypatch.chdir(tmp_path / "root")
    assert registry.known_by("mmrec-baby") is None and load_dataset("mmrec-baby", cache=False).name == "mmrec-baby"


def _addresses(entry: registry.KnownDataset) -> list[str]:
    if entry.download is None:
        return []
    return [entry.download.archive] if entry.download.archive else list(entry.download.files.values())


def test_official_movielens_files(tmp_path):
    (tmp_path / "ml-1m").mkdir()
    lines = [f"{user}::{item}::{item % 5 + 1}::{user * 10 + item}" for user in range(1, 21) for item in range(1, 11)]
    (tmp_path / "ml-1m" / "ratings.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    data = load_dataset("ml1m", data_root=tmp_path, cache=False)
    assert data.test.nnz == 40 and data.train.nnz + data.valid.nnz == 160
    assert data.item_ids.tolist() == list(range(1, 11))
    liked = load_dataset("ml1m", data_root=tmp_path, cache=False, threshold=4, split="time")
    assert liked.train.nnz + liked.valid.nnz + liked.test.nnz == 80


# The real ones ----------------------------------------------------------------------------------

REAL = {
    # name: users, items, train, valid, test as read, without a validation cut
    "gowalla": (29_858, 40_981, 810_128, 0, 217_242),
    "lastfm": (1_892, 4_489, 42_135, 0, 10_533),
    "ml1m": (6_040, 3_706, 800_167, 0, 200_042),
    "ml1m-ge3": (6_039, 3_628, 590_733, 80_897, 164_848),
    "ml100k": (943, 1_682, 80_000, 0, 20_000),
    "amazon-music": (5_541, 3_568, 41_689, 0, 5_157),
    "amazon-grocery": (14_681, 8_713, 96_061, 0, 11_956),
    "amazon-baby": (19_445, 7_050, 118_551, 20_559, 21_682),
    "amazon-sports": (35_598, 18_357, 218_409, 37_899, 40_029),
    "amazon-clothing": (39_387, 23_033, 197_338, 40_150, 41_189),
    "citeulike-a": (5_551, 16_980, 151_895, 18_727, 39_882),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_has_the_published_counts(shared_data, name):
    if registry.locate(registry.known_sets()[name], [shared_data]) is None:
        pytest.skip(f"{name} is not in {shared_data}")
    data = load_dataset(name, data_root=shared_data, cache=False, val_ratio=0, download=False)
    assert (data.num_users, data.num_items, data.train.nnz, data.valid.nnz, data.test.nnz) == REAL[name]
    # Counts, checksums, duplicates and overlaps are all as published: only empty rows are told.
    empty = ("users without train pairs", "test users without train pairs", "items without train pairs")
    assert set(data.notes) <= set(empty)


def test_real_lastfm_facts(shared_data):
    data = load_dataset("lastfm", data_root=shared_data, cache=False, val_ratio=0)
    assert data.notes["users without train pairs"] == 14 and data.notes["test users without train pairs"] == 2
    assert data.notes["items without train pairs"] == 13
    assert data.user_activity.max() == 39
    cut = load_dataset("lastfm", data_root=shared_data, cache=False)
    assert cut.valid.nnz == 4208 and cut.train.nnz == 42_135 - 4208


def test_real_movielens_ids_are_kept(shared_data):
    data = load_dataset("ml1m", data_root=shared_data, cache=False)
    assert data.item_ids[0] == 1 and data.item_ids[-1] == 3952 and data.user_ids[-1] == 6040
    positive = load_dataset("ml100k", data_root=shared_data, cache=False, threshold=4)
    assert positive.train.nnz + positive.valid.nnz + positive.test.nnz == 34_174 + 21_201
