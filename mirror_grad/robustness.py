"""What feature noise and swapped features do to finished runs, and how flat their minima are.

    python mirror_grad/robustness.py runs/PLAIN runs/WITH-MG
    python mirror_grad/robustness.py runs/PLAIN runs/WITH-MG --noise 0.5 1 2 --swap 0.1 0.3 --draws 5 --curvature-batches 8

Noise: every feature plus LEVEL times the root mean square of its table times standard normal noise. Swap: a share of the
items pass their features round. Models see the change wherever they read features: in graphs made from them, in fixed
tables, and added to trained ones. Figures are test recall and ndcg, absolute and relative to the unchanged features;
means over ``--draws`` draws. Curvature: the norm of the loss gradient over some train batches, its cosine with the
gradient after a descent step, and the Hessian's largest eigenvalue. Written to robustness.json in each run.
The claim measured: Zhong et al., Mirror Gradient, WWW 2024.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError
from gfml.program.cli import Options, Parser, number, resolve_device, run_main
from mirror_grad.main import PROGRAM
from mirror_grad.models import MODELS

if TYPE_CHECKING:
    from torch import nn

    from mirror_grad.experiment import MirrorGrad


def build_parser() -> Parser:
    """The command line of ``mirror_grad/robustness.py``."""
    parser = Parser(
        prog="mirror_grad/robustness.py", description="Feature noise, feature swaps and curvature of finished runs."
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="finished run directory")
    add(
        "--noise",
        nargs="*",
        type=number(least=0),
        default=[0.1, 0.3, 1.0],
        metavar="LEVEL",
        help="noise levels, in rms of the features",
    )
    add(
        "--swap",
        nargs="*",
        type=number(least=0, most=1),
        default=[0.1, 0.3, 1.0],
        metavar="SHARE",
        help="shares of items that swap features",
    )
    add("--draws", type=number(int, least=1), default=3, metavar="N", help="draws of every level")
    add("--metric", default="recall@20", metavar="NAME@K", help="the figure of the table")
    add(
        "--curvature-batches",
        type=number(int, least=0),
        default=4,
        metavar="N",
        help="train batches behind the curvature; 0: none",
    )
    add("--iterations", type=number(int, least=1), default=20, metavar="N", help="most steps of the power iteration")
    add("--seed", type=number(int, least=0), default=0, metavar="N", help="seed of noise, swaps and start vectors")
    add("--csv", metavar="FILE", help="also write the table for scripts/results_table.py")
    add("--data-root", metavar="DIR", help="where the data lies now (default: where the run found it)")
    add("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}", help="where to compute")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = build_parser().parse_args(None if argv is None else list(argv))
    from gfml.base.files import write_json
    from gfml.report.recommenders import text_table

    rows: dict[str, dict[str, float]] = {}
    measured = []
    for path in map(Path, given.runs):
        found = measure(path, given)
        measured.append(found)
        write_json(path / "robustness.json", found)
        rows[label(path, found, rows)] = summary(found, given.metric)
    if given.csv:
        write_csv(Path(given.csv), rows, measured)
    print(text_table(rows, list(dict.fromkeys(name for row in rows.values() for name in row))))
    print(f"{given.metric} on test, and its share of the clean figure; means of {given.draws} draws")
    return 0


def label(path: Path, found: Mapping[str, Any], taken: Mapping[str, object]) -> str:
    """Model and arm; the directory where that is taken."""
    name = f"{found['model']}, {found['arm']}"
    return path.name if name in taken else name


def write_csv(file: Path, rows: Mapping[str, Mapping[str, float]], measured: Sequence[Mapping[str, Any]]) -> None:
    """The printed table with the columns that tables of results have."""
    from gfml.base.files import atomic_open

    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    with atomic_open(file, newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["method", "protocol", "n", "epoch", "train_seconds", *columns])
        for (name, row), found in zip(rows.items(), measured, strict=True):
            facts = [name, f"test, mean of {found['draws']} draws", 1, found["epoch"], ""]
            writer.writerow([*facts, *(f"{row[column]:.6g}" if column in row else "" for column in columns)])


def measure(path: Path, given: Options) -> dict[str, Any]:
    """Everything measured about one run."""
    from gfml.base.runs import read_result
    from gfml.engine.distributed import World
    from mirror_grad.data import load
    from mirror_grad.experiment import MirrorGrad

    result = read_result(path)
    if "arm" not in result or "features" not in result:
        raise UserError(f"{path} is no run of mirror_grad/main.py: give the directory of one")
    root = [f"--data-root={given.data_root}"] if given.data_root else []
    options = PROGRAM.parse([f"--config={path / 'config.toml'}", f"--device={given.device}", *root])
    if not MODELS[options.model].needs_features:
        raise UserError(
            f"{path}: {options.model} reads no item features, so no change of them can matter: give runs of other models"
        )
    data = load(options, needs_features=True)
    if data.fingerprint != result["features"]["fingerprint"]:
        raise UserError(
            f"{path} was trained on other data or features than those found now: give --data-root, or train it again"
        )
    this = MirrorGrad(options, data, World(0, 1, resolve_device(options)))
    model = this.restore(path)

    def judged(changed: nn.Module) -> dict[str, float]:
        return this.evaluation(changed, "test").means

    facts = {
        "model": options.model,
        "arm": result["arm"],
        "epoch": result["selection"]["epoch"],
        "seed": given.seed,
        "draws": given.draws,
    }
    found = {**facts, "clean": judged(model)} | changes(this, model, given, judged)
    if given.curvature_batches and MODELS[options.model].trains:
        found["curvature"] = curvature(this, model, given)
    return found


def changes(
    this: MirrorGrad, model: nn.Module, given: Options, judged: Callable[[nn.Module], dict[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """{"noise": {level: means over draws}, "swap": ...}."""
    import dataclasses

    from mirror_grad.diagnostics import changed_model, with_noise, with_swap

    # Graphs of changed features are used once: they are not kept.
    passing = dataclasses.replace(this.data, cache_dir=None)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, change, values in (("noise", with_noise, given.noise), ("swap", with_swap, given.swap)):
        found[kind] = {}
        for value in values:
            draws = []
            for draw in range(given.draws):
                features = change(this.data.features, value, given.seed + draw)
                draws.append(
                    judged(
                        changed_model(
                            model, passing, features, lambda d: type(this)(this.settings, d, this.world).build()
                        )
                    )
                )
            found[kind][f"{value:g}"] = {name: sum(means[name] for means in draws) / len(draws) for name in draws[0]}
    return found


def curvature(this: MirrorGrad, model: nn.Module, given: Options) -> dict[str, float]:
    """Gradient norms, cosine of the half-steps and the top Hessian eigenvalue at the selected weights, in train mode."""
    from mirror_grad.diagnostics import half_steps, mean_loss, top_eigenvalue

    options = this.settings
    batches = list(islice(this.batches(model)(1), given.curvature_batches))
    loss, parameters = mean_loss(model.train(), batches), [p for p in model.parameters() if p.requires_grad]
    found = half_steps(loss, parameters, options.learning_rate, options.mirror_alpha1, given.seed)
    value, count = top_eigenvalue(loss, parameters, iterations=given.iterations, seed=given.seed)
    model.eval()
    return {**found, "top_eigenvalue": value, "iterations": count, "batches": len(batches)}


def summary(found: Mapping[str, Any], metric: str) -> dict[str, float]:
    """One row of the printed table."""
    if metric not in found["clean"]:
        raise UserError(f"the run has no {metric}, found {', '.join(found['clean'])}: mend --metric")
    clean = found["clean"][metric]
    row = {"clean": clean}
    for kind in ("noise", "swap"):
        for value, means in found[kind].items():
            row |= {
                f"{kind} {value}": means[metric],
                f"{kind} {value} rel": means[metric] / clean if clean else float("nan"),
            }
    curved = found.get("curvature", {})
    return row | {name: curved[name] for name in ("grad_norm", "cosine", "top_eigenvalue") if name in curved}


if __name__ == "__main__":
    sys.exit(run_main(main))
