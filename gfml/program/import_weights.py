"""Take over weights that other programs wrote: under our names, as safetensors, and judged.

    gfml import lgn-lastfm-3-64.pth.tar --from lightgcn --dataset lastfm --layers 3
    gfml import best.pth.tar --from gfml --dataset ml1m --lamb 3.08
    gfml import cub.pt --from contextual --dataset cub --root DIR
    gfml import hlrm.pt --from hlrm --dataset ml-100k --topk 10

Any file of torch.save is read, whole pickled modules too, without running code of theirs. With --dataset they are judged:
tables of users and items here on the test part (train items masked, validation items too with --mask seen), other files by
the program that has their model, whose flags are taken. What a file does not say (layers, lambda, heads) is a flag.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError, choice_error
from gfml.data.options import DataSettings, DemoSettings, load_from_args
from gfml.program.cli import Options, Parser, TopksAction, add_settings, number, run_main
from gfml.program.console import papers
from gfml.program.flags import DefinitionSettings

if TYPE_CHECKING:
    from torch import Tensor

    from gfml.data.interactions import Interactions
    from gfml.program.foreign import Source
    from gfml.ranking.topk import Scorer


def build_parser(sources: Sequence[str]) -> Parser:
    """The command line of ``gfml import``."""
    parser = Parser(
        prog="gfml import", description="Weights of other programs under our names, as safetensors, judged."
    )
    parser.add_argument("file", metavar="FILE", help="what torch.save wrote, or safetensors")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="NAME", help=f"whose it is: {', '.join(sources)}"
    )
    parser.add_argument("--out", metavar="FILE", help="where the safetensors go (default: FILE's name, here)")
    for part in (DataSettings, DemoSettings, DefinitionSettings):
        add_settings(parser, part)
    parser.set_defaults(dataset="none")
    group = parser.add_argument_group("judging tables of users and items, with --dataset")
    group.add_argument(
        "--layers",
        type=number(int, least=0),
        default=0,
        metavar="N",
        help="propagation layers of LightGCN; 0: the tables",
    )
    group.add_argument("--combine", choices=("mean", "sum", "final"), default="mean", help="how layers are joined")
    group.add_argument(
        "--score",
        choices=("dot", "distance", "gravity"),
        help="default: as that program ranks; gravity where masses are",
    )
    group.add_argument("--lamb", type=number(above=0), default=1.0, metavar="X", help="lambda of the gravity score")
    group.add_argument("--mask", choices=("train", "seen"), default="train", help="seen: validation items too")
    group.add_argument("--topks", nargs="+", action=TopksAction, default=(5, 10, 20), metavar="K", help="list lengths")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv, found = list(sys.argv[1:] if argv is None else argv), sources()
    options, rest = _parsed(argv, found)
    from gfml.base.weights import read_weights, write_weights

    source = found[options.source]
    theirs = read_weights(options.file)
    ours, program = source.convert(theirs), source.program(theirs)
    out = Path(options.out or f"{Path(options.file).name.split('.')[0]}.safetensors")
    users = next((len(value) for name, value in theirs.items() if "user" in name and value.ndim == 2), 0)
    write_weights(out, ours, {"from": options.source, "users": str(users)})
    print(f"{len(ours)} tensors of {options.source} under our names  {out}")
    if unread := source.unread(theirs):
        print(f"{len(unread)} tensors of the file are read by nothing here and left out: {', '.join(unread[:5])}")
    if not has_dataset(argv):
        print(f"judge them: gfml import {options.file} --from {options.source} --dataset NAME"
              + (f", with flags of {program.replace('.', '/')}.py" if program else ""))  # fmt: skip
    elif program:
        _judge_by(program, [*source.flags(theirs, options.file), *rest], ours, options.file, source.assumed)
    else:
        _judge(options, ours, users, source.score)
    return 0


def has_dataset(argv: Sequence[str]) -> bool:
    """Whether a command line names data."""
    return any(word.partition("=")[0] in ("--dataset", "-d") for word in argv)


def _parsed(argv: list[str], found: Mapping[str, Source]) -> tuple[Any, list[str]]:
    """The flags; of files that a program judges only FILE, --from and --out, and the program's own as they are."""
    first = argparse.ArgumentParser("gfml import", argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    first.add_argument("--from", dest="source")
    name = first.parse_known_args(argv)[0].source
    if name is not None and name not in found:
        raise choice_error("source", name, found)
    if name is None or found[name].score or {"-h", "--help"} & {*argv}:
        return build_parser(list(found)).parse_args(argv), []
    first.add_argument("file")
    first.add_argument("--out")
    if argv[0].startswith("-"):
        raise UserError(f"found {argv[0]} first, wanted gfml import FILE --from {name} and then other flags")
    options, rest = first.parse_known_args(argv)
    if rest and not has_dataset(rest):
        raise UserError(f"found {rest[0]} and no --dataset: flags of the program are for judging, give both")
    return options, rest


def _judge_by(program: str, argv: Sequence[str], ours: Mapping[str, Tensor], file: str, assumed: Sequence[str]) -> None:
    """Let the program that has the model judge the weights; one that takes a file gets it."""
    from gfml.program.driver import judge_weights
    from gfml.program.program import program_of

    print(f"judged by {program.replace('.', '/')}.py {' '.join(argv)}")
    if any(word.startswith("--resume=") for word in argv):
        importlib.import_module(program).main(argv)
        return
    one = program_of(program)
    settings = one.parse(argv)
    values = {name: getattr(settings, name) for name in assumed if name not in settings.explicit}
    if words := [f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None]:
        print(f"assumed, as the file does not say: {' '.join(words)}")
    print(judge_weights(one, settings, ours, file))


def sources() -> dict[str, Source]:
    """What each paper's ``foreign.py`` can read, by name."""
    found: dict[str, Source] = {}
    for paper in papers():
        if importlib.util.find_spec(f"{paper}.foreign"):
            found |= getattr(importlib.import_module(f"{paper}.foreign"), "SOURCES", {})
    return dict(sorted(found.items()))


def _judge(options: Options, state: Mapping[str, Tensor], users: int, score: str) -> None:
    """Print the test figures of tables."""
    from gfml.program.steps import check_judgeable, definitions_of, usual_lengths
    from gfml.ranking.evaluation import evaluate

    data = load_from_args(options)
    topks = usual_lengths(options, data)
    check_judgeable(data, topks, "", "test")
    scorer = _scorer(options, state, users, score, data)
    found = evaluate(
        scorer, data, "test", topks, beyond=True, mask_valid=options.mask == "seen",
        definitions=definitions_of(options, judging=True),
    )  # fmt: skip
    print(
        f"test of {data.name}: {len(found.users):,} users, {options.mask} items masked; metrics as in docs/metrics.md"
    )
    shown = [
        name for name in found.means if name.partition("@")[0] in ("recall", "ndcg", "precision", "hit", "mrr", "map")
    ]
    for name in [*shown, *(name for name in found.means if ":" in name)]:
        print(f"{name:<24} {found.means[name]:.4f}")


def _layers(options: Options, width: int) -> int:
    """``--layers``; where it is not given, what LightGCN-PyTorch's names of files say: lgn-DATASET-LAYERS-WIDTH.pth.tar."""
    named = re.fullmatch(r"lgn-.+-(\d+)-(\d+)\.pth\.tar", Path(options.file).name)
    if named is None or "layers" in options.explicit or int(named[2]) != width:
        return int(options.layers)
    print(f"--layers {named[1]}, by the name of the file")
    return int(named[1])


def _scorer(options: Options, state: Mapping[str, Tensor], users: int, score: str, data: Interactions) -> Scorer:
    """The scorer of the tables: propagated, with masses, by the score asked for."""
    from gfml.cml import SquaredDistanceScorer
    from gfml.gravity import Gravity, GravityScorer
    from gfml.ranking.graph import build_graph, propagate
    from gfml.ranking.topk import FactorScorer

    nodes = state["encoder.nodes"]
    if (users, len(nodes) - users) != (data.num_users, data.num_items):
        found = f"the file has {users:,} users and {len(nodes) - users:,} items"
        raise UserError(
            f"{found}, {data.name} has {data.num_users:,} and {data.num_items:,}: give the --dataset it is of"
        )
    masses = {side: state[name] for side in ("user", "item") if (name := f"gravity.mass.{side}") in state}
    kind = options.score or ("gravity" if masses else score)
    layers = _layers(options, nodes.shape[1])
    print(f"assumed, as the file does not say: --layers {layers} --combine {options.combine} --score {kind}"
          + (f" --lamb {options.lamb:g}" if kind == "gravity" else ""))  # fmt: skip
    nodes = propagate(build_graph(data.train), nodes, layers, combine=options.combine)
    user, item = nodes[:users], nodes[users:]
    if kind == "dot":
        return FactorScorer(user, item)
    if kind == "distance":
        return SquaredDistanceScorer(user, item)
    mode = "both" if len(masses) == 2 else next(iter(masses), "none")
    gravity = Gravity(data.num_users, data.num_items, mass=mode, lamb=options.lamb)
    for side, value in masses.items():
        getattr(gravity.mass, side).data.copy_(value)
    return GravityScorer(gravity, user, item)


if __name__ == "__main__":
    sys.exit(run_main(main))
