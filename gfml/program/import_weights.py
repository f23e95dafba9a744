"""Take over weights that other programs wrote: under our names, as safetensors, and judged.

    gfml import lgn-lastfm-3-64.pth.tar --from lightgcn --dataset lastfm --layers 3
    gfml import best.pth.tar --from gfml --dataset ml1m --lamb 3.08
    gfml import cub.pt --from contextual --out cub.safetensors

Any file of torch.save is read, whole pickled modules too, without running code of theirs. With --dataset the tables of
recommenders are judged on its test part: train items masked, and validation items with --mask seen. What a file does not
say (layers, lambda) is a flag; its value is printed. Weights of Mirror-Gradient's models are judged by mirror_grad/main.py --resume FILE.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError, choice_error
from gfml.data.options import DataSettings, DemoSettings, load_from_args
from gfml.program.cli import Options, Parser, TopksAction, add_definition_flags, add_settings, number, run_main
from gfml.program.console import papers

if TYPE_CHECKING:
    from torch import Tensor

    from gfml.data.interactions import Interactions
    from gfml.ranking.topk import Scorer

NEXT = {
    "contextual": "judge it: gfml contextual main --checkpoint {out} --epochs 0, with the --dataset and --pipeline of the file",
    "vit-cifar": "load it: vision.vit.ViT(...).load_state_dict(gfml.base.weights.read_weights({out!r}))",
    "mirror-gradient": "judge it: gfml mirror_grad main --model MODEL --dataset NAME --published-protocol --resume {file}",
    "hlrm": "load it into hlrm.model.RelationModel with the port's relation",
}


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
    for part in (DataSettings, DemoSettings):
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
    add_definition_flags(group)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    found = sources()
    options = build_parser(list(found)).parse_args(argv)
    if options.source not in found:
        raise choice_error("source", options.source, found)
    from gfml.base.weights import read_weights, write_weights

    convert, score = found[options.source]
    theirs = read_weights(options.file)
    ours = convert(theirs)
    out = Path(options.out or f"{Path(options.file).name.split('.')[0]}.safetensors")
    users = next((len(value) for name, value in theirs.items() if "user" in name and value.ndim == 2), 0)
    write_weights(out, ours, {"from": options.source, "users": str(users)})
    print(f"{len(ours)} tensors of {options.source} under our names  {out}")
    if options.source in NEXT:
        print(NEXT[options.source].format(out=str(out), file=options.file))
    elif options.dataset != "none":
        _judge(options, ours, users, score)
    return 0


def sources() -> dict[str, tuple[Callable[[Mapping[str, Tensor]], dict[str, Tensor]], str]]:
    """What each paper's ``foreign.py`` can read, by name: the translation, and the score that program ranks by."""
    found: dict[str, Any] = {}
    for paper in papers():
        if importlib.util.find_spec(f"{paper}.foreign"):
            found |= getattr(importlib.import_module(f"{paper}.foreign"), "SOURCES", {})
    return dict(sorted(found.items()))


def _judge(options: Options, state: Mapping[str, Tensor], users: int, score: str) -> None:
    """Print the test figures of tables."""
    from gfml.program.steps import check_judgeable, definitions_of
    from gfml.ranking.evaluation import evaluate

    data = load_from_args(options)
    check_judgeable(data, options.topks, "test")
    scorer = _scorer(options, state, users, score, data)
    found = evaluate(
        scorer, data, "test", options.topks, beyond=True, mask_valid=options.mask == "seen",
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
    print(f"assumed, as the file does not say: --layers {options.layers} --combine {options.combine} --score {kind}"
          + (f" --lamb {options.lamb:g}" if kind == "gravity" else ""))  # fmt: skip
    nodes = propagate(build_graph(data.train), nodes, options.layers, combine=options.combine)
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
