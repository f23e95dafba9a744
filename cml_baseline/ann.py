"""Export a finished run's vectors for nearest-neighbour search, build an index and measure it against exact search.

    python cml_baseline/ann.py RUN
    python cml_baseline/ann.py RUN --kind sklearn --top 50

Writes into RUN/ann: ``vectors.npz`` (user [U, D], item [I, D], item_ids; any L2 index can be built from it),
``index.faiss`` (kind faiss: a navigable small-world graph, HNSW) and ``ann.json`` with recall and queries a second.
Kind sklearn is a ball tree, which is exact. The items nearest to a user are its recommendations, seen ones included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_baseline.settings import ANN
from gfml.base.errors import UserError
from gfml.program.cli import Parser, number, run_main
from gfml.program.index import measure_index

if TYPE_CHECKING:
    import numpy as np


def build_parser() -> Parser:
    """The command line of ``cml_baseline/ann.py``."""
    parser = Parser(prog="cml_baseline/ann.py", description="Export a run's vectors and a nearest-neighbour index.")
    parser.add_argument("run", metavar="RUN", help="directory of a finished run of cml_baseline/main.py")
    parser.add_argument("--kind", choices=ANN[1:], default="auto", help="auto: faiss if installed, else scikit-learn")
    parser.add_argument(
        "--top", type=number(int, least=1), default=100, metavar="K", help="neighbours that are compared"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    export(options.run, options.kind, options.top)
    return 0


def export(run: str | os.PathLike[str], kind: str = "auto", top: int = 100) -> dict[str, Any]:
    """Write vectors, index and their measurements into ``RUN/ann`` and print the latter; what ``ann.json`` holds.

    Raises UserError for a run that is not finished and for kind faiss without faiss.
    """
    import numpy as np

    from gfml.base.files import atomic_open

    arrays = read_arrays(Path(run))
    user, item = search_vectors(arrays)
    folder = Path(run) / "ann"
    kept = {"user": user, "item": item} | {name: arrays[name] for name in ("item_ids",) if name in arrays}
    with atomic_open(folder / "vectors.npz", "wb") as stream:
        np.savez_compressed(stream, **kept)
    return measure_index(folder, user, item, kind, top)


def read_arrays(run: Path) -> dict[str, np.ndarray]:
    """The content of a finished run's ``analysis.npz``; UserError when there is none."""
    from gfml.base.files import read_arrays as read
    from gfml.base.runs import require_done, train_anew

    require_done(run)
    arrays = read(run / "analysis.npz", train_anew(run))
    if not {"user", "item"} <= arrays.keys():
        raise UserError(f"{run} is no run of cml_baseline/main.py: give the directory of one")
    return arrays


def search_vectors(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """User and item vectors whose squared distance is what ranks: one coordinate more where cold items have an offset."""
    import numpy as np

    user, item = arrays["user"], arrays["item"]
    if not arrays.get("item_offset", np.zeros(1)).any():
        return user, item
    more = np.sqrt(arrays["item_offset"], dtype=np.float32)[:, None]
    return np.concatenate([user, np.zeros_like(user[:, :1])], 1), np.concatenate([item, more], 1)


if __name__ == "__main__":
    sys.exit(run_main(main))
