"""Flags: both published spellings, what is ambiguous, and the resolved config as a config."""

from __future__ import annotations

import shlex

import pytest

from gfml.base.toml import toml_text
from mcl.main import PROGRAM

parse = PROGRAM.parse

SEED = "--gfml --dataset $DATA --gpu_id $GPU --lr $LR --lambd $LAM --lamb_p $lamP --lamb_n $lamN"


def refused(line, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(shlex.split(line))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_seed_command():
    line = SEED
    for name, value in {
        "$DATA": "demo",
        "$GPU": "0",
        "$LR": "1e-2",
        "$LAM": "0.01",
        "$lamP": "1.5",
        "$lamN": "0.9",
    }.items():
        line = line.replace(name, value)
    options = parse(line.split())
    assert (options.mode, options.lr, options.grav_lambda) == ("gfml", 1e-2, 0.01)
    assert (options.grav_weight_pos, options.grav_weight_neg) == (1.5, 0.9)
    assert (options.mcl_lambda_p, options.mcl_lambda_n) == (6.5, -0.5)


def test_published_defaults():
    options = parse([])
    wanted = {
        "mode": "mcl", "seed": 2020, "dropout": 0, "keep_prob": 0.8, "epochs": 1000, "lr": 1e-3, "batch_size": 1000,
        "embedding_dim": 64, "num_layers": 3, "combine": "sum", "num_neg": 10, "decay": 1e-4, "margin": 1.0, "alpha": 1.25,
        "beta": 5.0, "mcl_lambda_p": 6.5, "mcl_lambda_n": -0.5, "gfml_opt": 0, "grav_lambda": 1.0, "mix_ratio": 0.5,
        "grav_weight_pos": 1.0, "grav_weight_neg": 1.0, "ema": False, "ema_decay": 0.995, "topks": (5, 10, 20),
        "tensorboard": 0, "load": 0, "score": "distance",
    }  # fmt: skip
    assert {name: getattr(options, name) for name in wanted} == wanted


FORK = (
    "--split 0 --folds 100 --testbatch 100 --tensorboard 0 --load 0 --multicore 1 --pretrain 0 --seed 1 --dropout 1 "
    "--keep_prob 0.7 --epochs 9 --lr 0.01 --batch_size 50 --dim 8 --layer 2 --dataset demo --comb_method final --num_neg 4 "
    "--decay 1e-3 --margin 0.5 --alpha 1 --beta 4 --lambp 8 --lambn -1 --lamb_p 2 --lamb_n 0.9 --mix --gfml_opt 1 --lambd 5 "
    '--mix_ratio 0.7 --ema --ema_decay 0.99 --gpu_id 1 --topks "[5, 20]"'
)


def test_every_flag_of_the_fork(capsys):
    options = parse(shlex.split(FORK))
    wanted = {
        "mode": "mix", "seed": 1, "dropout": 1, "keep_prob": 0.7, "epochs": 9, "lr": 0.01, "batch_size": 50, "embedding_dim": 8,
        "num_layers": 2, "combine": "final", "num_neg": 4, "decay": 1e-3, "margin": 0.5, "alpha": 1.0, "beta": 4.0,
        "mcl_lambda_p": 8.0, "mcl_lambda_n": -1.0, "grav_weight_pos": 2.0, "grav_weight_neg": 0.9, "gfml_opt": 1,
        "grav_lambda": 5.0, "mix_ratio": 0.7, "ema": True, "ema_decay": 0.99, "gpu_id": 1, "topks": (5, 20), "split": None,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in wanted} == wanted
    notes = capsys.readouterr().err
    assert all(
        f"--{name} has no effect" in notes
        for name in ("adjacency-split", "folds", "testbatch", "multicore", "pretrain")
    )


def test_plain_names_mean_the_same():
    old = parse(
        shlex.split("--mix --lambp 8 --lambn -1 --lamb_p 2 --lamb_n 0.9 --lambd 5 --dim 8 --layer 2 --comb_method mean")
    )
    new = parse(
        shlex.split(
            "--mode mix --mcl-lambda-p 8 --mcl-lambda-n -1 --grav-weight-pos 2 --grav-weight-neg 0.9 "
            "--grav-lambda 5 --embedding-dim 8 --num-layers 2 --combine mean"
        )
    )
    assert old.resolved == new.resolved


def test_two_meanings(capsys):
    original = parse("--spelling original --lamb_p 8 --lamb_n -1".split())
    assert (original.mcl_lambda_p, original.mcl_lambda_n, original.grav_weight_pos) == (8.0, -1.0, 1.0)
    fork = parse("--spelling fork --lamb_p 8".split())
    assert (fork.mcl_lambda_p, fork.grav_weight_pos) == (6.5, 8.0)
    message = refused("--lamb_p 8 --lamb_n -1", capsys)
    assert "--mcl-lambda-p" in message and "--grav-weight-pos" in message and "--spelling" in message
    assert "mean the same" in refused("--gfml --lamb_n 1 --grav-weight-neg 2", capsys)


@pytest.mark.parametrize("split", ["--split 0", "--split 1", "--split=0"])
def test_the_original_split_flag_is_another_one(split, capsys):
    assert parse(shlex.split(split)).split is None
    assert "adjacency is never split" in capsys.readouterr().err
    assert parse("--split per-user".split()).split == "per-user"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--score gravity", "--mode gfml or mix"),
        ("--ema", "--ema-scope all"),
        ("--gfml --mode mix", "one of them"),
        ("--select-metric recal@20", "recall"),
        ("--select-metric ndcg", "cut-off"),
        ("--select-on test --refit", "--refit"),
        ("--mirror two_step --clip-grad 1", "--mirror-clip"),
        ("--baselines none ease", "beside"),
        ("--lamda 1", "unknown flag --lamda"),
        ("--gfm", "unknown flag --gfm"),
        ("--mix_ratio 1.5", "<= 1"),
    ],
)
def test_mistakes_are_answered_in_one_line(line, wanted, capsys):
    message = refused(line, capsys)
    assert wanted in message and message.count("\n") == 1


def test_gfml_wins_over_mix(capsys):
    assert parse("--mix --gfml".split()).mode == "gfml"
    assert "as in the fork" in capsys.readouterr().err


def test_the_papers_names_of_data(capsys):
    assert parse("--dataset amazon-book".split()).dataset == "amazon-book-mcl"
    assert parse("--dataset yelp".split()).dataset == "yelp-mcl"
    assert "the data of the MCL paper" in capsys.readouterr().err


def test_selection_on_test_keeps_all_train_pairs():
    assert parse("--select-on test".split()).val_ratio == 0
    assert parse("--es_on test --val_ratio 0.2".split()).val_ratio == 0.2


@pytest.mark.parametrize("line", ["", FORK, "--gfml --lamb_p 2", "--spelling original --lamb_p 8", "--patience none"])
def test_the_resolved_config_is_a_config(line, tmp_path):
    options = parse(shlex.split(line))
    file = tmp_path / "config.toml"
    file.write_text(toml_text(options.resolved), encoding="utf-8")
    assert parse(["--config", str(file)]).resolved == options.resolved
