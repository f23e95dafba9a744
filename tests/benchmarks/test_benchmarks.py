"""The benchmarks' own logic: stages on a small data set, tables, and that a ratio is of one run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_stages_hand_their_data_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    netflix = module("netflix")
    monkeypatch.setitem(netflix.SHAPES, 50_000, (1_500, 400))
    for stage in netflix.STAGES:
        row = netflix.run_stage(stage, 50_000, tmp_path, steps=3)
        assert row["cpu_s"] >= 0 and row["peak_gib"] > 0
        data = netflix.load(tmp_path)
        assert data.train.nnz + data.test.nnz == 50_000 and data.train.shape == (1_500, 400), stage


def test_table_of_sizes() -> None:
    netflix = module("netflix")
    rows = [{"stage": "a", "interactions": 10**6, "cpu_s": 2.0, "peak_gib": 0.5},
            {"stage": "b", "interactions": 10**6, "failed": "MemoryError"},
            {"stage": "a", "interactions": 10**7, "cpu_s": 30.0, "peak_gib": 1.0}]  # fmt: skip
    assert netflix.table(rows).splitlines()[2:] == [
        "| a | 2.00, 2.000, 0.50 | 30.00, 3.000, 1.00 |", "| b | MemoryError | - |"
    ]  # fmt: skip


def test_both_sides_are_timed_on_the_same_work(tmp_path: Path) -> None:
    import numpy as np

    from gfml.data.synthetic import generate

    peers, train = module("peers"), generate(300, 100, 5000).train
    path = tmp_path / "train.npz"
    np.savez(path, data=train.data, indices=train.indices, indptr=train.indptr, shape=train.shape)
    for row in peers.SPARSE:
        found = peers.one_turn("ours", f"{row.work}, demo", str(path), "")
        assert min(found.values()) > 0 or "memory" in row.work
        assert ("floor_s" in found) == (row.work in ("top 20 of all users, D 64", "MF bpr epoch, D 64, AdamW"))


def test_the_first_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    peers, calls = module("peers"), []
    monkeypatch.setattr(peers, "attend", lambda side, work: (lambda: calls.append(work), 7))
    peers.one_turn("peer", peers.ATTENTION[0].work, "", "")
    assert calls == [peers.ATTENTION[0].work] * 2


def test_added_memory_is_the_peak_of_the_call_alone() -> None:
    import numpy as np

    peers, kept = module("peers"), np.ones(2**22)
    np.ones(2**24).sum()  # an earlier, higher peak does not count
    assert 60 < peers.added_memory(lambda: np.ones(2**23).sum()) < 80 and kept.any()


def test_a_work_may_be_the_first_batches_of_an_epoch() -> None:
    peers = module("peers")
    assert peers.first_batches("MMGCN epoch, its first 12 batches, amazon-baby") == 12
    assert peers.first_batches("gravity attention l2, batch 8") is peers.first_batches("MGCN epoch") is None


@pytest.mark.slow
def test_attention_is_timed_on_both_sides() -> None:
    pytest.importorskip("timm")
    peers = module("peers")
    for row in peers.ATTENTION:
        assert all(peers.one_turn(side, row.work, "", "")["cost"] > 0 for side in ("ours", "peer"))


def test_rows_that_are_asked_for_are_measured_and_the_others_of_the_file_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, file = module("peers"), tmp_path / "run.json"
    old = {"work": "gravity attention l1, batch 64", "against": "timm Attention", "bar": 1.4, "ours": 2.0, "peer": 2.0,
           "ratio": 1.0, "turns": {}}  # fmt: skip
    file.write_text(json.dumps({"versions": {"ours": {}}, "machine": "m", "cpus": 2, "rows": [old]}))

    def one(command: list[str], **how: object) -> subprocess.CompletedProcess:
        if "-c" in command:
            return subprocess.CompletedProcess(command, 0, '{"torch": "2"}', "")
        side, work, _ = command[-3:]
        if "batch 8" in work and side == "peer":
            said = "Traceback\nERROR: needs Python 4\nERROR: no such version\n"
            raise subprocess.CalledProcessError(1, command, stderr=said)
        return subprocess.CompletedProcess(
            command, 0, json.dumps({"cost": 4.0} if side == "peer" else {"cost": 1.0, "floor_s": 0.5}), ""
        )

    monkeypatch.setattr(peers.subprocess, "run", one)
    assert peers.main(["--only", "attention l2", "--json", str(file), "--env", str(tmp_path)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows[0] == old and [row["work"] for row in rows[1:]] == [row.work for row in peers.ATTENTION[:2]]
    assert rows[1]["ratio"] == 0.25 and rows[1]["turns"] == {"ours": [1.0] * 3, "peer": [4.0] * 3, "floor": [0.5] * 3}
    assert rows[2]["failed"] == "ERROR: needs Python 4 ERROR: no such version" and "ratio" not in rows[2]
    assert peers.line(rows[2]).count("|") == 8 and "| 1.000 | 4.000 | 0.500 | 0.25 | 1 |" in peers.line(rows[1])


def test_the_page_is_filled_from_one_run(tmp_path: Path) -> None:
    peers = module("peers")
    row = {"work": "w, d", "against": "p", "bar": 1.2, "ours": 1.0, "peer": 4.0, "ratio": 0.25}
    found = {
        "versions": {"ours": {"torch": "2"}, "implicit": {"implicit": "0.7.3", "numpy": "1"}},
        "cpus": 2,
        "machine": "m",
        "rows": [row],
    }
    page = tmp_path / "README.md"
    page.write_text(f"before\n{peers.BEGIN}\nold 57 x\n{peers.END}\nafter\n")
    (tmp_path / "run.json").write_text(json.dumps(found))
    assert peers.main(["--table", str(tmp_path / "run.json"), str(page)]) == 0
    text = page.read_text()
    assert (
        "| w, d | p | 1.000 | 4.000 |  | 0.25 | 1.2 |" in text
        and "old" not in text
        and "ours: torch 2; implicit: implicit 0.7.3, numpy 1" in text
    )
    assert text.startswith("before\n") and text.endswith("after\n")
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="has no line"):
        peers.fill(found, page)
