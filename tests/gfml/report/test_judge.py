"""gfml judge: foreign lists of every kind, notes, intervals, other conventions, comparison, other forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gfml.base.errors import UserError
from gfml.report.judge import main

STORED = Path(__file__).resolve().parents[2] / "golden" / "conventions"
VALUES = json.loads((STORED / "values.json").read_text(encoding="utf-8"))
WHERE = ["--train", str(STORED / "train.tsv"), "--test", str(STORED / "truth.tsv")]


def judged(out: Path, *argv: str) -> dict:
    assert main([*WHERE, *argv, "--out", str(out), "--resamples", "100"]) == 0
    return json.loads((out / "judged.json").read_text(encoding="utf-8"))


def test_figures_notes_and_conventions(tmp_path, capsys):
    found = judged(tmp_path / "out", str(STORED / "lists.tsv"), "--metrics-as", "elliot", "recbole", "--graded", "exp1")
    one = found["lists"]["lists.tsv"]
    for metric in ("recall", "precision", "ndcg", "map", "mrr", "hit", "coverage", "gini"):
        assert one["figures"][f"{metric}@10"] == pytest.approx(VALUES["gfml"][f"{metric}@10"], abs=2e-9)
    assert one["as"]["elliot"]["ndcg@10"] == pytest.approx(VALUES["elliot"]["ndcg[ratings]@10"], abs=2e-9)
    assert one["as"]["recbole"]["ndcg@10"] == pytest.approx(VALUES["recbole"]["ndcg@10"], abs=2e-9)
    # Elliot's graded value is over the 56 users with a list, ours over all 57.
    assert one["figures"]["graded_ndcg@10"] == pytest.approx(VALUES["elliot"]["ndcg[ratings]@10"] * 56 / 57, abs=2e-9)
    assert one["notes"] == {
        "listed users without truth, not judged": 3,
        "listed users in neither train nor truth": 1,
        "users with truth and without a list, counted as 0": 1,
        "places taken by the user's own train items": 1,
        "lists of fewer than 20 items, judged as they are": 2,
    }
    text = capsys.readouterr().out
    assert "metrics of this project" in text and "as elliot: Elliot's evaluator" in text and "[0." in text


@pytest.mark.parametrize("form", ["tsv", "csv", "trec", "recbole", "elliot", "warprec", "parquet"])
def test_other_forms_give_the_same_figures(form, tmp_path):
    file = tmp_path / f"lists.{form}"
    first = judged(tmp_path / "a", str(STORED / "lists.tsv"), "--write", f"{form}={file}")
    again = judged(tmp_path / "b", str(file))
    assert again["lists"][file.name]["figures"] == first["lists"]["lists.tsv"]["figures"]


def test_a_trec_run_is_read_by_score_where_trec_reads_it_so(tmp_path):
    """It has ranks and scores; trec_eval looks at the scores alone, in which the stored lists have ties."""
    rows = [line.split("\t") for line in (STORED / "lists.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    run, truth = tmp_path / "run.txt", tmp_path / "truth.tsv"
    run.write_text("".join(f"{u} Q0 {i} {rank} {score} run\n" for u, i, rank, score in rows), encoding="utf-8")
    pairs = (STORED / "truth.tsv").read_text(encoding="utf-8").splitlines()
    truth.write_text("\n".join(line.rpartition("\t")[0] for line in pairs), encoding="utf-8")
    flags = ["--test", str(truth), "--metrics-as", "trec"]
    one = judged(tmp_path / "out", str(run), *flags)["lists"]["run.txt"]
    for name in ("ndcg@10", "map@10", "recall@5"):
        stored = name.replace("@", "[score ties]@")
        assert one["as"]["trec"][name] == pytest.approx(VALUES["pytrec-eval-terrier"][stored], abs=2e-9)
        assert one["figures"][name] == pytest.approx(VALUES["gfml"][name], abs=2e-9)


def test_what_a_table_holds_is_noted(tmp_path):
    """Ranks with gaps, ranks against scores, a third column that may be a rank, columns that nothing reads."""
    users, items = (["u07", "u08"], ["i0001", "i0002", "i0003"])
    ranked = [(u, i, 1 + 2 * n, n, "x") for u in users for n, i in enumerate(items)]
    (tmp_path / "ranked.csv").write_text(
        "user,item,rank,score,who\n" + "".join(",".join(map(str, row)) + "\n" for row in ranked), encoding="utf-8"
    )
    (tmp_path / "bare.tsv").write_text(
        "".join(f"{u}\t{i}\t{n + 1}\n" for u in users for n, i in enumerate(items)), encoding="utf-8"
    )
    found = judged(tmp_path / "out", str(tmp_path / "ranked.csv"), str(tmp_path / "bare.tsv"), "--topks", "3")["lists"]
    notes = found["ranked.csv"]["notes"]
    assert (
        notes["columns not read (who)"] == 1 and notes["gaps in a user's ranks, closed up (rectools keeps them)"] == 4
    )
    assert notes["scores above that of the rank before, ordered by rank"] == 4
    (counted,) = (note for note in found["bare.tsv"]["notes"] if "counts 1, 2, 3" in note)
    assert found["bare.tsv"]["notes"][counted] == 6 and "name it rank" in counted


def test_ratings_of_train_do_not_count(tmp_path):
    lines = (STORED / "train.tsv").read_text(encoding="utf-8").splitlines()
    rated = tmp_path / "train.tsv"
    rated.write_text("\n".join([lines[0] + "\trating", *(f"{line}\t{1 + n % 5}" for n, line in enumerate(lines[1:]))]))
    flags = [str(STORED / "lists.tsv"), "--topks", "10", "--metrics-as", "elliot", "warprec"]
    plain, weighed = (judged(tmp_path / name, *flags, "--train", str(file))["lists"]["lists.tsv"]
                      for name, file in (("a", STORED / "train.tsv"), ("b", rated)))  # fmt: skip
    assert plain["figures"] == weighed["figures"] and plain["as"] == weighed["as"]


def test_a_list_without_any_hit_is_judged(tmp_path):
    """One user whose only item is known and not in the truth: figures of 0, no error about ids."""
    for name, text in (
        ("train", "user,item\na,1\na,2\n"),
        ("test", "user,item\na,3\n"),
        ("list", "user,item,rank\na,2,1\n"),
    ):
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    flags = [flag for name in ("train", "test") for flag in (f"--{name}", str(tmp_path / f"{name}.csv"))]
    assert main([str(tmp_path / "list.csv"), *flags, "--out", str(tmp_path / "out"), "--topks", "1"]) == 0
    found = json.loads((tmp_path / "out" / "judged.json").read_text(encoding="utf-8"))
    assert found["lists"]["list.csv"]["figures"]["recall@1"] == 0


def test_a_run_against_a_file(tmp_path):
    """A stored run is read by the names of its data, and both are judged by the same truth."""
    run = tmp_path / "run"
    run.mkdir()
    rows = [line.split("\t") for line in (STORED / "lists.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    users = list(dict.fromkeys(row[0] for row in rows))
    items = sorted({row[1] for row in rows})
    top = np.full((len(users), 20), -1, np.int32)
    for user, item, rank, _ in rows:
        top[users.index(user), int(rank) - 1] = items.index(item)
    np.savez(run / "analysis.npz", top=top, test_users=np.arange(len(users)), user_names=users, item_names=items)
    worse = tmp_path / "worse.tsv"
    worse.write_text("".join(f"{row[0]}\t{row[1]}\t{row[2]}\n" for row in rows), encoding="utf-8")  # worst first
    found = judged(tmp_path / "out", str(run), str(worse), "--metrics", "ndcg@10", "--topks", "10")
    assert found["lists"]["run"]["figures"]["ndcg@10"] == pytest.approx(VALUES["gfml"]["ndcg@10"], abs=2e-9)
    (row,) = found["comparison"]
    assert row["users"] == 57 and row["difference"] < 0 and row["p_holm"] < 0.05 and row["against"] == "run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--graded", "exp", "--test", str(STORED / "train.tsv")], "no ratings"),
        (["--write", "letor=x"], "wanted FORM=FILE"),
        (["--train", "nowhere.tsv"], "nowhere.tsv"),
    ],
)
def test_errors(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([str(STORED / "lists.tsv"), *WHERE, *change])


def test_ratings_below_zero_are_no_gains(tmp_path):
    lines = (STORED / "truth.tsv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "t.tsv").write_text("\n".join([*lines[:-1], lines[-1].rpartition("\t")[0] + "\t-2"]), encoding="utf-8")
    flags = [str(STORED / "lists.tsv"), *WHERE, "--test", str(tmp_path / "t.tsv")]
    with pytest.raises(UserError, match="found a rating of -2 .*wanted none below 0"):
        main([*flags, "--graded", "linear"])


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="which is no run: give"):
        main([str(tmp_path), *WHERE])


def test_lists_of_other_data(tmp_path):
    (tmp_path / "l.csv").write_text("user,item,score\n999,1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="no user of the lists is in the truth"):
        main([str(tmp_path / "l.csv"), *WHERE])
