"""Run the commands of a sweep one after the other: skip what is done, continue what is incomplete, count failures.

    some-script | python scripts/sweep.py [--dry-run] [further flags for every command]

Commands come on stdin, one per line: ``python FOLDER/main.py --flag value ...``. A command's state is that of its run
directory (done, incomplete, failed, running, not launched), found by its settings. --dry-run prints the states and
runs nothing. Exit code 1 when a command failed, 2 when one is not understood.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gfml.cli import LOCATION_FLAGS, run_main
from gfml.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def state_of(words: Sequence[str]) -> str:
    """State of the run that ``python FOLDER/main.py ...`` makes, without running it. UserError for a wrong command."""
    from gfml.runs import run_id, run_state

    family = Path(words[1]).parent.name if len(words) > 1 else ""
    if not family or not (ROOT / words[1]).is_file():
        raise UserError(f"found the command {shlex.join(words)!r}, wanted python FOLDER/main.py and its flags")
    module = importlib.import_module(f"{family}.options")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = module.parse(list(words[2:]))
    except SystemExit:
        raise UserError(f"{said.getvalue().strip()} (in: {shlex.join(words)})") from None
    if options.run_name or options.resume:
        raise UserError("a sweep names its runs by their settings: drop --run-name and --resume")
    name = run_id(family, "*", options.resolved, LOCATION_FLAGS | module.NOT_IDENTITY)
    # The label between family and hash follows from the settings too, but only once the data is read.
    found = sorted((ROOT / options.out).glob(f"{family}-*-{name.rpartition('-')[2]}"))
    return run_state(found[0]) if found else "not launched"


def main(argv: Sequence[str] | None = None) -> int:
    more = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(more):
        print(__doc__)
        return 0
    dry = "--dry-run" in more
    more = [word for word in more if word != "--dry-run"]
    # A mistake in any command is found before the first one runs.
    commands = [shlex.split(line) + more for line in sys.stdin if line.strip()]
    states = [state_of(words) for words in commands]
    ended: Counter[str] = Counter()
    for number, (words, state) in enumerate(zip(commands, states, strict=True), start=1):
        print(f"[{number}/{len(commands)}] {state}: {shlex.join(words)}", flush=True)
        if dry or state in ("done", "running"):
            ended[state] += 1
            continue
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT)
        if done.returncode == 130:
            print("stopped; the same command goes on from here")
            return 130
        ended["ran" if done.returncode == 0 else "FAILED"] += 1
    print(", ".join(f"{count} {what}" for what, count in ended.items()) or "no commands")
    return 1 if ended["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
