"""Run the commands of a sweep: skip what is done, continue what is incomplete, count failures.

    some-script | python scripts/run_commands.py [--dry-run] [--workers N] [further flags for every command]
    some-script | GPUS=0,1,2 python scripts/run_commands.py

Commands come on stdin, one per line: ``python FOLDER/PROGRAM.py --flag value ...`` (or torchrun). A command's state is
that of its run directory (done, incomplete, failed, running, not launched), found by its settings. --dry-run prints the
states and runs nothing. Commands run one after the other; ``GPUS=0,1,2`` in the environment runs one per device at a time
(``GPUS=0,0``: two at once on one device), --workers N runs N at a time on the CPU. Several lists may run at once on one
directory: no run is launched twice. Ctrl-C stops all programs; the same command goes on from there. Exit code 1 when a
command failed, 2 when one is not understood, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Sequence

from gfml.base.errors import UserError
from gfml.base.home import home
from gfml.program.commands import Command, check_devices, read_command, run_all, slots_of

ROOT = home()


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    dry = "--dry-run" in words
    workers, more = _take_workers([word for word in words if word != "--dry-run"])
    slots = slots_of(os.environ.get("GPUS"), workers)
    # A mistake in any command is found before the first one runs.
    commands = [read_command(shlex.split(line) + more, ROOT) for line in sys.stdin if line.strip()]
    if "GPUS" in os.environ:
        check_devices(commands)
    ended = _print_states(commands) if dry else _run(commands, slots)
    print(("# " if dry else "") + (", ".join(f"{count} {what}" for what, count in ended.items()) or "no commands"))
    return 1 if ended["FAILED"] else 0


def _take_workers(words: list[str]) -> tuple[int, list[str]]:
    """The value of --workers, 1 without it, and the other words."""
    if "--workers" not in words:
        return 1, words
    place = words.index("--workers")
    value = words[place + 1] if place + 1 < len(words) else ""
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"found --workers {value!r}, wanted a whole number >= 1")
    return int(value), words[:place] + words[place + 2 :]


def _print_states(commands: Sequence[Command]) -> Counter[str]:
    states = [command.state() for command in commands]
    for number, (command, state) in enumerate(zip(commands, states, strict=True), start=1):
        print(f"{command}  # [{number}/{len(commands)}] {state}")
    return Counter(states)


def _run(commands: Sequence[Command], slots: Sequence[dict[str, str]]) -> Counter[str]:
    # A job that is ended politely, or that was started in the background, stops its programs too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return run_all(commands, slots, ROOT)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("all programs are stopped; the same command goes on from here")
        raise
