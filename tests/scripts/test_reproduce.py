"""Tables of the papers: every stored command is understood, and a small table is run, collected and compared."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import wilcoxon

from gfml.base.errors import UserError
from gfml.base.runs import checksums
from gfml.program.cli import run_main
from gfml.program.commands import read_command
from gfml.report import reproduce, results_table, table_figure

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "recsys/main.py --dataset synthetic --demo-users 60 --demo-items 40 --demo-interactions 900 --epochs 1 --eval-every 1 "
    "--topks 5 --report 0 --baselines popularity --lamb {lamb} --es_metric ndcg@5 --device cpu"
)
TABLE = f"""
folder = "paper"
title = "Toy"
seeds = [1, 2]

[[cell]]
label = "lambda {{lamb}}"
command = "{TINY}"
over = {{ lamb = [1, 3] }}
paper = "theirs"

[[cell]]
label = "from lambda 1"
command = "{TINY.replace("{lamb}", "2")} --pretrain 1 --pretrain-file '{{run:lambda 1}}'"
seeds = [1]

[[cell]]
label = "far away"
command = "recsys/main.py --dataset yelp2018"
needs = ["files:no/such/place"]

[[published]]
method = "theirs"
source = "a paper"
"recall@5" = 0.5
"""
PAIRS = """
folder = "paper"
title = "Pairs"
seeds = [1, 2]
metrics = ["ndcg"]
columns = ["ndcg@5", "ndcg@10"]
main = ["ndcg@5"]

[over.model]
A = "--lamb 1"
B = "--lamb 3"

[[cell]]
label = "alone"
command = "recsys/main.py --dataset synthetic"

[[cell]]
label = "{model} + MG"
command = "recsys/main.py --dataset synthetic {model} --lr 0.1"
paper = "{model} (paper)"
against = ["{model}", "{model} + {control}"]
over = { control = ["steps"] }

[[cell]]
label = "{model}"
command = "recsys/main.py --dataset synthetic {model} --lr 0.2"

[[cell]]
label = "{model} + {control}"
command = "recsys/main.py --dataset synthetic {model} {control}"
over = { control = { steps = "--lr 0.3" } }
against = "{model}"

[[published]]
method = "A (paper)"
source = "a paper"
"ndcg@5" = 0.5
"ndcg@10" = 0.55

[[published]]
method = "B (paper)"
source = "a paper"
"ndcg@5" = 0.6
"""
BASE = np.random.default_rng(0).integers(1, 5, 40) / 8


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return reproduce


@pytest.fixture
def toy(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one table, whose README is in ``paper``; programs are still those of the repository."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "toy.toml").write_text(TABLE)
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "README.md").write_text("<!-- results:toy -->\n<!-- end:toy -->\n")
    (tmp_path / "README.md").write_text("first page\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tables").symlink_to(tmp_path / "tables")
    monkeypatch.setattr(script, "configs", lambda: tmp_path / "configs")
    monkeypatch.setattr(results_table, "configs", lambda: tmp_path / "configs")
    monkeypatch.setattr(script, "TABLE_ROOT", tmp_path)
    monkeypatch.setattr(results_table, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def pairs(script: ModuleType, toy: Path) -> Path:
    """The same with the table ``pairs``, whose README also shows paired tests."""
    (toy / "tables" / "pairs.toml").write_text(PAIRS)
    blocks = "<!-- results:pairs -->\n<!-- end:pairs -->\n<!-- paired:pairs -->\n<!-- end-paired:pairs -->\n"
    (toy / "paper" / "README.md").write_text(blocks)
    return toy


def finish(
    script: ModuleType,
    out: Path,
    name: str,
    gains: dict[tuple[str, int], float],
    protocol: str = "selected on validation",
) -> None:
    """Finished runs of cells (label, seed), as programs leave them: user i gains ``gain`` times i mod 3, in the mean ``gain``."""
    for cell in script.expand(script.load_table(name), str(out)):
        if (cell.label, cell.seed) not in gains:
            continue
        values = (BASE + gains[cell.label, cell.seed] * (np.arange(len(BASE)) % 3)).astype(np.float32)
        for number, run in enumerate(read_command(["python", *cell.words], ROOT).runs):
            path = run.out / f"{run.family}-toy-{run.digest}"
            path.mkdir(parents=True)
            (path / "config.toml").write_text(f"seed = {cell.seed}\nlabel = {cell.label!r}\n")
            data = {"name": "toy", "test_fingerprint": "t", "fingerprint": "f"}
            selection = {"epoch": 1, "protocol": protocol, "value": 1 - (number - 1) ** 2}
            result = {
                "data": data,
                "selection": selection,
                "test": {"ndcg@5": float(values.mean()) + number, "ndcg@10": 0.7},
                "seconds": {},
            }
            (path / "result.json").write_text(json.dumps(result))
            (path / "done").write_text("")
            arrays = {"per_user/ndcg@5": values, "per_user/ndcg@10": values}
            np.savez(path / "analysis.npz", test_users=np.arange(len(values)), **arrays)


def collect(
    script: ModuleType, folder: Path, out: str = "runs", name: str = "pairs"
) -> dict[tuple[str, str, str], dict[str, str]]:
    """What --collect stores of paired tests, by row, the row it is compared with, and seed."""
    assert run_main(script.main, [name, "--out", str(folder / out), "--collect"]) == 0
    return {
        (row["row"], row["against"], row["seed"]): row for row in script.stored_rows(folder / "paper", f"{name}-paired")
    }


def table_names() -> list[str]:
    """Tables with cells; the others are only filled from runs named by hand."""
    return sorted(
        path.stem
        for path in (ROOT / "configs" / "tables").glob("*.toml")
        if "[[cell]]" in path.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("name", table_names())
def test_stored_tables_are_understood(script: ModuleType, tmp_path: Path, name: str) -> None:
    """Known keys, different labels, published rows that exist, and commands the programs accept."""
    table = script.load_table(name)
    cells = script.expand(table, str(tmp_path), str(tmp_path))
    if "search" in table:
        # Of a study one trial of each row, which are hundreds.
        cells = [cell for cell in cells if cell.label.endswith(": trial 1")]
    known = script.survey(cells, str(tmp_path))
    page = f"{name}.md" if "search" in table else "README.md"
    assert (ROOT / table["folder"] / page).is_file() and table["title"]
    assert len({(one.cell.label, one.cell.seed) for one in known}) == len(known)
    for one in known:
        assert one.state == "not launched" or one.state.startswith("waits for")
        assert one.reason or not one.cell.needs, "nothing is below an empty folder"


def test_files_are_below_the_data_or_the_project(script: ModuleType, tmp_path: Path) -> None:
    """Features that a table's runs share are made in the project's folder, where commands run."""
    (tmp_path / "own").mkdir()
    assert script.lacking(["files:own", "files:configs/tables"], str(tmp_path)) is None
    assert "own/none is not below" in (script.lacking(["files:own/none"], str(tmp_path)) or "")


def test_a_small_table_from_nothing_to_numbers(
    script: ModuleType, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(toy / "runs")]
    assert run_main(script.main, ["toy", *out]) == 0
    said = capsys.readouterr().out
    assert said.count("not launched") == 4 + 1 and "waits for lambda 1" in said and "no/such/place is not below" in said
    assert not (toy / "runs").exists()

    assert run_main(script.main, ["toy", *out, "--launch", "--only", "lambda 1"]) == 0
    assert run_main(script.main, ["toy", *out, "--collect"]) == 0
    capsys.readouterr()
    rows = {row["method"]: row for row in script.stored_rows(toy / "paper", "toy")}
    runs = [json.loads(path.read_text()) for path in (toy / "runs").glob("recsys-*/result.json")]
    from_seed = [run["test"]["recall@5"] for run in runs if "pretrain" not in run["model"]]
    assert rows["lambda 1"]["n"] == "2" and rows["lambda 3"]["protocol"] == "not run yet"
    assert rows["far away"]["protocol"] == "not run: needs no/such/place"
    assert rows["from lambda 1"]["n"] == "1" and "theirs" in rows and "popularity" in rows
    assert min(from_seed) <= float(rows["lambda 1"]["recall@5"]) <= max(from_seed)

    # Where only the clock went otherwise, the file stays as it is.
    stored = toy / "paper" / "results" / "toy.csv"
    kept = stored.read_bytes()
    for path in (toy / "runs").glob("recsys-*/result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"seconds": {"train": 1e6}}))
        done = path.parent / "done"
        done.write_text(" ".join([*done.read_text().split()[:2], *checksums(path.parent)]))
    assert run_main(script.main, ["toy", *out, "--collect"]) == 0 and stored.read_bytes() == kept
    capsys.readouterr()
    assert run_main(script.main, ["--list", *out]) == 0
    assert "3 runs in 2 rows stored" in capsys.readouterr().out

    # What is done is not run again, and a row whose runs are gone keeps its figures.
    before = {path: path.stat().st_mtime_ns for path in (toy / "runs").glob("*/done")}
    assert run_main(script.main, ["toy", *out, "--launch", "--only", "lambda 1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (toy / "runs").glob("*/done")} == before
    assert run_main(script.main, ["toy", "--out", str(toy / "elsewhere"), "--collect"]) == 0
    assert "0 of 7 runs are here" in capsys.readouterr().out
    assert script.stored_rows(toy / "paper", "toy")[0] == rows["lambda 1"]

    capsys.readouterr()
    assert run_main(script.main, ["toy", "--check"]) == 0
    ours = float(rows["lambda 1"]["recall@5"])
    said = capsys.readouterr().out
    assert (
        f"paper 0.5000  ours {ours:.4f}  difference {ours - 0.5:+.4f}" in said and "n 2, selected on validation" in said
    )
    (toy / "paper" / "README.md").write_text("<!-- results:toy -->\nsomething else\n<!-- end:toy -->\n")
    capsys.readouterr()
    assert run_main(script.main, ["toy", "--check"]) == 2
    # Its advice works.
    advised = shlex.split(capsys.readouterr().err.partition("gfml results-table ")[2].partition(" writes")[0])
    assert run_main(results_table.main, advised) == 0 and run_main(script.main, ["toy", "--check"]) == 0


def test_the_list_names_every_table(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(script.main, ["--list", "--data-root", str(tmp_path), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{said}" for name in table_names())
    assert "cannot run here" in said


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (('title = "Toy"', 'titel = "Toy"'), "unknown key 'titel'"),
        (('paper = "theirs"', 'paper = "ours"'), "names the published row 'ours'"),
        (("--topks 5", "--topk 5"), "--topk"),
        (("files:no/such/place", "moon:full"), "wanted data:NAME, files:PATH or gpu"),
        (("{run:lambda 1}", "{run:lambda 7}"), "starts from 'lambda 7'"),
    ),
)
def test_mistakes_in_a_table_are_one_line(
    script: ModuleType, toy: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    file = toy / "tables" / "toy.toml"
    assert change[0] in file.read_text()
    file.write_text(file.read_text().replace(*change))
    assert run_main(script.main, ["toy", "--out", str(toy / "runs")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (["tyo"], "did you mean 'toy'"),
        (["toy", "--only", "nothing"], "no row of toy"),
        (["toy", "--collect", "--only", "1"], "whole table"),
        (["toy", "--check", "--only", "1"], "without --only"),
    ),
)
def test_wrong_calls_are_one_line(
    script: ModuleType, toy: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run_main(script.main, [*flags, "--out", str(toy / "runs")]) == 2
    assert message in capsys.readouterr().err


def test_a_table_or_the_list_must_be_named(script: ModuleType) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 2
    with pytest.raises(UserError):
        script.load_table("nothing")


def test_over_outside_cells_repeats_them_together(script: ModuleType, pairs: Path) -> None:
    cells = [cell for cell in script.expand(script.load_table("pairs")) if cell.seed == 1]
    assert [cell.label for cell in cells] == ["A + MG", "A", "A + steps", "B + MG", "B", "B + steps", "alone"]
    by_label = {cell.label: cell for cell in cells}
    # A table of values gives its keys to labels and its values to commands.
    assert "recsys/main.py --dataset synthetic --lamb 3 --lr 0.3 --out" in by_label["B + steps"].command
    assert (
        by_label["B + MG"].against == ("B", "B + steps")
        and by_label["B + steps"].against == ("B",)
        and by_label["B"].against == ()
    )
    assert by_label["A + MG"].paper == "A (paper)" and by_label["A"].paper is None


def test_pairs_are_tested_over_users_and_over_seeds(script: ModuleType, pairs: Path) -> None:
    gains = {
        ("A", 1): 0.0,
        ("A", 2): 0.0,
        ("A + MG", 1): 0.1,
        ("A + MG", 2): 0.2,
        ("B", 1): 0.0,
        ("B + MG", 1): -0.1,
        ("B + MG", 2): 0.3,
    }
    finish(script, pairs / "runs", "pairs", gains)
    tests = collect(script, pairs)
    # Of B only seed 1 has both rows, and the control of A never ran.
    assert list(tests) == [
        ("A + MG", "A", "1"),
        ("A + MG", "A", "2"),
        ("A + MG", "A", ""),
        ("B + MG", "B", "1"),
        ("B + MG", "B", ""),
    ]
    steps = np.arange(40) % 3
    for seed, gain in (("1", 0.1), ("2", 0.2)):
        row = tests["A + MG", "A", seed]
        assert row["level"] == "users" and row["metric"] == "ndcg@5" and row["n"] == "40"
        assert float(row["difference"]) == pytest.approx(gain * steps.mean(), rel=1e-4)
        assert float(row["low"]) < gain * steps.mean() < float(row["high"])
        stored, base = ((BASE + by * steps).astype(np.float32).astype(np.float64) for by in (gain, 0.0))
        assert float(row["p"]) == pytest.approx(wilcoxon(stored - base).pvalue, rel=1e-4)
    # Differences d and 2 d: t = 3 with one degree of freedom, whose distribution is an arc tangent.
    seeds = tests["A + MG", "A", ""]
    assert (seeds["level"], seeds["n"], seeds["low"]) == ("seeds", "2", "")
    assert float(seeds["difference"]) == pytest.approx(0.15 * steps.mean(), rel=1e-4)
    assert float(seeds["std"]) == pytest.approx(0.1 * steps.mean() / math.sqrt(2), rel=1e-4)
    assert float(seeds["p"]) == pytest.approx(1 - 2 / math.pi * math.atan(3), rel=1e-3)
    # One seed is no test, and Holm corrects over three tests of users, one of seeds.
    assert tests["B + MG", "B", ""]["p"] == "" and tests["B + MG", "B", ""]["n"] == "1"
    assert float(seeds["p_holm"]) == float(seeds["p"])
    users = sorted((float(row["p"]), float(row["p_holm"])) for row in tests.values() if row["level"] == "users")
    assert users[0][1] == pytest.approx(3 * users[0][0], rel=1e-4)

    text = (pairs / "paper" / "README.md").read_text()
    assert "| B + MG | B | ndcg@5 | 1 | −0.0975 | no test: one seed | −0." in text
    assert (
        "| A + MG | A | ndcg@5 | 2 | +0.1462 ± 0.0689 | p = 0.205, Holm p = 0.205 | better in 2, worse in 0 of 2 |"
        in text
    )


def test_stored_tests_stay_until_there_are_as_many_runs(script: ModuleType, pairs: Path) -> None:
    both = {(label, seed): gain for seed in (1, 2) for label, gain in (("A", 0.0), ("A + MG", 0.1))}
    finish(script, pairs / "runs", "pairs", both)
    before = collect(script, pairs)
    finish(script, pairs / "fewer", "pairs", {("A", 1): 0.0, ("A + MG", 1): -0.1, ("A + steps", 1): 0.2})
    after = collect(script, pairs, "fewer")
    kept = ("row", "against", "seed", "n", "difference", "p")
    for key, row in before.items():
        assert {name: after[key][name] for name in kept} == {name: row[name] for name in kept}
    assert {key for key in after if key not in before} == {
        (row, against, seed) for row, against in (("A + MG", "A + steps"), ("A + steps", "A")) for seed in ("1", "")
    }
    finish(script, pairs / "others", "pairs", {key: -gain for key, gain in both.items()})
    assert float(collect(script, pairs, "others")["A + MG", "A", "2"]["difference"]) < 0


def test_check_also_reads_the_paired_tests(script: ModuleType, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = pairs / "paper" / "README.md"
    assert collect(script, pairs) == {}
    assert "No two rows to compare" in readme.read_text() and run_main(script.main, ["pairs", "--check"]) == 0
    finish(script, pairs / "runs", "pairs", {("A", 1): 0.0, ("A + MG", 1): 0.1})
    collect(script, pairs)
    assert run_main(script.main, ["pairs", "--check"]) == 0
    good = readme.read_text()
    readme.write_text(good.replace("| +0.0975 |", "| +0.1975 |"))
    assert readme.read_text() != good
    assert run_main(script.main, ["pairs", "--check"]) == 2
    assert "disagree" in capsys.readouterr().err
    readme.write_text(good.partition("<!-- paired")[0])
    assert run_main(script.main, ["pairs", "--check"]) == 0


def test_every_row_stands_beside_its_published_one(
    script: ModuleType, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one whose label is part of another's, which comes first."""
    file = pairs / "tables" / "pairs.toml"
    file.write_text(PAIRS.replace('label = "{model}"\n', 'label = "{model}"\npaper = "{model} (paper)"\n'))
    finish(script, pairs / "runs", "pairs", {("A", 1): 0.0, ("A + MG", 1): 0.1})
    collect(script, pairs)
    capsys.readouterr()
    assert run_main(script.main, ["pairs", "--check"]) == 0
    said = capsys.readouterr().out
    assert "A + MG beside A (paper)" in said and "\nA beside A (paper)" in said


def test_runs_that_judged_others_are_not_compared(
    script: ModuleType, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(script, pairs / "runs", "pairs", {("A", 1): 0.0, ("A + MG", 1): 0.1})
    path = next(path for path in (pairs / "runs").glob("*/config.toml") if "MG" in path.read_text()).parent
    result = json.loads((path / "result.json").read_text())
    result["data"]["test_fingerprint"] = "u"
    (path / "result.json").write_text(json.dumps(result))
    assert run_main(script.main, ["pairs", "--out", str(pairs / "runs"), "--collect"]) == 2
    assert "another split of toy" in capsys.readouterr().err
    assert not (pairs / "paper" / "results").exists()


GRID = """
folder = "paper"
title = "Grid"
seeds = [1]
metrics = ["ndcg"]

[[cell]]
label = "best of three"
command = "mirror_grad/main.py --model BPR --dataset baby --mirror-arm equal-grid"
"""


def test_of_a_command_with_several_runs_the_best_counts(
    script: ModuleType, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy / "tables" / "grid.toml").write_text(GRID)
    (toy / "paper" / "README.md").write_text("<!-- results:grid -->\n<!-- end:grid -->\n")
    finish(script, toy / "runs", "grid", {("best of three", 1): 0.0}, "no training")
    collect(script, toy, name="grid")
    # The second of the three has the highest value of what selects, and one more on test than the first.
    [row] = script.stored_rows(toy / "paper", "grid")
    assert row["n"] == "1" and float(row["ndcg@5"]) == pytest.approx(BASE.mean() + 1, rel=1e-4)
    # What is not trained is not doubled among the rows that need no training.
    collect(script, toy, "elsewhere", name="grid")
    assert [row] == script.stored_rows(toy / "paper", "grid")
    next((toy / "runs").glob("*/done")).unlink()
    capsys.readouterr()
    assert run_main(script.main, ["grid", "--out", str(toy / "runs")]) == 0
    assert capsys.readouterr().out.strip().endswith("1 incomplete")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (('against = "{model}"', 'against = "{modle}"'), "against which 'A + steps' is compared, '{modle}'"),
        (('against = "{model}"', 'against = "{model} + steps"'), "unknown row"),
        (('main = ["ndcg@5"]', 'main = ["ndcg@50"]'), "main of"),
        (('main = ["ndcg@5"]', ""), "set main"),
        (('label = "alone"', 'label = "B"'), "two cells make the row 'B' with seed 1"),
        (('label = "alone"', 'label = "alone"\nover = { data = [1] }'), "over sets data"),
        (('paper = "{model} (paper)"', 'paper = "{model}"'), "names the published row 'A'"),
    ),
)
def test_wrong_references_are_one_line(
    script: ModuleType, pairs: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    assert change[0] in PAIRS
    (pairs / "tables" / "pairs.toml").write_text(PAIRS.replace(*change))
    assert run_main(script.main, ["pairs"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


# -- the figure


def test_the_figure_shows_rows_published_values_and_changes(script: ModuleType, pairs: Path) -> None:
    gains = {
        ("A", 1): 0.0,
        ("A", 2): 0.0,
        ("A + MG", 1): 0.1,
        ("A + MG", 2): 0.2,
        ("A + steps", 1): 0.1,
        ("alone", 1): 0.0,
    }
    finish(script, pairs / "runs", "pairs", gains)
    tests = collect(script, pairs)
    picture = (pairs / "paper" / "results" / "pairs.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000

    labels = ["A + MG", "A", "A + steps", "B + MG", "B", "B + steps", "alone"]
    first = {"A + MG": "A", "A + steps": "A", "B + MG": "B", "B + steps": "B"}
    rows = {row["method"]: row for row in script.stored_rows(pairs / "paper", "pairs")}
    drawn = table_figure.Drawn(
        rows, labels, first, {"A + MG": "A (paper)", "B + MG": "B (paper)"}, list(tests.values())
    )
    left, right = table_figure.draw(drawn, ["ndcg@5"]).axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["A", "B", "alone"]
    single = [line for line in left.lines if line.get_marker() in ("o", "D") and len(line.get_xdata()) == 1]
    points = {(line.get_marker(), float(line.get_ydata()[0])): float(line.get_xdata()[0]) for line in single}
    # B has no run: its published value is all there is, and its other rows take no place.
    assert (
        points["o", 1.0] == pytest.approx(BASE.mean(), rel=1e-4) and points["D", 0.0] == 0.5 and points["D", 4.0] == 0.6
    )
    assert sorted(points) == [("D", 0.0), ("D", 4.0), ("o", 0.0), ("o", 1.0), ("o", 2.0), ("o", 6.0)]
    bars = {
        line.get_ydata()[0]: line.get_xdata()
        for line in right.lines
        if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]
    }
    seeds = tests["A + MG", "A", ""]
    middle, spread = (100 * float(seeds[name]) / BASE.mean() for name in ("difference", "std"))
    assert list(bars[0.0]) == pytest.approx([middle - spread, middle + spread], rel=1e-4)
    users = tests["A + steps", "A", "1"]
    assert list(bars[2.0]) == pytest.approx(
        [100 * float(users[name]) / BASE.mean() for name in ("low", "high")], rel=1e-4
    )
    assert right.get_title(loc="left") == "Change to plain"


def test_labels_are_grouped_and_named_by_what_they_share(script: ModuleType) -> None:
    first = {"A + MG": "A", "B, mg": "B, plain", "B, lr": "B, plain"}
    groups = table_figure.groups_of(["A", "B, plain", "A + MG", "B, mg", "C", "B, lr"], first)
    assert groups == [["A", "A + MG"], ["B, plain", "B, mg", "B, lr"], ["C"]]
    assert [table_figure.names_of(group) for group in groups] == [
        ("A", ["plain", "MG"]),
        ("B", ["plain", "mg", "lr"]),
        ("C", ["plain"]),
    ]


def test_a_long_figure_stays_small_and_nothing_gives_none(script: ModuleType, tmp_path: Path) -> None:
    labels = [f"model {number}{arm}" for number in range(25) for arm in ("", " + MG")]
    rows = {
        label: {"protocol": "", "ndcg@5": str(place / 100), "ndcg@5 std": "0.003"} for place, label in enumerate(labels)
    }
    first = {label: label.removesuffix(" + MG") for label in labels if label.endswith("MG")}
    table_figure.write_figure(tmp_path / "a.png", table_figure.Drawn(rows, labels, first, {}, []), ["ndcg@5"])
    assert 1000 < (tmp_path / "a.png").stat().st_size < 100_000
    table_figure.write_figure(tmp_path / "b.png", table_figure.Drawn({}, labels, first, {}, []), ["ndcg@5"])
    assert not (tmp_path / "b.png").exists()
