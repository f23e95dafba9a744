"""Tables of the papers: every stored command is understood, and a small table is run, collected and compared."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from gfml.cli import run_main
from gfml.errors import UserError

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
command = "{TINY.replace('{lamb}', '2')} --pretrain 1 --pretrain-file '{{run:lambda 1}}'"
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


@pytest.fixture(scope="session")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("reproduce")


@pytest.fixture
def toy(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one table, whose README is in ``paper``; programs are still those of the repository."""
    results = importlib.import_module("results_table")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "toy.toml").write_text(TABLE)
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "README.md").write_text("<!-- results:toy -->\n<!-- end:toy -->\n")
    (tmp_path / "README.md").write_text("first page\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tables").symlink_to(tmp_path / "tables")
    monkeypatch.setattr(script, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(script, "TABLE_ROOT", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def table_names() -> list[str]:
    """Tables with cells; the others are only filled from runs named by hand."""
    return sorted(path.stem for path in (ROOT / "configs" / "tables").glob("*.toml") if "[[cell]]" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", table_names())
def test_stored_tables_are_understood(script: ModuleType, tmp_path: Path, name: str) -> None:
    """Known keys, different labels, published rows that exist, and commands the programs accept."""
    table = script.load_table(name)
    known = script.survey(script.expand(table, str(tmp_path), str(tmp_path)), str(tmp_path))
    assert (ROOT / table["folder"] / "README.md").is_file() and table["title"]
    assert len({(one.cell.label, one.cell.seed) for one in known}) == len(known)
    for one in known:
        assert one.state == "not launched" or one.state.startswith("waits for")
        assert one.reason or not one.cell.needs, "nothing is below an empty folder"


def test_a_small_table_from_nothing_to_numbers(script: ModuleType, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert rows["far away"]["protocol"].startswith("not run: no/such/place")
    assert rows["from lambda 1"]["n"] == "1" and "theirs" in rows and "popularity" in rows
    assert min(from_seed) <= float(rows["lambda 1"]["recall@5"]) <= max(from_seed)

    # What is done is not run again, and a row whose runs are gone keeps its figures.
    before = {path: path.stat().st_mtime_ns for path in (toy / "runs").glob("*/done")}
    assert run_main(script.main, ["toy", *out, "--launch", "--only", "lambda 1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (toy / "runs").glob("*/done")} == before
    assert run_main(script.main, ["toy", "--out", str(toy / "elsewhere"), "--collect"]) == 0
    assert script.stored_rows(toy / "paper", "toy")[0] == rows["lambda 1"]

    capsys.readouterr()
    assert run_main(script.main, ["toy", "--check"]) == 0
    ours = float(rows["lambda 1"]["recall@5"])
    said = capsys.readouterr().out
    assert f"paper 0.5000  ours {ours:.4f}  difference {ours - 0.5:+.4f}" in said and "n 2, selected on validation" in said
    (toy / "paper" / "README.md").write_text("<!-- results:toy -->\nsomething else\n<!-- end:toy -->\n")
    assert run_main(script.main, ["toy", "--check"]) == 2


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
def test_mistakes_in_a_table_are_one_line(script: ModuleType, toy: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str) -> None:
    file = toy / "tables" / "toy.toml"
    assert change[0] in file.read_text()
    file.write_text(file.read_text().replace(*change))
    assert run_main(script.main, ["toy", "--out", str(toy / "runs")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"), ((["tyo"], "did you mean 'toy'"), (["toy", "--only", "nothing"], "no row of toy"), (["toy", "--collect", "--only", "1"], "whole table"))
)
def test_wrong_calls_are_one_line(script: ModuleType, toy: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert run_main(script.main, [*flags, "--out", str(toy / "runs")]) == 2
    assert message in capsys.readouterr().err


def test_a_table_or_the_list_must_be_named(script: ModuleType) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 2
    with pytest.raises(UserError):
        script.load_table("nothing")
