"""The program end to end on planted data: every model, the mirror, continuing, weights, grids, protocols, failures."""

from __future__ import annotations

import csv
import json
import shlex
import shutil

import numpy as np
import pytest
import torch

from gfml.base.checkpoints import load_state
from gfml.base.home import home
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.engine.train import EarlyStopping
from gfml.metrics.ranking import find_hits, ranking_metrics
from gfml.program.cli import run_main
from gfml.program.commands import read_command
from gfml.ranking.evaluation import evaluate
from gfml.ranking.topk import DenseScorer, topk_items
from gfml.report.collection import collect
from mirror_grad.experiment import arm_factor
from mirror_grad.main import PROGRAM, main
from mirror_grad.models import MODELS

parse = PROGRAM.parse

SHORT = "--epochs 3 --eval-every 1 --batch-size 100 --lr 0.02 --embedding-dim 8 --topks 5 10 --device cpu --no-progress --baselines none --no-cache".split()
TRAINED = [name for name, entry in MODELS.items() if entry.trains]


@pytest.fixture
def run(planted, tmp_path):
    """run(words, out="runs") -> (exit code, run directories)."""

    def start(*words, out="runs"):
        code = run_main(main, [*SHORT, "-d", str(planted), "--out", str(tmp_path / out), *map(str, words)])
        return code, sorted(
            path for path in (tmp_path / out).glob("mirror-*") if path.is_dir() and "~" not in path.name
        )

    return start


def result_of(path):
    return json.loads((path / "result.json").read_text())


def rows_of(path):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds/")} for line in lines]


def weights_of(path, name="last.pt"):
    return load_state(path / name)["model"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("model", MODELS)
def test_every_model_runs_with_the_mirror(model, run, capsys):
    code, [path] = run("-m", model)
    assert code == 0
    result = result_of(path)
    assert result["model"] == model and result["behaviour"] == "fixed" and 0 <= result["test"]["recall@10"] <= 1
    out = capsys.readouterr().out
    assert str(path) in out and f"{result['test']['recall@10']:.4f}" in out
    if MODELS[model].trains:
        rows = rows_of(path)
        assert len(rows) == 3 and all("train/mirror_loss" in row and "val/recall@5" in row for row in rows)
        assert result["arm"] == "mg" and result["mirror"] == {
            "mode": "two_step",
            "alpha1": 1.0,
            "alpha2": 0.2,
            "every": 3,
            "counter": "epoch",
            "phase": 0,
        }
    else:
        assert result["arm"] == "plain" and result["selection"]["protocol"] == "no training"


@pytest.mark.parametrize("model", TRAINED)
def test_published_behaviour_runs(model, run):
    code, [path] = run("-m", model, "--behaviour", "published", "--epochs", 1)
    assert code == 0 and result_of(path)["behaviour"] == "published"


# -- the mirror


@pytest.mark.parametrize("model", ["LightGCN", "SELFCFED_LGN"])
def test_off_is_plain_training_bit_for_bit(model, run, planted, tmp_path):
    """--not_mg equals a loop of one's own: backward and Adam, on the sampler's batches."""
    from gfml.engine.runs import seed_everything
    from mirror_grad import experiment
    from mirror_grad.data import load

    _, [path] = run("-m", model, "--not_mg")
    assert result_of(path)["mirror"] == {"mode": "off"}
    options = parse([*SHORT, "-d", str(planted), "-m", model, "--not_mg"])
    data = load(options, needs_features=MODELS[model].needs_features)
    seed_everything(options.seed)
    built = experiment.MirrorGrad(options, data).build()
    batches = experiment.MirrorGrad(options, data).batches(built)
    optimizer = torch.optim.Adam(built.parameters(), lr=0.02, fused=True)
    for epoch in (1, 2, 3):
        built.train()
        for batch in batches(epoch):
            optimizer.zero_grad()
            built.loss(batch)["loss"].backward()
            optimizer.step()
    assert same(weights_of(path), built.state_dict())


def test_two_step_on_every_third_batch_as_published(run, planted):
    """Seven batches an epoch: 0, 3 and 6 take two optimizer steps, with +g and -alpha2 g of the same batch."""
    from gfml.engine.runs import seed_everything
    from mirror_grad import experiment
    from mirror_grad.data import load

    _, [path] = run("-m", "BPR", "--alpha2", 0.3)
    options = parse([*SHORT, "-d", str(planted), "-m", "BPR", "--alpha2", "0.3"])
    data = load(options, needs_features=False)
    seed_everything(options.seed)
    model = experiment.MirrorGrad(options, data).build()
    batches = experiment.MirrorGrad(options, data).batches(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, fused=True)
    steps = 0
    for epoch in (1, 2, 3):
        for number, batch in enumerate(batches(epoch)):
            for factor in (1.0, -0.3) if number % 3 == 0 else (1.0,):
                optimizer.zero_grad()
                (factor * model.loss(batch)["loss"]).backward()
                optimizer.step()
                steps += 1
    assert steps == 3 * (7 + 3)
    for name, value in weights_of(path).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["two_step", "fused", "precond", "sgd_mirror", "backstitch", "repeat"])
def test_every_mirror_mode_trains(mode, run):
    code, [path] = run("-m", "VBPR", "--mirror", mode)
    assert code == 0 and result_of(path)["mirror"]["mode"] == mode


def test_the_two_gradients_are_logged_where_asked(run):
    _, [path] = run("-m", "VBPR", "--mirror-diagnostics")
    for row in rows_of(path):
        assert row["train/grad_norm"] > 0 and row["train/mirror_grad_norm"] > 0
        assert -1 <= row["train/grad_cosine"] <= 1 and -1 <= row["train/displacement_cosine"] <= 1


def test_control_arms(run, capsys):
    """equal-lr is plain training at another rate; equal-grid is a search of as many rates; the labels are theirs."""
    factor = arm_factor(parse(["-m", "BPR", "--mirror-arm", "equal-lr", "--alpha2", "0.3"]))
    assert factor == pytest.approx(1.024, abs=5e-4)
    assert arm_factor(parse(["-m", "BPR", "--mirror-arm", "equal-lr", "--alpha2", "0.1"])) == pytest.approx(
        1.114, abs=5e-4
    )
    _, [path] = run("-m", "BPR", "--mirror-arm", "equal-lr", "--alpha2", 0.3, out="lr")
    _, [plain] = run("-m", "BPR", "--not_mg", "--lr", 0.02 * factor, out="plain")
    assert (
        result_of(path)["arm"] == "equal-lr"
        and result_of(plain)["arm"] == "plain"
        and same(weights_of(path), weights_of(plain))
    )
    code, paths = run("-m", "BPR", "--mirror-arm", "equal-grid", out="grid")
    assert code == 0 and run_main(main, ["--resume", str(paths[0]), "--epochs", "4"]) == 0
    assert len(paths) == 3 and {result_of(path)["arm"] for path in paths} == {"equal-grid"}
    assert "best by val/recall@5" in capsys.readouterr().out


# -- continuing and stored weights


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("BPR", []),
        ("FREEDOM", ["--learning-rate-scheduler", 0.9, 1]),
        ("SELFCFED_LGN", ["--mirror-counter", "global"]),
        ("LayerGCN", []),
    ],
)
def test_a_stopped_run_goes_on_exactly(model, words, run, tmp_path):
    """Dropout, thinned graphs, the mirror's counter and the schedule of the rate included."""
    words = ["-m", model, *words]
    _, [whole] = run(*words, out="whole")
    _, [path] = run(*words, "--epochs", 1, out="parts")
    code, _ = run("--resume", path, "--epochs", 3, out="parts")
    assert (
        code == 0
        and same(weights_of(whole), weights_of(path))
        and same(weights_of(whole, "best.pt"), weights_of(path, "best.pt"))
    )
    assert rows_of(whole) == rows_of(path) and result_of(whole)["test"] == result_of(path)["test"]


def test_resume_of_a_directory_needs_no_other_flag(planted, tmp_path, run):
    _, [path] = run("-m", "LightGCN", "--n_layers", 1, "--epochs", 1)
    assert run_main(main, ["--resume", str(path), "--epochs", "2"]) == 0
    assert len(rows_of(path)) == 2


def test_a_finished_run_is_shown_not_repeated(run, capsys):
    run("-m", "BPR")
    capsys.readouterr()
    code, paths = run("-m", "BPR")
    assert code == 0 and len(paths) == 1 and "is done" in capsys.readouterr().out
    code, _ = run("-m", "BPR", "--eval-only")
    assert code == 0 and f"{result_of(paths[0])['test']['recall@10']:.4f}" in capsys.readouterr().out


def test_resume_of_a_file_judges_its_weights(run, planted, tmp_path, capsys):
    """best.pt of a run with its config, and a bare state somewhere else."""
    _, [path] = run("-m", "VBPR", "--reg_weight", 0.5)
    recall = f"{result_of(path)['test']['recall@10']:.4f}"
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    capsys.readouterr()
    assert run_main(main, ["--resume", str(path / "best.pt")]) == 0
    assert recall in capsys.readouterr().out and before == {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    torch.save(weights_of(path, "best.pt"), tmp_path / "VBPR-planted.pth")
    words = [
        "--model",
        "VBPR",
        "--dataset",
        str(planted),
        "--resume",
        str(tmp_path / "VBPR-planted.pth"),
        "--topks",
        "5",
        "10",
    ]
    assert run_main(main, [*words, "--embedding-dim", "8"]) == 0
    assert recall in capsys.readouterr().out


def test_weights_of_something_else_are_one_line(run, planted, tmp_path, capsys):
    _, [path] = run("-m", "BPR")
    capsys.readouterr()
    for words, said in (
        (["-m", "LightGCN", "--embedding-dim", "16"], "give the --dataset and the hyper-parameters"),
        (["-m", "VBPR"], "give the --model and the hyper-parameters"),
    ):
        torch.save(weights_of(path), tmp_path / "w.pth")
        assert run_main(main, [*words, "-d", str(planted), "--resume", str(tmp_path / "w.pth")]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and said in error[0]
    assert run_main(main, ["--model", "BPR", "--resume", "BPR-sports.pth"]) == 2
    assert "there is no BPR-sports.pth" in capsys.readouterr().err
    (tmp_path / "w.pth").write_bytes(b"not a checkpoint")
    assert run_main(main, ["-m", "BPR", "-d", str(planted), "--resume", str(tmp_path / "w.pth")]) == 2
    assert "cannot be read as weights" in capsys.readouterr().err


# -- grid


def test_grid_selects_on_validation_and_goes_on(run, tmp_path, capsys):
    words = ["-m", "BPR", "--grid", "reg_weight=0.001,5.0", "learning_rate=0.02,0.0001"]
    code, paths = run(*words)
    assert code == 0 and len(paths) == 4
    [folder] = (tmp_path / "runs" / "sweeps").iterdir()
    stored = (folder / "trials.json").read_text()
    values = {path.name: result_of(path)["val"]["recall@5"] for path in paths}
    trials = json.loads(stored)["trials"]
    assert json.loads(stored)["metric"] == "val/recall@5"
    assert {trial["run"]: trial["value"] for trial in trials} == values
    best = max(trials, key=lambda trial: trial["value"])
    # Its line can be pasted, and the table shows test figures of it alone, as that of any sweep.
    assert read_command(shlex.split(best["command"]), home()).runs[0].path().name == best["run"]
    [row] = [row for row in csv.DictReader((folder / "table.csv").open()) if row["recall@5"]]
    assert row["run"] == best["run"] and "reg-weight = " in (folder / "best.toml").read_text()
    assert [trial.value for trial in collect([folder], None, None).ranked] == sorted(values.values(), reverse=True)
    shutil.rmtree(paths[1])
    before = (paths[0] / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    code, again = run(*words)
    assert code == 0 and again == paths and (paths[0] / "result.json").stat().st_mtime_ns == before
    assert (folder / "trials.json").read_text() == stored and f"{max(values.values()):.4f}" in capsys.readouterr().out


def test_grid_on_test_is_labelled(run, tmp_path, capsys):
    run("-m", "BPR", "--select-on", "test", "--grid", "reg_weight=0.1,0.2")
    out = capsys.readouterr().out
    [file] = (tmp_path / "runs" / "sweeps").glob("*/table.csv")
    assert "selected on test: optimistic" in out and "optimistic" in file.read_text()


# -- protocol


def test_selection_never_reads_test(run, planted, tmp_path):
    """Other test items, same chosen epoch, same curves, same weights."""
    other = shutil.copytree(planted, tmp_path / "planted")
    lines = (other / "planted.inter").read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    held = [row for row in rows if row[4] == "2"]
    taken = {}
    for row in rows:
        taken.setdefault(row[0], set()).add(row[1])
    for row in held:
        row[1] = str(next(item for item in range(60) if str(item) not in taken[row[0]]))
        taken[row[0]].add(row[1])
    (other / "planted.inter").write_text("\n".join([lines[0], *("\t".join(row) for row in rows)]) + "\n")
    _, [path] = run("-m", "BPR")
    _, [moved] = run("-m", "BPR", "-d", other, out="moved")
    assert same(weights_of(path, "best.pt"), weights_of(moved, "best.pt"))
    first, second = rows_of(path), rows_of(moved)
    assert first == second and result_of(path)["test"] != result_of(moved)["test"]


def test_published_masking_is_offered_and_labelled(run, planted):
    """The same model; validation items are in the published lists and in no other."""
    from mirror_grad.data import load

    valid = load(
        parse(["-d", str(planted), "-m", "BPR", "--no-cache"]), needs_features=False
    ).interactions.valid.toarray()
    _, [path] = run("-m", "BPR", out="ours")
    _, [loose] = run("-m", "BPR", "--test-mask", "train", out="theirs")
    ours, theirs = result_of(path), result_of(loose)
    known = {}
    for kind, folder in (("ours", path), ("theirs", loose)):
        with np.load(folder / "analysis.npz") as file:
            known[kind] = int(valid[file["test_users"][:, None], file["top"]].sum())
    assert known["ours"] == 0 < known["theirs"] and ours["val"] == theirs["val"]
    assert "as published" in theirs["selection"]["protocol"] and "as published" not in ours["selection"]["protocol"]


def test_evaluation_equals_the_stored_vectors(numbers):
    """All four metrics at all cut-offs, both maskings, for users without repeated or overlapping rows; those by lists alone."""
    golden = numbers("mm_eval")
    shape = int(golden["n_users"]), int(golden["n_items"])
    parts = [
        (golden["inter_user"][golden["inter_label"] == k], golden["inter_item"][golden["inter_label"] == k])
        for k in range(3)
    ]
    matrices = [csr_from_pairs(users, items, *shape) for users, items in parts]
    names, ks = golden["metric_names"].tolist(), golden["topk"].tolist()
    data = Interactions("stored", *matrices)
    for split, stored, mask in (
        ("valid", "valid", False),
        ("test", "test", False),
        ("test", "fixed_test_maskvalid", True),
    ):
        found = evaluate(DenseScorer(torch.from_numpy(golden["scores"])), data, split, ks, mask_valid=mask)
        users, items = parts[("train", "valid", "test").index(split)]
        order = golden[f"{split}_users"].tolist()
        overlap = (matrices[0] * matrices[("train", "valid", "test").index(split)]).sum(1)
        clean = [u for u in order if len(items[users == u]) == len(set(items[users == u].tolist())) and overlap[u] == 0]
        assert len(clean) >= len(order) - 3
        for u in clean:
            row = found.users.tolist().index(u)
            for m, name in enumerate(names):
                for k, cut in enumerate(ks):
                    assert found.per_user[f"{name}@{cut}"][row] == pytest.approx(
                        golden[f"{stored}_per_user"][order.index(u), m, k], abs=1e-12
                    )
        if stored != "fixed_test_maskvalid":
            assert (found.top[[found.users.tolist().index(u) for u in order]] == golden[f"{split}_top50"]).all()
    top = topk_items(
        DenseScorer(torch.from_numpy(golden["scores"])), torch.from_numpy(golden["valid_users"]), 50, seen=matrices[0]
    )
    relevant = matrices[1][golden["valid_users"]]
    assert (find_hits(top.numpy(), relevant) == golden["valid_hits"]).all() and "map@50" in ranking_metrics(
        top.numpy(), relevant, ks
    )


@pytest.mark.parametrize("patience", [3, 8])
def test_stopping_is_the_stored_one(numbers, patience):
    """The published rule stops at the evaluation after ``patience`` in a row; --patience counts the same."""
    golden = numbers("mm_eval")
    stopping, trace = EarlyStopping(patience + 1), golden[f"early_{patience}_trace"]
    for score, (best, bad, stop, _) in zip(golden["early_scores"], trace, strict=False):
        assert stopping.update(float(score)) == bool(stop)
        assert stopping.best == pytest.approx(best) and stopping.num_bad == bad
    assert stopping.should_stop


def test_patience_in_the_program(run):
    _, [path] = run("-m", "BPR", "--epochs", 60, "--patience", 2, "--lr", 0.3)
    selection = result_of(path)["selection"]
    assert selection["stopped_early"] and selection["epochs_trained"] == selection["epoch"] + 3


def test_rounded_metrics_select_and_stop(run):
    _, [path] = run("-m", "BPR", "--round-metrics", 2)
    assert all(row["val/recall@5"] == round(row["val/recall@5"], 2) for row in rows_of(path))


# -- batches


def test_batches_are_a_function_of_seed_and_epoch_not_of_the_model(planted):
    from mirror_grad import experiment
    from mirror_grad.data import load

    drawn = {}
    for name, words in {
        "narrow": ["--embedding-dim", "4"],
        "wide": ["--embedding-dim", "32"],
        "seed": ["--seed", "1"],
    }.items():
        options = parse([*SHORT, "-d", str(planted), "-m", "BPR", *words])
        data = load(options, needs_features=False)
        model = experiment.MirrorGrad(options, data).build()
        batches = list(experiment.MirrorGrad(options, data).batches(model)(2))
        drawn[name] = torch.cat([torch.stack([batch.users, batch.pos, batch.neg]) for batch in batches], 1)
    train = data.interactions.train.toarray()
    assert torch.equal(drawn["narrow"], drawn["wide"]) and not torch.equal(drawn["wide"], drawn["seed"])
    users, pos, neg = drawn["wide"].numpy()
    assert sorted(zip(users.tolist(), pos.tolist(), strict=True)) == sorted(
        zip(*(side.tolist() for side in np.nonzero(train)), strict=True)
    )
    assert (train[users, neg] == 0).all() and (train.sum(0)[neg] > 0).all()


# -- mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-d", "nowhere/at/all"], "no data set"),
        (["--topks", 500], "give --topks [0-9]+"),
        (["--grid", "seed=1,2", "--run-name", "x"], "drop --run-name"),
        (["--mirror", "precond", "--learner", "sgd"], "needs Adam"),
        (["--lr", 1e30, "--learner", "sgd"], "not finite|is nan|is inf"),
    ],
)
def test_mistakes_are_one_line(words, said, run, capsys):
    import re

    code, _ = run("-m", "BPR", *words)
    error = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error")]
    assert code == 2 and len(error) == 1 and re.search(said, error[0]), error


def test_other_features_are_not_mixed_into_a_run(run, planted, tmp_path, capsys):
    from mirror_grad import layout

    other = shutil.copytree(planted, tmp_path / "data")
    (other / "planted.inter").rename(other / "data.inter")
    words = ["-m", "VBPR", "--run-name", "mirror-x", "-d", other]
    run(*words, "--epochs", 1)
    layout.write_feature_file(other / "text_feat.npy", np.ones((60, 10)))
    code, _ = run("--resume", tmp_path / "runs" / "mirror-x", "-m", "VBPR", "-d", other, "--epochs", 2)
    assert code == 2 and "data" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns(model, run):
    """Planted groups, judged on test: far above popularity, which knows no groups. MVGAE needs the long run."""
    words = ["--not_mg", "--epochs", 30, "--eval-every", 3, "--baselines", "popularity", "--report", 0]
    code, [path] = run("-m", model, *words)
    popularity = result_of(path)["baselines"]["popularity"]["test"]["recall@10"]
    assert code == 0 and result_of(path)["test"]["recall@10"] > (1.25 if model == "BPR" else 1.7) * popularity


@pytest.mark.slow
@pytest.mark.parametrize("model", TRAINED)
def test_every_mirror_mode_trains_every_model_about_as_well(model, run):
    """Finite everywhere, and the ranking on planted groups stays within reach of ordinary training's.

    Means of three seeds: 160 validation pairs give one seed a spread of a third, and so the mean one of a fifth.
    """
    words = ["-m", model, "--epochs", 12, "--baselines", "none", "--report", 0]
    found = {}
    for mode in ("off", "two_step", "fused", "precond", "sgd_mirror", "backstitch", "repeat"):
        values = []
        for seed in (1, 2, 3):
            code, [path] = run(*words, "--mirror", mode, "--alpha2", 0.2, "--seed", seed, out=f"{mode}-{seed}")
            assert code == 0 and all(np.isfinite(row["train/loss"]) for row in rows_of(path))
            values.append(result_of(path)["val"]["recall@10"])
        found[mode] = np.mean(values)
    assert min(found.values()) > 0.6 * found["off"], found
