"""Recommendations are those that were judged, under the names of the source."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from gfml import load as load_run
from gfml.base.errors import UserError
from gfml.base.runs import read_result
from gfml.program.cli import run_main
from gfml.program.recommend import Lists, main, recommend, recommend_new, similar_items, write_csv, write_json
from recsys.main import main as train_main

ROOT = Path(__file__).resolve().parents[2]


def rows_of(capsys, *argv):
    capsys.readouterr()
    assert run_main(main, [str(word) for word in argv]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A run on a file in which users are u0, u1, ... and items 1000, 1007, ..., and the file."""
    folder = tmp_path_factory.mktemp("named")
    drawn = np.random.default_rng(5)
    pairs = {
        (int(user), int(item)) for user, item in zip(drawn.integers(0, 25, 500), drawn.zipf(1.3, 500) % 30, strict=True)
    }
    lines = ["user,item", *(f"u{user},{1000 + 7 * item}" for user, item in sorted(pairs))]
    (folder / "mine.csv").write_text("\n".join(lines) + "\n")
    flags = ["--dataset", str(folder / "mine.csv"), "--no-cache", "--out", str(folder), "--run-name", "run", "--epochs", "3",
             "--eval-every", "1", "--baselines", "none", "--report", "0", "--topks", "5", "--es_metric", "ndcg@5", "--lr", "2e-2",
             "--embedding-dim", "8", "--no-progress"]  # fmt: skip
    assert run_main(train_main, flags) == 0
    return folder


# -- lists


@pytest.mark.parametrize("name", ["gravity", "bpr", "mix", "lgn"])
def test_lists_are_those_that_were_judged(finished, name):
    run, arrays = load_run(finished[name]), np.load(finished[name] / "analysis.npz")
    lists = recommend(run, arrays["test_users"].tolist(), 10)
    np.testing.assert_array_equal(lists.items, arrays["top"])
    assert (np.diff(lists.columns["score"], axis=1) <= 1e-5).all()


def test_a_refit_run_recommends_with_its_refit_weights(train, tmp_path):
    path = train(tmp_path, "refit", "--refit", "--epochs", "4", "--model", "lgn")
    arrays = np.load(path / "analysis.npz")
    np.testing.assert_array_equal(recommend(load_run(path), arrays["test_users"].tolist(), 10).items, arrays["top"])


def test_scores_and_probabilities_are_those_of_the_formula(finished):
    """g = M(a_u) + M(a_i) - lambda log(|x - y|^2 + eps) on unit vectors, item by item in float64; user mass included."""
    run = load_run(finished["gravity"])
    state = {name: value.double() for name, value in run.model.state_dict().items()}
    vectors = torch.nn.functional.normalize(state["encoder.nodes"], dim=1)
    lists = recommend(run, [3, 0], 4)
    for row, user in enumerate((3, 0)):
        for rank, item in enumerate(lists.items[row].tolist()):
            sq_distance = (vectors[user] - vectors[60 + item]).square().sum()
            mass = sum(
                math.log1p(math.exp(state[f"gravity.mass.{side}"][at])) for side, at in (("user", user), ("item", item))
            )
            score = mass - math.log(sq_distance + 0.01)
            assert lists.columns["score"][row, rank] == pytest.approx(score, abs=2e-5)
            assert lists.columns["probability"][row, rank] == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "logit"),
    [
        ("--loss_mode dot", True), ("--loss_mode bpr", False), ("--loss_mode mix", True), ("--loss_mode bpr_gra", True),
        ("--loss_mode cml", False), ("--loss_mode gravity --infer_mode dot", False), ("--loss_mode bpr --infer_mode gravity", True),
        ("--loss_mode dot --infer_mode dot", True),
    ],
)  # fmt: skip
def test_probabilities_stand_only_where_scores_mean_one(train, tmp_path, flags, logit):
    run = load_run(train(tmp_path, "run", *flags.split()))
    assert run.experiment.is_logit(run.model) == logit
    assert ("probability" in recommend(run, [0], 3).columns) == logit


def test_seen_items_are_left_out_unless_asked_for(finished):
    run = load_run(finished["gravity"])
    seen = run.data.train_and_valid.toarray() > 0
    masked = recommend(run, range(60), 40)
    everything = recommend(run, range(60), 40, include_seen=True)
    for user in range(60):
        shown = masked.items[user][masked.items[user] >= 0]
        assert not seen[user, shown].any() and len(shown) == 40 - seen[user].sum()
    assert (np.sort(everything.items, axis=1) == np.arange(40)).all()


def test_lists_do_not_depend_on_company_or_order(finished):
    run = load_run(finished["lgn"])
    whole, some = recommend(run, range(60), 7), recommend(run, [41, 2, 41], 7)
    np.testing.assert_array_equal(some.items, whole.items[[41, 2, 41]])
    np.testing.assert_allclose(some.columns["score"], whole.columns["score"][[41, 2, 41]], rtol=1e-5)


def test_scores_come_block_by_block(finished, monkeypatch):
    run = load_run(finished["mix"])
    whole = recommend(run, range(60), 5)
    monkeypatch.setattr("gfml.ranking.lists.ROWS", 7)
    blocks = recommend(run, range(60), 5)
    np.testing.assert_array_equal(blocks.columns["score"], whole.columns["score"])


def test_users_without_history_are_counted(train, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("0 1 2 3 4 5 6\n1\n2 1 2 3 7 8 9\n")
    (tmp_path / "test.txt").write_text("0 7\n1 3\n2 5\n")
    flags = [
        "--out",
        str(tmp_path),
        "--run-name",
        "run",
        "--baselines",
        "none",
        "--report",
        "0",
        "--no-cache",
        "--no-progress",
    ]
    assert (
        run_main(
            train_main, ["--dataset", str(tmp_path), "--epochs", "1", "--topks", "2", "--es_metric", "ndcg@2", *flags]
        )
        == 0
    )
    rows = rows_of(capsys, tmp_path / "run", "--user", "1", "--top", "3")
    assert len(rows) == 3
    assert run_main(main, [str(tmp_path / "run"), "--all-users"]) == 0
    assert "1 of 3 users have no train interactions" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["bpr", "gravity"])
def test_new_users_of_a_graph_are_propagated(train, tmp_path, monkeypatch, loss):
    """Their items are ranked as for the known user who has them, without a gradient step."""
    monkeypatch.setattr("gfml.ranking.foldin.user_vectors", None)
    run = load_run(train(tmp_path, "run", "--model", "lgn", "--loss_mode", loss, "--epochs", "40", "--lr", "1e-2"))
    known, ranks = run.experiment.scorer(run.model).score(torch.arange(20)).detach(), []
    for user in range(20):
        items = run.data.train[[user]].indices
        found = recommend_new(run, items, run.data.num_items, include_seen=True)
        ranks.append(spearmanr(known[user, found.items[0]], found.columns["score"][0]).statistic)
        if user == 0:
            own = recommend_new(run, items, run.data.num_items)
            assert not set(items) & set(own.items[own.items >= 0].tolist())
    assert np.mean(ranks) > 0.9


# -- nearest items


@pytest.mark.parametrize(
    ("flags", "unit"),
    [("--loss_mode gravity", True), ("--loss_mode gravity --emb_norm 0", False), ("--loss_mode bpr", True),
     ("--model cml --loss_mode cml", False), ("--model lgn --loss_mode mix", True)],
)  # fmt: skip
def test_nearest_items_by_brute_force(train, tmp_path, flags, unit):
    run = load_run(train(tmp_path, "run", *flags.split()))
    vectors = run.model.encoder.vectors()[1].detach().double().numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if unit else vectors
    found = similar_items(run, [0, 13], 6)
    for row, item in enumerate((0, 13)):
        distances = [math.fsum((a - b) ** 2 for a, b in zip(vectors[item], other, strict=True)) for other in vectors]
        expected = sorted((other for other in range(40) if other != item), key=distances.__getitem__)[:6]
        assert found.items[row].tolist() == expected
        np.testing.assert_allclose(
            found.columns["sq_distance"][row], [distances[other] for other in expected], atol=2e-6
        )


def test_nearest_items_under_kl_start_from_the_given_item(train, tmp_path):
    run = load_run(train(tmp_path, "run", "--dist_mode", "kl"))
    p = 1 / (1 + np.exp(-run.model.encoder.vectors()[1].detach().double().numpy()))
    found = similar_items(run, [5], 39)
    expected = [(p[5] * np.log(p[5] / q) + (1 - p[5]) * np.log((1 - p[5]) / (1 - q))).sum() for q in p[found.items[0]]]
    np.testing.assert_allclose(found.columns["sq_distance"][0], expected, atol=1e-6)


def test_the_catalogue_bounds_the_neighbours(finished):
    found = similar_items(load_run(finished["bpr"]), [7], 1000)
    assert sorted(found.items[0].tolist()) == [item for item in range(40) if item != 7]


# -- names, titles, forms


def test_users_and_items_go_by_the_names_of_the_source(named, capsys):
    rows = rows_of(capsys, named / "run", "--user", "u7", "u11", "--top", "3")
    assert [row["user"] for row in rows] == ["u7"] * 3 + ["u11"] * 3
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2
    assert all((int(row["item"]) - 1000) % 7 == 0 for row in rows)
    taken = {tuple(line.split(",")) for line in (named / "mine.csv").read_text().split()[1:]}
    run = load_run(named / "run")
    held_out = {
        (str(run.data.user_ids[u]), str(run.data.item_ids[i])) for u, i in zip(*run.data.test.nonzero(), strict=True)
    }
    assert not {(row["user"], row["item"]) for row in rows} & (taken - held_out)


def test_nearest_items_go_by_their_names(named, capsys):
    rows = rows_of(capsys, named / "run", "--similar-items", "1007", "--top", "4")
    assert list(rows[0]) == ["similar_to", "rank", "item", "sq_distance"]
    assert {row["similar_to"] for row in rows} == {"1007"} and "1007" not in {row["item"] for row in rows}
    distances = [float(row["sq_distance"]) for row in rows]
    assert distances == sorted(distances)


def test_all_users(named, capsys):
    rows = rows_of(capsys, named / "run", "--all-users", "--top", "2")
    assert len({row["user"] for row in rows}) == load_run(named / "run").data.num_users == len(rows) / 2


def test_json_says_the_same_as_csv(named, tmp_path, capsys):
    rows = rows_of(capsys, named / "run", "--user", "u3", "u4", "--top", "5")
    output = tmp_path / "deep" / "lists.json"
    assert (
        main([str(named / "run"), "--user", "u3", "u4", "--top", "5", "--format", "json", "--output", str(output)]) == 0
    )
    assert capsys.readouterr().out == ""
    flat = [{"user": entry["user"], **item} for entry in json.loads(output.read_text()) for item in entry["items"]]
    assert [{key: str(value) for key, value in row.items()} for row in flat] == rows
    assert isinstance(flat[0]["item"], int) and isinstance(flat[0]["user"], str)


def test_titles_become_a_column(named, tmp_path, capsys):
    (tmp_path / "titles.csv").write_text(
        'id,year,title\n1007,1995,"Heat, the film"\n5,1999,Not there\n', encoding="utf-8"
    )
    rows = rows_of(capsys, named / "run", "--similar-items", "1000", "--top", "29", "--titles", tmp_path / "titles.csv")
    assert {row["item"]: row["title"] for row in rows if row["title"]} == {"1007": "Heat, the film"}


def test_known_data_sets_bring_their_titles(shared_data, tmp_path, capsys):
    flags = ["--dataset", "ml100k", "--data-root", str(shared_data), "--out", str(tmp_path), "--run-name", "run", "--epochs", "0",
             "--baselines", "none", "--report", "0", "--cache-dir", str(tmp_path), "--no-progress"]  # fmt: skip
    assert run_main(train_main, flags) == 0
    rows = rows_of(capsys, tmp_path / "run", "--user", "196", "--top", "3")
    assert len(rows) == 3 and all(len(row["title"]) > 3 for row in rows)


def test_a_list_that_ends_early_has_no_filler():
    lists = Lists("user", ["a"], np.array([[2, -1]]), {"score": np.array([[0.25, np.nan]])}, ["x", "y", "z"])
    as_csv, as_json = io.StringIO(), io.StringIO()
    write_csv(lists, as_csv, None)
    write_json(lists, as_json, None)
    assert as_csv.getvalue() == "user,rank,item,score\na,1,z,0.25\n"
    assert json.loads(as_json.getvalue()) == [{"user": "a", "items": [{"rank": 1, "item": "z", "score": 0.25}]}]


def test_names_of_any_kind_survive_csv():
    lists = Lists("user", ['a,"b"'], np.array([[0]]), {}, ["x\ny"])
    stream = io.StringIO()
    write_csv(lists, stream, ["é, ö"])
    assert list(csv.DictReader(io.StringIO(stream.getvalue(), newline=""))) == [
        {"user": 'a,"b"', "rank": "1", "item": "x\ny", "title": "é, ö"}
    ]


def test_a_reader_that_leaves_early_is_no_error(finished):
    # Far more than a pipe holds.
    command = [sys.executable, str(ROOT / "recsys" / "recommend.py"), str(finished["bpr"]), "--user", *["0"] * 8000]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom recsys.recommend import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'numpy', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# -- moved files


def test_the_files_a_run_started_from_may_be_gone(train, tmp_path):
    first = train(tmp_path, "first")
    second = train(tmp_path, "second", "--pretrain", "1", "--pretrain-file", str(first))
    shutil.rmtree(first)
    assert recommend(load_run(second), [0], 3).items.shape == (1, 3)


def test_run_and_data_may_move(named, fail, tmp_path, capsys):
    expected = rows_of(capsys, named / "run", "--user", "u3")
    shutil.copytree(named / "run", tmp_path / "moved")
    shutil.copy(named / "mine.csv", tmp_path / "theirs.csv")
    config = tmp_path / "moved" / "config.toml"
    config.write_text(config.read_text().replace("mine.csv", "gone.csv"))
    assert "gone.csv" in fail(main, str(tmp_path / "moved"), "--user", "u3")
    assert rows_of(capsys, tmp_path / "moved", "--user", "u3", "--dataset", tmp_path / "theirs.csv") == expected


# -- bad inputs


def test_unknown_ids(named, fail):
    line = fail(main, str(named / "run"), "--user", "u3", "u3x")
    assert "unknown user 'u3x'" in line and "did you mean 'u3'" in line
    line = fail(main, str(named / "run"), "--similar-items", "10007")
    assert "unknown item '10007'" in line and "did you mean '1007'" in line


def test_rows_that_do_not_exist(finished, fail):
    assert "unknown user '60', wanted one of the 60 users of synthetic, such as 0, 1, 2" in fail(
        main, str(finished["bpr"]), "--user", "60"
    )
    assert "unknown user '-1'" in fail(main, str(finished["bpr"]), "--user", "-1")


def test_runs_that_cannot_recommend(finished, fail, tmp_path):
    assert "there is no run" in fail(main, str(tmp_path / "nowhere"), "--user", "0")
    run = tmp_path / "run"
    shutil.copytree(finished["bpr"], run)
    (run / "final.pt").write_bytes((run / "final.pt").read_bytes()[:300])
    assert "final.pt" in fail(main, str(run), "--user", "0")
    (run / "done").unlink()
    assert "not finished (incomplete)" in fail(main, str(run), "--user", "0")


def test_changed_data(named, fail, tmp_path):
    lines = (named / "mine.csv").read_text().splitlines()
    (tmp_path / "shorter.csv").write_text("\n".join(lines[:-40]) + "\n")
    line = fail(main, str(named / "run"), "--user", "u3", "--dataset", str(tmp_path / "shorter.csv"))
    assert "data has changed" in line and read_result(named / "run")["data"]["fingerprint"][:12] in line


def test_weights_of_another_model(finished, fail, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished["bpr"], run)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("embedding-dim = 8", "embedding-dim = 9"))
    assert "of another model" in fail(main, str(run), "--user", "0")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--user", "--all-users", "--similar-items", "required"]),
        (["--user", "0", "--all-users"], ["not allowed with"]),
        (["--user", "0", "--top", "0"], ["--top", ">= 1"]),
        (["--user", "0", "--titles", "no/such.csv"], ["no/such.csv"]),
        (["--user", "0", "--formt", "csv"], ["unknown flag --formt", "did you mean '--format'"]),
    ],
)
def test_bad_flags(finished, fail, argv, words):
    line = fail(main, str(finished["bpr"]), *argv)
    for word in words:
        assert word in line


def test_bad_titles_and_output(finished, fail, tmp_path):
    (tmp_path / "titles.csv").write_text("number,name\n1,x\n")
    assert "titles.csv has no id" in fail(
        main, str(finished["bpr"]), "--user", "0", "--titles", str(tmp_path / "titles.csv")
    )
    (tmp_path / "others.csv").write_text("id,title\n99,x\n")
    assert "no title for any of the 40 items" in fail(
        main, str(finished["bpr"]), "--user", "0", "--titles", str(tmp_path / "others.csv")
    )
    assert "cannot write" in fail(
        main, str(finished["bpr"]), "--user", "0", "--output", str(tmp_path / "titles.csv" / "x")
    )


# -- new users, filters, forms


def test_a_new_user_is_recommended_from_his_items(finished, named, capsys):
    run = load_run(finished["gravity"])
    known = run.interactions.train_and_valid
    user = int(np.argmax(np.diff(known.indptr)))
    own = known[[user]].indices
    new = recommend_new(run, own.tolist(), 10)
    assert not set(new.items[0].tolist()) & set(own.tolist()) and new.keys == ["new"]
    trained = recommend(run, [user], 10).items[0].tolist()
    assert len(set(trained) & set(new.items[0].tolist())) >= 3
    (named / "have.txt").write_text("1007\n1000\n")
    flags = (named / "run", "--top", "4", "--device", "cpu")
    rows = rows_of(capsys, *flags, "--items", "1000,1007")
    assert rows == rows_of(capsys, *flags, "--items-file", named / "have.txt")
    with pytest.raises(UserError, match="unknown item 'a', .*names have a comma are read from --items-file"):
        main([str(word) for word in (*flags, "--items", "1000,a,b")])
    assert (
        len(rows) == 4
        and {row["user"] for row in rows} == {"new"}
        and not {row["item"] for row in rows} & {"1000", "1007"}
    )
    assert {
        row["item"] for row in rows_of(capsys, named / "run", "--items", "1000", "--include-seen", "--top", "99")
    } >= {"1000"}


def test_filters_by_files(named, capsys):
    (named / "only.txt").write_text("1000\n1007\n1014\nnobody\n")
    (named / "not.txt").write_text("1007\n")
    flags = (named / "run", "--user", "u0", "u1", "--include-seen")
    rows = rows_of(capsys, *flags, "--only", named / "only.txt", "--not", named / "not.txt")
    assert {row["user"]: {row["item"]} for row in rows}.keys() == {"u0", "u1"} and {row["item"] for row in rows} == {
        "1000",
        "1014",
    }
    assert rows[0]["rank"] == "1" and len(rows) == 4
    near = rows_of(capsys, named / "run", "--similar-items", "1000", "--only", named / "only.txt")
    assert {row["item"] for row in near} == {"1007", "1014"}
    main([str(word) for word in (*flags, "--only", named / "only.txt")])
    assert "1 ids of" in capsys.readouterr().err
    (named / "none.txt").write_text("nobody\n")
    with pytest.raises(UserError, match="leave none of the"):
        main([str(word) for word in (*flags, "--only", named / "none.txt")])


def test_one_user_alone_and_among_all_gets_the_same_numbers(named):
    run = load_run(named / "run")
    every = recommend(run, range(run.interactions.num_users), 5)
    for user in (0, 11, 24):
        alone = recommend(run, [user], 5)
        assert np.array_equal(alone.items[0], every.items[user])
        assert np.array_equal(alone.columns["score"][0], every.columns["score"][user])


def test_parquet_and_formulas(named, capsys):
    import pyarrow.parquet as pq

    flags = (str(named / "run"), "--user", "u0", "u3", "--top", "3")
    # The form is that of the ending unless --format says another.
    for file, more in (
        ("lists.parquet", ()),
        ("lists.json", ()),
        ("lists.CSV", ()),
        ("other.json", ("--format", "csv")),
    ):
        assert run_main(main, [*flags, *more, "--output", str(named / file)]) == 0
    assert json.loads((named / "lists.json").read_text())
    assert (named / "lists.CSV").read_text() == (named / "other.json").read_text()
    table, rows = pq.read_table(named / "lists.parquet").to_pylist(), rows_of(capsys, *flags)
    assert [(row["user"], str(row["item"]), row["rank"]) for row in table] == [
        (r["user"], r["item"], int(r["rank"])) for r in rows
    ]
    lists = Lists("user", ["=u"], np.array([[0]]), {"score": np.array([[-0.5]])}, ["@item"])
    safe, raw = io.StringIO(), io.StringIO()
    write_csv(lists, safe, ["=1+1"])
    write_csv(lists, raw, ["=1+1"], raw=True)
    assert safe.getvalue().splitlines()[1] == "'=u,1,'@item,'=1+1,-0.5"
    assert raw.getvalue().splitlines()[1] == "=u,1,@item,=1+1,-0.5"
