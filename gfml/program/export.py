"""Export the vectors of a finished run for other tools: arrays, implicit's model file, a faiss index.

    gfml export runs/recsys-lastfm-mf-bpr-1a2b3c4d --out vectors

user.npy [U, D], item.npy [I, D]   float32; the larger their inner product, the better: faiss IndexFlatIP, RecTools'
                                   ImplicitRanker, Annoy's "dot", hnswlib's "ip" take them as they are
user_l2.npy, item_l2.npy           one column wider; nearest by Euclidean distance, and by angle, is best: for tools
                                   that know no inner product (scikit-learn, Annoy's "euclidean" and "angular")
implicit.npz                       implicit.cpu.als.AlternatingLeastSquares.load reads it; pass seen.npz as user_items
index.faiss                        IndexFlatIP of the items, where faiss is installed
seen.npz                           train and validation, a scipy CSR matrix: what our lists leave out
users.txt, items.txt               the names of the rows, one a line

Any model whose score is an increasing function of an inner product has such vectors: all but relations by attention.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.program.cli import Parser, run_main

if TYPE_CHECKING:
    import numpy as np

    from gfml.data.interactions import Interactions
    from gfml.ranking.topk import Scorer


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="gfml export", description="Vectors of a finished run for other tools.")
    parser.add_argument("run", metavar="RUN", help="directory of a finished run of a recommender")
    parser.add_argument("--out", default="vectors", metavar="DIR", help="where the files go")
    parser.add_argument("--dataset", metavar="NAME", help="where the run's data lies now")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets lie now")
    options = parser.parse_args(argv)
    from gfml.program.loading import load
    from gfml.program.recommend import require_recommender

    places = {name: value for name in ("dataset", "data_root") if (value := getattr(options, name)) is not None}
    run = load(options.run, **places)
    require_recommender(run)
    files = export(run.experiment.scorer(run.model, "test"), run.interactions, Path(options.out))
    print("\n".join(str(file) for file in files))
    return 0


def export(scorer: Scorer, data: Interactions, out: Path) -> list[Path]:
    """Write every form into ``out``; what was written. UserError for a scorer that is no inner product."""
    import numpy as np
    import scipy.sparse as sp

    factors = scorer.factors()
    if factors is None:
        raise UserError("the scores of this model are no inner product of vectors: write its lists with gfml recommend")
    user, item = (part.detach().cpu().numpy().astype(np.float32) for part in factors)
    arrays = {"user": user, "item": item, **dict(zip(("user_l2", "item_l2"), augmented(user, item), strict=True))}
    for name, array in arrays.items():
        with atomic_open(out / f"{name}.npy", "wb") as stream:
            np.save(stream, np.ascontiguousarray(array))
    with atomic_open(out / "implicit.npz", "wb") as stream:
        np.savez(stream, user_factors=user, item_factors=item)
    with atomic_open(out / "seen.npz", "wb") as stream:
        sp.save_npz(stream, data.train_and_valid)
    names = {"users": (data.user_ids, data.num_users), "items": (data.item_ids, data.num_items)}
    for name, (ids, count) in names.items():
        with atomic_open(out / f"{name}.txt") as stream:
            stream.writelines(f"{one}\n" for one in (range(count) if ids is None else ids.tolist()))
    if importlib.util.find_spec("faiss"):
        _faiss(item, out / "index.faiss")
    return sorted(out.iterdir())


def augmented(user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[u ; 0] and [x ; sqrt(M^2 - |x|^2)], M the longest item: |u - x|^2 = |u|^2 + M^2 - 2 u.x, and all items are as long.

    Reference: Bachrach et al., Speeding Up the Xbox Recommender System, RecSys 2014.
    """
    import numpy as np

    length = np.square(item.astype(np.float64)).sum(axis=1)
    last = np.sqrt(np.maximum(length.max(initial=0.0) - length, 0.0))
    return np.pad(user, ((0, 0), (0, 1))), np.column_stack([item, last]).astype(np.float32)


def _faiss(item: np.ndarray, path: Path) -> None:
    import faiss

    index: Any = faiss.IndexFlatIP(item.shape[1])
    index.add(item)
    with atomic_open(path, "wb") as stream:
        stream.write(faiss.serialize_index(index).tobytes())


if __name__ == "__main__":
    sys.exit(run_main(main))
