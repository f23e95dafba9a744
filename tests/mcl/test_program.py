"""The program end to end on generated data: modes, files, continuing, protocols, failures, sweeps, and real anchors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gfml.base.checkpoints import load_state
from gfml.program.cli import run_main
from mcl.main import main

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--demo-users 120 --demo-items 60 --demo-interactions 2400 --dim 8 --batch_size 40 --num_neg 3 --epochs 4 --eval-every 2 "
    "--lr 0.02 --topks 5 10 --device cpu --no-progress"
).split()
MODES = {
    "mcl": [],
    "gfml": ["--gfml", "--lamb_p", "1.5", "--lamb_n", "0.9"],
    "mix": ["--mix", "--lambd", "2"],
    "pull only": ["--gfml", "--gfml_opt", "1"],
    "ema": ["--mix", "--ema"],
    "ema of trained masses": ["--mix", "--ema", "--ema-scope", "mass", "--score", "gravity"],
    "ema of all": ["--ema", "--ema-scope", "all"],
    "gravity score": ["--gfml", "--score", "gravity"],
    "tables": ["--encoder", "tables", "--mix"],
    "final layer": ["--comb_method", "final", "--layer", "2"],
    "mean, edges dropped": ["--comb_method", "mean", "--dropout", "1"],
    "published batches": ["--drop-last", "--duplicate-batches", "5"],
    "mirror": ["--mirror", "two_step"],
    "refit": ["--refit"],
    "softplus masses": ["--mix", "--mass-param", "softplus", "--mass-init", "default"],
}


def run(tmp_path, *words, baselines="none"):
    out = tmp_path / "runs"
    code = run_main(main, [*TINY, "--out", str(out), "--baselines", baselines, *map(str, words)])
    return code, sorted(path for path in out.glob("mcl-*") if "~" not in path.name)


def result_of(path):
    return json.loads((path / "result.json").read_text(encoding="utf-8"))


def rows_of(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]


@pytest.mark.parametrize("name", MODES)
def test_every_mode_trains_and_reports(name, tmp_path, capsys):
    code, (path,) = run(tmp_path, *MODES[name])
    assert code == 0 and (path / "done").exists()
    result, rows = result_of(path), rows_of(path)
    # Batches differ between epochs, so the last loss need not be the lowest.
    assert len(rows) == 4 and min(row["train/loss"] for row in rows[1:]) < rows[0]["train/loss"]
    assert 0 < result["test"]["recall@10"] < 1 and "val/sum" in rows[-1]
    assert result["selection"]["epoch"] in (2, 4) and result["selection"]["protocol"].startswith(
        "selected on validation"
    )
    has_masses = "mcl" not in result["model"].split()
    assert set(result.get("scores", ())) == ({"distance", "gravity"} if has_masses else set())
    if has_masses:
        assert result["test"] == result["scores"][result["score"]]
    assert str(path) in capsys.readouterr().out


def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch):
    """Two epochs and two more equal four, bit for bit, with trained masses and running averages."""
    words = ["--mix", "--ema", "--ema-scope", "all"]
    _, (whole,) = run(tmp_path / "whole", *words)
    _, (path,) = run(tmp_path / "parts", *words, "--epochs", "2")
    code, _ = run(tmp_path / "parts", *words, "--resume", path)
    assert code == 0
    one, other = (load_state(p / "last.pt") for p in (whole, path))
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert rows_of(whole) == rows_of(path)
    assert result_of(whole)["test"] == result_of(path)["test"]


def test_a_finished_run_is_shown_not_repeated(tmp_path, capsys):
    run(tmp_path)
    capsys.readouterr()
    code, paths = run(tmp_path)
    shown = capsys.readouterr().out
    assert code == 0 and len(paths) == 1 and "is done" in shown and "lightgcn mcl, by distance" in shown
    code, _ = run(tmp_path, "--eval-only")
    assert code == 0 and f"{result_of(paths[0])['test']['recall@10']:.4f}" in capsys.readouterr().out


def test_equal_seeds_and_other_masses_give_equal_lists(tmp_path):
    """Frozen, trained and averaged masses: the published ranking by distance is the same list for list."""
    lists = {}
    for name, words in {
        "trained": [],
        "frozen": ["--ema"],
        "other start": ["--mass-param", "softplus", "--mass-init", "default"],
    }.items():
        _, (path,) = run(tmp_path / name.replace(" ", "-"), "--gfml", "--lamb_p", "1.5", *words)
        with np.load(path / "analysis.npz", allow_pickle=False) as file:
            lists[name] = file["top"]
    assert (lists["trained"] == lists["frozen"]).all() and (lists["trained"] == lists["other start"]).all()


def test_selection_on_test_is_labelled(tmp_path, capsys):
    code, (path,) = run(tmp_path, "--select-on", "test")
    result = result_of(path)
    assert code == 0 and result["selection"]["protocol"] == "selected on test (optimistic, as in the original code)"
    assert "optimistic" in capsys.readouterr().err


def test_baselines_stand_beside_the_model(tmp_path, capsys):
    code, (path,) = run(tmp_path, baselines="popularity")
    assert code == 0 and "recall@10" in result_of(path)["baselines"]["popularity"]["test"]
    assert re.search(r"^popularity +0\.\d{4}", capsys.readouterr().out, flags=re.MULTILINE)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    code, (path,) = run(tmp_path, "--lr", "1e30")
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "epoch" in message and "lower --lr" in message
    assert (path / "failed").exists() and not (path / "done").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--topks", "61"], "at most the 60 items"),
        (["--val_ratio", "0", "--split", "per-user", "--split-ratios", "0.8", "0", "0.2"], "no validation part"),
        (["--batch_size", "5000", "--drop-last"], "fewer than one batch"),
        (["--load", "1"], "no checkpoint"),
    ],
)
def test_mistakes_against_the_data(words, wanted, tmp_path, capsys):
    code, _ = run(tmp_path, *words)
    assert code == 2 and wanted in capsys.readouterr().err


def test_help_from_another_directory(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "mcl" / "main.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--grav-lambda" in done.stdout


SWEEPS = {
    "gfml_music": (81, "--lr 1e-4 --lambd 5 --lamb_p 1.2 --lamb_n 0.9"),
    "gfml_grocery": (81, "--dataset amazon-grocery --lr 1e-6 --lambd 0.01 --lamb_p 1.0 --lamb_n 0.5"),
    "gfml_books": (25, "--dataset amazon-book --lr 1e-5 --lambd 3"),
    "gfml_yelp": (25, "--dataset yelp --lr 1e-3 --lambd 0.1 --multicore 0"),
    "mix_music": (25, "--lambp 6.5 --lambn -0.5 --lr 1e-2 --lambd 0.01 --lamb_p 1.7 --lamb_n 0.6 --mix_ratio 0.7"),
    "mix_grocery": (243, "--lambp 6.5 --lambn -0.5 --lr 1e-4 --lambd 5 --lamb_p 1.2 --lamb_n 1 --mix_ratio 0.3"),
    "mix_books": (243, "--dataset amazon-book --lambp 8 --lambn -1 --lr 1e-3 --lambd 1 --lamb_p 1 --lamb_n 0.5 --mix_ratio 0.5"),
    "mix_yelp": (243, "--dataset yelp --lambp 8 --lambn -1 --lr 1e-2 --lambd 5 --lamb_p 1.5 --lamb_n 0.9 --mix_ratio 0.7 --multicore 0"),
    "ema_music": (3, "--lr 1e-4 --lambd 1 --lamb_p 1.5 --lamb_n 1.0 --mix_ratio 0.5 --ema --ema_decay 0.999"),
}  # fmt: skip


def sweep(name, *words):
    script = ROOT / "scripts" / f"sweep_mcl_{name}.sh"
    return subprocess.run(["bash", str(script), *map(str, words)], capture_output=True, text=True, cwd=ROOT.parent)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_prints_its_grid(name, tmp_path):
    done = sweep(name, "--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    count, cell = SWEEPS[name]
    assert len(set(lines)) == count == len(lines) and last == f"# {count} not launched"
    assert sum(cell in line for line in lines) == 1 and all(f"--out {tmp_path}" in line for line in lines)
    assert not list(tmp_path.iterdir())


def drive(commands, *words):
    script = str(ROOT / "scripts" / "run_commands.py")
    text = "\n".join(commands)
    return subprocess.run(
        [sys.executable, script, *map(str, words)], input=text, capture_output=True, text=True, cwd=ROOT.parent
    )


def test_a_sweep_runs_skips_and_counts_failures(tmp_path):
    commands = [f"python mcl/main.py {' '.join(TINY)} --lr {lr}" for lr in ("0.02", "1e30")]
    words = ["--epochs", "2", "--baselines", "none", "--out", tmp_path]
    first = drive(commands, *words)
    assert first.returncode == 1 and first.stdout.splitlines()[-1] == "1 ran, 1 FAILED", first.stderr
    states = drive(commands, "--dry-run", *words).stdout.splitlines()
    assert states[0].startswith("python mcl/main.py ") and states[0].endswith("  # [1/2] done")
    assert states[1].startswith("python mcl/main.py ") and "  # [2/2] failed" in states[1]
    again = drive(commands[:1], *words)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == "1 done"


@pytest.mark.parametrize(
    ("command", "wanted"),
    [("python mcl/main.py --lamda 1", "unknown flag --lamda"), ("python mcl/nothing.py", "wanted python FOLDER/main.py"),
     ("python mcl/main.py --run-name x", "drop --run-name")],
)  # fmt: skip
def test_a_sweep_with_a_mistake_starts_nothing(command, wanted, tmp_path):
    done = drive([f"python mcl/main.py --out {tmp_path}", command])
    assert done.returncode == 2 and wanted in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dataset", "sizes", "recall", "ndcg"),
    [
        ("amazon-digital-music", (5541, 3568, 41689, 5157, 2823), 0.0565, 0.0240),
        ("amazon-grocery", (14681, 8713, 96061, 11956, 7324), 0.0476, 0.0218),
    ],
)
def test_real_data_and_its_popularity_anchor(shared_data, dataset, sizes, recall, ndcg):
    from gfml.data.options import load_dataset
    from gfml.ranking import baselines
    from gfml.ranking.evaluation import evaluate

    data = load_dataset(dataset, data_root=shared_data, val_ratio=0, cache=False)
    judged = evaluate(baselines.popularity(data), data, "test", [20])
    assert (data.num_users, data.num_items, data.train.nnz, data.test.nnz, len(judged.users)) == sizes
    assert data.train.multiply(data.test).nnz == 0
    assert judged.means["recall@20"] == pytest.approx(recall, abs=1e-4)
    assert judged.means["ndcg@20"] == pytest.approx(ndcg, abs=1e-4)


@pytest.mark.slow
def test_mcl_on_digital_music_learns_as_fast_as_it_should(shared_data, tmp_path):
    words = ["--config", ROOT / "configs/mcl/amazon-music.toml", "--data-root", shared_data, "--out", tmp_path, "--epochs", 100,
             "--eval-every", 50, "--select-on", "test", "--baselines", "none", "--no-progress", "--device", "cpu"]  # fmt: skip
    assert run_main(main, list(map(str, words))) == 0
    (path,) = tmp_path.glob("mcl-*")
    rows = {row["epoch"]: row for row in rows_of(path)}
    assert rows[50]["test/recall@20"] > 0.27 and rows[100]["test/recall@20"] > 0.29
