"""Comparing stored runs: the figures, the files, and why some runs cannot be compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.program.cli import run_main
from gfml.report import compare

ROOT = Path(__file__).resolve().parents[2]
NAMES = vars(compare)
USERS = 80
RNG = np.random.default_rng(0)
BASE = RNG.integers(0, 5, USERS) / 4


def store(path: Path, values: np.ndarray, *, name: str = "toy", part: str = "t", train: str = "f", protocol: str = "selected on validation",
          users: np.ndarray | None = None, lr: float = 0.1, metrics: tuple[str, ...] = ("ndcg@20",), done: bool = True) -> Path:  # fmt: skip
    """A finished run as programs leave it."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(f"dataset = {name!r}\nlr = {lr}\nout = 'somewhere'\n")
    data = {"name": name, "test_fingerprint": part, "fingerprint": train}
    result = {
        "data": data,
        "selection": {"epoch": 1, "protocol": protocol},
        "test": {metric: float(np.nansum(values)) for metric in metrics},
    }
    if done:
        (path / "result.json").write_text(json.dumps(result))
        (path / "done").write_text("")
    ids = np.arange(len(values)) if users is None else users
    np.savez(
        path / "analysis.npz", test_users=ids, **{f"per_user/{metric}": values.astype(np.float32) for metric in metrics}
    )
    return path


def compare(*words: object) -> int:
    return run_main(NAMES["main"], [str(word) for word in words])


def test_differences_intervals_and_corrected_tests(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = store(tmp_path / "toy-x-1", BASE)
    better = store(tmp_path / "toy-x-2", BASE + 0.25 * (np.arange(USERS) % 2), lr=0.2)
    noise = store(tmp_path / "toy-x-3", BASE[::-1].copy(), lr=0.3)
    assert compare(base, better, noise, "--out", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["toy-x (lr 0.2)", "toy-x (lr 0.3)"] and {
        row["against"] for row in rows
    } == {"toy-x (lr 0.1)"}
    first, second = rows
    # Half of the users gain a quarter.
    assert first["difference"] == pytest.approx(0.125) and first["low"] < 0.125 < first["high"] and first["low"] > 0.05
    assert (first["better"], first["same"], first["worse"], first["rank_biserial"]) == (40, 40, 0, 1.0)
    assert first["dz"] == pytest.approx(0.125 / np.std(0.25 * (np.arange(USERS) % 2), ddof=1))
    assert (
        first["p_holm"] == pytest.approx(2 * first["p_wilcoxon"])
        and second["p_holm"] == pytest.approx(second["p_wilcoxon"])
        and first["p_holm"] < 1e-6
    )
    with open(tmp_path / "out" / "comparison.csv", newline="") as stream:
        assert [float(row["difference"]) for row in csv.DictReader(stream)] == pytest.approx(
            [row["difference"] for row in rows]
        )
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert (
        "ndcg@20  toy-x (lr 0.2)  toy-x (lr 0.1)" in said and "+0.1250" in said and "corrected over all 2 tests" in said
    )


def test_every_pair_and_the_default_place(tmp_path: Path) -> None:
    runs = [
        store(tmp_path / f"toy-x-{n}", BASE * (n + 1) / 4, lr=n + 0.1, metrics=("ndcg@20", "recall@20", "hit@20"))
        for n in range(3)
    ]
    assert compare(*runs, "--all-pairs") == 0
    place = tmp_path / "comparison-toy-x-0-toy-x-1-toy-x-2"
    rows = json.loads((place / "comparison.json").read_text())["rows"]
    assert (
        len(rows) == 6
        and "ask different things" in (place / "report.html").read_text().replace("\n", " ")
        and {row["metric"] for row in rows} == {"ndcg@20", "recall@20"}
    )
    assert compare(*runs, "--metrics", "hit@20", "--out", tmp_path / "hit") == 0
    assert {row["metric"] for row in json.loads((tmp_path / "hit" / "comparison.json").read_text())["rows"]} == {
        "hit@20"
    }


def test_equal_runs_and_users_without_a_value(tmp_path: Path) -> None:
    some = BASE.copy()
    some[:10] = np.nan
    runs = [store(tmp_path / "toy-x-1", some), store(tmp_path / "toy-x-2", some, lr=0.2)]
    assert compare(*runs, "--out", tmp_path / "out") == 0
    [row] = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert (row["users"], row["difference"], row["p_holm"], row["dz"], row["same"]) == (
        USERS - 10,
        0.0,
        1.0,
        0.0,
        USERS - 10,
    )
    shifted = store(tmp_path / "toy-x-3", some + 0.5, lr=0.3)
    assert compare(runs[0], shifted, "--out", tmp_path / "out") == 0
    [row] = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert row["dz"] is None and row["p_wilcoxon"] < 1e-6


def test_runs_with_other_train_parts_or_selection_are_compared_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = [
        store(tmp_path / "toy-x-1", BASE),
        store(tmp_path / "toy-x-2", BASE, train="g", protocol="selected on test", lr=0.2),
    ]
    assert compare(*runs, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert (
        "did not all see the same train part" in said
        and "selected their epochs differently: selected on test; selected on validation" in said
    )


@pytest.mark.parametrize(
    ("other", "wanted"),
    [({"name": "else"}, "other data, toy and else"), ({"part": "u"}, "another split of toy"), ({"users": np.arange(USERS) + 1}, "other users judged, 80 and 80"),
     ({"metrics": ("hit@5",)}, "no metric per user in common"), ({"done": False}, "has no result"), ({"values": BASE * np.nan}, "fewer than two users")],
)  # fmt: skip
def test_runs_that_cannot_be_compared_say_why_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, other: dict, wanted: str
) -> None:
    first = store(tmp_path / "toy-x-1", BASE)
    second = store(tmp_path / "toy-x-2", other.pop("values", BASE), lr=0.2, **other)
    assert compare(first, second, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = store(tmp_path / "toy-x-1", BASE), store(tmp_path / "toy-x-2", BASE, lr=0.2)
    for words, wanted in (([first], "wanted two or more"), ([first, first], "twice"), ([first, tmp_path / "none"], "there is no run"),
                          ([first, second, "--metrics", "ndgc@20"], "did you mean 'ndcg@20'")):  # fmt: skip
        assert compare(*words) == 2 and wanted in capsys.readouterr().err


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    from gfml.report.stored import read_runs

    run = store(tmp_path / "toy-x-1", BASE)
    (run / "analysis.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="analysis.npz"):
        _ = read_runs([run])[0].arrays
