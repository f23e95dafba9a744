"""The page about many runs: what it reads, ranks, draws and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.program.cli import run_main
from gfml.report import collection

ROOT = Path(__file__).resolve().parents[2]
NAMES = vars(collection)


def store(
    out: Path,
    number: int,
    values: list[float],
    *,
    done: bool = True,
    split: str = "val",
    family: str = "toy",
    **flags: object,
) -> Path:
    """A run with one evaluation an epoch."""
    path = out / f"{family}-x-{number:08d}"
    path.mkdir(parents=True)
    flags = {"kind": "a", **flags}
    (path / "config.toml").write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in flags.items()) + "out = 'there'\ndata-root = 'D'\n"
    )
    rows = [
        {"epoch": epoch, "train/loss": 1 / epoch, f"{split}/score": value}
        for epoch, value in enumerate(values, start=1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        selection = {"epoch": 1, "metric": "score", "split": split, "protocol": f"selected on {split}"}
        test = {"recall@20": values[0] / 2, "head_train_share": 0.5}
        (path / "result.json").write_text(json.dumps({"selection": selection, "test": test, "seconds": {"train": 3.0}}))
        (path / "done").write_text("")
    return path


def store_sweep(root: Path, mode: str = "max") -> Path:
    """Eight trials whose value is that of lr alone: six done, one stopped early, one never launched."""
    out, trials = root / "runs", []
    for number, lr in enumerate((0.001, 0.004, 0.02, 0.05, 0.1, 0.5, 0.9), start=1):
        path = store(out, number, [lr / 2, lr, lr * 0.9], lr=lr, kind="ab"[number % 2], done=number != 7)
        trials.append(
            {"trial": number, "run": f"toy-*-{path.name[-8:]}", "state": "stopped" if number == 7 else "done"}
        )
    trials.append({"trial": 8, "run": "toy-*-none", "state": "waiting"})
    folder = out / "sweeps" / "toy-1"
    folder.mkdir(parents=True)
    (folder / "trials.json").write_text(
        json.dumps({"metric": "val/score", "mode": mode, "search": "random", "trials": trials})
    )
    return folder


def test_a_sweep_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "TREES", 10)
    folder = store_sweep(tmp_path)
    assert run_main(NAMES["main"], [str(folder)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == folder / "report" / "report.html"
    html, text = page.read_text(), (folder / "report" / "report.md").read_text()
    assert html.count("data:image/png;base64,") == 3 and "http" not in html.replace("http-equiv", "")
    assert "8 runs: 6 done, 1 stopped early, 1 not launched." in text
    # The best finished one, although the one that was stopped early had reached more.
    assert "Best: trial 6 with 0.5000" in text
    *rows, best = [line for line in text.splitlines() if line.startswith("| trial")]
    assert [row.split("|")[1].strip() for row in rows] == [f"trial {n}" for n in (6, 5, 4, 3, 2, 1, 7)]
    assert "**0.5000**" in rows[0] and "stopped early" in rows[-1] and "| 2 |" in rows[0]
    # Test figures of the best alone, shares of the data not among them.
    assert best == "| trial 6 | 0.1250 |" and text.count("recall@20") == 1 and "head_train" not in text
    # Of the best run as much is told as on its own page.
    assert "**selected:** epoch 1 of ? trained" in text and "**protocol:** selected on val" in text
    best = (folder / "report" / "best.toml").read_text()
    assert "lr = 0.5" in best and "out =" not in best and "data-root" not in best
    assert "Importance" in text and "scikit-learn" in text and "R² on unseen runs" in text


def test_importance_finds_the_flag_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "TREES", 20)
    rng = np.random.default_rng(0)
    paths = [store(tmp_path, n, [float(lr) ** 0.5], lr=float(lr), noise=float(rng.random()), kind="abc"[n % 3])
             for n, lr in enumerate(rng.random(24), start=1)]  # fmt: skip
    found = NAMES["collect"](paths, None, None)
    result = NAMES["importance_of"](found)
    means = dict(zip(result.names, result.means, strict=True))
    assert result.r_squared > 0.5 and means["lr"] > 0.5 and all(abs(means[name]) < 0.1 for name in ("noise", "kind"))


def test_less_can_be_better(tmp_path: Path) -> None:
    found = NAMES["collect"]([store_sweep(tmp_path, mode="min")], None, None)
    assert found.best.label == "trial 1" and found.best.value == 0.0005 and found.best.epoch == 1


def test_single_runs_and_a_warning_about_selection_on_test(tmp_path: Path) -> None:
    runs = [store(tmp_path, n, [0.1 * n], lr=0.1 * n, split="test") for n in (1, 2)]
    assert run_main(NAMES["main"], [*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert [trial.run.path for trial in NAMES["collect"]([tmp_path], None, None).trials] == runs
    assert "ranked on the reported test part itself" in text and "Too little to tell: 2 runs" in text
    assert "toy-x (lr 0.2)" in text


def test_a_run_alone_and_one_that_is_not_done(tmp_path: Path) -> None:
    run = store(tmp_path, 1, [0.1, 0.3], done=False)
    assert run_main(NAMES["main"], [str(run), "--metric", "val/score", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No run is done yet" in text and "incomplete" in text and not (tmp_path / "out" / "best.toml").exists()


def test_axes() -> None:
    log = NAMES["scale_of"]([0.001, 0.01, 0.1])
    assert log.places == pytest.approx([0, 0.5, 1]) and [text for _, text in log.ticks] == ["0.001", "0.01", "0.1"]
    plain = NAMES["scale_of"]([1, 2, 5])
    assert plain.places == pytest.approx([0, 0.25, 1]) and [text for _, text in plain.ticks] == ["1", "2", "5"]
    assert [text for _, text in NAMES["scale_of"]([1, 2, 5, 3, 4]).ticks] == ["1", "3", "5"]
    # A drawn setting is shown as it was drawn; what ranks is never bent.
    assert NAMES["scale_of"]([1, 2, 4], log=True).places == pytest.approx([0, 0.5, 1])
    assert not NAMES["scale_of"]([0.01, 1.0], log=False).log and NAMES["scale_of"]([0.01, 1.0]).log
    assert NAMES["scale_of"](["b", "a", "c"]).places == [0.5, 0, 1] and NAMES["scale_of"]([3, 3]).places == [0.5, 0.5]
    assert NAMES["scale_of"]([None, 0.5]).ticks == [(0.0, "0.5"), (1.0, "none")]


@pytest.mark.parametrize("case", ["other program", "no metric", "nothing launched", "sweep and run", "two metrics"])
def test_what_cannot_be_reported_is_said_in_one_line(tmp_path: Path, case: str) -> None:
    sweep, run = store_sweep(tmp_path), store(tmp_path, 50, [0.1])
    wanted = {"other program": "runs of other and toy", "no metric": "no run has logged val/none", "nothing launched": "no trial of",
              "sweep and run": "wanted one sweep", "two metrics": "give --metric"}[case]  # fmt: skip
    paths, metric = [run], None
    if case == "other program":
        paths = [run, store(tmp_path, 51, [0.1], family="other")]
    elif case == "no metric":
        metric = "val/none"
    elif case == "nothing launched":
        (sweep / "trials.json").write_text(
            json.dumps(
                {
                    "metric": "val/score",
                    "mode": "max",
                    "trials": [{"trial": 1, "run": "toy-*-none", "state": "waiting"}],
                }
            )
        )
        paths = [sweep]
    elif case == "sweep and run":
        paths = [sweep, run]
    else:
        paths = [run, store(tmp_path, 52, [0.1], split="test")]
    with pytest.raises(UserError, match=wanted):
        NAMES["collect"](paths, metric, None)
