"""The program end to end: models, data, files, continuing, processes, the published command, reports, bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gfml.base.checkpoints import load_state
from gfml.program.cli import run_main
from gfml.report.compare import main as compare
from vision.main import main
from vision.report import main as report
from vision.settings import LONG_TAIL

ROOT = Path(__file__).resolve().parents[2]
SEED_COMMAND = (
    "--model-name vit_gra --max-epochs 200 --batch-size 128 --weight-decay 5e-5 --lr 1e-3 --min-lr 1e-5 --warmup-epoch 5 --dropout 0.0 "
    "--head 12 --num-layers 7 --hidden 384 --mlp-hidden 384 --autoaugment --label-smoothing --lamb_gra 3.0 --lamb_mix 0.5 --mix_on 1 "
    "--mix_mode split --dist_mode l2 --mass_pos tail --num_split 6 --split_mix 1 --dataset cimb10 --num-classes 10 --project-name 221104-cimb10"
)
# Small enough for a second a run.
TINY = "--hidden 16 --mlp-hidden 16 --num-layers 2 --head 2 --num_split 1 --patch 2 --epochs 2 --batch-size 64 --device cpu --no-progress".split()
MODES = {
    "plain": "--model-name vit",
    "gravity": "--model-name vit_gra",
    "distance alone": "--model-name vit_gra --mass_from none",
    "content mass": "--model-name vit_gra --mass_from content",
    "split": "--model-name vit_gra --mix_on 1 --mix_mode split --split_mix 1 --mass_pos tail --head_order original",
    "normal mix, l1, shared": "--model-name vit_gra --mix_on 1 --dist_mode l1 --mass_pos full_fix",
    "learned lambda, per head": "--model-name vit_gra --learn_lamb 1 --mass_share per_head --mass_pos head",
    "query mass": "--model-name vit_gra --query_mass 1 --mass_combine product --mass_param softplus",
    "mean token, dropout": "--model-name vit_gra --off-cls-token --dropout 0.1",
    "everything augmented": "--model-name vit --autoaugment --rcpaste --cutmix --label-smoothing",
    "mixup, averages, clipped": "--model-name vit --mixup --ema 0.9 --clip-grad 1",
    "validation": "--model-name vit --val_fraction 0.2 --ema 0.5",
    "original schedule, adamw": "--model-name vit --schedule original --warmup-epoch 1 --optimizer adamw",
    "mirror": "--model-name vit_gra --mirror two_step",
    "balanced draws": "--model-name vit --sampler balanced",
    "ldam": "--model-name vit_gra --long-tail ldam-drw",
    "logit adjustment": "--model-name vit --long-tail logit-adjustment",
    "no imbalance": "--model-name vit --imb-type balanced --dry-run",
}


def run(tmp_path, *words):
    out = tmp_path / "runs"
    code = run_main(
        main, [*TINY, "--out", str(out), "--report", "0", *(part for word in words for part in str(word).split())]
    )
    return code, sorted(path for path in out.glob("vision-*") if "~" not in path.name)


def result_of(path):
    return json.loads((path / "result.json").read_text(encoding="utf-8"))


def rows_of(path):
    """Lines of metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]


@pytest.mark.parametrize("name", MODES)
def test_every_mode_trains_and_reports(name, tmp_path, capsys):
    code, (path,) = run(tmp_path, MODES[name])
    assert code == 0 and (path / "done").exists() and str(path) in capsys.readouterr().out
    result, rows = result_of(path), rows_of(path)
    assert len(rows) == (1 if "--dry-run" in MODES[name] else 2) and all(np.isfinite(row["train/loss"]) for row in rows)
    assert result["selection"]["rule"] == "last epoch" and result["selection"]["epoch"] == len(rows)
    assert (
        0 <= result["test"]["accuracy"] <= 1
        and result["test"]["nll"] > 0
        and len(result["per_class"]["accuracy"]) == 10
    )
    assert ("accuracy_few" in result["test"]) == ("balanced" not in MODES[name].replace("--sampler balanced", ""))
    assert ("selected" in result) == ("val_fraction" in MODES[name]) == ("val/balanced_accuracy" in rows[0])
    with np.load(path / "analysis.npz") as arrays:
        assert arrays["test_logits"].shape == (500, 10)
        position_masses = "vit_gra" in MODES[name] and "mass_from" not in MODES[name]
        assert any(key.startswith("log_mass/") for key in arrays.files) == position_masses
        correct = (arrays["test_logits"].argmax(1) == arrays["test_labels"]).mean()
    assert result["test"]["accuracy"] == pytest.approx(correct)


def test_refit_trains_anew_on_train_and_validation(tmp_path):
    code, (path,) = run(tmp_path, "--model-name vit --val_fraction 0.2 --refit")
    result, selected = result_of(path), result_of(path)["selection"]["epoch"]
    assert code == 0 and "anew on train and validation" in result["selection"]["protocol"]
    inner = path / f"refit-{selected}"
    assert len(rows_of(inner)) == selected and "val/balanced_accuracy" not in rows_of(inner)[0]
    reported, fresh, first = (
        load_state(file)["model"] for file in (path / "final.pt", inner / "last.pt", path / "last.pt")
    )
    assert all(torch.equal(reported[key], fresh[key]) for key in fresh)
    assert any(not torch.equal(reported[key], first[key]) for key in first), "the headline is the refit's"
    assert report([str(path)]) == 0  # of the images that the refit was trained on


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("resnet18", "--stem cifar"),
        ("densenet121", ""),
        ("efficientnetb2", ""),
        ("vgg19", "--stem cifar"),
        ("vit_tiny_patch16_224_gra", "--image-size 16"),
        ("resnet10t", ""),
    ],
)
def test_every_kind_of_network_runs(model, words, tmp_path):
    code, (path,) = run(tmp_path, f"--model-name {model} --dry-run --batch-size 4 --eval-batch-size 8", words)
    assert code == 0 and result_of(path)["model"] == model and rows_of(path)[0]["train/loss"] > 0


@pytest.mark.parametrize("loss", ["ce", "class-balanced"])
def test_classes_without_train_images_are_judged(loss, tmp_path, capsys):
    code, (path,) = run(tmp_path, "--model-name vit --imb-factor 0.001 --sampler balanced --long-tail", loss)
    assert code == 0 and "classes have no train image" in capsys.readouterr().err
    result = result_of(path)
    assert (
        result["data"]["train_counts"][-1] == 0 and len(result["per_class"]["accuracy"]) == 10 and "also" not in result
    )


def test_learning_is_seen(tmp_path):
    """A small network learns the digits: far above one in ten, the loss falls."""
    code, (path,) = run(
        tmp_path,
        "--model-name vit_gra --imb-type balanced --epochs 12 --hidden 32 --mlp-hidden 32 --patch 4 --lr 3e-3 --crop 0",
    )
    rows = rows_of(path)
    assert (
        code == 0 and rows[-1]["train/loss"] < 0.7 * rows[0]["train/loss"] and result_of(path)["test"]["accuracy"] > 0.5
    )


LEARNING = {f"{dist}, mass {mass}": f"--model-name vit_gra --dist_mode {dist} {words}"
            for dist in ("l2", "l1", "emd", "kl")
            for mass, words in (("none", "--mass_from none"), ("at the tail", "--mass_pos tail"), ("content", "--mass_from content"))}  # fmt: skip
LEARNING |= {f"mix {mode}": f"--model-name vit_gra --mix_on 1 --mix_mode {mode}" for mode in ("normal", "split")}
LEARNING |= {
    f"loss {name}": f"--model-name vit --imb-type exp --imb-factor 0.2 --long-tail {name}" for name in LONG_TAIL
}
LEARNING |= {name: f"--model-name vit_gra {words}" for name, words in {
    "shared mass": "--mass_pos full_fix", "masses of queries": "--query_mass 1 --mass_combine product --mass_param softplus",
    "learned lambda": "--learn_lamb 1 --mass_share per_head", "averages, clipped": "--ema 0.9 --clip-grad 1",
    "mirror": "--mirror two_step"}.items()}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_every_variant_learns(name, tmp_path):
    """The digits, after 12 epochs of a small network: at least half right, by chance a tenth."""
    words = "--imb-type balanced --epochs 12 --hidden 32 --mlp-hidden 32 --patch 4 --lr 3e-3 --crop 0"
    code, (path,) = run(tmp_path, words, LEARNING[name])
    assert code == 0 and result_of(path)["test"]["accuracy"] > 0.5


def test_models_side_by_side(tmp_path, capsys):
    code, paths = run(tmp_path, "--model-name vit vit_gra --mix_on 1 --mix_mode split --num_split 0")
    assert code == 0 and len(paths) == 2
    printed = capsys.readouterr().out
    assert re.search(r"^vit  ", printed, flags=re.MULTILINE) and "vit_gra (l2" in printed
    # No gravity head: the same network from the same seed on the same batches.
    one, other = (load_state(path / "final.pt")["model"] for path in paths)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- files, continuing


@pytest.mark.parametrize(
    "words",
    [
        "--dropout 0.2 --autoaugment --cutmix --ema 0.9",
        "--val_fraction 0.2 --mirror two_step",
        "--long-tail ldam-drw --sampler effective",
    ],
)
def test_a_stopped_run_goes_on_exactly(words, tmp_path, monkeypatch):
    """Killed after two of four epochs and started again: bit for bit the uninterrupted run."""
    from gfml.engine import train

    words = f"--model-name vit_gra --epochs 4 --checkpoint-every 1 {words}"
    _, (whole,) = run(tmp_path / "whole", words)
    finish = train._finish_epoch

    def stop(state, row, *rest):
        finish(state, row, *rest)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_finish_epoch", stop)
    assert run(tmp_path / "parts", words)[0] == 130
    monkeypatch.undo()
    code, (parts,) = run(tmp_path / "parts", words)
    assert code == 0
    one, other = (load_state(path / "final.pt")["model"] for path in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert rows_of(whole) == rows_of(parts) and result_of(whole)["test"] == result_of(parts)["test"]


def test_a_done_run_is_shown_not_repeated(tmp_path, capsys):
    _, (path,) = run(tmp_path, "--model-name vit")
    written = (path / "result.json").stat().st_mtime_ns
    first = capsys.readouterr().out
    code, _ = run(tmp_path, "--model-name vit")
    second = capsys.readouterr()
    assert (
        code == 0
        and "is done" in second.out
        and second.out.endswith(first)
        and (path / "result.json").stat().st_mtime_ns == written
    )
    assert run(tmp_path, "--model-name vit --eval-only")[0] == 0
    assert "0." in capsys.readouterr().out and not (path / "failed").exists()
    assert run(tmp_path, "--model-name vit --overwrite")[0] == 0 and (path.parent / f"{path.name}~1").is_dir()


def test_the_last_epoch_is_the_headline(tmp_path):
    """With validation the weights of the last and of the best epoch are both judged, and the last are stored."""
    code, (path,) = run(tmp_path, "--model-name vit --val_fraction 0.2 --epochs 3 --lr 0.01")
    last, best = (load_state(path / name) for name in ("last.pt", "best.pt"))
    final = load_state(path / "final.pt")["model"]
    assert code == 0 and all(torch.equal(final[key], last["model"][key]) for key in final)
    result, rows = result_of(path), rows_of(path)
    assert (
        result["selected"]["epoch"] == best["epoch"] == max(rows, key=lambda row: row["val/balanced_accuracy"])["epoch"]
    )
    assert result["val"]["accuracy"] == pytest.approx(rows[-1]["val/accuracy"])


@pytest.mark.parametrize("loss", ["ce", "class-balanced --cb-beta 0.999"])
def test_two_processes_give_one_run(tmp_path, processes, loss):
    """One batch between two processes: the numbers of one process, to rounding, in one run directory."""
    words = f"--model-name vit_gra --crop 0 --batch-size 33 --val_fraction 0.1 --long-tail {loss}"
    _, (alone,) = run(tmp_path / "one", words)
    printed = processes(2, ROOT / "vision" / "main.py", *TINY, "--out", tmp_path / "two", "--report", 0, *words.split())
    (both,) = (tmp_path / "two").glob("vision-*")
    assert "accuracy" in printed[0] and "accuracy" not in printed[1] and alone.name == both.name
    for one, two in zip(rows_of(alone), rows_of(both), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    first, second = (load_state(path / "final.pt")["model"] for path in (alone, both))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4)
    assert result_of(alone)["test"]["nll"] == pytest.approx(result_of(both)["test"]["nll"], rel=1e-3)


# -- data and the published command


def write_cifar(folder, images=120):
    """A tiny sprite folder named cifar10 with images of ten classes that a network can tell apart by colour."""
    folder.mkdir(parents=True)
    labels = np.arange(images) % 10
    tiles = np.random.default_rng(0).integers(0, 60, (images, 32, 32, 3)) + 15 * labels[:, None, None, None]
    sprite = tiles.astype(np.uint8).reshape(images // 10, 10, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 320, 3)
    for part in ("train", "test"):
        Image.fromarray(sprite).save(folder / f"{part}.webp", lossless=True)
    np.savez(folder / "labels.npz", y_train=labels, y_test=labels, classes=np.array([f"class {n}" for n in range(10)]))


def test_the_published_command_runs_word_for_word(tmp_path, monkeypatch):
    """On tiny data; --dry-run makes it one small step of the full network."""
    write_cifar(tmp_path / "data" / "cifar10", images=1200)
    monkeypatch.setenv("GFML_DATA", str(tmp_path / "data"))
    code = run_main(
        main,
        [
            *SEED_COMMAND.split(),
            "--dry-run",
            "--batch-size",
            "16",
            "--eval-batch-size",
            "16",
            "--report",
            "0",
            "--out",
            str(tmp_path / "runs"),
        ],
    )
    (path,) = (tmp_path / "runs").glob("vision-221104-cimb10-cimb10-vit_gra-*")
    result = result_of(path)
    assert code == 0 and result["parameters"] == 6_268_810 + 65
    assert (
        result["data"]["train_counts"] == [120, 71, 43, 25, 15, 9, 5, 3, 2, 1]
        and result["data"]["name"] == "cimb10 exp 0.01"
    )


@pytest.mark.parametrize("name", ["cifar10", "cimb10", "cifar100", "cimb100", "fashion-mnist", "grocery-store"])
def test_shared_images_run(shared_data, name, tmp_path):
    code, (path,) = run(
        tmp_path, f"--model-name vit_gra --dry-run --eval-batch-size 64 --data-root {shared_data} --dataset", name
    )
    assert code == 0 and result_of(path)["data"]["images"]["train"] > 2000


def test_a_folder_of_images_runs(tmp_path):
    for part in ("train", "test"):
        for n in range(12):
            path = tmp_path / "photos" / part / f"kind {n % 3}" / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20 + n, 30, 3), 80 * (n % 3), np.uint8)).save(path)
    code, (path,) = run(
        tmp_path, "--model-name vit_gra --dataset", tmp_path / "photos", "--image-size 16 --batch-size 6"
    )
    assert code == 0 and result_of(path)["data"]["classes"] == ["kind 0", "kind 1", "kind 2"]
    (tmp_path / "photos" / "train" / "kind 1" / "bad.jpg").write_bytes(b"nothing")
    bad = f"--model-name vit --dataset {tmp_path / 'photos'} --image-size 16 --batch-size 6"
    assert run(tmp_path / "again", bad)[0] == 2
    assert run(tmp_path / "again", bad, "--unreadable skip")[0] == 0


# -- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--patch 5", "images of side 32 and 5 patches per side"),
        ("--image-size 30 --patch 4", "images of side 30 and 4 patches per side"),
        ("--num-classes 7", "found --num-classes 7, wanted 10 for digits"),
        ("--model-name vitt", "unknown model 'vitt'"),
        ("--dataset c10 --data-root nowhere", "cifar10 is not below nowhere"),
        ("--dataset cimb100 --data-root nowhere", "cifar100 is not below nowhere"),
        ("--dataset no_such_set", "unknown image data 'no_such_set'"),
        ("--imb-factor 0.0001 --long-tail ldam", "raise --imb-factor"),
        ("--lr 1e9", "the loss is"),
        ("--device cuda:99", "CUDA devices"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, message, tmp_path, capsys):
    code, _ = run(tmp_path, "--model-name vit", words) if "--model-name" not in words else run(tmp_path, words)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in error[-1] and error[-1].startswith("error: ")


def test_a_wrong_flag_answers_before_torch():
    code = "import sys, vision.main; print(*sorted(sys.modules.keys() & {'torch', 'torchvision', 'timm', 'matplotlib', 'pandas', 'sklearn', 'numpy'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


# -- reports


def test_the_report_has_every_part(tmp_path, capsys):
    _, paths = run(tmp_path, "--model-name vit vit_gra")
    capsys.readouterr()
    assert run_main(report, [*map(str, paths), "--out", str(tmp_path / "page")]) == 0
    page = tmp_path / "page"
    assert capsys.readouterr().out.strip() == str(page / "report.html")
    for name in ("learning", "classes", "confusion", "calibration", "masses", "attention"):
        with Image.open(page / f"{name}.png") as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20, name
    text = (page / "report.md").read_text(encoding="utf-8")
    assert f"{result_of(paths[0])['test']['accuracy']:.4f}" in text and "vit\\_gra" in text and "many" in text
    assert f"{result_of(paths[1])['per_class']['answers'][3]:.3f}" in text and "ECE tail" in text
    # Both judged the same images, so they can be compared image by image.
    assert run_main(compare, [*map(str, paths), "--out", str(tmp_path / "compared")]) == 0
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())["rows"]
    accuracies = [result_of(path)["test"]["accuracy"] for path in paths]
    [row] = [row for row in rows if row["metric"] == "accuracy"]
    assert row["difference"] == pytest.approx(accuracies[1] - accuracies[0], abs=1e-6)
    assert row["better"] + row["same"] + row["worse"] == row["users"] > 100


def test_reports_refuse_what_does_not_belong_together(tmp_path, capsys):
    _, _paths = run(tmp_path, "--model-name vit --dry-run")
    _, both = run(tmp_path, "--model-name vit --dry-run --imb-type balanced")
    assert run_main(report, [str(path) for path in both]) == 2 and "on different images" in capsys.readouterr().err
    assert run_main(report, [str(tmp_path)]) == 2 and "there is no run" in capsys.readouterr().err
