"""Run directories: identity, state, locking, damage, random numbers."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from gfml.base import checkpoints, files
from gfml.base.errors import UserError
from gfml.base.runs import read_config, read_metrics, read_result, require_run, run_id, run_state
from gfml.base.settings import frozen
from gfml.engine import runs
from gfml.engine.runs import Run
from gfml.program.cli import parser_of
from gfml.program.flags import RunSettings

CONFIG = {"lr": 0.1, "epochs": 4, "seed": 1, "topks": [10, 20], "out": "runs", "device": "cpu", "checkpoint-every": 5}
RESULT = {"selection": {"epoch": 2}, "val": {"ndcg@20": 0.5}}


def open_run(out, config=CONFIG, **options) -> Run:
    return Run.open(out, "demo", config, label="toy", **options)


def finished(out, config=CONFIG, **options):
    with open_run(out, config, **options) as run:
        run.finish(RESULT)
    return run.path


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- identity


def test_id_ignores_locations_and_spelling_and_nothing_else():
    base = run_id("demo", "toy", CONFIG)
    assert base.startswith("demo-toy-") and len(base) == len("demo-toy-") + 8
    moved = CONFIG | {"out": "elsewhere", "device": "cuda", "checkpoint-every": 1, "topks": (10, 20)}
    assert run_id("demo", "toy", moved) == base
    assert run_id("demo", "toy", {"mass-lr": 1}) == run_id("demo", "toy", {"mass_lr": 1})
    for change in ({"lr": 0.2}, {"epochs": 5}, {"seed": 2}, {"topks": [10]}, {"new": 1}):
        assert run_id("demo", "toy", CONFIG | change) != base
    assert run_id("other", "toy", CONFIG)[-8:] != base[-8:]
    assert run_id("demo", "toy", CONFIG | {"data_root": "/x"}, runs.LOCATION_FLAGS | {"data_root"}) == base


def test_id_is_a_plain_directory_name():
    assert "/" not in run_id("demo", "../my data/ü.csv", CONFIG)


# -- life of a run


def test_states_and_files(tmp_path):
    path = tmp_path / run_id("demo", "toy", CONFIG)
    assert run_state(path) == "not launched"
    with open_run(tmp_path) as run:
        assert run.path == path and run_state(path) == "running" and not run.is_done and run.result is None
    assert run_state(path) == "incomplete"
    with pytest.raises(RuntimeError), open_run(tmp_path):
        raise RuntimeError("broke here")
    assert run_state(path) == "failed"
    assert "broke here" in (path / "failed").read_text() and "Traceback" in (path / "failed").read_text()
    with open_run(tmp_path) as run:
        assert not (path / "failed").exists()
        run.finish(RESULT)
    assert run_state(path) == "done" and read_result(path) == RESULT
    assert {p.name for p in path.iterdir()} == {".lock", "config.toml", "run.json", "result.json", "done"}


def test_run_json_tells_what_ran(tmp_path):
    path = finished(tmp_path)
    facts = json.loads((path / "run.json").read_text())
    assert facts["family"] == "demo" and facts["seed"] == 1 and facts["versions"]["torch"] == torch.__version__
    assert [session["state"] for session in facts["sessions"]] == ["done"]
    assert facts["sessions"][0].keys() == {"command", "started", "ended", "state", "cpu_seconds"}


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    package = tmp_path / "repo" / "gfml"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(runs.gfml, "__file__", str(package / "__init__.py"))
    assert runs._code_version() == {}
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    version = runs._code_version()
    assert len(version["commit"]) == 40 and version["dirty"] is False
    (package / "new.py").write_text("")
    assert runs._code_version()["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs._code_version() == {}


def test_interrupt_leaves_the_run_incomplete_and_says_how_to_go_on(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stop, open_run(tmp_path) as run:
        raise KeyboardInterrupt
    assert run_state(run.path) == "incomplete" and not (run.path / "failed").exists()
    assert f"`resume {run.path}`" in stop.value.__notes__[0]
    assert json.loads((run.path / "run.json").read_text())["sessions"][-1]["state"] == "incomplete"


def test_a_done_run_is_not_opened_for_writing(tmp_path):
    path = finished(tmp_path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with open_run(tmp_path) as run:
        assert run.is_done and run.result == RESULT
        for write in (lambda: run.log({"epoch": 1}), lambda: run.checkpoint({}), lambda: run.finish(RESULT)):
            with pytest.raises(ValueError, match="done"):
                write()
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_a_result_must_say_how_it_was_selected(tmp_path):
    with open_run(tmp_path) as run, pytest.raises(ValueError, match="selected"):
        run.finish({"val": {}})


def test_overwrite_keeps_earlier_runs(tmp_path):
    path = finished(tmp_path)
    for number in (1, 2):
        finished(tmp_path, overwrite=True)
        assert run_state(path.with_name(f"{path.name}~{number}")) == "done"
    with open_run(tmp_path, overwrite=True) as run:
        assert not run.is_done and run.metrics() == []
    assert run_state(path.with_name(f"{path.name}~3")) == "done"


def test_overwrite_without_an_earlier_run(tmp_path):
    assert run_state(finished(tmp_path, overwrite=True)) == "done"
    assert len(list(tmp_path.iterdir())) == 1


def test_read_only(tmp_path):
    with pytest.raises(UserError, match="there is no run at .*, or train it first"):
        open_run(tmp_path, read_only=True)
    with open_run(tmp_path) as writer:
        # What --out names holds runs and is none.
        with pytest.raises(UserError, match=f"there is no run at .* one of the 1 inside, such as {writer.path}$"):
            require_run(tmp_path)
        writer.save_best({"epoch": 3})
        reader = open_run(tmp_path, read_only=True)
        assert reader.load_best() == {"epoch": 3}
        with pytest.raises(ValueError, match="reading only"):
            reader.note(device="cpu")


# -- same directory, other settings


def test_resume_may_extend_and_change_nothing_else(tmp_path):
    path = finished(tmp_path)
    with pytest.raises(UserError, match=r"lr 0.1 \(now 0.2\).*only epochs and patience may change") as error:
        open_run(tmp_path, CONFIG | {"lr": 0.2}, resume=path)
    one_line(error)
    with open_run(tmp_path, CONFIG | {"out": "elsewhere"}, resume=path) as run:
        assert run.is_done
    with open_run(tmp_path, CONFIG | {"epochs": 8}, resume=path) as run:
        assert run.path == path and not run.is_done and run_state(path) == "running"
    assert read_config(path)["epochs"] == 8
    assert len(json.loads((path / "run.json").read_text())["sessions"]) == 2


def test_an_extended_run_is_not_taken_for_the_short_one(tmp_path):
    path = finished(tmp_path)
    with open_run(tmp_path, CONFIG | {"epochs": 8}, resume=path) as run:
        run.finish(RESULT)
    with pytest.raises(UserError, match=r"epochs 8 \(now 4\).*`overwrite`") as error:
        open_run(tmp_path)
    one_line(error)


def test_named_runs(tmp_path):
    assert finished(tmp_path, name="mine") == tmp_path / "mine"
    with pytest.raises(UserError, match=r"holds a run with lr 0.1 \(now 0.2\).*`run_name`"):
        open_run(tmp_path, CONFIG | {"lr": 0.2}, name="mine")
    for bad in ("../x", "a/b", "~x", "-x", ".hidden"):
        with pytest.raises(UserError, match="`run_name`"):
            open_run(tmp_path, name=bad)
    with pytest.raises(UserError, match="`resume` and `overwrite` together"):
        open_run(tmp_path, resume=tmp_path / "mine", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_directory_is_left_alone(tmp_path, overwrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not a run"):
        open_run(tmp_path, name="mine", overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_config_toml_is_a_config(tmp_path):
    parser = parser_of("demo", "", RunSettings)
    options = frozen(RunSettings, parser.parse_args(["--seed", "5", "--out", str(tmp_path)]))
    with Run.open(tmp_path, "demo", options.resolved) as run:
        pass
    again = frozen(RunSettings, parser.parse_args(["--resume", str(run.path)]))
    assert again.seed == 5 and again.resolved == options.resolved
    with Run.open(again.out, "demo", again.resolved, resume=again.resume) as resumed:
        assert resumed.path == run.path


def test_changed_data_is_noticed(tmp_path):
    with open_run(tmp_path) as run:
        run.check_data("a" * 64)
        run.check_data("a" * 64)
    with open_run(tmp_path) as run, pytest.raises(UserError, match="data has changed.*`overwrite`"):
        run.check_data("b" * 64)


# -- metrics


def test_metrics_lines(tmp_path):
    with open_run(tmp_path) as run:
        assert run.metrics() == []
        run.log({"epoch": 1, "train/loss": 0.1 + 0.2, "bad": float("nan")})
        run.log({"epoch": 2, "train/loss": 1e-30})
        assert run.metrics() == [{"epoch": 1, "train/loss": 0.1 + 0.2, "bad": None}, {"epoch": 2, "train/loss": 1e-30}]
        before = (run.path / "metrics.jsonl").read_bytes()
        run.truncate_metrics(2)
        assert (run.path / "metrics.jsonl").read_bytes() == before
        run.truncate_metrics(1)
        assert [row["epoch"] for row in run.metrics()] == [1]


def test_a_changed_line_is_told_when_the_run_goes_on(tmp_path):
    """The checkpoint holds the checksum of the lines before it: one flipped bit would only change a figure."""
    for keep in (3, 2):
        with open_run(tmp_path, overwrite=keep == 2) as run:
            for epoch in (1, 2, 3):
                run.log({"epoch": epoch, "loss": 0.5 / epoch, "none": float("inf")})
                if epoch <= keep:
                    run.checkpoint({"epoch": epoch})
            logged = run.load_checkpoint()["logged"]
            run.truncate_metrics(keep, logged)
            run.log({"epoch": keep + 1, "loss": 0.1})
            run.truncate_metrics(keep, logged)
            assert [row["epoch"] for row in run.metrics()] == [*range(1, keep + 1)]
            flipped(run.path / "metrics.jsonl", (run.path / "metrics.jsonl").read_bytes().index(b"0.25") + 2)
            with pytest.raises(UserError, match="metrics.jsonl is damaged: restore it, or train anew"):
                run.truncate_metrics(keep, logged)


def test_a_line_cut_short_is_dropped_but_damage_is_told(tmp_path):
    with open_run(tmp_path) as run:
        run.log({"epoch": 1})
        path = run.path / "metrics.jsonl"
        path.write_text(path.read_text() + '{"epoch": 2, "tr')
        assert run.metrics() == [{"epoch": 1}]
        path.write_text('{"epo\n{"epoch": 2}\n')
        with pytest.raises(UserError, match="metrics.jsonl is damaged"):
            run.metrics()


# -- locks


def test_two_processes_never_write_to_one_run(tmp_path):
    code = "import sys; from gfml.engine.runs import Run; from gfml.program.cli import run_main\n"
    code += f"sys.exit(run_main(lambda argv: Run.open({str(tmp_path)!r}, 'demo', {CONFIG!r}, label='toy') and 0))"
    with open_run(tmp_path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert second.returncode == 2
        assert second.stderr.startswith("error: another process is writing to") and second.stderr.count("\n") == 1
        with pytest.raises(UserError, match="another process"):
            open_run(tmp_path, overwrite=True)
    with open_run(tmp_path):
        pass


def test_the_lock_dies_with_its_process(tmp_path):
    code = "import os; from gfml.engine.runs import Run; "
    code += f"Run.open({str(tmp_path)!r}, 'demo', {CONFIG!r}, label='toy'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert run_state(tmp_path / run_id("demo", "toy", CONFIG)) == "incomplete"
    with open_run(tmp_path):
        pass


# -- checkpoints and disks


def test_checkpoint_round_trip(tmp_path):
    with open_run(tmp_path) as run:
        assert run.load_checkpoint() is None
        state = {"weights": torch.randn(3), "epoch": 2, "nested": {"a": [1.5, None, (1, "x")]}}
        run.checkpoint(state)
        loaded = run.load_checkpoint()
        assert torch.equal(loaded.pop("weights"), state.pop("weights")) and loaded == state | {"logged": 0}
        assert not list(run.path.glob(".*.tmp"))
        with pytest.raises(UserError, match="there is no .*best.pt"):
            run.load_best()


@pytest.mark.parametrize("damage", ["half", "empty", "text", "tail", "middle", "foreign", "pickle"])
def test_damaged_checkpoints(tmp_path, damage):
    with open_run(tmp_path) as run:
        run.checkpoint({"weights": torch.zeros(1000)})
        path = run.path / "last.pt"
        data = path.read_bytes()
        if damage == "foreign":
            torch.save({"weights": torch.zeros(3)}, path)
        elif damage == "pickle":
            torch.save({"format": checkpoints.FORMAT, "state": random.Random(1)}, path)
        else:
            changed = {
                "half": data[: len(data) // 2],
                "empty": b"",
                "text": b"hello" * 100,
                "tail": data[:-1],
                "middle": data[:100] + bytes(300) + data[400:],
            }
            path.write_bytes(changed[damage])
        with pytest.raises(UserError) as error:
            run.load_checkpoint()
        assert str(path) in one_line(error) and "delete it and run the same command again" in one_line(error)


def flipped(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_one_flipped_bit_in_a_checkpoint_is_told(tmp_path):
    """Of a weight, where torch.load alone notices nothing."""
    with open_run(tmp_path) as run:
        weights = torch.arange(1000.0)
        run.checkpoint({"weights": weights})
        path = run.path / "last.pt"
        place = path.read_bytes().index(weights.numpy().tobytes()[:400])
        for offset in (0, 1234, 3999):
            flipped(path, place + offset)
            assert not torch.equal(torch.load(path)["state"]["weights"], weights)
            with pytest.raises(UserError, match="last.pt .*does not have its checksum.*delete it") as error:
                run.load_checkpoint()
            one_line(error)
            flipped(path, place + offset)
        assert torch.equal(run.load_checkpoint()["weights"], weights)


def test_one_flipped_bit_in_a_result_is_told(tmp_path):
    """It would only change a figure; the advice finishes the run again."""
    path = finished(tmp_path)
    file, found = path / "result.json", read_result(path)
    flipped(file, file.read_bytes().index(b"0.") + 2)
    assert "selection" in json.loads(file.read_text()) and json.loads(file.read_text()) != found
    with pytest.raises(UserError, match="result.json is no result of a run, or damaged: delete it and finish") as error:
        read_result(path)
    one_line(error)
    file.unlink()
    assert run_state(path) == "incomplete" and read_result(finished(tmp_path)) == found
    (path / "done").write_text("2026-01-01T00:00:00+00:00\n")  # as before results had checksums
    assert read_result(path) == found


def test_advice_about_damaged_files_names_what_helps(tmp_path):
    """last.pt may be deleted; of others the run's own flags are given again, in its place."""
    path = finished(tmp_path)
    for name in ("best.pt", "final.pt"):
        told = str(checkpoints.damaged(path / name, "why"))
        assert f"`config {path / 'config.toml'}` `out {tmp_path}` `run_name {path.name}` `overwrite`" in told
    with pytest.raises(UserError, match="final.pt .it is missing.*`overwrite`"):
        checkpoints.load_state(path / "final.pt")  # training again would only show the result
    inner = path / "refit-3"
    assert f"delete {inner} and run" in str(checkpoints.damaged(inner / "best.pt", "why"))
    for theirs in (tmp_path / "weights.pt", tmp_path / "last.pt", tmp_path / "refit-1" / "final.pt"):
        assert str(checkpoints.damaged(theirs, "why")).endswith("give another file")


def test_a_removed_run_directory_stays_removed(tmp_path):
    """The failure creates nothing in its place, and the same command starts anew."""
    for write in (lambda run: run.log({"epoch": 1}), lambda run: run.checkpoint({}), lambda run: run.file("final.pt")):
        with pytest.raises(UserError, match="was removed meanwhile: run the same command again"):
            with open_run(tmp_path) as run:
                shutil.rmtree(run.path)
                write(run)
        assert not run.path.exists()
    with pytest.raises(RuntimeError, match="broke"), open_run(tmp_path) as run:
        shutil.rmtree(run.path)
        raise RuntimeError("broke")
    assert not run.path.exists()
    finished(tmp_path)


def test_a_done_run_without_its_result_is_finished_again(tmp_path):
    path = finished(tmp_path)
    (path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="result.json is no result.*delete it and finish the run again"):
        read_result(path)
    (path / "result.json").unlink()
    assert run_state(path) == "incomplete"
    with pytest.raises(UserError, match=f"no result .incomplete.*`resume {path}`"):
        read_result(path)
    with open_run(tmp_path, resume=path) as run:
        assert not run.is_done
        run.finish(RESULT)
    assert read_result(path) == RESULT


def test_what_killed_processes_left_goes_at_the_next_start(tmp_path):
    """Their temporary files go, those of a process at work stay; and a forked reader holds no lock."""
    code = """
import os, signal, sys
from gfml.base.files import atomic_open
from gfml.engine.runs import Run
run = Run.open(sys.argv[1], "demo", {"seed": 1}, name="mine")
reader = os.fork()
if reader == 0:
    signal.pause()
with atomic_open(run.path / "last.pt") as stream:
    stream.write("half")
    stream.flush()
    print(reader, flush=True)
    signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    reader = int(process.stdout.readline())
    path = tmp_path / "mine"
    try:
        files.remove_leftovers(path)
        assert len(list(path.glob(".last.pt.*.tmp"))) == 1 and run_state(path) == "running"
        process.kill()
        process.wait()
        os.kill(reader, 0)  # still there
        with Run.open(tmp_path, "demo", {"seed": 1}, name="mine"):
            assert not list(path.glob(".*.tmp"))
    finally:
        process.kill()
        os.kill(reader, signal.SIGKILL)


def test_damaged_metrics_are_told(tmp_path):
    path = finished(tmp_path)
    for content in (b"\xff\xfe{}\n", b"[1]\n", b'{"loss": 1}\n', b"{\n"):
        (path / "metrics.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="metrics.jsonl is damaged.*`overwrite`"):
            read_metrics(path)


def test_a_name_that_no_file_may_have(tmp_path):
    with pytest.raises(UserError, match="a run name of 300 letters, wanted 200 at most"):
        open_run(tmp_path, name="x" * 300)


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    with open_run(tmp_path) as run:
        run.checkpoint({"epoch": 1})

        def full(state, stream):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 (as torch.save does)

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="disk full while writing .*last.pt") as error:
            run.checkpoint({"epoch": 2})
        one_line(error)
        assert run.load_checkpoint() == {"epoch": 1, "logged": 0}
        assert not list(run.path.glob(".*.tmp"))


def test_torch_reports_a_full_disk_as_assumed(tmp_path):
    """What the previous test imitates: a write error inside torch.save is the context of its RuntimeError."""

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises((RuntimeError, OSError)) as error:
        torch.save({"a": torch.zeros(1000)}, Full())
    assert isinstance(error.value, OSError) or isinstance(error.value.__context__, OSError)


def test_unwritable_places(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write .*file.*`out`") as error:
        open_run(tmp_path / "file")
    one_line(error)
    with pytest.raises(UserError, match="cannot write"):
        open_run("/proc/nowhere")
    with open_run(tmp_path) as run:
        run.log({"epoch": 1})
        (run.path / "metrics.jsonl").unlink()
        (run.path / "metrics.jsonl").mkdir()
        with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
            run.log({"epoch": 2})


def test_recording_a_failure_never_hides_it(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError, match="the real reason"), open_run(tmp_path):
        monkeypatch.setattr(os, "replace", full)
        raise RuntimeError("the real reason")
    monkeypatch.undo()
    with open_run(tmp_path):  # and the lock is free again
        pass


def test_an_error_while_opening_frees_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_versions", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_run(tmp_path)
    monkeypatch.undo()
    with open_run(tmp_path):
        pass


def test_damaged_records_are_told(tmp_path):
    path = finished(tmp_path)
    (path / "result.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*result.json"):
        read_result(path)
    (path / "result.json").unlink()
    with pytest.raises(UserError, match="has no result"):
        read_result(path)
    (path / "config.toml").write_text("= 3")
    with pytest.raises(UserError, match="cannot read .*config.toml"):
        read_config(path)
    with pytest.raises(UserError, match="there is no run at"):
        read_config(tmp_path / "none")


# -- random numbers


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_one_seed_for_every_generator():
    runs.seed_everything(5)
    first = draw()
    runs.seed_everything(5)
    assert draw() == first
    runs.seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_rng_state_survives_a_checkpoint(tmp_path):
    runs.seed_everything(5)
    random.gauss(0, 1)  # leaves a second number waiting in Python's and NumPy's generators
    np.random.randn()
    checkpoints.save_state(tmp_path / "rng.pt", runs.rng_state())
    expected = draw()
    runs.seed_everything(9)
    runs.set_rng_state(checkpoints.load_state(tmp_path / "rng.pt"))
    assert draw() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rng_state_on_cuda(tmp_path):
    runs.seed_everything(5)
    torch.rand(3, device="cuda")
    checkpoints.save_state(tmp_path / "rng.pt", runs.rng_state())
    expected = torch.rand(3, device="cuda")
    runs.set_rng_state(checkpoints.load_state(tmp_path / "rng.pt"))
    assert torch.equal(torch.rand(3, device="cuda"), expected)
