"""Whole-number pairs from Parquet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.data import large
from gfml.data.large import read_pairs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: Path, users: object, items: object, group: int = 50, **more: object) -> Path:
    pq.write_table(pa.table({"user": users, "item": items, **more}), path, row_group_size=group)
    return path


def test_pairs_come_back_once_each_cut_per_user(tmp_path: Path, threads, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 40, 900), rng.integers(0, 60, 900)
    users[users == 7] = 8  # nobody has number 7
    path = write(tmp_path / "pairs.parquet", users, items, rating=np.ones(900))
    monkeypatch.setattr(large, "ROWS", 64)
    monkeypatch.setattr(large, "USERS", 9)
    found = []
    for number in (1, 2, 4):
        threads(number)
        found.append(read_pairs(path, test_ratio=0.25, seed=3))
    assert len({data.fingerprint for data in found}) == 1
    data = found[0]
    expected = {(int(u), int(i)) for u, i in zip(users, items, strict=True)}
    parts = [set(zip(*data.split(part).nonzero(), strict=True)) for part in ("train", "test")]
    assert {(int(u), int(i)) for part in parts for u, i in part} == expected and not parts[0] & parts[1]
    assert data.notes == {"duplicate pairs dropped": 900 - len(expected)}
    for matrix in (data.train, data.test):
        assert matrix.has_canonical_format and matrix.indices.dtype == np.int32
    for u in range(40):
        number = sum(user == u for user, _ in expected)
        held = int(data.test.indptr[u + 1] - data.test.indptr[u])
        assert held == (max(1, round(0.25 * number)) if number >= 3 else 0)
    assert read_pairs(path, test_ratio=0.25, seed=4).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    "users, items, words",
    [
        ([0, 1], ["a", "b"], "item of .* holds no whole numbers"),
        ([0, -1], [0, 1], "column user .* wants whole numbers from 0"),
        ([0, None], [0, 1], "column user .* wants whole numbers from 0"),
        (np.empty(0, int), np.empty(0, int), "no interaction at all"),
    ],
)
def test_what_is_no_table_of_pairs_is_named(tmp_path: Path, users: object, items: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_pairs(write(tmp_path / "pairs.parquet", users, items))
    with pytest.raises(UserError, match="has no column who: it has user, item"):
        read_pairs(tmp_path / "pairs.parquet", user="who")


PEAK = """
import sys
from gfml.data.large import read_pairs
now = lambda what: int(open("/proc/self/status").read().split(what)[1].split()[0]) / 1024
read_pairs(sys.argv[1])
before = now("VmRSS:")
read_pairs(sys.argv[2])
print(now("VmHWM:") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
def test_memory_is_that_of_the_columns_and_the_result(tmp_path: Path) -> None:
    """20 million pairs: 160 MB of columns as they stand in memory, 160 MB of result."""
    rng = np.random.default_rng(0)
    small, big = (
        write(tmp_path / f"{n}.parquet", rng.integers(0, 9000, n), rng.integers(0, 9000, n), 1 << 20)
        for n in (10**4, 2 * 10**7)
    )
    done = subprocess.run([sys.executable, "-c", PEAK, small, big], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 400
