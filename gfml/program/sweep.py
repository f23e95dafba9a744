"""Search over flags with Ray Tune: grid, random or Optuna, early stopping, on one machine or a Ray cluster.

    pip install -e '.[sweep]'
    python scripts/sweep.py configs/sweeps/recsys-lastfm.toml --dry-run                    the first commands and their states
    python scripts/sweep.py configs/sweeps/recsys-lastfm.toml --workers 2 -- --data-root DIR
    python scripts/sweep.py configs/sweeps/recsys-lastfm.toml --resume -- --data-root DIR  after any interruption
    sbatch scripts/slurm_ray.sbatch configs/sweeps/recsys-lastfm.toml -- --data-root DIR   Ray on the allocated nodes

The TOML file is described in ``gfml/program/search.py``; flags after ``--`` go to every trial. A trial is a command that a reader
can paste, run as a process of its own; its evaluations on validation are followed and reported to Tune. Run directories
are the source of truth: the same command goes on after a kill, reads what is finished, continues what is half done from
its checkpoint and starts nothing twice (--resume: only if there is a sweep to go on with). ``OUT/sweeps/NAME`` holds the
points and how each ended (trials.json), the table (table.csv) and the best settings, a ``--config`` (best.toml).
Exit code 1 when a trial failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gfml.base.errors import UserError
from gfml.base.files import atomic_open, write_csv, write_json
from gfml.base.home import find_config, home
from gfml.base.runs import read_config, read_result, read_trials, trials_sum
from gfml.base.toml import LOCATION_FLAGS, toml_text
from gfml.program.cli import Parser, number
from gfml.program.commands import last_line, read_command
from gfml.program.program import program_of
from gfml.program.search import (
    Dimension,
    Follower,
    Spec,
    check_points,
    evaluations,
    grid_points,
    load_spec,
    planned_points,
    random_point,
)

ROOT = home()
FACTS = ("method", "protocol", "n", "epoch", "train_seconds")


def build_parser() -> Parser:
    """The command line of ``scripts/sweep.py``."""
    parser = Parser(prog="gfml sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="TOML file of the search")
    parser.add_argument(
        "--workers", type=number(int, least=1), metavar="N", help="trials at once (default: as many as fit)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="directory of the run directories (default: runs); on a cluster, shared"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that must exist")
    parser.add_argument("--dry-run", action="store_true", help="print commands and states, run nothing")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="a running Ray cluster, or auto; without it Ray is started here"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    place = words.index("--") if "--" in words else len(words)
    options = build_parser().parse_args(words[:place])

    out = ROOT / "runs" if options.out is None else Path(options.out).absolute()
    spec = load_spec(find_config(options.file), words[place + 1 :] + (["--out", str(out)] if options.out else []))
    check_points(spec, ROOT)
    folder = out / "sweeps" / f"{spec.name}-{spec.identity(ROOT)}"
    if options.resume and not (folder / "trials.json").exists():
        raise UserError(f"--resume found no sweep in {folder}: start it without --resume, or mend --out")
    if options.dry_run:
        return show_states(spec, folder)
    require_ray()
    check_data(spec)
    with Trials.open(folder) as trials:
        interrupted = search(spec, trials, options.workers, options.address)
        settle(spec, trials)
        write_table(spec, trials)
        code = summarise(spec, trials)
    if interrupted:
        raise KeyboardInterrupt("stopped")
    return code


def check_data(spec: Spec) -> None:
    """UserError, before any trial is launched, where the program of the first one cannot read its data."""
    program = program_of(spec.program.removesuffix(".py").replace("/", "."))
    [run] = read_command(spec.words(random_point(spec.space, spec.seed, 0)), ROOT).runs
    with contextlib.chdir(ROOT):
        program.load_experiment().load(run.options)


def require_ray() -> None:
    """UserError when Ray or Optuna is missing."""
    try:
        import optuna  # noqa: F401
        import ray.tune  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: run pip install -e '.[sweep]'") from None


# -- what is known of a sweep


class Trials:
    """``trials.json`` of a sweep: every point in order, its command and how it ended. Written by one process at a time.

    A trial's state: waiting (not ended in any session), done, stopped (early, by ASHA) or failed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[dict[str, Any]] = []
        if found := read_trials(folder):
            self.all = found["trials"]

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Trials]:
        """The trials of a sweep for writing. UserError while another process has them."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process runs the sweep {folder}: wait for it") from None
            yield cls(folder)

    def add(self, spec: Spec, point: Mapping[str, Any]) -> dict[str, Any]:
        """Write a new point down, before it is tried."""
        command = read_command(spec.words(point), ROOT)
        run = command.runs[0]
        found = {"trial": len(self.all) + 1, "point": dict(point), "command": str(command),
                 "run": f"{run.family}-*-{run.digest}", "state": "waiting", "epoch": None, "value": None}  # fmt: skip
        self.all.append(found)
        self.write(spec)
        return found

    def end(
        self, spec: Spec, trial: dict[str, Any], state: str, epoch: int | None, value: float | None, why: str = ""
    ) -> None:
        """Write down how a trial ended."""
        trial |= {"state": state, "epoch": epoch, "value": value} | ({"why": why} if why else {})
        self.write(spec)

    def write(self, spec: Spec) -> None:
        """Write everything down."""
        facts: dict[str, Any] = {"metric": spec.metric, "mode": spec.mode, "search": spec.search}
        # Settings that were drawn by logarithm are shown so.
        facts["log"] = [one.name.replace("-", "_") for one in spec.space if one.kind == "loguniform"]
        facts["trials"] = self.all
        write_json(self.folder / "trials.json", facts | {"crc32": trials_sum(facts)})


def run_of(trial: Mapping[str, Any], out: Path) -> Path | None:
    """The run directory of a trial, None before it was launched."""
    found = sorted(out.glob(trial["run"]))
    return found[0] if found else None


# -- where points come from


class Source:
    """The points of a search, those of earlier sessions first, and what became of them for a search that learns."""

    def __init__(self, spec: Spec, trials: Trials) -> None:
        self.spec, self.trials = spec, trials
        self._known = iter(list(trials.all))
        self._planned = [] if spec.search == "optuna" else planned_points(spec)
        self._study = _study(spec, len(trials.all)) if spec.search == "optuna" else None
        self._asked: dict[int, Any] = {}
        self.empty = False

    def next(self) -> dict[str, Any] | None:
        """The next trial; None when there are no more."""
        known = next(self._known, None)
        self.empty = known is None and len(self.trials.all) >= self.spec.trials
        if self.empty:
            return None
        asked = self._ask(known and known["point"]) if self._study else None
        trial = known or self.trials.add(self.spec, self._point(asked))
        self._asked[trial["trial"]] = asked
        return trial

    def _point(self, asked: Any) -> dict[str, Any]:
        if asked is None:
            return self._planned[len(self.trials.all)]
        of_range = {one.name: one for one in self.spec.space if one.kind in ("uniform", "loguniform")}
        return {
            name: of_range[name].rounded(value) if name in of_range else value for name, value in asked.params.items()
        }

    def _ask(self, point: Mapping[str, Any] | None) -> Any:
        if point is not None:
            self._study.enqueue_trial(dict(point))
        return self._study.ask({one.name: _distribution(one) for one in self.spec.space})

    def tell(self, number: int, state: str, epoch: int | None, value: float | None) -> None:
        """How a trial ended: learned from, for the points that follow."""
        from optuna.trial import TrialState

        asked = self._asked.pop(number)
        if self._study is None:
            return
        if state == "stopped" and value is not None:
            asked.report(value, epoch)
            self._study.tell(asked, state=TrialState.PRUNED)
        elif state == "done":
            self._study.tell(asked, value)
        else:
            self._study.tell(asked, state=TrialState.FAIL)


def _study(spec: Spec, known: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Another stream of random numbers in each session: the same one would propose the same first points again.
    sampler = optuna.samplers.TPESampler(seed=spec.seed + known)
    return optuna.create_study(direction={"max": "maximize", "min": "minimize"}[spec.mode], sampler=sampler)


def _distribution(one: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if one.is_list:
        return CategoricalDistribution(one.values)
    kind = IntDistribution if one.kind == "randint" else FloatDistribution
    return kind(*one.values, log=one.kind == "loguniform")


# -- Tune


def search(spec: Spec, trials: Trials, workers: int | None, address: str | None) -> bool:
    """Carry all trials out; whether Ctrl-C stopped it."""
    # One line per trial is printed here; Tune's own tables, logs and statistics are left out.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with ray_session(spec, workers, address):
        storage = trials.folder / "tune"
        shutil.rmtree(storage, ignore_errors=True)
        points = _points_class()(Source(spec, trials), spec, trials)
        resources = {"cpu": spec.cpus, "gpu": spec.gpus}
        tuner = tune.Tuner(
            tune.with_resources(_trainable_class(spec), {name: amount for name, amount in resources.items() if amount}),
            tune_config=tune.TuneConfig(
                metric="value", mode=spec.mode, search_alg=points, scheduler=_scheduler(spec), num_samples=-1,
                max_concurrent_trials=workers, reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="session", storage_path=str(storage), verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )  # fmt: skip
        with _politely():
            tuner.fit()
        shutil.rmtree(storage, ignore_errors=True)
    ray.shutdown()
    return not points.exhausted


@contextmanager
def _politely() -> Iterator[None]:
    """SIGTERM, as batch systems send it, does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ray_session(spec: Spec, workers: int | None, address: str | None) -> Iterator[None]:
    """Ray, started here or joined. UserError when one trial alone needs more than there is."""
    import ray

    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address:
        check_address(address)
        try:
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UserError(
                f"cannot join the Ray cluster {address} ({str(error).splitlines()[0]}): mend --address, or RAY_AUTH_TOKEN"
            ) from None
    else:
        cpus = None if workers is None else max(1, round(workers * spec.cpus + 0.499))
        # Without an address a cluster that happens to run on this machine would be joined.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        there = ray.cluster_resources()
        for name, key, wanted in (("CPUs", "CPU", spec.cpus), ("GPUs", "GPU", spec.gpus)):
            if wanted > there.get(key, 0):
                raise UserError(
                    f"found {there.get(key, 0):g} {name}, wanted {wanted:g} for each trial: mend [resources]"
                )
        if there.get("GPU") and not spec.gpus:
            print(f"note: no trial gets one of the {there['GPU']:g} GPUs: set gpus in [resources]", file=sys.stderr)
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """UserError unless something answers at HOST:PORT: Ray itself would try for minutes. "auto" is left to Ray."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise UserError(f"found --address {address!r}, wanted HOST:PORT of a Ray cluster, or auto")
    try:
        socket.create_connection((host.removeprefix("[").removesuffix("]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {address} ({error.strerror or error}): start Ray there, or mend --address"
        ) from None


def _scheduler(spec: Spec) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if spec.asha is None:
        return FIFOScheduler()

    class Scheduler(ASHAScheduler):
        """What earlier sessions let pass goes on: told again, in whatever order, it counts but is not judged anew.

        So does what has only its end to write: stopping it would save nothing and lose its test figures.
        """

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(tune_controller, trial, result)
            return self.CONTINUE if result["stored"] or result["last"] else decision

    # No trial reaches max_t: one that trained to its end must also judge and store what it found.
    return Scheduler(time_attr="epoch", max_t=10**6, grace_period=spec.asha.grace, reduction_factor=spec.asha.reduction)


def _trainable_class(spec: Spec) -> type:
    """A trial as Tune drives it: each step waits for the next evaluation of the program."""
    from ray import tune

    class Program(tune.Trainable):
        follower: Follower | None = None

        def setup(self, config: dict[str, Any]) -> None:
            command = read_command(spec.words(config["point"]), ROOT)
            self.follower = Follower(spec, command, ROOT, until=config["until"])

        def step(self) -> dict[str, Any]:
            report = self.follower.next()
            if report is None:
                return {"done": True, "finished": False}
            return {"epoch": report.epoch, "value": report.value, "finished": report.finished, "done": report.finished,
                    "stored": report.stored, "last": report.last}  # fmt: skip

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.cleanup()
            self.setup(new_config)
            return True

        def cleanup(self) -> None:
            if self.follower is not None:
                self.follower.stop()

    return Program


def _points_class() -> type:
    from ray.tune.search import Searcher

    class Points(Searcher):
        """Hands points to Tune and writes down how each ended, in this process."""

        def __init__(self, source: Source, spec: Spec, trials: Trials) -> None:
            super().__init__(metric="value", mode=spec.mode)
            self.source, self.spec, self.trials = source, spec, trials
            self._by_id: dict[str, dict[str, Any]] = {}
            self._last: dict[str, dict[str, Any]] = {}
            self.halted = False

        def suggest(self, trial_id: str) -> dict[str, Any] | str:
            trial = None if self.halted else self.source.next()
            if trial is None:
                return Searcher.FINISHED
            self._by_id[trial_id] = trial
            if trial["state"] in ("waiting", "failed"):
                print(f"[{trial['trial']}/{self.spec.trials}] {trial['command']}", flush=True)
            until = trial["epoch"] if trial["state"] == "stopped" else None
            return {"trial": trial["trial"], "point": trial["point"], "until": until}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            if result.get("value") is not None:
                self._last[trial_id] = result

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            trial, last = self._by_id.pop(trial_id), self._last.pop(trial_id, {})
            last = result if result and result.get("value") is not None else last
            epoch, value, finished = last.get("epoch"), last.get("value"), last.get("finished")
            state, known = "failed" if error else "done" if finished else "stopped", trial["state"]
            if known in ("done", "stopped") and not error:
                # It was read, not run: how it ended stands.
                state, epoch, value = known, trial["epoch"], trial["value"]
            why = last_line(read_command(self.spec.words(trial["point"]), ROOT).log) if error else ""
            self.trials.end(self.spec, trial, state, epoch, value, why)
            self.source.tell(trial["trial"], state, epoch, value)
            said = why if error or value is None else f"{self.spec.metric} {value:.4f} after epoch {epoch}"
            print(
                f"[{trial['trial']}/{self.spec.trials}] {'was ' if known == state else ''}{state}: {said}", flush=True
            )
            if error and value is None and all(one["value"] is None for one in self.trials.all):
                # The others would most likely die of the same.
                self.source.empty = self.halted = True

        @property
        def exhausted(self) -> bool:
            """Whether every trial has ended, in this session or an earlier one."""
            return self.source.empty and not self._by_id

        def save(self, checkpoint_path: str) -> None:
            """Tune's own copy of the search stays empty: trials.json and the run directories are what a sweep goes on from."""
            Path(checkpoint_path).touch()

        def restore(self, checkpoint_path: str) -> None:
            raise NotImplementedError("a sweep goes on from trials.json")

    return Points


# -- results


def settle(spec: Spec, trials: Trials) -> None:
    """A trial whose program was done before the decision to stop it arrived counts as done, with all that it found."""

    for trial in trials.all:
        [run] = read_command(spec.words(trial["point"]), ROOT).runs
        if trial["state"] == "stopped" and run.state() == "done":
            found = evaluations(run.path(), spec.metric)
            best = (max if spec.mode == "max" else min)(value for _, value in found)
            trials.end(spec, trial, "done", found[-1][0], best)


def show_states(spec: Spec, folder: Path) -> int:
    """Print the trials known so far and those to come, as far as they are known before the search."""

    known = Trials(folder).all
    points = [trial["point"] for trial in known]
    points += planned_points(spec)[len(points) :] if spec.search != "optuna" else []
    states: Counter[str] = Counter()
    for n, point in enumerate(points, start=1):
        command = read_command(spec.words(point), ROOT)
        stopped = n <= len(known) and known[n - 1]["state"] == "stopped"
        states[state := "stopped early" if stopped else command.state()] += 1
        print(f"{command}  # [{n}/{spec.trials}] {state}")
    if more := spec.trials - len(points):
        states["to be proposed"] = more
    print("# " + ", ".join(f"{count} {state}" for state, count in states.items()))
    return 0


def best_of(spec: Spec, trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The finished trial with the best value, the first of equal ones."""
    done = [trial for trial in trials if trial["state"] == "done"]
    sign = 1 if spec.mode == "max" else -1
    return max(done, key=lambda trial: sign * trial["value"], default=None)


def table_rows(spec: Spec, trials: Trials) -> list[dict[str, Any]]:
    """One row per trial, best first, in the columns of scripts/results_table.py; test figures of the best trial alone."""
    out, best = trials.folder.parents[1], best_of(spec, trials.all)
    sign = -1 if spec.mode == "max" else 1
    order = sorted(
        trials.all, key=lambda trial: (trial["state"] != "done", trial["value"] is None, sign * (trial["value"] or 0))
    )
    return [_row(spec, trial, out, is_best=trial is best) for trial in order]


def _row(spec: Spec, trial: Mapping[str, Any], out: Path, *, is_best: bool) -> dict[str, Any]:
    from gfml.report.sections import headline

    result = read_result(run_of(trial, out)) if trial["state"] == "done" else {}
    protocols = {"stopped": f"stopped early after epoch {trial['epoch']}", "failed": f"failed: {trial.get('why', '')}"}
    varied = [(one, trial["point"][one.name]) for one in spec.space if trial["point"][one.name] != ""]
    said = ", ".join(str(value) if one.kind == "flags" else f"{one.name} {value}" for one, value in varied)
    selection = result.get("selection", {})
    row = {
        "method": f"trial {trial['trial']}: {said}", "protocol": selection.get("protocol") or protocols.get(trial["state"], trial["state"]),
        "n": 1 if result else "", "epoch": selection.get("epoch", ""), "train_seconds": round(result.get("seconds", {}).get("train", 0)) or "",
        spec.metric: trial["value"] if trial["value"] is not None else "",
    }  # fmt: skip
    row |= {f"flag {name}": value for name, value in trial["point"].items()} | {
        "state": trial["state"],
        "run": trial["run"],
    }
    return row | (headline(result["test"]) if is_best else {})


def write_table(spec: Spec, trials: Trials) -> None:
    """Write ``table.csv`` and, once a trial is done, ``best.toml``."""

    write_csv(trials.folder / "table.csv", table_rows(spec, trials), FACTS)
    if best := best_of(spec, trials.all):
        path = run_of(best, trials.folder.parents[1])
        config = {key: value for key, value in read_config(path).items() if key.replace("-", "_") not in LOCATION_FLAGS}
        with atomic_open(trials.folder / "best.toml") as stream:
            stream.write(
                f"# python {spec.program} --config FILE: {spec.metric} {best['value']:.6g}, the best of {len(trials.all)} trials\n"
            )
            stream.write(toml_text(config))


def keep_grid(
    name: str,
    program: str,
    flags: Sequence[str],
    space: Sequence[Dimension],
    metric: str,
    found: Sequence[tuple[Mapping[str, Any], Path]],
) -> str:
    """Ledger, table and best settings of a grid that a program ran by itself, as of any sweep; what is printed.

    found: result and run directory of each point. The folder is the same for the same runs.
    """
    from gfml.report.recommenders import table_columns, text_table

    spec = Spec(name, program, tuple(flags), tuple(space), metric, "max", "grid", len(found), 0, None, 1, 0)
    part, _, figure = metric.partition("/")
    runs = " ".join(path.name for _, path in found)
    folder = found[0][1].parent / "sweeps" / f"{name}-{hashlib.sha256(runs.encode()).hexdigest()[:8]}"
    with Trials.open(folder) as trials:
        trials.all = [
            {"trial": number, "point": point, "command": shlex.join(spec.words(point)), "run": path.name, "state": "done",
             "epoch": result["selection"]["epoch"], "value": result[part][figure]}
            for number, (point, (result, path)) in enumerate(zip(grid_points(space), found, strict=True), start=1)
        ]  # fmt: skip
        trials.write(spec)
        write_table(spec, trials)
        rows, best = {row["method"]: row for row in table_rows(spec, trials)}, best_of(spec, trials.all)
    winner = found[best["trial"] - 1][0]
    test = {best["run"]: winner["test"]}
    return "\n".join([
        text_table(rows, [metric]), f"\nbest by {metric}, {best['value']:.4f}: {best['command']}\nits test:",
        text_table(test, table_columns(test, winner["topks"])), *(["selected on test: optimistic"] if part == "test" else []),
        f"settings        {folder / 'best.toml'}", f"table           {folder / 'table.csv'}",
    ])  # fmt: skip


def summarise(spec: Spec, trials: Trials) -> int:
    """Print how it went; the exit code."""
    states = Counter(trial["state"] for trial in trials.all)
    print(", ".join(f"{count} {state}" for state, count in states.items()) or "no trials")
    if states["waiting"] and states["failed"]:
        print(
            "the first trial died before its first evaluation, so no other was started: mend what its line says, then start the sweep again"
        )
    if best := best_of(spec, trials.all):
        print(f"best by {spec.metric}, {best['value']:.4f}: {best['command']}")
        print(f"settings  {trials.folder / 'best.toml'}")
    print(f"table     {trials.folder / 'table.csv'}")
    return 1 if states["failed"] else 0
