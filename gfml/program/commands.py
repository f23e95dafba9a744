"""Command lines that make runs: which runs a line makes, their states, and running many lines over several devices.

A line is ``python FOLDER/PROGRAM.py --flag value ...`` or ``torchrun ... FOLDER/PROGRAM.py --flag value ...``. What it
makes is asked of the program itself: of ``PROGRAM`` in the module FOLDER.PROGRAM (:class:`gfml.program.program.Program`).

Whoever launches a run holds its claim, a lock below ``OUT/.commands``, until the launched process has ended; the process
inherits it. So one run is never launched twice, whatever becomes of the launcher.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gfml.base.errors import UserError
from gfml.base.files import handed_down, is_locked, os_errors, try_lock
from gfml.base.home import find_program
from gfml.base.toml import LOCATION_FLAGS

# How long a stopped program may take to write what it has before it is killed.
GRACE_SECONDS = 30.0
POLL_SECONDS = 0.05
_ORDER = ("running", "failed", "incomplete", "not launched", "done")


@dataclass(frozen=True)
class PlannedRun:
    """A run that a command makes. out: the directory of its run directory; digest: the end of that directory's name."""

    family: str
    digest: str
    out: Path
    options: Any = field(compare=False, repr=False)

    def path(self) -> Path | None:
        """The run directory, None before the run was first launched."""
        # The label between family and digest follows from the settings too, but only once the data is read.
        found = sorted(self.out.glob(f"{self.family}-*-{self.digest}"))
        return found[0] if found else None

    def state(self) -> str:
        """done, incomplete, failed, running or not launched. A claimed run is running, although it may just be starting."""
        from gfml.base.runs import run_state

        path = self.path()
        state = run_state(path) if path else "not launched"
        return "running" if state != "done" and is_locked(self.file("lock")) else state

    def file(self, kind: str) -> Path:
        """Its ``lock`` or ``log`` among the files of launchers."""
        return self.out / ".commands" / f"{self.family}-{self.digest}.{kind}"


@dataclass(frozen=True)
class Command:
    """A line that was understood. words: as written; runs: what it makes."""

    words: tuple[str, ...]
    runs: tuple[PlannedRun, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def log(self) -> Path:
        """Where its output goes when it is not shown."""
        return self.runs[0].file("log")

    def state(self) -> str:
        """The state of its run; of several, done when all are, else the first of running, failed, incomplete that one has."""
        states = {run.state() for run in self.runs}
        if states == {"done", "not launched"}:
            return "incomplete"
        return min(states, key=_ORDER.index)

    def arguments(self, root: Path) -> list[str]:
        """The process to start in ``root``, by this interpreter: the program there, else that of the installed package."""
        launcher = ["-m", "torch.distributed.run"] if self.words[0] == "torchrun" else []
        words = list(self.words[1:])
        place = next(n for n, word in enumerate(words) if word.endswith(".py"))
        if not (root / words[place]).is_file():
            words[place] = str(find_program(words[place], root))
        return [sys.executable, *launcher, *words]


def read_command(words: Sequence[str], root: Path) -> Command:
    """The command of these words, its flags checked by the program's own parser; nothing is run.

    root: the repository; paths in the words are relative to it. UserError for anything the program would refuse.
    """
    text = shlex.join(words)
    place = next((n for n, word in enumerate(words) if word.endswith(".py")), 0)
    if len(words) < 2 or place == 0 or not find_program(words[place], root) or not Path(words[place]).parent.name:
        raise UserError(f"found the command {text!r}, wanted python FOLDER/main.py and its flags")
    with contextlib.chdir(root):
        made = _ask(Path(words[place]), list(words[place + 1 :]), text)
        if any(options.run_name or options.resume for _, options in made):
            raise UserError(f"runs of a list are named by their settings: drop --run-name and --resume (in: {text})")
        return Command(tuple(words), tuple(_planned(*one) for one in made))


def _ask(program: Path, argv: list[str], text: str) -> list[tuple[str, Any]]:
    """Family and settings of every run, from the program itself."""
    folder = program.parent.name
    spec = importlib.util.find_spec(folder) if folder.isidentifier() else None
    if spec is None or spec.origin is None:
        raise UserError(f"{folder} is no paper, so {program.name} makes no runs (in: {text})")
    found = getattr(importlib.import_module(f"{folder}.{program.stem}"), "PROGRAM", None)
    said, made = io.StringIO(), []
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            # A companion, such as one that judges, may import the program beside it.
            own = found is not None and found.module == f"{folder}.{program.stem}"
            made = [(found.family, one) for one in found.runs(argv)] if own else []
    except SystemExit as stop:
        if stop.code in (0, None):
            raise UserError(f"found a command that only prints its help: {text}") from None
        raise UserError(f"{said.getvalue().strip().splitlines()[-1]} (in: {text})") from None
    if not made:
        raise UserError(f"{program} makes no runs (in: {text})")
    return made


def _planned(family: str, options: Any) -> PlannedRun:
    from gfml.base.runs import run_id

    name = run_id(family, "*", options.resolved, LOCATION_FLAGS | options.beside())
    return PlannedRun(family, name.rpartition("-")[2], Path(options.out).absolute(), options)


# -- launching


class Claim:
    """The locks of some runs: held until closed here and, once handed to a process, until that has ended too."""

    def __init__(self, locks: Sequence[IO[str]]) -> None:
        self._locks = locks

    @property
    def files(self) -> tuple[int, ...]:
        """Their descriptors, for ``pass_fds``."""
        return tuple(lock.fileno() for lock in self._locks)

    @property
    def environment(self) -> dict[str, str]:
        """What tells the process of them."""
        return handed_down(self._locks)

    def close(self) -> None:
        """Let go. Safe to call twice."""
        for lock in self._locks:
            lock.close()


def claim(runs: Iterable[PlannedRun]) -> Claim | None:
    """Hold the claims of all these runs; None when another launcher, or what it launched, holds one."""
    locks: list[IO[str]] = []
    # In one order everywhere, so that two launchers never hold half each.
    for run in sorted(runs, key=lambda run: run.file("lock")):
        path = run.file("lock")
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = try_lock(path)
        if lock is None:
            Claim(locks).close()
            return None
        locks.append(lock)
    return Claim(locks)


@dataclass
class Launched:
    """A program at work, in a process group of its own. ``poll`` gives its exit code, None while it runs."""

    process: subprocess.Popen[bytes]
    claim: Claim
    started: float = field(default_factory=time.monotonic)

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            self.claim.close()
        return code

    def signal(self, number: int) -> None:
        """Send a signal to the program and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def launch(
    command: Command, root: Path, *, env: Mapping[str, str] | None = None, show: bool = False
) -> Launched | None:
    """Start or continue a command's runs; None when another launcher has them.

    env: variables beside this process's own. show: its output comes here instead of to ``command.log``.
    """
    held = claim(command.runs)
    if held is None:
        return None
    try:
        with contextlib.ExitStack() as files:
            output = None if show else files.enter_context(open(command.log, "ab"))
            # A launcher that blocks Ctrl-C would hand that down, and the program could not be stopped politely.
            mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            files.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            process = subprocess.Popen(
                command.arguments(root), cwd=root, env={**os.environ, **(env or {}), **held.environment}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT if output else None, pass_fds=held.files, start_new_session=True,
            )  # fmt: skip
    except BaseException:
        held.close()
        raise
    return Launched(process, held)


def stop(launched: Sequence[Launched], grace: float = GRACE_SECONDS) -> None:
    """End programs as Ctrl-C does, and by force those that are still there after ``grace`` seconds or at a second Ctrl-C."""
    # A launcher in the background of a script was told to ignore Ctrl-C, and what it launched was told so too.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    try:
        for one in launched:
            one.signal(signal.SIGTERM if ignored else signal.SIGINT)
        deadline = time.monotonic() + grace
        while any(one.poll() is None for one in launched) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        for one in launched:
            if one.poll() is None:
                one.signal(signal.SIGKILL)
                one.process.wait()
                one.poll()


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty without one."""
    if not log.is_file():
        return ""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = stream.read().decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# -- many commands


def slots_of(gpus: str | None, workers: int) -> list[dict[str, str]]:
    """What may run at once: the environment of each place.

    gpus: device numbers or names separated by commas, a place for each ("0,0" is two on one device), as in GPUS=0,1,2;
    None: ``workers`` places, which share out the CPU cores unless OMP_NUM_THREADS is set.
    """
    if gpus is not None:
        names = [name.strip() for name in gpus.split(",")]
        if not all(re.fullmatch(r"[0-9]+|(GPU|MIG)-[\w/-]+", name) for name in names):
            raise UserError(f"found GPUS={gpus!r}, wanted device numbers such as GPUS=0,1,2")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    if workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * workers
    return [{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers))}] * workers


def check_devices(commands: Iterable[Command]) -> None:
    """UserError for a command that chooses its device itself, which cannot be while GPUS gives each program one."""
    for command in commands:
        for run in command.runs:
            options = run.options
            chosen = str(getattr(options, "device", "auto")).startswith("cuda:")
            if chosen or ("gpu_id" in options.explicit and options.gpu_id):
                raise UserError(f"GPUS chooses the device: drop --gpu_id and --device cuda:N (in: {command})")


def run_all(
    commands: Sequence[Command],
    slots: Sequence[Mapping[str, str]],
    root: Path,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> Counter[str]:
    """Run what is not done, one command per slot at a time; how many "ran", "FAILED", or were in another state.

    A run that another launcher has, or that an earlier command of the list makes, is left alone. With several slots the
    output of programs goes to logs. Ctrl-C stops all programs and is raised again.
    """
    ended: Counter[str] = Counter()
    waiting, free = deque(enumerate(commands, start=1)), list(slots)
    working: list[tuple[int, Command, Launched, Mapping[str, str]]] = []
    seen: dict[PlannedRun, int] = {}

    def name(number: int) -> str:
        return f"[{number}/{len(commands)}]"

    try:
        while waiting or working:
            while waiting and free:
                number, command = waiting.popleft()
                first = min((seen[run] for run in command.runs if run in seen), default=None)
                seen |= {run: number for run in command.runs if run not in seen}
                state = command.state()
                if first is not None or state in ("done", "running"):
                    say(f"{name(number)} {f'the same run as [{first}]' if first else state}: {command}")
                    ended["repeated" if first else state] += 1
                    continue
                say(f"{name(number)} {state}: {command}")
                launched = launch(command, root, env=free[-1], show=len(slots) == 1)
                if launched is None:
                    ended["running"] += 1
                    continue
                working.append((number, command, launched, free.pop()))
            for one in [one for one in working if one[2].poll() is not None]:
                working.remove(one)
                free.append(one[3])
                ended[_how_it_ended(name(one[0]), one[1], one[2], say, logged=len(slots) > 1)] += 1
            time.sleep(POLL_SECONDS)
    finally:
        stop([launched for _, _, launched, _ in working])
    return ended


def _how_it_ended(name: str, command: Command, launched: Launched, say: Callable[[str], None], *, logged: bool) -> str:
    code, seconds = launched.poll(), time.monotonic() - launched.started
    if code == 0:
        say(f"{name} ran in {seconds:.0f} s")
        return "ran"
    if command.state() == "running":
        say(f"{name} was started elsewhere at the same time")
        return "running"
    say(f"{name} FAILED with exit code {code}" + (f": {last_line(command.log)} ({command.log})" if logged else ""))
    return "FAILED"
