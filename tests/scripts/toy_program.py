"""A program of a paper folder in small: flags, run directories and exit codes, without torch. Written out by the tests.

``write(folder)`` makes FOLDER/options.py and FOLDER/main.py. The program logs a "val/score" for each epoch and continues
where it stopped; ``--fail 1`` ends it with exit code 3 after the first epoch.
"""

from __future__ import annotations

from pathlib import Path

OPTIONS = """
from gfml.program.cli import Parser, add_run_flags, number

NOT_IDENTITY = frozenset({"seconds"})


def parse(argv=None):
    parser = Parser(prog="toy/main.py")
    parser.add_argument("--lr", type=number(above=0), default=0.1)
    parser.add_argument("--kind", choices=("a", "b"), default="a")
    parser.add_argument("--epochs", type=number(int, least=1), default=3)
    parser.add_argument("--seconds", type=number(least=0), default=0.0)
    parser.add_argument("--fail", type=int, default=0)
    parser.add_argument("--select-on", choices=("val", "test"), default="val")
    parser.add_argument("--select-metric", default="score")
    add_run_flags(parser)
    options = parser.parse_args(argv)
    options.resolved = parser.config_of(options)
    return options
"""
# The name of the run directory is asked of the environment's table: hashing settings would import torch here.
MAIN = """
import fcntl, json, os, sys, time
from pathlib import Path

from gfml.base.toml import toml_text
from toy_paper.options import parse

options = parse(sys.argv[1:])
path = Path(options.out) / f"toy_paper-x-{NAME}"
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
"""
# The digest as gfml.engine.runs makes it, so that the toy finds its own directory.
DIGEST = """
import hashlib

from gfml.base.toml import LOCATION_FLAGS
from toy_paper.options import NOT_IDENTITY


def name_of(resolved):
    words = {key.replace("-", "_"): value for key, value in resolved.items()}
    kept = {key: words[key] for key in sorted(words) if key not in LOCATION_FLAGS | NOT_IDENTITY}
    return hashlib.sha256(json.dumps(["toy_paper", kept], sort_keys=True).encode()).hexdigest()[:8]
"""


def write(root: Path) -> None:
    """Make the folder ``toy_paper`` below root."""
    folder = root / "toy_paper"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "options.py").write_text(OPTIONS)
    keys = "KEYS = ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')\n"
    body = MAIN.replace("{NAME}", "{name_of(options.resolved)}").replace(
        "options = parse", DIGEST + "\n\n" + keys + "options = parse", 1
    )
    (folder / "main.py").write_text("import json\n" + body)
