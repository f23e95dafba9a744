"""Lists of commands: states, failures, devices, two lists at once, and stopping, on a toy program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from gfml.base.errors import UserError
from gfml.base.files import handed_down, is_locked, try_lock
from gfml.program.commands import check_devices, claim, launch, read_command, run_all, slots_of

ROOT = Path(__file__).resolve().parents[2]


def command(root: Path, *flags: str, out: str = "runs"):
    return read_command(["python", "toy_paper/main.py", "--out", out, *flags], root)


def starts(one) -> list[dict]:
    """What every start of the program wrote down."""
    path = one.runs[0].path()
    return [json.loads(line) for line in (path / "starts").read_text().splitlines()] if path else []


def run(root: Path, commands, slots=({},)) -> tuple[Counter, list[str]]:
    said: list[str] = []
    return run_all(commands, slots, root, said.append), said


def test_states_failures_and_skipping(toy: Path) -> None:
    good, bad, last = command(toy, "--lr", "1"), command(toy, "--lr", "2", "--fail", "1"), command(toy, "--lr", "3")
    assert [one.state() for one in (good, bad, last)] == ["not launched"] * 3
    ended, said = run(toy, [good, bad, last], [{}, {}])
    # A failure does not stop what comes after it.
    assert ended == {"ran": 2, "FAILED": 1}
    assert any("FAILED with exit code 3: the reason stands in the last line" in line for line in said)
    assert [one.state() for one in (good, bad, last)] == ["done", "incomplete", "done"]
    again, said = run(toy, [good, bad, last])
    assert again == {"done": 2, "FAILED": 1} and said[0].startswith("[1/3] done: python toy_paper/main.py")
    assert [len(starts(one)) for one in (good, bad, last)] == [1, 2, 1]
    (bad.runs[0].path() / "failed").write_text("")
    assert bad.state() == "failed"


def test_the_same_run_twice_in_a_list_runs_once(toy: Path) -> None:
    one, same = command(toy, "--lr", "1"), command(toy, "--lr", "1.0", "--seconds", "0.01")
    ended, said = run(toy, [one, same], [{}, {}])
    assert ended == {"ran": 1, "repeated": 1} and "the same run as [1]" in said[1] and len(starts(one)) == 1


def test_a_program_on_each_device_and_one_at_a_time_there(toy: Path) -> None:
    commands = [command(toy, "--lr", str(n), "--seconds", "0.1") for n in range(1, 6)]
    ended, _ = run(toy, commands, slots_of("0,3", 1))
    assert ended == {"ran": 5}
    began = {n: starts(one)[0] for n, one in enumerate(commands)}
    ends = {n: float((one.runs[0].path() / "ends").read_text()) for n, one in enumerate(commands)}
    assert {one["CUDA_VISIBLE_DEVICES"] for one in began.values()} == {"0", "3"}
    for n, first in began.items():
        others = [m for m in began if m > n and began[m]["CUDA_VISIBLE_DEVICES"] == first["CUDA_VISIBLE_DEVICES"]]
        assert all(began[m]["began"] > ends[n] for m in others)


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slots_of("0,0", 1) == [{"CUDA_VISIBLE_DEVICES": "0"}] * 2
    cores = len(os.sched_getaffinity(0))
    assert slots_of(None, 1) == [{}] and slots_of(None, 3) == [{"OMP_NUM_THREADS": str(max(1, cores // 3))}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert slots_of(None, 2) == [{}, {}]
    for wrong in ("", "0,", "a", "0;1"):
        with pytest.raises(UserError, match="GPUS=0,1,2"):
            slots_of(wrong, 1)


def test_gpus_and_a_device_of_its_own_contradict(toy: Path) -> None:
    check_devices([command(toy, "--device", "cuda"), command(toy, "--gpu_id", "0")])
    for flags in (["--device", "cuda:1"], ["--gpu_id", "2"]):
        with pytest.raises(UserError, match="GPUS chooses the device"):
            check_devices([command(toy, *flags)])


def test_two_lists_at_once_start_every_run_once(toy: Path) -> None:
    commands = [command(toy, "--lr", str(n), "--seconds", "0.05") for n in range(1, 7)]
    counts: list[Counter] = []
    lists = [
        threading.Thread(target=lambda order=order: counts.append(run(toy, order)[0]))
        for order in (commands, commands[::-1])
    ]
    for one in lists:
        one.start()
    for one in lists:
        one.join()
    assert all(one.state() == "done" and len(starts(one)) == 1 for one in commands)
    assert sum(count["ran"] for count in counts) == 6 and not any(count["FAILED"] for count in counts)


def test_a_claim_outlives_its_launcher(toy: Path) -> None:
    """The launcher is killed at once; the program goes on, and nobody starts it a second time."""
    code = (
        "import sys, time; from pathlib import Path; from gfml.program.commands import launch, read_command\n"
        f"root = Path({str(toy)!r}); launch(read_command(sys.argv[1:], root), root); print('launched', flush=True); time.sleep(60)"
    )
    one = command(toy, "--seconds", "0.5")
    launcher = subprocess.Popen([sys.executable, "-c", code, *one.words], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "launched\n"
    launcher.kill()
    launcher.wait()
    assert one.state() == "running" and claim(one.runs) is None and launch(one, toy) is None
    assert run(toy, [one])[0] == {"running": 1}
    deadline = time.monotonic() + 30
    while one.state() != "done" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert one.state() == "done" and len(starts(one)) == 1


def test_readers_of_a_killed_program_do_not_keep_its_claim(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from gfml.program.cli import run_main\n"
        "def main(argv):\n"
        "    if not os.fork(): print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "run_main(main)\n"
    )
    path = tmp_path / "lock"
    lock = try_lock(path)
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, pass_fds=[lock.fileno()],
        env={**os.environ, **handed_down([lock])},
    )  # fmt: skip
    reader = int(program.stdout.readline())
    try:
        lock.close()
        assert is_locked(path)
        program.kill()
        program.wait()
        os.kill(reader, 0)  # it lives
        assert not is_locked(path)
    finally:
        os.kill(reader, signal.SIGKILL)
        program.stdout.close()


def script(root: Path, text: str, *words: str) -> subprocess.Popen:
    """The script with another root, its commands on stdin."""
    code = f"import sys; from pathlib import Path; from gfml.program import run_commands; run_commands.ROOT = Path({str(root)!r}); from gfml.program.cli import run_main; sys.exit(run_main(run_commands.main, sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    process.stdin.write(text)
    process.stdin.close()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_a_list_stops_its_programs_and_says_how_to_go_on(toy: Path, number: int) -> None:
    commands = [command(toy, "--lr", str(n), "--seconds", "5") for n in (1, 2, 3)]
    process = script(toy, "\n".join(map(str, commands)), "--workers", "2")
    deadline = time.monotonic() + 60
    while sum(bool(starts(one)) for one in commands) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=60) == 130 and time.monotonic() - began < 10
    assert "interrupted: all programs are stopped; the same command goes on from here" in process.stderr.read()
    for one in commands[:2]:
        assert one.state() == "incomplete"
        with pytest.raises(ProcessLookupError):
            os.kill(starts(one)[0]["pid"], 0)
    assert commands[2].state() == "not launched"


def test_the_script_end_to_end(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "python toy_paper/main.py --lr 1\n\npython toy_paper/main.py --lr 2 --fail 1\n"
    dry = script(toy, text, "--dry-run")
    assert dry.wait() == 0 and dry.stdout.read().splitlines()[-1] == "# 2 not launched" and not (toy / "runs").exists()
    done = script(toy, text, "--epochs", "1")
    assert done.wait() == 1 and done.stdout.read().splitlines()[-1] == "1 ran, 1 FAILED"
    for words, wanted in ((["--workers", "0"], "whole number >= 1"), (["--lrr", "1"], "unknown flag --lrr")):
        wrong = script(toy, text, *words)
        assert wrong.wait() == 2 and wanted in (line := wrong.stderr.read()) and line.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "families"),
    [("recsys/main.py --dataset lastfm", ["recsys"]), ("mcl/main.py --gfml", ["mcl"]), ("cml_baseline/main.py --dataset demo", ["cml_baseline"]),
     ("hlrm/train.py --hlrm_type plus --epochs 2", ["hlrm"]), ("vision/main.py", ["vision", "vision"]),
     ("vision/main.py --model-name vit_gra", ["vision"]), ("contextual/main.py", ["contextual-256"]), ("contextual/train.py", ["contextual-224"]),
     ("mirror_grad/main.py --model BPR", ["mirror"]), ("mirror_grad/main.py --model BPR --grid learning-rate=0.1,0.2", ["mirror", "mirror"])],
)  # fmt: skip
def test_every_program_of_the_repository_is_understood(words: str, families: list[str]) -> None:
    found = read_command(["python", *words.split()], ROOT)
    assert [run.family for run in found.runs] == families and len({run.digest for run in found.runs}) == len(families)
    distributed = read_command(["torchrun", "--nproc-per-node", "2", *words.split()], ROOT)
    assert distributed.runs == found.runs and distributed.arguments(ROOT)[1:3] == ["-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("python recsys/main.py --lamda 1", "unknown flag --lamda"), ("python hlrm/eval.py", "makes no runs"), ("python recsys/report.py x", "makes no runs"),
     ("python recsys/none.py", "wanted python FOLDER/main.py"), ("recsys/main.py", "wanted python FOLDER/main.py"), ("python scripts/bench.py", "is no paper"),
     ("python recsys/main.py --help", "prints its help"), ("python mcl/main.py --run-name x", "drop --run-name")],
)  # fmt: skip
def test_a_mistake_in_a_command_is_one_line(words: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        read_command(words.split(), ROOT)


def test_the_run_directory_is_the_one_the_program_makes(tmp_path: Path) -> None:
    """The digest of a planned run against a run that a program really made."""
    from recsys.main import main

    words = ["--demo-users", "60", "--demo-items", "40", "--demo-interactions", "900", "--epochs", "1", "--topks", "5", "--es_metric",
             "ndcg@5", "--baselines", "none", "--report", "0", "--no-progress", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    assert main(words) == 0
    found = read_command(["python", "recsys/main.py", *words], ROOT)
    assert found.state() == "done" and found.runs[0].path().parent == tmp_path


def test_the_recommender_grid(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "sweep_recsys.sh"), "--dry-run", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    # Three models with dot and bpr and four gravity losses x 4 distances x 4 masses; the hinge on two.
    assert len(set(lines)) == 3 * (2 + 4 * 4 * 4) + 2 and last == "# 200 not launched" and not list(tmp_path.iterdir())
