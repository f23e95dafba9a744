"""The ablations of the contextual loss, each a command of ``contextual/main.py``.

    python contextual/ablations.py                                     print the commands, run nothing
    python contextual/ablations.py --launch                            run or continue what is missing, then the table
    python contextual/ablations.py --launch --only none 7 lam-0.8 --seeds 1 2 3 --dataset cifar100 --epochs 20
    python contextual/ablations.py --dataset cifar100 | python scripts/run_commands.py --workers 2      the same on several workers

Flags that are not listed in ``--help`` go to every command, before the variant's own. The first eleven variants are the
published list, its numbers 0 to 10 are accepted: what is taken out of the similarity (``contextual.similarity.Steps``).
The others change one setting. In the published script the switch has no effect: it rewrites a function that nothing
calls, so there is no number of it to compare with.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

from contextual.main import PROGRAM
from contextual.names import ABLATIONS
from gfml.base.errors import choice_error
from gfml.base.home import home
from gfml.program.cli import Parser, number, run_main
from gfml.program.commands import read_command, run_all
from gfml.report.results_table import rows_of_runs, to_markdown

COLUMNS = ("recall@1", "map@r", "r_precision")


class Variant(NamedTuple):
    """flags: of contextual/main.py. about: what differs from the method."""

    name: str
    flags: tuple[str, ...]
    about: str


def variants() -> list[Variant]:
    """The published list, then one setting at a time."""
    found = [Variant(name, () if name == "none" else ("--ablation", name), about) for name, about in ABLATIONS.items()]
    found.append(Variant("contextual", ("--loss", "contextual"), "the contextual loss alone"))
    found.append(Variant("contrastive", ("--loss", "contrastive"), "the contrastive loss alone"))
    for flag, values, about in (
        ("--lam", (0.1, 0.2, 0.6, 0.8, 0.9), "weight of the contextual term"),
        ("--gamma", (0.0, 0.05, 0.2), "weight of the similarity regulariser"),
        ("--reg-sim", (0.0, 0.1, 0.5), "mean similarity wanted"),
        ("--eps", (0.0, 0.02, 0.1, 0.2), "slack of a neighbourhood"),
        ("--slope", (1.0, 100.0), "slope of the step in the backward pass"),
        ("--k", (2, 3, 8), "size of a neighbourhood"),
        ("--ipc", (2, 8), "pictures per class; k stays 4"),
        ("--batch-size", (64, 256), "pictures per batch"),
    ):
        found += [Variant(f"{flag[2:]}-{value:g}", (flag, f"{value:g}"), about) for value in values]
    for loss in ("contrastive", "triplet", "ms", "roadmap"):
        found.append(
            Variant(f"{loss}-regularised", ("--loss", loss, "--regularise", "convex"), "the regulariser on a baseline")
        )
    return found


def chosen(names: Sequence[str] | None) -> list[Variant]:
    """The variants of these names or published numbers; all when None."""
    known = {variant.name: variant for variant in variants()}
    if names is None:
        return list(known.values())
    numbered = {str(number): name for number, name in enumerate(ABLATIONS)}
    for name in names:
        if numbered.get(name, name) not in known:
            raise choice_error("ablation", name, known)
    return [known[numbered.get(name, name)] for name in names]


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own flags, and all others as they are."""
    parser = Parser(prog="contextual/ablations.py", description="Run the ablations of the contextual loss.")
    add = parser.add_argument
    names = ", ".join(variant.name for variant in variants())
    add("--launch", action="store_true", help="run the commands and print the table; without it they are printed")
    add("--only", nargs="+", metavar="NAME", help=f"some of {names}")
    add("--seeds", nargs="+", type=number(int, least=0), default=[0], metavar="N", help="one run for each")
    parser.epilog = "All other flags are those of contextual/main.py and go to every command."
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    own, common = _parse(sys.argv[1:] if argv is None else list(argv))
    made = [
        (variant, ["python", "contextual/main.py", *common, *variant.flags, "--seed", str(seed)])
        for variant in chosen(own.only)
        for seed in own.seeds
    ]
    # Every command is understood before the first one runs or is shown.
    for _, (_, _, *flags) in made:
        PROGRAM.parse(flags)
    if not own.launch:
        for variant, words in made:
            print(f"{shlex.join(words)}  # {variant.about}")
        return 0
    commands = [read_command(words, home()) for _, words in made]
    if run_all(commands, [{}], home())["FAILED"]:
        return 1
    done = [(variant.name, command.runs[0].path()) for (variant, _), command in zip(made, commands, strict=True)]
    print(to_markdown(rows_of_runs(done, [column.partition("@")[0] for column in COLUMNS]), COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
