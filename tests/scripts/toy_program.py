"""A program of a paper folder in small: flags, run directories and exit codes, without torch. Written out by the tests.

``write(folder)`` makes FOLDER/toy_paper/main.py. The program logs a "val/score" for each epoch and continues
where it stopped; ``--fail 1`` ends it with exit code 3 after the first epoch.
"""

from __future__ import annotations

from pathlib import Path

MAIN = """
import fcntl, json, os, sys, time
from dataclasses import dataclass
from pathlib import Path

from gfml.base import settings as kinds
from gfml.base.runs import run_id
from gfml.base.settings import setting
from gfml.base.toml import LOCATION_FLAGS, toml_text
from gfml.program.flags import RunSettings
from gfml.program.program import Program

KEYS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class ToySettings(RunSettings):
    lr: float = setting(0.1, "learning rate", kinds.positive)
    kind: str = setting("a", "kind", choices=("a", "b"))
    epochs: int = setting(3, "epochs", kinds.count)
    seconds: float = setting(0.0, "of an epoch", kinds.nonnegative, beside=True)
    fail: int = setting(0, "1: end with exit code 3")
    select_on: str = setting("val", "split", choices=("val", "test"))
    select_metric: str = setting("score", "metric")


PROGRAM = Program("toy_paper/main.py", "toy_paper", ToySettings, "toy_paper:Nothing", "A toy.")


def name_of(options):
    return run_id("toy_paper", "x", options.resolved, LOCATION_FLAGS | options.beside())


def main(options):
    path = Path(options.out) / name_of(options)
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("error: another process is writing")
    with open(path / "starts", "a") as stream:
        stream.write(json.dumps({"pid": os.getpid(), "began": time.time(), **{key: os.environ.get(key) for key in KEYS}}) + "\\n")
    (path / "config.toml").write_text(toml_text(options.resolved))
    rows = (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").exists() else []
    try:
        for epoch in range(len(rows) + 1, options.epochs + 1):
            time.sleep(options.seconds)
            with open(path / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps({"epoch": epoch, "val/score": options.lr * min(epoch, 2)}) + "\\n")
            if options.fail:
                print("the reason stands in the last line")
                sys.exit(3)
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
    selection = {"epoch": min(2, options.epochs), "metric": "score", "split": "val", "protocol": "selected on validation"}
    result = {"selection": selection, "test": {"recall@20": options.lr / 2}, "seconds": {"train": 1.0}, "data": {"name": "toy"}}
    (path / "result.json").write_text(json.dumps(result))
    (path / "done").write_text("")
    with open(path / "ends", "a") as stream:
        stream.write(f"{time.time()}\\n")


if __name__ == "__main__":
    main(PROGRAM.parse())
"""


def write(root: Path) -> None:
    """Make the folder ``toy_paper`` below root."""
    folder = root / "toy_paper"
    folder.mkdir()
    nothing = "class Nothing:\n    @staticmethod\n    def load(settings):\n        return None\n"
    (folder / "__init__.py").write_text(nothing)
    (folder / "main.py").write_text(MAIN)
