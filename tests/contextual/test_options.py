"""Flags of both programs: every original name, defaults by pipeline and data set, rules, and light imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from contextual import main as pipeline_256
from contextual import train as pipeline_224


def parse(pipeline, argv):
    return {"256": pipeline_256, "224": pipeline_224}[pipeline].PROGRAM.parse(argv)


ORIGINAL_256 = (
    "--trainxform bigtrain --testxform bigtest --root DIR --lam 0.4 --gamma 0.1 --loss hybrid --embedding_size 512 --batch_size 128 --n_epochs 80 "
    "--test_freq 5 --lr 1e-5 --weight_decay 1e-4 --eps 0.05 --start_epoch 0 --checkpoint FILE --dataset CUB --neg_margins 0.6 --pos_margins 0.75 "
    "--reg_sim 0.25"
).split()
ORIGINAL_224 = (
    "--dataset cub --embedding-size 512 --train_embedding 2048 --batch-size 128 --epochs 80 --gpu-id 0 --workers 8 --loss Hybrid --optimizer adamw "
    "--bottleneck linear --lr 1e-4 --weight-decay 1e-4 --lr-decay-step 5 --lr-decay-gamma 0.5 --gem 1 --projector_lr_multi 2.0 "
    "--embedding_lr_multi 1.0 --data_root DIR --gamma 0.1 --lam 0.5 --pos_margin 0.75 --neg_margin 0.6 --regsim 0.3 --seed 0 --alpha 32 --mrg 0.1 "
    "--IPC 4 --warm 0 --hierarchical 0 --bn-freeze 1 --testfreq 10 --eps 0.05 --xform_scale 0.08"
).split()


def test_every_original_flag_is_accepted() -> None:
    options = parse("256", [*ORIGINAL_256])
    assert (options.epochs, options.eval_every, options.pos_margin, options.neg_margin, options.reg_sim) == (
        80,
        5,
        0.75,
        0.6,
        0.25,
    )
    assert parse("256", ["--dataset", "Cars", "--loss", "proxynca", "--loss_lr", "1e-3"]).loss_lr == 1e-3
    options = parse("224", ORIGINAL_224)
    assert (options.pooling, options.batch_norm, options.eval_every, options.reg_sim, options.ipc, options.seed) == (
        "gem",
        "frozen",
        10,
        0.3,
        4,
        0,
    )


@pytest.mark.parametrize(
    "loss",
    [
        "hybrid",
        "roadmap",
        "triplet",
        "multisimilarity",
        "smoothap",
        "fastap",
        "contrastive",
        "ntxent",
        "proxynca",
        "normsoftmax",
    ],
)
def test_losses_of_the_256_pipeline_by_name(loss: str) -> None:
    parse("256", ["--loss", loss])


@pytest.mark.parametrize(
    "loss",
    [
        "Hybrid",
        "Contrastive",
        "Roadmap",
        "Triplet",
        "MS",
        "MS+miner",
        "Proxy_Anchor",
        "Proxy_NCA",
        "NormalizedSoftmax",
        "CosFace",
    ],
)
def test_losses_of_the_224_pipeline_by_name(loss: str) -> None:
    parse("224", ["--loss", loss])


def test_the_published_networks_and_batches() -> None:
    cub, sop, inat = (parse("256", ["--dataset", name]) for name in ("CUB", "SOP", "iNat"))
    assert (cub.pooling, cub.layer_norm, cub.batch_norm, cub.image_size, cub.ks) == (
        "max",
        1,
        "stats",
        256,
        (1, 2, 4, 8),
    )
    assert (sop.pooling, sop.layer_norm, sop.hierarchical, sop.ks) == ("avg", 0, 1, (1, 10, 100))
    assert (inat.image_size, inat.batch_size, inat.hierarchical) == (224, 256, 1)
    cars = parse("224", ["--dataset", "cars"])
    assert (cars.pooling, cars.batch_norm, cars.bottleneck, cars.regularise, cars.k, cars.full_map) == (
        "gem",
        "frozen",
        "linear",
        "additive",
        4,
        1,
    )
    assert parse("224", ["--dataset", "cars", "--IPC", "8"]).k == 8
    assert parse("256", ["--dataset", "CUB", "--pretrained", "0"]).batch_norm == "train"


def test_small_data_start_from_scratch() -> None:
    options = parse("224", [])
    assert (options.dataset, options.backbone, options.pretrained, options.batch_norm) == (
        "digits",
        "small",
        0,
        "train",
    )


def test_the_resolved_settings_are_settings(tmp_path: Path) -> None:
    from gfml.base.toml import toml_text

    for pipeline, argv in (
        ("256", ["--dataset", "SOP", "--root", "X"]),
        ("224", ["--dataset", "cub", "--bn-freeze", "1", "--loss", "Proxy_Anchor"]),
    ):
        first = parse(pipeline, argv)
        (tmp_path / "c.toml").write_text(toml_text(first.resolved))
        again = parse(pipeline, ["--config", str(tmp_path / "c.toml")])
        assert again.resolved == first.resolved


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-size", "30", "--IPC", "4"], "wanted a batch of whole classes"),
        (["--dataset", "SOP", "--batch-size", "12"], "wanted two halves of whole classes each"),
        (["--hierarchical", "1"], "which has no super-classes"),
        (["--dataset", "CUBS"], "unknown data set 'CUBS'.*did you mean 'cub'"),
        (["--loss", "hybird"], "unknown value 'hybird'.*did you mean 'hybrid'"),
        (["--lam", "1.5"], "wanted a number >= 0 and <= 1"),
        (["--lam", "0.95"], "wanted lam . gamma <= 1"),
        (["--k", "1"], "wanted a whole number >= 2"),
        (["--k", "64"], "wanted a batch of at least k pictures"),
        (["--gem", "1", "--pooling", "avg"], "contradict each other"),
        (["--bn-freeze", "1", "--batch-norm", "stats"], "contradict each other"),
        (["--select-metric", "recal@1"], "wanted recall@K, map@r or r_precision"),
        (["--select-on", "test", "--refit"], "--refit needs selection on validation"),
        (["--split-lists", "a", "b"], "wanted it with inat only"),
        (["--loss", "ms", "--ablation", "sigmoid"], "ablations are of hybrid and contextual"),
        (["--loss-lr", "0.1"], "has no parameters of its own"),
        (["--batchsize", "8"], "unknown flag --batchsize; did you mean '--batch-size'"),
        (["--pretrained", "2"], "choose one of 0, 1"),
    ],
)
def test_a_wrong_flag_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("256", argv)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1
    import re

    assert re.search(words, text), text


@pytest.mark.parametrize("pipeline", ["256", "224"])
def test_every_flag_has_help(pipeline: str) -> None:
    assert all(action.help for action in {"256": pipeline_256, "224": pipeline_224}[pipeline].PROGRAM.parser()._actions)


def test_flags_import_nothing_heavy() -> None:
    code = "import sys, contextual.main, contextual.train; print(*sorted(sys.modules.keys() & {'torch', 'torchvision', 'timm', 'pandas', 'scipy', 'sklearn', 'matplotlib'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
