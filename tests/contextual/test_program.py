"""Both programs end to end: smoke runs, files, the published commands, continuing, several processes, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from contextual import main as program_256
from contextual import train as program_224
from gfml.base.checkpoints import load_state
from gfml.program.cli import run_main

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"256": program_256.main, "224": program_224.main}
TINY = (
    "--backbone small --pretrained 0 --lr 1e-3 --val-share 0.3 --width 4 --embedding-size 8 --image-size 16 --batch-size 16 --IPC 4 --batches-per-epoch 3 --epochs 2 --eval-every 1 --workers 0 "
    "--device cpu --no-progress --pictures 0 --baselines none --nmi 0 --ks 1 2"
).split()
# The users' commands, word for word but for the script's path; the folder of the data follows.
SEED_COMMANDS = {
    (
        "224",
        "cub",
    ): "--loss Hybrid --dataset cub --batch-size 128 --eps 0.04 --lam 0.05 --lr 0.00014 --warm 0 --bn-freeze 1 --gamma 0.1 --testfreq 10 "
    "--lr-decay-step 10 --epochs 60 --lr-decay-gamma 0.3 --xform_scale 0.16 --bottleneck linear --data_root",
    (
        "224",
        "cars",
    ): "--loss Hybrid --dataset cars --batch-size 64 --eps 0.05 --lam 0.2 --lr 8e-05 --warm 0 --bn-freeze 1 --gamma 0.1 --testfreq 10 "
    "--lr-decay-step 20 --epochs 160 --lr-decay-gamma 0.5 --xform_scale 0.12 --bottleneck linear --data_root",
    (
        "224",
        "sop",
    ): "--loss Hybrid --dataset SOP --batch-size 128 --eps 0.05 --lam 0.2 --lr 6e-05 --warm 0 --bn-freeze 1 --gamma 0.1 --testfreq 5 "
    "--lr-decay-step 15 --epochs 80 --lr-decay-gamma 0.3 --xform_scale 0.08 --bottleneck identity --hierarchical 1 --data_root",
    ("256", "cub"): "--dataset CUB --loss hybrid --lr 8e-05 --root",
    ("256", "cars"): "--dataset Cars --loss hybrid --lr 0.00016 --root",
    ("256", "sop"): "--dataset SOP --loss hybrid --lr 4e-05 --batch_size 128 --root",
    ("256", "inat"): "--dataset iNat --loss hybrid --lr 8e-05 --batch_size 256 --root",
    ("256", "inshop"): "--dataset inshop --loss hybrid --lr 4e-05 --batch_size 128 --root",
}


Runs = Callable[..., tuple[int, list[Path]]]


def folder(root: Path, number: int = 8, each: int = 4) -> Path:
    """Images by class: noise around a shade and a slope that are the class's."""
    rng, across = np.random.default_rng(0), np.linspace(-1, 1, 20)
    for label in range(number):
        for image in range(each):
            place = root / f"class{label:02d}" / f"{image}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture = (
                128
                + 60 * np.sin(label)
                + 50 * np.cos(2 * label) * across[None, :, None]
                + rng.normal(0, 15, (18, 20, 3))
            )
            Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(place)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes of five: four train, two validate, six test."""
    return folder(tmp_path_factory.mktemp("photos"), 12, 5)


@pytest.fixture
def run(photos: Path) -> Runs:
    """run(pipeline, out, *words): the program with tiny settings on ``photos``; its exit code and run directories."""

    def start(pipeline: str, out: Path, *words: object) -> tuple[int, list[Path]]:
        code = run_main(PROGRAMS[pipeline], [*TINY, "--dataset", str(photos), "--out", str(out), *map(str, words)])
        return code, sorted(path for path in out.glob("contextual-*") if "~" not in path.name)

    return start


def result_of(path: Path) -> dict:
    return json.loads((path / "result.json").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_state(path / "final.pt")["model"]


# -- smoke


def test_the_mirror_step_trains_otherwise(run: Runs, tmp_path: Path) -> None:
    """Finite, with other weights after one epoch from the same start."""
    found = {}
    for name, words in {"plain": "", "mirror": "--mirror two_step --mirror-every 1"}.items():
        code, (path,) = run("256", tmp_path / name, "--pictures", 0, *words.split())
        assert code == 0
        found[name] = weights_of(path), rows_of(path)[0]["train/loss"]
    (plain, _), (mirror, loss) = found["plain"], found["mirror"]
    assert np.isfinite(loss) and any(not torch.equal(plain[key], mirror[key]) for key in plain)


@pytest.mark.parametrize("pipeline", ["256", "224"])
def test_the_loss_falls_and_everything_is_stored(
    run: Runs, pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the embedded digits."""
    words = "--dataset digits --epochs 3 --batches-per-epoch 15 --width 16 --embedding-size 32 --batch-size 32 --IPC 8 --nmi 1 --pictures 2"
    code, (path,) = run(pipeline, tmp_path, *words.split(), "--baselines", "pixels", "start")
    assert code == 0
    rows, result = rows_of(path), result_of(path)
    # The contrastive term is a mean over active pairs alone, which grows as the easy ones drop out.
    assert rows[-1]["train/contextual"] < rows[0]["train/contextual"]
    assert {"recall@1", "recall@2", "map@r", "r_precision", "nmi"} <= result["test"].keys()
    assert ("map" in result["test"]) == ("train" in result) == (pipeline == "224")
    assert result["selection"]["split"] == "val" and result["lam"].startswith(
        "lam weighs the contextual" if pipeline == "256" else "lam weighs the contrastive"
    )
    assert set(result["baselines"]) == {"pixels", "starting network"}
    assert {row["class"] for row in result["per_class"]} == set("6789")
    for name in (
        "final.pt",
        "best.pt",
        "analysis.npz",
        "report/report.html",
        "report/neighbours.png",
        "report/errors.png",
    ):
        assert (path / name).stat().st_size > 0
    printed = capsys.readouterr()
    assert ("lam weighs the contextual term" if pipeline == "256" else "lam weighs the contrastive term") in printed.err
    assert "starting network, test" in printed.out


@pytest.mark.parametrize(
    "loss", ["contrastive", "Triplet", "MS+miner", "Proxy_Anchor", "Roadmap", "smooth-ap", "contextual", "normsoftmax"]
)
def test_losses_train(run: Runs, loss: str, tmp_path: Path) -> None:
    code, (path,) = run("256", tmp_path, "--loss", loss, "--epochs", 1, "--batches-per-epoch", 2)
    assert code == 0 and np.isfinite(rows_of(path)[0]["train/loss"])


@pytest.mark.parametrize(
    "words",
    [
        ["--bottleneck", "linear", "--train_embedding", 24, "--pooling", "gem", "--layer-norm", 1],
        ["--IPC", 0, "--loss", "Proxy_NCA", "--warm", 1],
        ["--trainxform", "none", "--testxform", "bigtest", "--optimizer", "adamw", "--lr-decay-step", 1],
        ["--select-on", "test", "--select-metric", "map@r", "--full-map", 1, "--patience", 1],
        ["--lam-convention", "contrast", "--lam", 0.05, "--ablation", "neighbours", "--loss-backend", "reference"],
        ["--amp", 1, "--batch-norm", "stats"],
        ["--workers", 1],
    ],
)
def test_flags_reach_the_training(run: Runs, words: list, tmp_path: Path) -> None:
    code, (path,) = run("256", tmp_path, *words)
    assert code == 0 and len(rows_of(path)) == 2


def test_the_number_of_workers_does_not_matter(run: Runs, tmp_path: Path) -> None:
    losses = [
        [row["train/loss"] for row in rows_of(run("256", tmp_path / str(n), "--workers", n)[1][0])] for n in (0, 2)
    ]
    assert losses[0] == losses[1]


def test_selection_on_test_trains_on_all_classes_and_says_so(run: Runs, tmp_path: Path) -> None:
    _, (path,) = run("256", tmp_path, "--select-on", "test")
    result = result_of(path)
    assert "on test (optimistic" in result["selection"]["protocol"]
    assert result["data"]["train"]["classes"] == 6 and "valid" not in result["data"]
    best = max(rows_of(path), key=lambda row: row["test/recall@1"])
    assert result["selection"]["value"] == best["test/recall@1"] == result["test"]["recall@1"]


def test_refit_trains_on_the_validation_classes_too(run: Runs, tmp_path: Path) -> None:
    code, (path,) = run("256", tmp_path, "--refit")
    result = result_of(path)
    assert code == 0 and "trained anew" in result["selection"]["protocol"] and result["data"]["train"]["classes"] == 6
    assert run("256", tmp_path, "--refit", "--eval-only")[0] == 0


def test_weights_of_another_run_are_a_start(run: Runs, tmp_path: Path) -> None:
    _, (first,) = run("256", tmp_path / "a")
    code, (path,) = run("256", tmp_path / "b", "--checkpoint", first / "final.pt", "--epochs", 0)
    start, then = weights_of(first), weights_of(path)
    assert code == 0 and all(torch.equal(start[key], then[key]) for key in start if key.startswith("encoder.0."))


def test_warm_epochs_leave_the_backbone_as_it_was(run: Runs, tmp_path: Path) -> None:
    _, (path,) = run("256", tmp_path, "--epochs", 0)
    start = weights_of(path)
    _, (path,) = run("256", tmp_path / "warm", "--epochs", 2, "--warm", 2, "--batch-norm", "frozen")
    then = load_state(path / "last.pt")["model"]
    moved = {key for key in start if not torch.equal(start[key], then[key])}
    assert moved == {"encoder.0.head.weight", "encoder.0.head.bias"}


def test_a_recording_of_the_warm_epochs_ends_with_them(recorded: Callable) -> None:
    from contextual.experiment import WarmStep

    def trained(record: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net, images = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(20, 8, 4)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        step = WarmStep(list(net[0].parameters()), 1)
        call, made = recorded(net, optimizer, step, lambda batch: {"loss": net(batch).square().mean()}, record=record)
        held = []
        for number, batch in enumerate(images):
            if number % 10 == 0:
                step.new_epoch()
            call(batch)
            held.append(net[0].weight.detach().clone())
        assert [torch.equal(one, held[0]) for one in held] == [True] * 10 + [False] * 10
        assert sum(one.replays for one in made) == (16 if record else 0)
        return list(net.parameters())

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=0)


def test_rates_fall_as_published(tmp_path: Path) -> None:
    from contextual import main, train
    from contextual.experiment import Retrieve

    def rates(pipeline: str, words: list[str], epochs: int) -> list[list[float]]:
        settings = {"256": main, "224": train}[pipeline].PROGRAM.parse([*TINY, *words])
        retrieve = Retrieve(settings, Retrieve.load(settings))
        training = retrieve.training(retrieve.build())
        optimizer, scheduler = training.optimizer, training.scheduler
        found = []
        for _ in range(epochs):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return found

    found = rates("256", ["--lr", "1e-4", "--loss", "proxynca"], 50)
    assert found[0] == pytest.approx([5e-5, 1e-4, 1e-3])
    for epoch, falls in ((14, 0), (15, 1), (29, 1), (30, 2), (45, 3)):
        assert found[epoch] == pytest.approx([5e-5 * 0.3**falls, 1e-4 * 0.3**falls, 1e-3])
    words = [
        "--lr",
        "1e-4",
        "--loss",
        "Proxy_Anchor",
        "--lr-decay-step",
        "10",
        "--lr-decay-gamma",
        "0.3",
        "--bottleneck",
        "linear",
    ]
    found = rates("224", words, 21)
    for epoch, falls in ((9, 0), (10, 1), (20, 2)):
        assert found[epoch] == pytest.approx([rate * 0.3**falls for rate in (1e-4, 1e-4, 2e-4, 1e-2)])


# -- continuing


def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--epochs", 4, "--loss", "Triplet", "--warm", 1, "--eval-every", 2]
    _, (whole,) = run("224", tmp_path / "whole", *words)

    from gfml.engine.runs import Run

    saved = Run.checkpoint

    def stop(self: Run, state: dict) -> None:
        saved(self, state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "checkpoint", stop)
    assert run("224", tmp_path / "parts", *words)[0] == 130
    monkeypatch.undo()
    code, (parts,) = run("224", tmp_path / "parts", *words)
    assert code == 0
    assert [row["train/loss"] for row in rows_of(parts)] == [row["train/loss"] for row in rows_of(whole)]
    one, other = load_state(whole / "last.pt"), load_state(parts / "last.pt")
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    assert result_of(whole)["test"] == result_of(parts)["test"]


def test_a_finished_run_is_shown_and_judged_again(
    run: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (path,) = run("256", tmp_path)
    first = capsys.readouterr().out
    run("256", tmp_path)
    shown = capsys.readouterr().out
    assert "is done; this is its result" in shown
    run("256", tmp_path, "--eval-only", "--pictures", 2)
    assert (path / "report" / "neighbours.png").stat().st_size > 0
    rows = [[line for line in text.splitlines() if "hybrid, " in line] for text in (capsys.readouterr().out, first)]
    assert rows[0] == rows[1] and len(rows[0]) > 1


def test_two_processes_train_as_one(
    run: Runs, photos: Path, tmp_path: Path, processes: Callable[..., list[str]]
) -> None:
    """The batch is gathered: the losses and weights of both are those of one process with the whole batch."""
    words = [*TINY, "--dataset", photos, "--batch-norm", "frozen"]
    _, (one,) = run("256", tmp_path / "one", "--batch-norm", "frozen")
    printed = processes(2, ROOT / "contextual" / "main.py", *words, "--out", tmp_path / "two")
    (two,) = (tmp_path / "two").glob("contextual-*")
    assert "run directory" in printed[0] and "run directory" not in printed[1]
    np.testing.assert_allclose(
        [r["train/loss"] for r in rows_of(two)], [r["train/loss"] for r in rows_of(one)], rtol=1e-5
    )
    first, second = weights_of(one), weights_of(two)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-4, atol=1e-5)
    assert result_of(two)["test"] == pytest.approx(result_of(one)["test"], abs=0.02)


# -- the published commands


@pytest.mark.parametrize(("pipeline", "name"), list(SEED_COMMANDS))
def test_seed_commands_parse_and_ask_for_their_data_in_one_line(
    pipeline: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_main(
        PROGRAMS[pipeline],
        [*SEED_COMMANDS[pipeline, name].split(), str(tmp_path / "absent"), "--out", str(tmp_path / "runs")],
    )
    text = capsys.readouterr().err
    assert code == 2 and text.count("\n") == 1
    assert f"there is no folder {tmp_path / 'absent'}: give the folder of {name}" in text


SHORT = ("--pretrained 0 --backbone small --width 4 --image-size 16 --batches-per-epoch 1 --workers 0 --nmi 0 --pictures 0 --baselines none --no-progress "
         "--train_embedding 16 --embedding-size 8 --device cpu --select-on test").split()  # fmt: skip


@pytest.mark.parametrize(("pipeline", "name"), list(SEED_COMMANDS))
def test_seed_commands_run_on_miniatures(
    pipeline: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, then flags that shorten: a small network, one epoch of one batch, and miniature data."""
    root = miniature(name, tmp_path / "data")
    words = [*SEED_COMMANDS[pipeline, name].split(), str(root), *SHORT, "--check-counts", "0", "--epochs", "1"]
    assert run_main(PROGRAMS[pipeline], [*words, "--out", str(tmp_path / "runs")]) == 0
    (path,) = (tmp_path / "runs").glob("contextual-*")
    assert np.isfinite(rows_of(path)[0]["train/loss"])
    assert 0 <= result_of(path)["test"]["recall@1"] <= 1


def miniature(name: str, root: Path) -> Path:
    """The official layout with as many classes as a batch needs and a handful of pictures."""
    trained, each = {"cub": (32, 4), "cars": (32, 4), "sop": (32, 4), "inshop": (32, 4), "inat": (64, 4)}[name]
    rng = np.random.default_rng(0)

    def picture(path: str) -> str:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / path)
        return path

    if name == "cub":
        rows = [
            (label, picture(f"images/{label:03d}.X/{i}.png").removeprefix("images/"))
            for label in [*range(1, trained + 1), 150, 151]
            for i in range(each)
        ]
        write(root / "images.txt", [f"{number} {path}" for number, (_, path) in enumerate(rows, 1)])
        write(root / "image_class_labels.txt", [f"{number} {label}" for number, (label, _) in enumerate(rows, 1)])
    elif name == "cars":
        for part, labels in (("train", range(1, trained + 1)), ("test", (150, 151))):
            paths = [(label, picture(f"car_ims/{label}_{i}.png")) for label in labels for i in range(each)]
            lines = [f"{number} {label} 1 {path}" for number, (label, path) in enumerate(paths)]
            write(root / f"cars196_{part}.txt", ["image_id class_id super_class_id path", *lines])
    elif name == "sop":
        for part, labels in (("train", range(1, trained + 1)), ("test", (90, 91))):
            lines = [
                f"{label} {label} {1 + label % 2} {picture(f'chair_final/{label}_{i}.png')}"
                for label in labels
                for i in range(each)
            ]
            write(root / f"Ebay_{part}.txt", ["image_id class_id super_class_id path", *lines])
    elif name == "inshop":
        rows = [
            (picture(f"img/{label}/{i}.png"), f"id_{label:03d}", "train")
            for label in range(trained)
            for i in range(each)
        ]
        rows += [
            (picture(f"img/{label}/{i}.png"), f"id_{label:03d}", "query" if i < 2 else "gallery")
            for label in (90, 91)
            for i in range(each)
        ]
        write(
            root / "list_eval_partition.txt",
            [str(len(rows)), "image_name item_id evaluation_status", *("  ".join(row) for row in rows)],
        )
    else:
        for label in range(2 * trained):
            for i in range(each):
                picture(f"{label:05d}_{'Animalia_Chordata_Aves' if label % 2 else 'Plantae_T_M'}_{label}/{i}.png")
    return root


def write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


# -- bad input


def failure(run: Runs, words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    code, _ = run("256", tmp_path / "runs", *words)
    text = capsys.readouterr().err.splitlines()
    assert code == 2 and text[-1].startswith("error: ")
    return text[-1]


def test_a_class_with_one_image_is_named(run: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "data")
    for image in range(1, 4):
        (root / "class01" / f"{image}.png").unlink()
    words = ["--dataset", root, "--batch-size", 4, "--IPC", 2]
    assert "found one image in the training class class01" in failure(run, words, tmp_path, capsys)
    assert run("256", tmp_path / "dropped", *words, "--single-images", "drop", "--select-on", "test")[0] == 0
    assert run("256", tmp_path / "repeated", *words, "--single-images", "repeat", "--select-on", "test")[0] == 0


def test_too_few_classes_for_a_batch_are_named(run: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--batch-size", 64, "--IPC", 4]
    assert (
        "found 4 training classes, wanted 16 for --batch-size 64 and --IPC 4: give --batch-size 16 or less"
        in failure(run, words, tmp_path, capsys)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_and_skipped_only_when_asked(
    run: Runs, workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "data")
    for label in range(8):
        (root / f"class{label:02d}" / "2.png").write_bytes(b"\x89PNG no picture")
    words = ["--dataset", root, "--batch-size", 8, "--workers", workers]
    text = failure(run, words, tmp_path, capsys)
    assert (
        "cannot read the image" in text
        and "2.png" in text
        and text.endswith("or skip such images with --skip-bad-images")
    )
    code, _ = run("256", tmp_path / "skipped", *words, "--skip-bad-images")
    notes = capsys.readouterr().err
    assert code == 0 and "4 images of" in notes and "cannot be read and are left out" in notes


def test_weights_that_cannot_be_fetched_are_one_line(
    run: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    def offline(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    text = failure(run, ["--backbone", "resnet50", "--pretrained", 1, "--image-size", 32], tmp_path, capsys)
    assert "cannot get the pretrained weights of resnet50.tv_in1k" in text and "--pretrained 0" in text


def test_a_checkpoint_of_another_network_is_named(
    run: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (first,) = run("256", tmp_path / "a")
    capsys.readouterr()
    assert "cannot use the checkpoint" in failure(
        run, ["--checkpoint", first / "final.pt", "--width", 8], tmp_path, capsys
    )
    assert "there is no" in failure(run, ["--checkpoint", tmp_path / "none.pt"], tmp_path, capsys)


def test_weights_of_the_published_programs_are_a_start(
    run: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their names, in a whole pickled tuple too; a file of another program is one line and leaves no run behind."""
    _, (first,) = run("256", tmp_path / "a")
    net = {key.removeprefix("encoder.0."): value for key, value in weights_of(first).items() if "encoder.0." in key}
    theirs = {key.replace("head.", "remap.", 1): value for key, value in net.items()}
    torch.save((theirs, [1.0], None), tmp_path / "theirs.pt")
    code, (path,) = run("256", tmp_path / "b", "--checkpoint", tmp_path / "theirs.pt", "--epochs", 0)
    then = weights_of(path)
    assert code == 0 and all(torch.equal(value, then[f"encoder.0.{key}"]) for key, value in net.items())
    capsys.readouterr()
    for bad in ({"embedding_user.weight": torch.zeros(2, 2)}, {**theirs, "remap.weight": torch.zeros(2, 2)}):
        torch.save(bad, tmp_path / "bad.pt")
        code, paths = run("256", tmp_path / "c", "--checkpoint", tmp_path / "bad.pt", "--epochs", 0)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2 and said.startswith("error: ") and "delete" not in said and not paths, said
