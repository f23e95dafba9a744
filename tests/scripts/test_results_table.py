"""Tables from stored runs against hand-checked text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gfml.base.errors import UserError
from gfml.report import results_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The command with a repository of its own: one paper folder with a README."""
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "README.md").write_text("before\n<!-- results:toy -->\nold\n<!-- end:toy -->\nafter\n")
    (tmp_path / "README.md").write_text("first page\n")
    monkeypatch.setattr(results_table, "ROOT", tmp_path)
    monkeypatch.setattr(results_table, "configs", lambda: tmp_path / "configs")
    return vars(results_table)


def store_run(path: Path, recall: float, *, protocol: str = "selected on validation", epoch: int = 3) -> str:
    path.mkdir()
    result = {
        "data": {"name": "toy"},
        "selection": {"epoch": epoch, "protocol": protocol},
        "test": {"recall@20": recall, "ndcg@20": recall / 2, "users_q1_recall@20": 0.9},
        "baselines": {"popularity": {"test": {"recall@20": 0.05}}, "ease": {"skipped": "too large"}},
        "seconds": {"train": 10.0},
    }
    (path / "result.json").write_text(json.dumps(result))
    return str(path)


def test_mean_and_sample_deviation_over_runs(table: dict, tmp_path: Path) -> None:
    runs = [f"ours={store_run(tmp_path / str(n), recall, epoch=n)}" for n, recall in ((3, 0.1), (5, 0.2))]
    assert table["main"](["toy", "--folder", "paper", *runs]) == 0
    text = (tmp_path / "paper" / "README.md").read_text()
    # The mean of .1 and .2 is .15, their sample standard deviation sqrt(2 * .05^2) = .0707.
    assert "| ours | selected on validation | 2 | 3/5 | 0.1500 ± 0.0707 | 0.0750 ± 0.0354 | 10 |" in text
    assert "| popularity | no training | 1 |  | 0.0500 |  |  |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "users_q1" not in text and "ease" not in text
    assert table["main"](["toy", "--folder", "paper", "--check"]) == 0


def test_published_rows_and_the_first_page(table: dict, tmp_path: Path) -> None:
    (tmp_path / "configs" / "tables").mkdir(parents=True)
    (tmp_path / "configs" / "tables" / "toy.toml").write_text(
        '[[published]]\nmethod = "theirs"\nsource = "paper"\n"recall@20" = 0.3\n'
    )
    (tmp_path / "README.md").write_text("<!-- results:paper/toy -->\n<!-- end:paper/toy -->\n")
    table["main"](["toy", "--folder", "paper", f"a = b={store_run(tmp_path / 'r', 0.1)}"])
    for readme in (tmp_path / "README.md", tmp_path / "paper" / "README.md"):
        assert "| theirs | paper |  |  | 0.3000 |  |  |" in readme.read_text()
        assert "| a = b | selected on validation | 1 | 3 | 0.1000 |" in readme.read_text()


def test_what_a_result_reports_beside_its_metrics_has_a_row(table: dict, tmp_path: Path) -> None:
    for n, value in ((1, 0.2), (2, 0.4)):
        path = Path(store_run(tmp_path / str(n), 0.1))
        result = json.loads((path / "result.json").read_text())
        (path / "result.json").write_text(json.dumps(result | {"also": {"adjusted": {"recall@20": value}}}))
    table["main"](["toy", "--folder", "paper", f"ours={tmp_path / '1'}", f"ours={tmp_path / '2'}"])
    text = (tmp_path / "paper" / "README.md").read_text()
    assert "| ours, adjusted | selected on validation | 2 | 3 | 0.3000 ± 0.1410 |  |  |" in text


def test_a_table_may_show_some_columns(table: dict, tmp_path: Path) -> None:
    file = tmp_path / "configs" / "tables" / "toy.toml"
    file.parent.mkdir(parents=True)
    file.write_text('columns = ["ndcg@20"]\n')
    run = f"ours={store_run(tmp_path / 'r', 0.1)}"
    table["main"](["toy", "--folder", "paper", run])
    text = (tmp_path / "paper" / "README.md").read_text()
    assert "| ours | selected on validation | 1 | 3 | 0.0500 | 10 |" in text and "recall@20" not in text
    assert "recall@20" in (tmp_path / "paper" / "results" / "toy.csv").read_text()
    file.write_text('columns = ["ndgc@20"]\n')
    with pytest.raises(UserError, match="ndgc@20"):
        table["main"](["toy", "--folder", "paper", run])


def test_baselines_of_two_data_sets_are_two_rows(table: dict, tmp_path: Path) -> None:
    runs = [store_run(tmp_path / name, 0.1) for name in ("one", "two")]
    stored = tmp_path / "two" / "result.json"
    result = json.loads(stored.read_text())
    stored.write_text(
        json.dumps(result | {"data": {"name": "other"}, "baselines": {"popularity": {"test": {"recall@20": 0.06}}}})
    )
    assert table["main"](["toy", "--folder", "paper", f"a={runs[0]}", f"b={runs[1]}"]) == 0
    text = (tmp_path / "paper" / "README.md").read_text()
    assert "| popularity, toy | no training | 1 |  | 0.0500 |" in text
    assert "| popularity, other | no training | 1 |  | 0.0600 |" in text


def test_equal_baselines_of_two_protocols_are_one_row(table: dict, tmp_path: Path) -> None:
    runs = [
        f"one={store_run(tmp_path / 'a', 0.1)}",
        f"other={store_run(tmp_path / 'b', 0.1, protocol='selected on test')}",
    ]
    table["main"](["toy", "--folder", "paper", *runs])
    assert (tmp_path / "paper" / "README.md").read_text().count("popularity") == 1
    stored = json.loads((tmp_path / "b" / "result.json").read_text())
    stored["baselines"]["popularity"]["test"]["recall@20"] = 0.06
    (tmp_path / "b" / "result.json").write_text(json.dumps(stored))
    table["main"](["toy", "--folder", "paper", *runs])
    text = (tmp_path / "paper" / "README.md").read_text()
    assert "| popularity (validation protocol) |" in text and "| popularity (test protocol) |" in text


def test_check_notices_an_edited_table(table: dict, tmp_path: Path) -> None:
    table["main"](["toy", "--folder", "paper", f"ours={store_run(tmp_path / 'r', 0.1)}"])
    readme = tmp_path / "paper" / "README.md"
    readme.write_text(readme.read_text().replace("0.1000", "0.9000"))
    with pytest.raises(UserError, match="disagree"):
        table["main"](["toy", "--folder", "paper", "--check"])


def test_mixed_protocols_are_not_averaged(table: dict, tmp_path: Path) -> None:
    runs = [
        f"ours={store_run(tmp_path / 'a', 0.1)}",
        f"ours={store_run(tmp_path / 'b', 0.1, protocol='selected on test')}",
    ]
    with pytest.raises(UserError, match="differ in data or protocol"):
        table["main"](["toy", "--folder", "paper", *runs])


@pytest.mark.parametrize(("arguments", "message"), [([], "wanted NAME --folder FOLDER"), (["toy", "--folder", "paper"], "give the runs"),
                                                    (["toy", "--folder", "paper", "runs/x"], "LABEL=RUN"),
                                                    (["toy", "--folder", "paper", "x=runs/none"], "no result")])  # fmt: skip
def test_wrong_calls_are_one_line(table: dict, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        table["main"](arguments)


def test_a_readme_without_the_block(table: dict, tmp_path: Path) -> None:
    (tmp_path / "paper" / "README.md").write_text("nothing\n")
    with pytest.raises(UserError, match="add both"):
        table["main"](["toy", "--folder", "paper", f"ours={store_run(tmp_path / 'r', 0.1)}"])


def test_a_declaration_names_the_figures_that_are_kept(table: dict, tmp_path: Path) -> None:
    (tmp_path / "configs" / "tables").mkdir(parents=True)
    declared = 'metrics = ["users_q1_recall", "ndcg"]\ncolumns = ["users_q1_recall@20"]\n'
    (tmp_path / "configs" / "tables" / "toy.toml").write_text(declared)
    table["main"](["toy", "--folder", "paper", f"ours={store_run(tmp_path / 'r', 0.1)}"])
    stored = (tmp_path / "paper" / "results" / "toy.csv").read_text()
    assert "users_q1_recall@20" in stored and "ndcg@20" in stored and ",recall@20" not in stored
    assert "| ours | selected on validation | 1 | 3 | 0.9000 | 10 |" in (tmp_path / "paper" / "README.md").read_text()


def paired(seed: str, difference: float, p: float, p_holm: float, **more: object) -> dict[str, str]:
    facts = {"row": "a", "against": "b", "metric": "ndcg@5", "level": "users" if seed else "seeds", "seed": seed}
    return {
        **facts,
        "difference": str(difference),
        "p": str(p),
        "p_holm": str(p_holm),
        **{key: str(value) for key, value in more.items()},
    }


def test_paired_tests_are_shown_a_line_for_each_pair(table: dict) -> None:
    users = [paired("1", 0.2, 0.001, 0.01), paired("2", -0.1, 0.002, 0.02), paired("3", 0.2, 0.03, 0.06)]
    lines = table["paired_markdown"]([*users, paired("", 0.1, 0.0004, 0.0004, n=3, std=0.1732)]).splitlines()
    assert lines[0] == "| row | minus | metric | seeds | difference | over seeds | over users, seed by seed |"
    assert (
        lines[2]
        == "| a | b | ndcg@5 | 3 | +0.1000 ± 0.1732 | p < 0.001, Holm p < 0.001 | better in 1, worse in 1 of 3 |"
    )
    assert lines[4].startswith("Difference: mean over the seeds")
    one = [paired("1", 0.2, 0.001, 0.01, low=0.1, high=0.3), paired("", 0.2, 0, 0, n=1)]
    assert (
        table["paired_markdown"](one).splitlines()[2]
        == "| a | b | ndcg@5 | 1 | +0.2000 | no test: one seed | +0.1000 to +0.3000, p = 0.001, Holm p = 0.010 |"
    )


def test_paired_tests_have_a_block_of_their_own(table: dict, tmp_path: Path) -> None:
    readme, run = tmp_path / "paper" / "README.md", f"ours={store_run(tmp_path / 'r', 0.1)}"
    readme.write_text(readme.read_text() + "<!-- paired:toy -->\nold\n<!-- end-paired:toy -->\nend\n")
    table["main"](["toy", "--folder", "paper", run])
    assert "No two rows to compare" in readme.read_text() and "old" not in readme.read_text()
    one = [paired("1", 0.2, 0.001, 0.01, low=0.1, high=0.3), paired("", 0.2, 0, 0, n=1)]
    table["store_rows"](tmp_path / "paper", "toy-paired", one, table["PAIRED"])
    with pytest.raises(UserError, match="disagree"):
        table["main"](["toy", "--folder", "paper", "--check"])
    table["main"](["toy", "--folder", "paper"])
    table["main"](["toy", "--folder", "paper", "--check"])
    text = readme.read_text()
    assert "| a | b | ndcg@5 | 1 | +0.2000 |" in text and text.startswith("before\n") and text.endswith("end\n")
    assert "| ours | selected on validation | 1 |" in text


def test_check_notices_a_figure_in_a_sentence_that_no_file_has(table: dict, tmp_path: Path) -> None:
    table["main"](["toy", "--folder", "paper", f"ours={store_run(tmp_path / 'r', 0.12345)}"])
    readme = tmp_path / "paper" / "README.md"
    stored = readme.read_text()
    readme.write_text(
        stored + "Ours has .1234 or .123; popularity .050; `--lr 0.00123`; in version 0.1234.5 it was so.\n"
    )
    assert table["main"](["--check"]) == 0
    readme.write_text(stored + "Ours has .1236.\n")
    for arguments in (["--check"], ["toy", "--folder", "paper", "--check"]):
        with pytest.raises(UserError, match=r"quotes \.1236, wanted figures that a file of results has"):
            table["main"](arguments)


def test_check_alone_compares_every_table(table: dict, tmp_path: Path) -> None:
    table["main"](["toy", "--folder", "paper", f"ours={store_run(tmp_path / 'r', 0.1)}"])
    readme = tmp_path / "paper" / "README.md"
    readme.write_text(readme.read_text().replace("0.1000", "0.9000"))
    with pytest.raises(UserError, match="disagree"):
        table["main"](["--check"])
