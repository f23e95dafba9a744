"""The recommender program from its command line: the whole grid, bad inputs, stopping and going on."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import recsys.experiment as experiment
from gfml.base.checkpoints import load_state
from gfml.base.runs import read_config, read_metrics, read_result, run_state
from gfml.program.cli import run_main
from recsys.experiment import Recsys
from recsys.main import PROGRAM, main
from recsys.settings import DEMO_DEFAULTS, LOSSES, MODELS, SEARCHED

ROOT = Path(__file__).resolve().parents[2]
DISTS, MASSES = ("l1", "l2", "kl", "emd"), ("user", "item", "both", "none")
GRAVITY_LOSSES = ("gravity", "mix", "bpr_gra", "mix_bpr")
PLAIN_CELLS = [(model, loss, "l2", "both") for model in MODELS for loss in LOSSES if loss not in GRAVITY_LOSSES]
GRAVITY_CELLS = [(m, loss, d, mass) for m in MODELS for loss in GRAVITY_LOSSES for d in DISTS for mass in MASSES]
parse, build_parser = PROGRAM.parse, PROGRAM.parser
CELLS = PLAIN_CELLS + GRAVITY_CELLS
RUN_FILES = {
    "config.toml",
    "run.json",
    "metrics.jsonl",
    "last.pt",
    "best.pt",
    "final.pt",
    "result.txt",
    "result.json",
    "analysis.npz",
    "done",
}
# Every flag of the published recommender with its default.
PUBLISHED = {
    "bpr_batch": 2048, "recdim": 64, "layer": 3, "lr": 0.001, "decay": 1e-4, "dropout": 0, "keepprob": 0.6, "a_fold": 100,
    "testbatch": 100, "path": "./checkpoints", "topks": (10, 20), "tensorboard": 0, "comment": "lgn", "load": 0,
    "epochs": 1000, "multicore": 0, "pretrain": 0, "seed": 2020, "model": "mf", "lamb": 1.0, "mix_ratio": 0.5,
    "loss_mode": "gravity", "dist_mode": "l2", "mass_mode": "both", "exp_name": "Apple", "ema_on": 1, "lam_d": 0.995,
    "emb_norm": 1, "weight_decay": 1e-2, "lr_decay": 1e-2, "gpu_id": 0, "ES": 1, "infer_mode": "mat", "features": None,
    "margin": 1.9, "master_learning_rate": 0.1, "clip_norm": 1.0, "hidden_layer_dim": 64, "dropout_rate": 0.2,
    "feature_l2_reg": 0.1, "feature_projection_scaling_factor": 0.5, "use_rank_weight": False, "use_cov_loss": False,
    "cov_loss_weight": 1.0,
}  # fmt: skip


def action_of(parser, name):
    return parser._option_string_actions[parser._known_spelling(f"--{name}")]


def timeless(run):
    """The rows of a run's metrics without what the clock says."""
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in read_metrics(run)]


def losses(run):
    return [row["train/loss"] for row in read_metrics(run) if "train/loss" in row]


def same_state(first, second):
    """Whether two stored states are equal, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    return first == second


def trained(run):
    return load_state(run / "final.pt")["model"]


# -- the grid


@pytest.mark.parametrize(("model", "loss", "dist", "mass"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_every_cell_runs(train, tmp_path, model, loss, dist, mass):
    run = train(tmp_path, "cell", "--model", model, "--loss_mode", loss, "--dist_mode", dist, "--mass_mode", mass)
    assert {entry.name for entry in run.iterdir()} >= RUN_FILES
    assert len(losses(run)) == 2 and all(math.isfinite(value) for row in read_metrics(run) for value in row.values())
    assert 0 <= read_result(run)["test"]["recall@10"] <= 1
    named = {name.removeprefix("gravity.mass.") for name in trained(run) if name.startswith("gravity.mass.")}
    assert named == {"user", "item"} & {"both": {"user", "item"}, "none": set()}.get(mass, {mass})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_falls(train, tmp_path, model, loss):
    run = train(
        tmp_path,
        "longer",
        "--model",
        model,
        "--loss_mode",
        loss,
        "--epochs",
        "20",
        "--lr",
        "3e-2",
        "--eval-every",
        "20",
    )
    found = losses(run)
    assert len(found) == 20 and all(map(math.isfinite, found))
    assert np.mean(found[-3:]) < 0.98 * found[0]


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "cml"])
def test_the_published_formulas_run(train, tmp_path, loss):
    run = train(tmp_path, "compat", "--compat", "1", "--loss_mode", loss, "--weight_decay", "1e-5")
    config = tomllib.loads((run / "config.toml").read_text())
    assert (config["mass-combine"], config["mass-param"], config["infer-mode"]) == ("product", "relu", "original")
    assert len(losses(run)) == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--mirror two_step", "--mirror fused --mirror-clip 1.0", "--mirror precond", "--clip-grad 0.5", "--sampler interaction",
        "--sampler per_user", "--num-neg 4", "--learn-lamb", "--lr-schedule cosine", "--lr-schedule step", "--ema-scope all",
        "--ema_on 0 --lr_decay 0", "--model lgn --dropout 1 --undirected-dropout", "--model lgn --combine sum --num-layers 1",
        "--model cml --loss_mode cml --use_rank_weight --use_cov_loss", "--infer_mode dot", "--mass-scale 0.5", "--amp",
        "--loss_mode mix --mass_combine product --mass_param exp", "--dist_mode emd --emd-input softmax",
        "--dist_mode kl --kl-kind softmax --lamb 2", "--split global --split-ratios 0.7 0.1 0.2", "--epochs 0",
        "--mass_init xavier --mass_adamw 1 --emb_norm 0", "--model cml --mirror two_step --mirror-every 2",
    ],
)  # fmt: skip
def test_further_flags_run(train, tmp_path, flags):
    run = train(tmp_path, "further", *flags.split())
    assert math.isfinite(read_result(run)["test"]["ndcg@10"])


@pytest.mark.parametrize("flags", ("--loss_mode mix --dist_mode emd", "--model cml --loss_mode bpr_gra --mirror fused"))
def test_gradients_by_formula_train_as_those_of_autograd(train, fail, tmp_path, capsys, flags):
    found, wanted = (train(tmp_path, kernel, "--kernel", kernel, *flags.split()) for kernel in ("auto", "autograd"))
    shown = capsys.readouterr().err
    assert "gradients by formula" in shown and "gradients by autograd: --kernel autograd" in shown
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    train(tmp_path, "graph", "--model", "lgn", *flags.split()[2:])
    assert "gradients by autograd: vectors come from a graph" in capsys.readouterr().err
    words = (
        "--dataset synthetic --demo-users 60 --demo-items 40 --demo-interactions 600 --model lgn --kernel fused --out"
    )
    line = fail(main, *words.split(), str(tmp_path))
    assert "vectors come from a graph" in line and "--kernel auto" in line


def test_tables_start_from_an_earlier_run(train, tmp_path):
    first = train(tmp_path, "first")
    second = train(tmp_path, "second", "--pretrain", "1", "--pretrain-file", str(first), "--epochs", "0")
    assert torch.equal(trained(first)["encoder.nodes"], trained(second)["encoder.nodes"])


def test_item_features_are_regularised(train, tmp_path):
    np.save(tmp_path / "features.npy", np.random.default_rng(0).random((40, 5), dtype=np.float32))
    run = train(
        tmp_path, "features", "--model", "cml", "--loss_mode", "cml", "--features", str(tmp_path / "features.npy")
    )
    assert all(row["train/features"] > 0 for row in read_metrics(run))


# -- flags


def test_published_flags_have_their_defaults():
    options, parser = vars(parse(["--dataset", "ml1m", "--lr", "0.001"])), build_parser()
    for name, default in PUBLISHED.items():
        assert options[action_of(parser, name).dest] == default, name


def test_without_lr_decay_and_lamb_a_searched_point_is_taken() -> None:
    def point(*words: str) -> dict[str, float]:
        options = parse(["--dataset", "ml1m", *words])
        return {name: getattr(options, name) for name in ("optimizer", "lr", "lamb", "decay")}

    published = {"optimizer": "adamw", "lr": 1e-3, "lamb": 1.0, "decay": 1e-4}
    assert point() == published | SEARCHED["gravity"]
    assert point("--loss_mode", "bpr") == published | SEARCHED["bpr"]
    for name, value in (("lr", 0.5), ("lamb", 2.0), ("decay", 0.5), ("optimizer", "adagrad")):
        assert point(f"--{name}", str(value)) == published | {name: value}
    for words in (
        ("--model", "lgn"),
        ("--loss_mode", "mix"),
        ("--dist_mode", "l1"),
        ("--compat", "1"),
        ("--model", "ials"),
    ):
        assert point(*words) == published


def test_a_searched_point_is_said_and_stored(train, tmp_path, capsys):
    run = train(tmp_path, "run")
    assert "--optimizer lazy_adamw --lr 0.0025 --lamb 4.0 --decay 0.0003: as chosen in" in capsys.readouterr().err
    stored = read_config(run)
    assert {name: stored[name] for name in SEARCHED["gravity"]} == SEARCHED["gravity"]
    train(tmp_path, "other", "--lr", "1e-3")
    assert "as chosen in" not in capsys.readouterr().err


def test_the_bare_program_has_settings_of_its_own():
    """Those of the embedded data; a flag that is given wins, and other data has the published defaults."""
    bare, given = vars(parse([])), vars(parse(["--lr", "0.25", "--epochs", "3"]))
    assert bare["dataset"] == "demo"
    for name, value in DEMO_DEFAULTS.items():
        assert bare[name] == value
        assert given[name] == {"lr": 0.25, "epochs": 3}.get(name, value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flags_are_accepted(name):
    parser = build_parser()
    action = action_of(parser, name)
    switch = action.nargs == 0
    options = parse([f"--{name}"] if switch else [f"--{name}", str(PUBLISHED[name]).strip("()")])
    assert getattr(options, action.dest) == (True if switch else PUBLISHED[name])
    assert action.dest in options.explicit


def test_flags_without_effect_say_so(capsys):
    parse(["--a_fold", "50"])
    assert "--a-fold has no effect" in capsys.readouterr().err
    parse(["--lr", "0.1"])
    assert capsys.readouterr().err == ""


def test_help_is_quick_and_light_from_anywhere(run_script, tmp_path):
    started = time.perf_counter()
    shown = run_script("recsys/main.py", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--loss-mode" in shown.stdout
    assert time.perf_counter() - started < 5
    code = (
        "import runpy, sys\nsys.argv = ['main.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'recsys' / 'main.py')!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path).returncode == 0


def test_the_program_runs_from_another_directory(run_script, tmp_path):
    flags = "--dataset synthetic --demo-users 60 --demo-items 40 --demo-interactions 900 --epochs 1 --baselines none --report 0"
    done = run_script("recsys/main.py", *flags.split(), "--topks", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recall@5" in done.stdout and len(list((tmp_path / "runs").glob("recsys-synthetic-mf-gravity-*/done"))) == 1


# -- bad inputs: exit code 2 and one line that names what was found and what to do


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "gowala"], ["unknown data set 'gowala'", "did you mean 'gowalla'"]),
        (["--dataset", "no/such.csv"], ["no file or folder no/such.csv"]),
        (["--dataset", "lastfm", "--no-download", "--data-root", "no/such/place"], ["lastfm", "no/such/place"]),
        (["--loss-modes", "bpr"], ["unknown flag --loss-modes", "did you mean '--loss-mode'"]),
        (["--loss_mode", "gravty"], ["unknown value 'gravty'", "gravity", "did you mean 'gravity'"]),
        (["--dist_mode", "l3"], ["--dist-mode", "l1, l2, kl, emd"]),
        (["--model", "gcn"], ["--model", "mf, lgn, cml"]),
        (["--mass_mode", "items"], ["did you mean 'item'"]),
        (["--topks", "5", "50"], ["list length of 50", "40 items", "--topks"]),
        (["--es_metric", "ndcg@41"], ["list length of 41", "40 items"]),
        (["--es_metric", "ndgc@20"], ["--select-metric 'ndgc@20'", "ndcg"]),
        (["--topks", "ten"], ["--topks", "ten"]),
        (["--lamb", "0"], ["--lamb", "'0'", "> 0"]),
        (["--lamb", "-1.5"], ["--lamb", "'-1.5'", "> 0"]),
        (["--lamb", "nan"], ["--lamb", "'nan'"]),
        (["--mix_ratio", "1.5"], ["--mix-ratio", "<= 1"]),
        (["--batch-size", "0"], ["0", ">= 1"]),
        (["--lr", "1e30"], ["the loss is", "epoch", "gravity", "lower --lr"]),
        (["--loss_mode", "bpr", "--lr", "1e30"], ["the loss is", "epoch", "dot", "lower --lr"]),
        (["--demo-users", "0"], ["num_users >= 1"]),
        (["--load", "1"], ["--load 1 found no checkpoint"]),
        (["--eval-only"], ["there is no run"]),
        (["--val_ratio", "0"], ["no validation part", "--val-ratio"]),
        (["--val_ratio", "1"], ["validation ratio of 1"]),
        (["--pretrain", "1"], ["--pretrain-file"]),
        (["--pretrain-file", "no/such.npz"], ["without --pretrain 1"]),
        (["--pretrain", "1", "--pretrain-file", "no/such.npz"], ["no/such.npz"]),
        (["--model", "cml", "--loss_mode", "cml", "--features", "no/such.npy"], ["no/such.npy"]),
        (["--features", "some.npy"], ["--loss_mode cml"]),
        (["--compat", "1", "--dist_mode", "kl"], ["--infer_mode"]),
        (["--es_on", "test", "--refit"], ["--refit"]),
        (["--mirror", "fused", "--clip-grad", "1"], ["--mirror-clip"]),
        (["--device", "cuda:99"], ["CUDA"]),
        (["--baselines", "none", "ease"], ["none"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_flags(fail, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    tiny = ["--dataset", "synthetic", "--demo-users", "60", "--demo-items", "40", "--demo-interactions", "900"]
    tiny = tiny if "--dataset" not in flags else []
    rest = [
        "--epochs",
        "2",
        "--embedding-dim",
        "8",
        "--topks",
        "5",
        "--es_metric",
        "ndcg@5",
        "--baselines",
        "none",
        "--no-progress",
    ]
    line = fail(main, *tiny, *rest, "--out", str(tmp_path / "runs"), *flags)
    for word in words:
        assert word in line, line


def test_a_foreign_start_file_leaves_no_run(fail, tmp_path):
    theirs = tmp_path / "last.pt"
    torch.save({"embedding_user.weight": torch.zeros(60, 8)}, theirs)
    line = fail(
        main, "--dataset", "demo", "--pretrain", "1", "--pretrain-file", str(theirs), "--out", str(tmp_path / "runs")
    )
    assert line.endswith("give another file") and [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_an_unknown_config_key(fail, tmp_path):
    (tmp_path / "typo.toml").write_text('loss_mod = "bpr"\n')
    line = fail(main, "--config", str(tmp_path / "typo.toml"))
    assert "typo.toml" in line and "'loss_mod'" in line and "did you mean 'loss-mode'" in line


def test_a_bad_choice_in_a_config(fail, tmp_path):
    (tmp_path / "bad.toml").write_text('loss_mode = "bpq"\n')
    line = fail(main, "--config", str(tmp_path / "bad.toml"))
    assert "bad.toml" in line and "did you mean 'bpr'" in line


@pytest.mark.parametrize(
    ("train_text", "test_text", "words"),
    [
        ("", "0 3\n", ["train.txt is empty"]),
        ("0 1 2\n1 4 3\n", "", ["test.txt is empty"]),
        ("0 1 2\n1 4 3\n", "0 2\n", ["no test interactions (1 test pairs also in train or valid, dropped)"]),
    ],
)
def test_bad_data_files(fail, tmp_path, train_text, test_text, words):
    (tmp_path / "train.txt").write_text(train_text)
    (tmp_path / "test.txt").write_text(test_text)
    line = fail(main, "--dataset", str(tmp_path), "--out", str(tmp_path / "runs"), "--no-cache", "--topks", "2", "--es_metric", "ndcg@2",
                "--es_on", "test")  # fmt: skip
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(("line", "name"), [("1 x 3", "x"), ("1 2.5 3", "2.5"), ("-1 4 3", "-1")])
def test_ids_of_an_adjacency_list_that_are_no_numbers_are_names(tmp_path, capsys, line, name):
    (tmp_path / "train.txt").write_text(f"0 1 2 5\n{line}\n")
    (tmp_path / "test.txt").write_text("0 3\n")
    flags = ["--no-cache", "--topks", "2", "--es_metric", "ndcg@2", "--es_on", "test", "--epochs", "1", "--report", "0"]
    assert run_main(main, ["--dataset", str(tmp_path), "--out", str(tmp_path / "runs"), *flags]) == 0
    assert f"names, not numbers, as {name!r} in line 2 is none" in capsys.readouterr().err


def test_doubtful_data_is_used_with_notes(train, tmp_path, capsys):
    """A user without items, a test pair that train has, and a repeated pair."""
    (tmp_path / "train.txt").write_text("0 1 2 3 4 5 6 6\n1\n2 1 2 3 7 8 9\n")
    (tmp_path / "test.txt").write_text("0 7 1\n1 3\n2 5\n")
    flags = [
        "--out",
        str(tmp_path),
        "--run-name",
        "run",
        "--baselines",
        "popularity",
        "--report",
        "0",
        "--no-cache",
        "--no-progress",
    ]
    assert (
        run_main(main, ["--dataset", str(tmp_path), "--epochs", "1", "--topks", "2", "--es_metric", "ndcg@2", *flags])
        == 0
    )
    notes = capsys.readouterr().err
    assert "users without train pairs: 1" in notes and "test pairs also in train or valid, dropped: 1" in notes
    assert read_result(tmp_path / "run")["cold_users"] == 1


def test_an_output_directory_that_cannot_be_written(fail, tmp_path):
    (tmp_path / "file").write_text("")
    line = fail(main, "--dataset", "synthetic", "--out", str(tmp_path / "file" / "runs"), "--baselines", "none")
    assert "cannot write" in line and "--out" in line


# -- stopping and going on


def stop_at_evaluation(monkeypatch, number):
    """Ctrl-C at the start of that evaluation."""
    judge, calls = Recsys.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return judge(*args)

    monkeypatch.setattr(Recsys, "evaluate", interrupted)


@pytest.mark.parametrize(
    "flags",
    [
        "--loss_mode gravity --learn-lamb --lr-schedule cosine --amp",
        "--model lgn --loss_mode mix_bpr --dropout 1 --ema-scope all",
        "--model cml --loss_mode cml --use_rank_weight --sampler interaction",
        "--loss_mode bpr_gra --mirror two_step --num-neg 3 --checkpoint-every 1",
        "--loss_mode gravity --refit --eval-every 2",
        "--loss_mode mix_bpr --optimizer lazy_adamw --mirror fused",
        "--loss_mode gravity --optimizer adagrad --kernel autograd",
    ],
)
def test_an_interrupted_run_continues_exactly(train, tmp_path, monkeypatch, capsys, flags):
    words = [*flags.split(), "--epochs", "6", "--lr", "1e-2"]
    words += [] if "--eval-every" in words else ["--eval-every", "1"]
    whole = train(tmp_path, "whole", *words)
    with monkeypatch.context() as patch:
        stop_at_evaluation(patch, 3)
        with pytest.raises(AssertionError):
            train(tmp_path, "parts", *words)
    assert "--resume" in capsys.readouterr().err and not (tmp_path / "parts" / "done").exists()
    assert 0 < len(read_metrics(tmp_path / "parts")) < 6
    parts = train(tmp_path, "parts", *words)
    assert timeless(whole) == timeless(parts)
    assert same_state(trained(whole), trained(parts))
    assert same_state(load_state(whole / "best.pt"), load_state(parts / "best.pt"))
    first, second = read_result(whole), read_result(parts)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_an_interrupted_refit_continues_exactly(train, tmp_path, monkeypatch):
    words = ["--refit", "--epochs", "4", "--lr", "2e-2", "--checkpoint-every", "1"]
    whole = train(tmp_path, "whole", *words)
    with monkeypatch.context() as patch:
        # The sampler is asked for epochs 1 .. 4 first; what follows is the refit.
        sample, calls = experiment.TripleSampler.epoch, []

        def interrupted(self, epoch):
            calls.append(epoch)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return sample(self, epoch)

        patch.setattr(experiment.TripleSampler, "epoch", interrupted)
        with pytest.raises(AssertionError):
            train(tmp_path, "parts", *words)
    parts = train(tmp_path, "parts", *words)
    assert same_state(trained(whole), trained(parts))
    assert read_result(whole)["test"] == read_result(parts)["test"]


def test_a_run_that_failed_continues_too(train, tmp_path, monkeypatch):
    whole = train(tmp_path, "whole", "--epochs", "4", "--checkpoint-every", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Recsys, "judge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, "parts", "--epochs", "4", "--checkpoint-every", "1")
    assert "ZeroDivisionError" in (tmp_path / "parts" / "failed").read_text()
    parts = train(tmp_path, "parts", "--epochs", "4", "--checkpoint-every", "1")
    assert not (parts / "failed").exists() and same_state(trained(whole), trained(parts))


def test_more_epochs_continue_a_finished_run(train, tmp_path):
    whole = train(tmp_path, "whole", "--epochs", "5")
    parts = train(tmp_path, "parts", "--epochs", "3")
    assert run_main(main, ["--resume", str(parts), "--epochs", "5"]) == 0
    assert timeless(whole) == timeless(parts)
    assert same_state(trained(whole), trained(parts))


def test_a_longer_run_with_refit_has_a_new_refit(train, tmp_path):
    """Whatever epoch each of them selects."""
    whole = train(tmp_path, "whole", "--epochs", "8", "--refit", "--lr", "2e-2")
    parts = train(tmp_path, "parts", "--epochs", "2", "--refit", "--lr", "2e-2")
    assert run_main(main, ["--resume", str(parts), "--epochs", "8"]) == 0
    assert same_state(trained(whole), trained(parts))


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"not a checkpoint"]
)
def test_a_corrupted_checkpoint(train, fail, tmp_path, monkeypatch, damage):
    with monkeypatch.context() as patch:
        stop_at_evaluation(patch, 3)
        with pytest.raises(AssertionError):
            train(tmp_path, "run", "--epochs", "5")
    checkpoint = tmp_path / "run" / "last.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    line = fail(main, "--resume", str(tmp_path / "run"))
    assert "last.pt" in line and "delete it and run the same command again" in line
    checkpoint.unlink()
    assert run_main(main, ["--resume", str(tmp_path / "run")]) == 0 and run_state(tmp_path / "run") == "done"


@pytest.mark.parametrize("name", ["best.pt", "final.pt"])
def test_advice_about_lost_weights_works(train, fail, tmp_path, name, monkeypatch):
    """Of a run at work (best.pt) and of one that is done: damaged, then deleted; both times the line says what helps."""
    if name == "best.pt":
        with monkeypatch.context() as patch:
            stop_at_evaluation(patch, 4)
            with pytest.raises(AssertionError):
                train(tmp_path, "run", "--epochs", "5", "--lr", "0.0001")
        words = ["--resume", str(tmp_path / "run")]
    else:
        train(tmp_path, "run")
        words = [
            "--config",
            str(tmp_path / "run" / "config.toml"),
            "--out",
            str(tmp_path),
            "--run-name",
            "run",
            "--eval-only",
        ]
    file = tmp_path / "run" / name
    if name == "best.pt":
        # Weights that are the best of an earlier epoch than the last, which alone cannot be made again.
        state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
        state["state"]["best"]["epoch"] -= 1
        torch.save(state, tmp_path / "run" / "last.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    first = fail(main, *words)
    file.unlink()
    lines = [first, fail(main, *words)]
    assert "checksum" in lines[0] and "missing" in lines[1] and all(name in line for line in lines)
    advice = [re.search("train anew with (.*), which keeps", line)[1] for line in lines]
    assert advice[0] == advice[1] and run_main(main, shlex.split(advice[0])) == 0
    assert run_state(tmp_path / "run") == "done" and (tmp_path / "run~1").exists()


def test_overwrite_keeps_the_earlier_run(train, tmp_path):
    first = train(tmp_path, "run")
    before = (first / "result.json").read_bytes()
    train(tmp_path, "run", "--overwrite")
    assert (tmp_path / "run~1" / "result.json").read_bytes() == before


def test_a_finished_run_is_shown_not_trained(train, tmp_path, monkeypatch, capsys):
    run = train(tmp_path, "run")
    first = capsys.readouterr().out
    monkeypatch.setattr(Recsys, "build", lambda *_: pytest.fail("a finished run was built again"))
    train(tmp_path, "run")
    shown = capsys.readouterr().out
    assert "is done" in shown and f"{read_result(run)['test']['recall@10']:.4f}" in first
    assert shown.splitlines()[1:] == first.splitlines()
    (run / "result.txt").unlink()  # a run from before that file came
    train(tmp_path, "run")
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("name", [["--run-name", "run"], []], ids=["named", "automatic"])
def test_a_finished_run_is_shown_without_torch(tmp_path, tiny, name):
    words = [*tiny, "--out", str(tmp_path), *name]
    assert run_main(main, words) == 0
    code = "import sys; from recsys.main import main; main(sys.argv[1:]); print('torch' in sys.modules, 'numpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert "is done" in shown.stdout and shown.stdout.splitlines()[-1] == "False False", shown.stderr


def test_a_finished_run_of_other_settings_is_refused(train, fail, tiny, tmp_path):
    run = train(tmp_path, "run")
    line = fail(main, *tiny, "--out", str(tmp_path), "--run-name", "run", "--lr", "0.5")
    assert "lr 0.0025 (now 0.5)" in line and (run / "done").exists(), line
    assert "only epochs and patience" in fail(main, "--resume", str(run), "--lr", "0.5")


def test_load_continues_an_earlier_run(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_evaluation(patch, 2)
        with pytest.raises(AssertionError):
            train(tmp_path, "run", "--epochs", "3")
    run = train(tmp_path, "run", "--epochs", "3", "--load", "1")
    assert len(losses(run)) == 3


def test_changed_data_is_noticed(train, fail, tmp_path, monkeypatch):
    def write(last):
        rows = np.random.default_rng(0).integers(0, 30, size=(400, 2))
        lines = [f"{user},{item}" for user, item in rows.tolist()]
        (tmp_path / "mine.csv").write_text("\n".join(["user,item", *lines, last]))

    flags = ["--dataset", str(tmp_path / "mine.csv"), "--no-cache", "--baselines", "none", "--report", "0", "--topks", "5",
             "--es_metric", "ndcg@5", "--out", str(tmp_path), "--run-name", "run", "--epochs", "4", "--eval-every", "1"]  # fmt: skip
    write("1,2")
    with monkeypatch.context() as patch:
        stop_at_evaluation(patch, 2)
        assert run_main(main, flags) == 130
    write("77,78")
    assert "data has changed" in fail(main, *flags)


# -- what is reported


def test_selection_on_test_is_labelled(train, tmp_path, capsys):
    run = train(tmp_path, "run", "--es_on", "test")
    shown, result = capsys.readouterr(), read_result(run)
    assert result["selection"]["split"] == "test" and "selected on test (optimistic" in result["selection"]["protocol"]
    assert "selected on test (optimistic" in shown.out and "TEST, the original protocol" in shown.err
    assert result["data"]["valid"] == 0 and "val" not in result
    assert any("test/ndcg@10" in row for row in read_metrics(run))


def test_selection_on_validation_never_reads_test(train, tmp_path, monkeypatch):
    seen, judge = [], Recsys.evaluate
    monkeypatch.setattr(Recsys, "evaluate", lambda self, m, split: seen.append(split) or judge(self, m, split))
    run = train(tmp_path, "run")
    assert seen == ["valid", "valid"]
    selection, rows = read_result(run)["selection"], read_metrics(run)
    assert selection["value"] == max(row["val/ndcg@10"] for row in rows) == read_result(run)["val"]["ndcg@10"]


@pytest.mark.parametrize(
    "flags", ["--loss_mode mix", "--model lgn --loss_mode gravity --ema-scope all", "--refit", "--es_on test"]
)
def test_eval_only_repeats_the_stored_numbers(train, tmp_path, monkeypatch, flags):
    words = [*flags.split(), "--epochs", "5", "--lr", "2e-2"]
    run = train(tmp_path, "run", *words)
    before = {file.name: file.stat().st_mtime_ns for file in run.iterdir()}
    shown = []
    monkeypatch.setattr(Recsys, "result_text", classmethod(lambda cls, result: shown.append(result) or ""))
    train(tmp_path, "run", *words, "--eval-only")
    stored = read_result(run)
    for key in ("test", "val", "selection", "mass", "mass_curve", "data"):
        assert shown[0].get(key) == stored.get(key), key
    assert {file.name: file.stat().st_mtime_ns for file in run.iterdir()} == before


def test_refit_trains_on_validation_too(train, tmp_path):
    plain, refit = train(tmp_path, "plain", "--epochs", "4"), train(tmp_path, "refit", "--epochs", "4", "--refit")
    first, second = read_result(plain), read_result(refit)
    assert second["selection"]["protocol"].endswith("trained anew on train and validation")
    assert second["selection"]["epoch"] == first["selection"]["epoch"]
    assert second["data"]["train"] == first["data"]["train"] + first["data"]["valid"]
    assert not same_state(trained(plain), trained(refit))
    assert len(losses(refit / f"refit-{second['selection']['epoch']}")) == second["selection"]["epoch"]


def test_the_same_seed_gives_the_same_run(train, tmp_path):
    first, second = train(tmp_path, "first", "--epochs", "4"), train(tmp_path, "second", "--epochs", "4")
    other = train(tmp_path, "other", "--epochs", "4", "--seed", "8")
    assert timeless(first) == timeless(second)
    assert read_result(first)["test"] == read_result(second)["test"]
    assert losses(first) != losses(other)


def test_more_epochs_leave_the_first_ones_alone(train, tmp_path):
    short, long = train(tmp_path, "short", "--epochs", "2"), train(tmp_path, "long", "--epochs", "5")
    assert timeless(short) == timeless(long)[:2]


def test_baselines_stand_in_the_result(train, tmp_path):
    run = train(tmp_path, "run", "--baselines", "popularity", "item-knn", "ease")
    found = read_result(run)["baselines"]
    assert list(found) == ["popularity", "item-knn", "ease"]
    for row in found.values():
        assert row["test"].keys() >= {"recall@10", "ndcg@5", "tail_recall@10", "gini@10"}
    assert json.loads((run / "result.json").read_text())["model"] == "mf gravity"


def test_other_conventions_stand_beside_and_can_be_compared(train, tmp_path, capsys):
    """Columns by name in the result, per user for paired tests, and the run's lists judged again from files."""
    from gfml.report import compare
    from gfml.report.judge import run_lists

    asked = ("--metrics-as", "elliot", "rectools", "cornac", "--map-denominator", "k")
    runs = [train(tmp_path, name, *asked, "--seed", str(seed)) for name, seed in (("a", 1), ("b", 2))]
    plain = train(tmp_path, "plain", "--seed", "1")
    first, usual = (json.loads((run / "result.json").read_text(encoding="utf-8")) for run in (runs[0], plain))
    k = max(first["topks"])
    assert first["test"][f"ndcg@{k}"] == usual["test"][f"ndcg@{k}"]
    assert first["test"][f"map@{k}"] <= usual["test"][f"map@{k}"]
    assert first["test"][f"rectools:ndcg@{k}"] <= first["test"][f"ndcg@{k}"]
    assert 0 <= first["test"]["cornac:map"] <= 1
    said = capsys.readouterr().out
    assert "metrics as elliot defines them" in said and "metrics of this project" in said
    assert (
        compare.main([*map(str, runs), "--metrics-as", "elliot", "--resamples", "100", "--out", str(tmp_path / "c")])
        == 0
    )
    assert f"elliot:ndcg@{k}" in capsys.readouterr().out
    # The plain run has the seed of the first: judged again, its figures are the first's.
    again = [str(runs[0]), str(plain), "--metrics-as", "elliot", "--resamples", "100", "--out", str(tmp_path / "d")]
    assert compare.main(again) == 0 and "judged again as elliot" in capsys.readouterr().out
    rows = json.loads((tmp_path / "d" / "comparison.json").read_text(encoding="utf-8"))["rows"]
    theirs = [row for row in rows if row["metric"].startswith("elliot:")]
    assert theirs and all(row["mean"] == pytest.approx(row["mean_against"], abs=1e-6) for row in theirs)
    table = run_lists(runs[0])
    with np.load(runs[0] / "analysis.npz") as stored:
        assert len(table) == (stored["top"] >= 0).sum()
