"""Searches: spaces, points, following a run, the ledger, and Ray Tune end to end on a toy program."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from gfml.base.errors import UserError
from gfml.program import sweep as sweep_program
from gfml.program.cli import run_main
from gfml.program.commands import launch, read_command
from gfml.program.search import Follower, check_points, load_spec, planned_points, random_point

ROOT = Path(__file__).resolve().parents[2]
BASE = """
program = "toy_paper/main.py"
flags = "--epochs 3"
metric = "val/score"
search = "random"
trials = 4
seed = 1
[space]
lr = { loguniform = [0.01, 1] }
kind = { choice = ["a", "b"] }
"""
needs_ray = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("ray", "optuna")),
    reason="ray or optuna is missing: pip install -e '.[sweep]'",
)


def write(root: Path, text: str = BASE, **changes: str) -> Path:
    """The file with some lines replaced: search='"grid"' for search = "grid"."""
    lines = text.splitlines()
    for key, value in changes.items():
        lines = [line for line in lines if line.partition(" =")[0] != key]
        lines = ([f"{key} = {value}"] if value else []) + lines
    path = root / "toy.toml"
    path.write_text("\n".join(lines))
    return path


# -- spaces and points


def test_points_of_a_grid(tmp_path: Path) -> None:
    text = BASE.replace("{ loguniform = [0.01, 1] }", "{ choice = [0.1, 0.2] }")
    spec = load_spec(write(tmp_path, text, search='"grid"', trials=""))
    assert spec.trials == 4
    assert planned_points(spec) == [{"lr": lr, "kind": kind} for lr in (0.1, 0.2) for kind in ("a", "b")]


def test_random_points_are_within_their_ranges_and_cover_them(tmp_path: Path) -> None:
    space = 'x = { uniform = [-2, 3] }\ny = { randint = [1, 3] }\nz = { flags = ["", "--some thing"] }\n'
    spec = load_spec(write(tmp_path, BASE + space, trials="300"))
    points = planned_points(spec)
    assert all(0.01 <= p["lr"] <= 1 and -2 <= p["x"] <= 3 for p in points)
    assert Counter(p["y"] for p in points).keys() == {1, 2, 3} and all(isinstance(p["y"], int) for p in points)
    # Half of a log range lies below its geometric middle, half of a plain one below the arithmetic one.
    assert sum(p["lr"] < 0.1 for p in points) / 300 == pytest.approx(0.5, abs=0.1)
    assert sum(p["x"] < 0.5 for p in points) / 300 == pytest.approx(0.5, abs=0.1)
    assert all(p["lr"] == float(f"{p['lr']:.4g}") for p in points)


def test_a_longer_search_starts_as_a_shorter_one_and_no_point_repeats(tmp_path: Path) -> None:
    short, long = (planned_points(load_spec(write(tmp_path, trials=str(n)))) for n in (4, 40))
    assert long[:4] == short and len({tuple(point.values()) for point in long}) == 40
    assert planned_points(load_spec(write(tmp_path, seed="2"))) != short
    few = BASE.replace("lr = { loguniform = [0.01, 1] }\n", "")
    with pytest.raises(UserError, match="only 2 different points"):
        planned_points(load_spec(write(tmp_path, few)))


def test_words_of_a_point(tmp_path: Path) -> None:
    space = 'loss = { flags = ["--select-metric score --fail 0"] }\nname = { choice = ["-x"] }\n'
    spec = load_spec(write(tmp_path, BASE + space), ["--out", "there"])
    words = spec.words({"lr": 0.02, "kind": "b", "loss": "--select-metric score --fail 0", "name": "-x"})
    assert (
        words
        == "python toy_paper/main.py --epochs 3 --out there --lr 0.02 --kind b --select-metric score --fail 0 --name=-x".split()
    )


def test_the_identity_of_a_search(toy: Path) -> None:
    def of(**changes: str) -> str:
        return load_spec(write(toy, **changes)).identity(toy)

    assert of() == of(trials="9") and of() == load_spec(write(toy), ["--out", "elsewhere", "--device", "cpu"]).identity(
        toy
    )
    others = [
        of(seed="2"),
        of(mode='"min"'),
        of(search='"optuna"'),
        of(flags='"--epochs 4"'),
        load_spec(write(toy), ["--epochs", "5"]).identity(toy),
    ]
    assert len({of(), *others}) == 6


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [("metric", '"test/score"', "one of validation"), ("metric", "", "has no 'metric'"), ("search", '"rnd"', "unknown search 'rnd'.*did you mean 'random'"),
     ("mode", '"maximum"', "unknown mode"), ("trials", "0", "whole number >= 1"), ("trials", "true", "whole number"), ("seed", "1.5", "whole number"),
     ("search", '"grid"', "a grid tries every combination"), ("trails", "3", "unknown key 'trails'.*did you mean 'trials'"), ("flags", "3", "wanted a text"),
     ("space", "3", "wanted a table|is not valid TOML")],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, key: str, value: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted) as found:
        load_spec(write(tmp_path, **{key: value}))
    assert "toy.toml" in str(found.value)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("x = 3", "wanted one kind"), ("x = { uniforn = [1, 2] }", "did you mean 'uniform'"), ("x = { uniform = [2, 1] }", "the smaller first"),
     ("x = { loguniform = [0, 1] }", "above 0"), ("x = { randint = [1.5, 3] }", "two whole numbers"), ("x = { choice = [] }", "wanted a list"),
     ("x = { choice = [true, false] }", "write switches as flags"), ("x = { choice = [1, 1] }", "different numbers or texts"), ("x = { flags = [1] }", "different texts"),
     ("[asha]\nreduction = 3", "found grace = None"), ("[asha]\ngrace = 1\nreduction = 1", "whole number >= 2"), ("[resources]\ngpu = 1", "did you mean 'gpus'"),
     ("[resources]\ngpus = -1", "number >= 0")],
)  # fmt: skip
def test_a_mistake_in_the_space_is_one_line(tmp_path: Path, line: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        load_spec(write(tmp_path, BASE + line))


@pytest.mark.parametrize(
    ("flags", "more", "wanted"),
    [("--epochs 3 --select-on test", "", "selection on validation"), ("--select-metric other", "", "select their epoch by 'other'"),
     ("--epochs 3 --lrr 1", "", "unknown flag --lrr"), ("--epochs 3", "[asha]\ngrace = 3\n", "wanted fewer"), ("--epochs 0", "", "wanted a whole number >= 1")],
)  # fmt: skip
def test_a_mistake_in_the_flags_is_found_before_anything_runs(toy: Path, flags: str, more: str, wanted: str) -> None:
    for search in ('"random"', '"optuna"'):
        with pytest.raises(UserError, match=wanted):
            check_points(load_spec(write(toy, BASE + more, flags=f'"{flags}"', search=search)), toy)


def test_the_ends_of_a_range_are_checked_for_a_search_that_invents_points(toy: Path) -> None:
    text = BASE.replace("{ loguniform = [0.01, 1] }", "{ uniform = [-1, 1] }")
    with pytest.raises(UserError, match="found '-1'"):
        check_points(load_spec(write(toy, text, search='"optuna"')), toy)


def test_the_stored_searches_are_right() -> None:
    for path in sorted((ROOT / "configs" / "sweeps").glob("*.toml")):
        check_points(load_spec(path), ROOT)


# -- following a run


def follower(toy: Path, *flags: str, **how) -> Follower:
    spec = load_spec(write(toy))
    return Follower(spec, read_command(["python", "toy_paper/main.py", "--lr", "0.5", *flags], toy), toy, **how)


def reports(one: Follower) -> list[tuple]:
    found = []
    while (report := one.next()) is not None:
        found.append((report.epoch, report.value, report.finished))
    return found


def starts_of(toy: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in toy.glob("runs/*/starts"))


def test_every_evaluation_is_reported_once_with_the_best_so_far(toy: Path) -> None:
    wanted = [(1, 0.5, False), (2, 1.0, False), (3, 1.0, False), (3, 1.0, True)]
    assert reports(follower(toy)) == wanted
    # A finished run is read, not started.
    assert reports(follower(toy)) == wanted and starts_of(toy) == 1
    one = follower(toy)
    assert [one.next().last for _ in range(4)] == [False, False, True, True], "what ends is not to be stopped"
    less = follower(toy)
    less.spec = replace(less.spec, mode="min")
    assert [report[1] for report in reports(less)] == [0.5] * 4


@pytest.mark.parametrize("where", ("foreground", "background"))
def test_a_stopped_run_goes_on_where_it_was(toy: Path, where: str) -> None:
    """A shell tells what a script starts with & to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if where == "background" else signal.default_int_handler)
    try:
        one = follower(toy, "--seconds", "1.5")
        assert one.next().epoch == 1
        one.stop()
    finally:
        signal.signal(signal.SIGINT, before)
    assert one.command.state() == "incomplete"
    assert [report[0] for report in reports(follower(toy))] == [1, 2, 3, 3] and starts_of(toy) == 2
    [path] = toy.glob("runs/*/metrics.jsonl")
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_trial_that_was_stopped_early_is_not_started_again(toy: Path) -> None:
    one = follower(toy, "--seconds", "1.5")
    one.next()
    one.stop()
    assert [report[0] for report in reports(follower(toy, until=1))] == [1] and starts_of(toy) == 1
    # Told again, it is known to be from before; what an earlier session let pass is not judged anew.
    assert follower(toy).next().stored and not follower(toy, "--lr", "0.3").next().stored
    # What was logged after the decision to stop does not count.
    assert [report[0] for report in reports(follower(toy, until=0))] == []


def test_a_run_that_somebody_else_has_is_watched(toy: Path) -> None:
    one = follower(toy, "--seconds", "0.1")
    other = launch(one.command, toy)
    assert reports(one)[-1] == (3, 1.0, True) and starts_of(toy) == 1
    other.process.wait(30)  # the run is done a moment before its process is
    assert other.poll() == 0


def test_it_is_taken_over_when_the_other_vanishes(toy: Path) -> None:
    one = follower(toy, "--seconds", "0.6")
    other = launch(one.command, toy)
    threading.Timer(1.0, other.signal, [signal.SIGKILL]).start()
    threading.Timer(1.2, other.poll).start()
    assert reports(one)[-1] == (3, 1.0, True) and starts_of(toy) == 2


def test_a_failing_program_says_why(toy: Path) -> None:
    one = follower(toy, "--fail", "1")
    assert one.next().epoch == 1
    with pytest.raises(UserError, match="exit code 3: the reason stands in the last line"):
        one.next()


def test_a_finished_run_without_the_metric(toy: Path) -> None:
    one = follower(toy)
    one.spec = replace(one.spec, metric="val/other")
    with pytest.raises(UserError, match="has no val/other"):
        one.next()


# -- the ledger and the table


@pytest.fixture
def script(toy: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The script with the toy's root."""
    monkeypatch.setattr(sweep_program, "ROOT", toy)
    return vars(sweep_program)


def test_only_one_process_writes_to_a_sweep(script: dict, tmp_path: Path) -> None:
    with script["Trials"].open(tmp_path / "sweep"), pytest.raises(UserError, match="another process runs the sweep"):
        script["Trials"].open(tmp_path / "sweep").__enter__()


def test_known_trials_come_first_and_the_plan_goes_on_after_them(script: dict, toy: Path) -> None:
    spec = load_spec(write(toy))
    plan = planned_points(spec)
    with script["Trials"].open(toy / "runs" / "sweeps" / "x") as trials:
        source = script["Source"](spec, trials)
        assert [source.next()["point"] for _ in range(2)] == plan[:2]
        trials.end(spec, trials.all[0], "done", 3, 0.5)
    with script["Trials"].open(toy / "runs" / "sweeps" / "x") as trials:
        source = script["Source"](spec, trials)
        found = [source.next() for _ in range(5)]
        assert [one and one["point"] for one in found] == [*plan, None] and [one["state"] for one in found[:2]] == [
            "done",
            "waiting",
        ]
        assert trials.all[1]["command"].startswith("python toy_paper/main.py --epochs 3 --lr")


def test_a_damaged_ledger_is_told_and_made_again(script: dict, toy: Path) -> None:
    """One flipped bit may only change a value; without the file the same points come again, whose runs are there."""
    spec, folder = load_spec(write(toy)), toy / "runs" / "sweeps" / "x"
    with script["Trials"].open(folder) as trials:
        first = script["Source"](spec, trials).next()["point"]
        trials.end(spec, trials.all[0], "done", 3, 0.5)
    file = folder / "trials.json"
    whole = file.read_text()
    for damage in (whole.replace("0.5", "0.7"), whole.replace('"trials"', '"trialr"'), whole[:-9], "[]"):
        file.write_text(damage)
        with pytest.raises(UserError, match="trials.json.*: delete it and run the"):
            script["Trials"].open(folder).__enter__()
    file.unlink()
    with script["Trials"].open(folder) as trials:
        assert script["Source"](spec, trials).next()["point"] == first


@needs_ray
def test_optuna_goes_on_with_what_is_known(script: dict, toy: Path) -> None:
    spec = load_spec(write(toy, search='"optuna"', trials="30"))
    with script["Trials"].open(toy / "runs" / "sweeps" / "x") as trials:
        for _ in range(2):
            # The second session gets the points of the first again, and then others than those.
            source = script["Source"](spec, trials)
            for _ in range(len(trials.all) + 5):
                trial = source.next()
                source.tell(trial["trial"], "done", 3, -abs(trial["point"]["lr"] - 0.3))
        points = [trial["point"]["lr"] for trial in trials.all]
        assert len(points) == 10 and len(set(points)) == 10 and all(0.01 <= point <= 1 for point in points)
        source = script["Source"](spec, trials)
        while (trial := source.next()) is not None:
            source.tell(trial["trial"], "done", 3, -abs(trial["point"]["lr"] - 0.3))
        late = [trial["point"]["lr"] for trial in trials.all[20:]]
        # It learns: late points are nearer to the optimum than a log-uniform draw, whose mean distance is .27.
        assert sum(abs(point - 0.3) for point in late) / len(late) < 0.2


def test_the_table_ranks_on_validation_and_shows_test_of_the_best_alone(script: dict, toy: Path) -> None:
    spec = load_spec(write(toy), [])
    with script["Trials"].open(toy / "runs" / "sweeps" / "x") as trials:
        for n, lr in enumerate((0.1, 0.3, 0.2)):
            trial = trials.add(spec, {"lr": lr, "kind": "a"})
            state = "stopped" if n == 2 else "done"
            if state == "done":
                assert reports(Follower(spec, read_command(spec.words(trial["point"]), toy), toy))[-1][2]
            trials.end(spec, trial, state, 3, 2 * lr)
        failed = trials.add(spec, {"lr": 0.9, "kind": "b"})
        trials.end(spec, failed, "failed", None, None, "out of memory")
        script["write_table"](spec, trials)
        assert script["summarise"](spec, trials) == 1
        rows = script["table_rows"](spec, trials)
        # The program of the third was done before it could be stopped: its own figures count.
        assert reports(Follower(spec, read_command(spec.words(trials.all[2]["point"]), toy), toy))[-1][2]
        trials.all[2]["value"] = 0.2
        script["settle"](spec, trials)
        assert [trial["state"] for trial in trials.all] == ["done", "done", "done", "failed"] and trials.all[2][
            "value"
        ] == 0.4
    assert [row["method"] for row in rows] == [
        f"trial {n}: lr {lr}, kind {kind}"
        for n, lr, kind in ((2, 0.3, "a"), (1, 0.1, "a"), (3, 0.2, "a"), (4, 0.9, "b"))
    ]
    assert [row.get("recall@20") for row in rows] == [0.15, None, None, None] and [
        row["val/score"] for row in rows
    ] == [0.6, 0.2, 0.4, ""]
    assert rows[2]["protocol"] == "stopped early after epoch 3" and rows[3]["protocol"] == "failed: out of memory"
    best = (trials.folder / "best.toml").read_text()
    assert "lr = 0.3\n" in best and "out =" not in best
    again = read_command(["python", "toy_paper/main.py", "--config", str(trials.folder / "best.toml")], toy)
    assert again.state() == "done"


# -- Ray Tune


def test_data_that_are_missing_end_a_sweep_before_it_begins(
    script: dict, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import toy_paper

    def load(settings: object) -> None:
        raise UserError("toy data not found: give --data-root")

    monkeypatch.setattr(toy_paper.Nothing, "load", load)
    monkeypatch.setattr(sweep_program, "require_ray", lambda: None)
    assert run_main(script["main"], [str(write(toy))]) == 2
    assert "toy data not found: give --data-root" in capsys.readouterr().err
    assert not list(toy.glob("runs/**/*"))


def test_a_first_trial_that_dies_at_once_is_the_last(
    script: dict, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What hands points to Tune, with a stand-in for Tune's part of it."""
    searcher = type("Searcher", (), {"FINISHED": "FINISHED", "__init__": lambda self, metric, mode: None})
    for name in ("ray", "ray.tune", "ray.tune.search"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["ray.tune.search"].Searcher = searcher
    monkeypatch.setattr(script["Source"], "tell", lambda *_: None)
    spec = load_spec(write(toy))
    for value, goes_on in ((None, False), (0.5, True)):
        with script["Trials"].open(toy / f"sweep-{goes_on}") as trials:
            points = script["_points_class"]()(script["Source"](spec, trials), spec, trials)
            points.suggest("first")
            if value is not None:
                points.on_trial_result("first", {"value": value, "epoch": 1})
            points.on_trial_complete("first", error=True)
            assert (points.suggest("second") != "FINISHED") == goes_on
            assert script["summarise"](spec, trials) == 1
            said = capsys.readouterr().out
            assert "1 failed" in said and trials.all[0]["state"] == "failed"


@pytest.mark.parametrize("missing", ["ray", "optuna"])
def test_without_ray_or_optuna_it_says_what_to_install(
    script: dict, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in ("ray", "ray.tune", "optuna"):
        monkeypatch.setitem(sys.modules, name, None if name.startswith(missing) else ModuleType(name))
    with pytest.raises(UserError, match=f"{missing}.* is not installed: run pip install -e '.\\[sweep\\]'"):
        script["require_ray"]()


def test_an_address_where_nothing_answers(script: dict) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="nothing answers at"):
            script["check_address"](here)
        server.listen()
        script["check_address"](here)
    script["check_address"]("auto")
    for wrong in ("somewhere", "host:", ":80", "host:name"):
        with pytest.raises(UserError, match="wanted HOST:PORT"):
            script["check_address"](wrong)


def sweep(root: Path, *words: str) -> subprocess.Popen:
    """The script with another root, as a process of its own."""
    code = (
        f"import sys; from pathlib import Path; from gfml.program import sweep; sweep.ROOT = Path({str(root)!r}); "
        "from gfml.program.cli import run_main; sys.exit(run_main(sweep.main, sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_dry_run_needs_no_ray(toy: Path) -> None:
    done = sweep(toy, str(write(toy)), "--dry-run", "--", "--seconds", "0.1")
    out, err = done.communicate()
    assert done.returncode == 0, err
    first = out.splitlines()[0]
    assert first.startswith("python toy_paper/main.py --epochs 3 --seconds 0.1 --lr 0.")
    assert first.endswith("  # [1/4] not launched") and out.endswith("# 4 not launched\n")
    # Every line can be pasted into a shell as it is.
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    assert not (toy / "runs").exists()
    for words, wanted in (
        (["--resume"], "--resume found no sweep"),
        (["--worker", "2"], "unknown flag --worker"),
        (["--", "--lrr", "1"], "unknown flag --lrr"),
    ):
        wrong = sweep(toy, str(write(toy)), *words)
        line = wrong.communicate()[1]
        assert wrong.returncode == 2 and wanted in line and line.count("\n") == 1


def pids_of(toy: Path) -> list[int]:
    return [json.loads(line)["pid"] for path in toy.glob("runs/*/starts") for line in path.read_text().splitlines()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected by init does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_ray
@pytest.mark.slow
def test_two_trials_on_ray(toy: Path) -> None:
    """One trial ends well, one fails: reported, counted, and no reason for the other to stop."""
    text = BASE.replace("lr = { loguniform = [0.01, 1] }", 'work = { flags = ["--lr 0.3 --fail 1", "--lr 0.1"] }')
    path = write(toy, text.replace('kind = { choice = ["a", "b"] }\n', ""), search='"grid"', trials="")
    done = sweep(toy, str(path), "--workers", "2")
    out, err = done.communicate(timeout=600)
    assert done.returncode == 1, err
    assert (
        "[1/2] failed: the reason stands in the last line" in out
        and "[2/2] done: val/score 0.2000 after epoch 3" in out
    )
    assert "best by val/score, 0.2000: python toy_paper/main.py --epochs 3 --lr 0.1" in out
    [folder] = (toy / "runs" / "sweeps").iterdir()
    assert {one.name for one in folder.iterdir()} == {".lock", "trials.json", "table.csv", "best.toml"}


@needs_ray
@pytest.mark.slow
def test_a_killed_sweep_loses_and_repeats_nothing(toy: Path) -> None:
    """kill -9 of the driver and of the program at work, with one trial done before; a later one fails."""
    text = BASE.replace(
        "lr = { loguniform = [0.01, 1] }",
        'work = { flags = ["--lr 0.1", "--lr 0.2 --seconds 3 --epochs 2", "--lr 0.3 --fail 1"] }',
    )
    path = write(toy, text.replace('kind = { choice = ["a", "b"] }\n', ""), search='"grid"', trials="")
    first = sweep(toy, str(path), "--workers", "1")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and len(list(toy.glob("runs/*/metrics.jsonl"))) < 2:
        time.sleep(0.1)
    first.kill()
    first.communicate()
    [done] = [path.parent for path in toy.glob("runs/*/done")]
    before = (done / "metrics.jsonl").stat().st_mtime_ns
    for pid in filter(is_alive, pids_of(toy)):
        os.kill(pid, signal.SIGKILL)
    while any(map(is_alive, pids_of(toy))):
        time.sleep(0.1)

    second = sweep(toy, str(path), "--workers", "1", "--resume")
    out, err = second.communicate(timeout=600)
    assert second.returncode == 1, err
    assert (
        "[1/3] was done: val/score 0.2000 after epoch 3" in out
        and "[3/3] failed: the reason stands in the last line" in out
    )
    assert "2 done, 1 failed" in out and "best by val/score, 0.4000" in out
    # Done: untouched. At work: started twice, every epoch once. Failed: tried once.
    assert (done / "metrics.jsonl").stat().st_mtime_ns == before
    epochs = {
        path.parent.name: [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        for path in toy.glob("runs/*/metrics.jsonl")
    }
    assert sorted(epochs.values()) == [[1], [1, 2], [1, 2, 3]]
    assert sorted(len(path.read_text().splitlines()) for path in toy.glob("runs/*/starts")) == [1, 1, 2]


@needs_ray
@pytest.mark.slow
def test_asha_stops_the_worse_and_ctrl_c_leaves_all_resumable(toy: Path) -> None:
    text = (
        BASE.replace("{ loguniform = [0.01, 1] }", "{ choice = [0.1, 0.9, 0.05, 0.02] }")
        + "[asha]\ngrace = 1\nreduction = 2\n"
    )
    path = write(
        toy,
        text.replace('kind = { choice = ["a", "b"] }\n', ""),
        search='"grid"',
        trials="",
        flags='"--epochs 6 --seconds 0.7"',
    )
    first = sweep(toy, str(path), "--workers", "1")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and len(list(toy.glob("runs/*/metrics.jsonl"))) < 2:
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=600)
    assert first.returncode == 130 and "interrupted" in err, (out, err)
    assert not any(map(is_alive, pids_of(toy)))
    [ledger] = (toy / "runs" / "sweeps").glob("*/trials.json")
    # Interrupted is not stopped early: the second trial waits for the next session.
    assert [trial["state"] for trial in json.loads(ledger.read_text())["trials"]][:2] == ["done", "waiting"]
    second = sweep(toy, str(path), "--workers", "1")
    out, err = second.communicate(timeout=600)
    assert second.returncode == 0, err
    states = Counter(trial["state"] for trial in json.loads(ledger.read_text())["trials"])
    # The first has nothing to be compared with, the second is better, the others are below the median at the first rung.
    assert states == {"done": 2, "stopped": 2}
    lengths = sorted(len(path.read_text().splitlines()) for path in toy.glob("runs/*/metrics.jsonl"))
    assert lengths[2:] == [6, 6] and lengths[1] < 6


# -- Slurm


def test_slurm_starts_ray_on_every_node_and_passes_the_sweep_on(tmp_path: Path) -> None:
    """The batch script with stand-ins for Slurm, Ray and Python that write down how they were called."""
    stubs, venv = tmp_path / "stubs", tmp_path / ".venv" / "bin"
    stubs.mkdir()
    venv.mkdir(parents=True)
    log = tmp_path / "log"
    programs = {
        stubs / "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        stubs
        / "srun": 'while [[ $1 == --* ]]; do [[ $1 == --nodelist ]] && shift && node=$1; shift; done; NODE=$node exec "$@"',
        stubs / "hostname": "echo 10.0.0.7 fd00::1",
        venv / "ray": f'[ $1 = status ] && exit 0; echo "$NODE $*" >> {log}; exec sleep 20',
        # The sweep ends after every node has joined: how fast the stand-ins start is luck.
        venv
        / "python": f'for try in {{1..300}}; do [ $(wc -l < {log}) -ge 3 ] && break; sleep 0.1; done; echo "python $*" >> {log}; exit 7',
    }
    for path, body in programs.items():
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-3]",
           "SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm_ray.sbatch"), "a.toml", "--", "--data-root", "D"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
    lines = log.read_text().splitlines()
    share = "--num-cpus 16 --num-gpus 4 --block"
    assert "n1 start --head --node-ip-address 10.0.0.7 --port 20005 --include-dashboard false " + share in lines
    assert "python scripts/sweep.py --address 10.0.0.7:20005 a.toml -- --data-root D" in lines
    assert {f"n{n} start --address 10.0.0.7:20005 {share}" for n in (2, 3)} <= set(lines) and len(lines) == 4


def test_random_points_are_pinned(tmp_path: Path) -> None:
    """The points of a stored search must not move from one version to the next: runs are found by them."""
    spec = load_spec(write(tmp_path))
    # 0.01 * 100 ** 0.51182162 and the second of two, for the shares 0.51182162 and 0.9504637.
    assert random_point(spec.space, 1, 0) == {"lr": 0.1056, "kind": "b"}
