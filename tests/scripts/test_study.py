"""Studies: an equal search, its best point over seeds, frontiers, and a page that the stored files make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.program.commands import read_command
from gfml.report import reproduce, study

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
folder = "paper"
title = "Toy"
seeds = [1, 2]
metrics = ["recall", "tail_recall"]
columns = ["recall@20"]
main = ["recall@20"]

[search]
metric = "val/ndcg@20"
trials = 3
seed = 5

[over]
set = ["synthetic"]

[[cell]]
label = "{set}, plain"
command = "recsys/main.py --dataset {set} --loss_mode bpr"
space = { lr = { choice = [0.1, 0.2, 0.3] } }

[[cell]]
label = "{set}, mass {mass}"
command = "recsys/main.py --dataset {set} --mass_mode {mass}"
space = { lr = { choice = [0.1, 0.2, 0.3] } }
over = { mass = ["none", "both"] }
against = ["{set}, plain", "{set}, mass none"]
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "toy.toml").write_text(STUDY)
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "toy.md").write_text("words\n<!-- study:toy -->\n<!-- end-study:toy -->\nmore\n")
    monkeypatch.setattr(reproduce, "configs", lambda: tmp_path)
    monkeypatch.setattr(reproduce, "TABLE_ROOT", tmp_path)
    return tmp_path


def finish(words: tuple[str, ...], value: float, gain: float) -> None:
    """The run of a command, as its program leaves it: ``value`` on validation, everybody's recall raised by ``gain``."""
    [run] = read_command(["python", *words], ROOT).runs
    path = run.out / f"{run.family}-toy-{run.digest}"
    path.mkdir(parents=True)
    (path / "config.toml").write_text("epochs = 10\n")
    recall = (np.arange(30) % 5 / 5 + gain * (np.arange(30) % 2)).astype(np.float32)
    result = {
        "data": {"name": "toy", "test_fingerprint": "t", "fingerprint": "f"},
        "selection": {"epoch": 4, "protocol": "selected on validation", "value": value},
        "test": {"recall@20": float(recall.mean()), "tail_recall@20": 0.1}, "seconds": {},
    }  # fmt: skip
    (path / "result.json").write_text(json.dumps(result))
    (path / "run.json").write_text(json.dumps({"sessions": [{"cpu_seconds": 2.0}, {"cpu_seconds": 3.0}]}))
    (path / "done").write_text("")
    np.savez(path / "analysis.npz", test_users=np.arange(30), **{"per_user/recall@20": recall})


def survey(toy: Path) -> list[reproduce.Known]:
    return reproduce.survey(reproduce.expand(reproduce.load_table("toy"), str(toy / "runs")), None)


def test_seeds_follow_the_best_trial_on_validation(toy: Path) -> None:
    """Every row has as many trials, at the same points; seeds wait for them all and the first seed's run is the trial itself."""
    known = survey(toy)
    trials = [one for one in known if one.cell.point]
    rows = ["synthetic, plain", "synthetic, mass none", "synthetic, mass both"]
    assert [one.cell.row for one in trials] == [row for row in rows for _ in range(3)]
    assert {one.cell.point for one in trials} == {("--lr", "0.1"), ("--lr", "0.2"), ("--lr", "0.3")}
    assert [one.state for one in known if not one.cell.point] == ["waits for its search"] * 6
    for one, value in zip(trials[:2], (0.3, 0.5), strict=True):
        finish(one.cell.words, value, 0.0)
    assert survey(toy)[3].state == "waits for its search"
    finish(trials[2].cell.words, 0.4, 0.0)
    first, second = (one for one in survey(toy) if one.cell.label == "synthetic, plain")
    assert first.cell.words[-2:] == second.cell.words[-2:] == trials[1].cell.point
    assert (first.state, second.state) == ("done", "not launched") and "-lr" not in str(second.path)


def test_a_page_says_what_ran_and_is_checked(toy: Path) -> None:
    """A partial study makes a page; finished rows have their search, costs and tests; a changed page is refused."""
    table = reproduce.load_table("toy")

    def collect() -> str:
        study.collect("toy", table, survey(toy), toy / "runs", None)
        return (toy / "paper" / "toy.md").read_text()

    assert "0 of 3 rows have run" in collect()
    for one in [one for one in survey(toy) if one.cell.point]:
        finish(one.cell.words, float(one.cell.point[1]), 0.2 * ("both" in one.cell.row))
    for one in [one for one in survey(toy) if one.state == "not launched" and "none" not in one.cell.label]:
        finish(one.cell.words, 0.5, 0.2 * ("both" in one.cell.label))
    text = collect()
    assert text.startswith("words\n") and text.endswith("more\n")
    assert "2 of 3 rows have run to their end" in text and "synthetic, mass none (1 of 2 seeds done)" in text
    assert "| mass both | 2 | 3 | 0.5000 ± 0.0000 | 15 | 5 | 4 | `--lr 0.3` |" in text
    assert "| synthetic, mass both | synthetic, plain | recall@20 | 2 | +0.1000" in text
    rows = {row["method"]: row for row in reproduce.stored_rows(toy / "paper", "toy")}
    assert rows["synthetic, plain"]["cpu_search"] == "15" and rows["synthetic, plain"]["at_cap"] == "0"
    study.write_page(toy / "paper", "toy", table, check=True)
    (toy / "paper" / "toy.md").write_text(text.replace("0.5000", "0.6000"))
    with pytest.raises(UserError, match="disagree"):
        study.write_page(toy / "paper", "toy", table, check=True)
    # Runs that are gone leave what they found.
    for path in (toy / "runs").glob("recsys-*"):
        path.rename(toy / path.name)
    assert "2 of 3 rows have run" in collect()
