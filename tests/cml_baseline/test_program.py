"""``cml_baseline/main.py`` and its companions from flags to files: every option, resume, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cml_baseline import experiment, report
from cml_baseline.data import hide_items
from cml_baseline.experiment import CML
from cml_baseline.main import PROGRAM, main
from gfml.base.checkpoints import load_state
from gfml.base.errors import UserError
from gfml.base.runs import read_metrics, read_result
from gfml.data.items import by_title
from gfml.data.options import load_dataset
from gfml.data.readers import read_counted_lists
from gfml.program import index
from gfml.program.cli import run_main

TINY = ["--dataset", "demo", "--demo-users", "60", "--demo-items", "80", "--demo-interactions", "1500", "--dim", "8",
        "--topks", "5", "10", "--select-metric", "recall@10", "--batch-size", "200", "--epochs", "3", "--threads", "1",
        "--device", "cpu", "--baselines", "popularity", "--report", "0"]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """run(*flags): train the tiny data in a fresh folder; the run's path."""

    def start(*flags, name="r"):
        assert run_main(main, [*TINY, "--out", str(tmp_path), "--run-name", name, *flags]) == 0
        return tmp_path / name

    return start


def test_gradients_by_formula_train_as_those_of_autograd_and_both_say_so(run, monkeypatch, capsys):
    found = []
    for name, reason in (("formula", None), ("autograd", "as asked")):
        if reason:
            monkeypatch.setattr(CML, "fused_or_reason", lambda *_: reason)
        path = run("--optimizer", "adam", name=name)
        assert f"gradients by {name}" in capsys.readouterr().err
        found.append(load_state(path / "final.pt")["model"]["encoder.nodes"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    run("--cov-weight", "0.1", name="covariance")
    assert "gradients by autograd: a covariance penalty" in capsys.readouterr().err


def items_file(tmp_path, num_items=80, name="items.csv"):
    """Titles, genres and two numbers for all but the last item."""
    rng = np.random.default_rng(0)
    rows = [
        f"{i},Film {i},{'Drama|War' if i % 2 else 'Comedy'},{rng.random():.3f},{rng.random():.3f}"
        for i in range(num_items - 1)
    ]
    (tmp_path / name).write_text("\n".join(["item,title,genres,a,b", *rows]) + "\n")
    return str(tmp_path / name)


def epochs_of(path):
    with open(path / "epochs.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# ---------------------------------------------------------------- a run


def test_a_run_learns_prints_its_table_and_stores_it(run, capsys):
    path = run("--epochs", "6", "--patience", "none")
    out = capsys.readouterr().out
    rows, metrics = epochs_of(path), read_metrics(path)
    assert [row["epoch"] for row in rows] == list("123456")
    assert float(rows[-1]["total loss"]) < 0.7 * float(rows[0]["total loss"])
    train = load_dataset("demo", demo_users=60, demo_items=80, demo_interactions=1500).train.nnz
    for row, found in zip(rows, metrics, strict=True):
        assert float(row["total loss"]) == pytest.approx(found["train/loss"] * -(-train // 200), abs=0.06)
        assert float(row["recall@5"]) == pytest.approx(found["val/recall@5"], abs=6e-5)
        assert float(row["seconds"]) >= 0
        assert f"{row['total loss']:>12}  {row['recall@5']:>10}  {row['recall@10']:>10}" in out
    result = read_result(path)
    assert result["epochs"] == rows and result["selection"]["protocol"] == "selected on validation"
    best = max(metrics, key=lambda row: row["val/recall@10"])
    assert result["selection"]["epoch"] == best["epoch"] and result["val"]["recall@10"] == pytest.approx(
        best["val/recall@10"]
    )
    assert result["baselines"]["popularity"]["test"].keys() >= {"recall@10"}
    assert "popularity" in out and "q1_recall@10" in out
    nodes = load_state(path / "final.pt")["model"]["encoder.nodes"]
    assert nodes.shape == (140, 8) and nodes.norm(dim=1).max() <= 1 + 1e-6


def test_eval_only_and_a_second_start_give_the_stored_numbers(run, capsys):
    run()
    capsys.readouterr()
    shown = []
    for flags in (["--eval-only"], []):
        run(*flags)
        out = capsys.readouterr().out
        shown.append(out[out.index("test of demo") :])
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    "flags", (["--optimizer", "adam", "--lr", "0.02"], ["--sampler", "two-stage", "--candidates", "30"], [])
)
def test_a_continued_run_repeats_the_uninterrupted_one(run, flags, tmp_path):
    features = ["--features", items_file(tmp_path)]
    whole = run(*flags, *features, "--epochs", "4", name="whole")
    part = run(*flags, *features, "--epochs", "2", name="part")
    assert run_main(main, ["--resume", str(part), "--epochs", "4"]) == 0
    for name in ("train/loss", "train/hinge", "val/recall@10"):
        assert [row[name] for row in read_metrics(whole)] == [row[name] for row in read_metrics(part)]
    states = [load_state(path / "final.pt")["model"] for path in (whole, part)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [row["total loss"] for row in epochs_of(whole)] == [row["total loss"] for row in epochs_of(part)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--margin", "1.9", "--num-neg", "20", "--clip-norm", "1.1"],
        ["--num-neg", "1", "--no-rank-weight"],
        ["--no-rank-floor", "--reduction", "mean", "--init-std", "0.1"],
        ["--cov-weight", "10"],
        ["--cov-weight", "1", "--cov-form", "paper"],
        ["--cov-weight", "1", "--cov-form", "signed"],
        ["--sampler", "popularity"],
        ["--sampler", "two-stage", "--candidates", "50", "--refresh", "2"],
        ["--optimizer", "adam", "--lr", "0.01", "--clip-grad", "1"],
        ["--optimizer", "adagrad", "--accumulator", "0.1"],
        ["--select-on", "test", "--eval-every", "2", "--tensorboard", "1"],
        ["--mirror", "two_step", "--mirror-every", "2"],
        ["--hide-items", "0.2"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_option_runs_and_counts(run, flags):
    plain, other = run(name="plain"), run(*flags, name="other")
    first, second = (read_metrics(path)[0]["train/loss"] for path in (plain, other))
    assert np.isfinite(second)
    if flags[0] not in ("--select-on",):
        assert first != second
    else:
        assert "optimistic" in read_result(other)["selection"]["protocol"] and (other / "tensorboard").is_dir()
        assert [row["recall@10"] != "" for row in epochs_of(other)] == [False, True, True]


def test_the_mean_reduction_reports_the_same_kind_of_total(run):
    rows = {
        name: epochs_of(run("--epochs", "1", "--lr", "1e-9", "--reduction", name, name=name))
        for name in ("sum", "mean")
    }
    assert float(rows["mean"][0]["total loss"]) == pytest.approx(float(rows["sum"][0]["total loss"]), rel=0.02)


def test_refit_trains_on_validation_too(run):
    path = run("--refit")
    result = read_result(path)
    assert "trained anew" in result["selection"]["protocol"]
    assert result["data"]["valid"] == 0 and (path / f"refit-{result['selection']['epoch']}" / "done").exists()
    assert run_main(main, [*TINY, "--refit", "--out", str(path.parent), "--run-name", "r", "--eval-only"]) == 0


# ---------------------------------------------------------------- features and cold items


def test_features_place_items_that_train_never_shows(run, tmp_path, capsys):
    flags = [
        "--features",
        items_file(tmp_path),
        "--feature-weight",
        "3",
        "--hide-items",
        "0.3",
        "--epochs",
        "4",
        "--patience",
        "none",
    ]
    path = run(*flags)
    captured = capsys.readouterr()
    assert "4 columns for 79 of 80 items" not in captured.err  # a, b and three genres
    assert "5 columns for 79 of 80 items" in captured.err and "items hidden" in captured.err
    result, state = read_result(path), load_state(path / "final.pt")["model"]
    assert result["cold_items"] >= 24 and result["model"] == "cml with features"
    assert "cold_recall@10" in result["test"] and "cold_recall@10" in captured.out
    stored = np.load(path / "analysis.npz")
    moved = ~np.isclose(stored["item"], state["encoder.nodes"][60:].numpy()).all(1)
    # Exactly the cold items that have features rank where the network puts them.
    assert (moved == ((stored["item_popularity"] == 0) & (np.arange(80) < 79))).all()
    assert ((stored["item_offset"] > 0) == moved).all()
    # The exported vectors rank as the evaluation did.
    assert max(row["recall"] for row in experiment.index_vectors(path, "sklearn", top=20)["searches"]) == 1
    user, item = experiment.search_vectors(stored)
    assert user.shape[1] == item.shape[1] == 9
    seen = load_dataset("demo", demo_users=60, demo_items=80, demo_interactions=1500)
    near = index.exact_search(user, item, 10)
    for row, judged in zip(stored["test_users"], stored["top"], strict=True):
        known = set(hide_items(seen, 0.3, 2020).train_and_valid[[row]].indices.tolist())
        assert [i for i in near[row] if i not in known] == [i for i in judged.tolist() if i in near[row]]
    paper = run(*flags, "--cold-offset", "0", name="paper")
    assert read_result(paper)["test"]["cold_exposure@10"] > result["test"]["cold_exposure@10"]
    assert "item_offset" not in np.load(paper / "analysis.npz").files
    assert {"train/features", "train/hinge"} <= read_metrics(path)[0].keys()


def test_chosen_columns_and_no_scaling(run, tmp_path, capsys):
    run(
        "--features",
        items_file(tmp_path),
        "--feature-columns",
        "a",
        "b",
        "--feature-norm",
        "none",
        "--hidden",
        "4",
        "--dropout",
        "0",
    )
    assert "2 columns for 79" in capsys.readouterr().err


def test_hidden_items_are_only_in_test():
    data = load_dataset("demo", demo_users=60, demo_items=80, demo_interactions=1500)
    hidden = hide_items(data, 0.25, 3)
    gone = np.flatnonzero((np.diff(data.train.T.tocsr().indptr) > 0) & (hidden.item_popularity == 0))
    assert 0 < len(gone) <= 20 and hidden.valid[:, gone].nnz == 0
    assert (hidden.test != data.test).nnz == 0 and hidden.fingerprint != data.fingerprint
    assert hidden.fingerprint == hide_items(data, 0.25, 3).fingerprint != hide_items(data, 0.25, 4).fingerprint


# ---------------------------------------------------------------- index and report


@pytest.mark.parametrize("kind", ("sklearn", "faiss"))
def test_export_finds_the_exact_neighbours(run, kind, capsys):
    if kind == "faiss":
        pytest.importorskip("faiss")
    path = run("--ann", kind)
    assert "recall@80" in capsys.readouterr().out
    found = json.loads((path / "ann" / "ann.json").read_text())
    assert found["kind"] == kind and found["items"] == 80
    assert max(row["recall"] for row in found["searches"]) > 0.99
    stored, analysis = np.load(path / "ann" / "vectors.npz"), np.load(path / "analysis.npz")
    assert np.array_equal(stored["item"], analysis["item"]) and stored["user"].shape == (60, 8)
    assert experiment.index_vectors(path, kind, top=5)["top"] == 5
    if kind == "faiss":
        import faiss

        index = faiss.deserialize_index(np.fromfile(path / "ann" / "index.faiss", dtype=np.uint8))
        assert index.ntotal == 80


def test_a_bare_flag_picks_what_is_there_also_later(run, capsys):
    path = run()
    assert not (path / "ann").exists()
    run("--ann")
    assert (path / "ann" / "vectors.npz").exists() and "is done" in capsys.readouterr().out


def test_recall_counts_what_is_as_near_as_the_exact_list():
    """Of equally near items any may stand in it; repeats and places without an item count nothing."""
    items = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [3, 0], [0.5, 0]], dtype=np.float32)
    query, exact = np.zeros((1, 2), np.float32), np.array([[5, 0]])
    for found, wanted in (
        ([5, 0], 1),
        ([3, 5], 1),
        ([1, 2], 1),
        ([5, 4], 0.5),
        ([5, 5], 0.5),
        ([5, -1], 0.5),
        ([4, -1], 0),
    ):
        assert index.distance_recall(query, items, np.array([found]), exact) == wanted


def test_exact_indexes_are_exact_where_items_are_equally_near():
    generator = np.random.default_rng(0)
    items = generator.integers(0, 3, (300, 4)).astype(np.float32)  # many equal points
    queries = generator.integers(0, 3, (50, 4)).astype(np.float32)
    exact = index.exact_search(queries, items, 20)
    (row,) = index._tree_rows(items, queries, exact, 20)
    assert row["recall"] == 1.0


def test_the_report_shows_map_and_neighbours(run, tmp_path):
    path = run("--report", "1", "--item-info", items_file(tmp_path), "--ann", "sklearn")
    text = (path / "report" / "report.md").read_text()
    assert (path / "report" / "map.png").stat().st_size > 10_000
    for piece in ("Metrics", "total loss", "Film ", "share a genre", "t-SNE", "ball tree", "Nearest neighbours"):
        assert piece in text
    written = report.draw([path], tmp_path / "other", projection="pca", of=["Film 3"])
    text = (tmp_path / "other" / "report.md").read_text()
    assert "principal components" in text and written.name == "report.html"
    assert text.count("Film 3 (Drama, War)") == 1


def test_neighbours_and_genre_agreement():
    vectors = np.array([[0.0, 0], [1, 0], [0, 3], [0.1, 0]])
    ids, sq_distance = report.nearest(vectors, np.array([0, 2]), np.arange(4), 2)
    assert ids.tolist() == [[3, 1], [0, 3]]
    np.testing.assert_allclose(sq_distance, [[0.01, 1], [9, 9.01]])
    rng = np.random.default_rng(0)
    side = np.arange(40) % 2
    near = rng.normal(size=(40, 2)) + 50 * side[:, None]
    items = report.Items([f"i{i}" for i in range(40)], [(str(s),) for s in side], np.arange(40)[::-1], near)
    assert report.genre_agreement(items) == (1.0, pytest.approx(0.5, abs=0.01))
    assert report.well_known(items)[:2] != [0, 1] or len(set(report.well_known(items))) == 10
    assert report.genre_agreement(report.Items(items.titles, [()] * 40, items.popularity, near)) is None


# ---------------------------------------------------------------- data


def test_movielens_is_the_usual_data_where_it_lies(shared_data, capsys):
    options = PROGRAM.parse(["--data-root", str(shared_data)])
    assert (options.dataset, options.split, options.split_ratios) == ("ml1m", "per-user", (0.6, 0.2, 0.2))
    assert "MovieLens-1M" in capsys.readouterr().err
    assert PROGRAM.parse(["--dataset", "citeulike-a"]).split is None
    assert PROGRAM.parse(["--dataset", "ml100k", "--split", "time"]).split == "time"


@pytest.mark.parametrize("name", ("ml1m", "ml1m-cold"))
def test_stored_settings_parse(name):
    file = Path(__file__).parents[2] / "configs" / "cml_baseline" / f"{name}.toml"
    assert PROGRAM.parse(["--config", str(file)]).margin == 1.0


@pytest.mark.slow
def test_five_epochs_of_movielens(shared_data, tmp_path):
    """Far above what the port that this follows ends at (0.2642), after a fifth of its epochs."""
    flags = [
        "--data-root",
        str(shared_data),
        "--dim",
        "50",
        "--epochs",
        "5",
        "--report",
        "0",
        "--baselines",
        "popularity",
    ]
    assert run_main(main, [*flags, "--out", str(tmp_path), "--run-name", "r", "--threads", "1"]) == 0
    result = read_result(tmp_path / "r")
    assert result["test"]["recall@50"] > 0.35 and result["test"]["recall@100"] > 0.48
    assert result["baselines"]["popularity"]["test"]["recall@50"] == pytest.approx(0.1997, abs=0.003)
    assert float(result["epochs"][0]["total loss"]) == pytest.approx(2.83e6, rel=0.03)


def test_without_movielens_the_demo_is_used_and_said(tmp_path, capsys):
    options = PROGRAM.parse(["--data-root", str(tmp_path)])
    assert options.dataset == "demo" and options.resolved["dataset"] == "demo" and options.split is None
    assert f"the embedded demo (MovieLens-1M is not in {tmp_path})" in capsys.readouterr().err


def test_citeulike_counts_are_no_items_unless_asked_for(tmp_path):
    (tmp_path / "citeulike-t").mkdir()
    file = tmp_path / "citeulike-t" / "users.dat"
    file.write_text("2 10 30\n0\n3 30 2 40\n")
    assert read_counted_lists(file).items.tolist() == [10, 30, 30, 2, 40]
    assert read_counted_lists(file).users.tolist() == [0, 0, 2, 2, 2]
    legacy = read_counted_lists(file, counts_as_items=True)
    assert legacy.items.tolist() == [2, 10, 30, 0, 3, 30, 2, 40] and legacy.users.tolist() == [0] * 3 + [1] + [2] * 4
    for name, pairs in (("citeulike-t", 5), ("citeulike-t-counts", 8)):
        data = load_dataset(name, data_root=tmp_path, cache=False)
        assert data.train.nnz + data.valid.nnz + data.test.nnz == pairs
    file.write_text("2 10 30\n3 5\n")
    with pytest.raises(UserError, match="line 2: found 1 items after the count 3"):
        read_counted_lists(file)


# ---------------------------------------------------------------- what the user can mend


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "nowhere.npz"], "there is no file nowhere.npz"),
        (["--topks", "100"], "wanted at most the 80 items"),
        (["--resume", "nowhere"], "there is no file nowhere/config.toml"),
        (["--candidates", "5"], "--candidates belongs to --sampler two-stage"),
        (["--dropout", "0.1"], "--dropout belongs to --features FILE"),
        (["--optimizer", "adam", "--accumulator", "0.1"], "--accumulator belongs to --optimizer adagrad"),
        (["--select-metric", "recall"], "wanted one of recall, ndcg"),
        (["--refit", "--select-on", "test"], "--refit needs selection on validation"),
        (["--mirror", "two_step", "--clip-grad", "1"], "give --mirror-clip instead"),
        (["--cov-form", "square"], "did you mean 'squared'"),
        (["--baselines", "none", "ease"], "cannot stand beside others"),
        (["--margn", "1"], "did you mean '--margin'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    try:
        code = run_main(main, [*TINY, "--out", str(tmp_path), *flags])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and message in error


def test_features_of_another_width_do_not_load(run, tmp_path, capsys):
    path = run("--features", items_file(tmp_path))
    (tmp_path / "items.csv").write_text((tmp_path / "items.csv").read_text().replace("Comedy", "Drama"))
    assert (
        run_main(
            main,
            [
                *TINY,
                "--features",
                str(tmp_path / "items.csv"),
                "--out",
                str(tmp_path),
                "--run-name",
                "r",
                "--eval-only",
            ],
        )
        == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot use the checkpoint" in error and str(path / "final.pt") in error


def test_another_run_s_checkpoint_is_refused(run, capsys):
    first, second = run("--dim", "8", name="a"), run("--dim", "6", name="b")
    (second / "last.pt").write_bytes((first / "last.pt").read_bytes())
    (second / "done").unlink()
    assert run_main(main, ["--resume", str(second)]) == 2
    assert "of another model" in capsys.readouterr().err
    (second / "final.pt").write_bytes((first / "final.pt").read_bytes())
    (second / "done").touch()
    assert run_main(main, ["--resume", str(second), "--eval-only"]) == 2
    assert "of another model" in capsys.readouterr().err


def test_the_report_wants_a_finished_run(run, tmp_path, capsys):
    assert run_main(report.main, [str(tmp_path / "none")]) == 2
    assert "there is no run at" in capsys.readouterr().err
    path = run()
    (path / "done").unlink()
    assert run_main(report.main, [str(path)]) == 2
    assert "not finished" in capsys.readouterr().err


def test_an_unknown_title_names_a_near_one(run, tmp_path, capsys):
    path = run("--item-info", items_file(tmp_path))
    assert run_main(report.main, [str(path), "--of", "Fim 12"]) == 2
    assert "did you mean 'Film" in capsys.readouterr().err
    assert [by_title(name, ["Alien 3", "Alien", "Fargo (1996)"]) for name in ("Alien (1979)", "fargo")] == [1, 2]


def test_asking_for_faiss_without_it(monkeypatch):
    monkeypatch.setattr(index.importlib.util, "find_spec", lambda name: None)
    assert index._available("auto") == "sklearn"
    with pytest.raises(Exception, match=r"faiss is not installed: pip install -e '.\[ann\]'"):
        index._available("faiss")
