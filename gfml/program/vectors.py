"""Vectors and masses of a finished run of any recommender: under the ids of the source, for other tools, as an index.

    gfml vectors RUN                       RUN/vectors/: users.parquet and items.parquet, a row for each
    gfml vectors RUN --form npz            ids and log-masses in vectors.npz, vectors in vectors.safetensors
    gfml vectors RUN --form tools          what other tools read; gfml export RUN writes it into the folder vectors
    gfml vectors RUN --index --top 50      also an index whose nearest items are a user's best ones

A row holds the id, the vector and, where the model has masses, the log-mass. The index is by squared distance: where a
model ranks by a dot product of keys, items get one coordinate more, with which both orders are the same. For other tools:

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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gfml.base.errors import UserError
from gfml.base.files import atomic_open
from gfml.program.cli import Parser, number

if TYPE_CHECKING:
    from gfml.data.interactions import Interactions
    from gfml.program.loading import Loaded
    from gfml.ranking.topk import Scorer

FORMS = ("parquet", "npz", "tools")


def build_parser() -> Parser:
    """The command line of ``gfml vectors``."""
    parser = Parser(prog="vectors", description="Vectors and masses of a finished run under the ids of the source.")
    parser.add_argument("run", metavar="RUN", help="directory of a finished run of a recommender")
    parser.add_argument("--form", choices=FORMS, default="parquet", help="npz: with safetensors; tools: many files")
    parser.add_argument("--output", "--out", metavar="DIR", help="where to write (default: RUN/vectors)")
    parser.add_argument("--index", action="store_true", help="also build and measure a nearest-neighbour index")
    parser.add_argument("--kind", choices=("auto", "faiss", "sklearn"), default="auto", help="of index")
    parser.add_argument(
        "--top", type=number(int, least=1), default=100, metavar="K", help="neighbours that are compared"
    )
    parser.add_argument(
        "--dataset", metavar="PATH", help="name, file or folder of the data now (default: as for the run)"
    )
    parser.add_argument("--data-root", metavar="DIR", help="where the data lies now (default: as for the run)")
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,cuda,cuda:N}", help="where to compute")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    from gfml.program.index import measure_index
    from gfml.program.loading import load
    from gfml.program.recommend import require_recommender

    places = {name: value for name in ("dataset", "data_root") if (value := getattr(options, name)) is not None}
    run = load(options.run, device=options.device, **places)
    require_recommender(run)
    folder = Path(options.output) if options.output else run.path / "vectors"
    for file in export(run, folder, options.form):
        print(f"vectors         {file}")
    if options.index:
        measure_index(folder, *search_space(run), options.kind, options.top)
    return 0


def export(run: Loaded, folder: Path, form: str = "parquet") -> list[Path]:
    """Write users and items into the folder; the files. UserError for a model without vectors."""
    if form == "tools":
        return for_tools(run.experiment.scorer(run.model, "test"), run.interactions, folder)
    sides = tables(run)
    return _parquet(folder, sides) if form == "parquet" else _npz(folder, sides)


def tables(run: Loaded) -> dict[str, dict[str, np.ndarray]]:
    """{"user": {"id" [U], "vector" [U, D], "log_mass" [U] where there are masses}, "item": ...}."""
    vectors, data = run.experiment.vectors(run.model), run.interactions
    if vectors is None:
        raise UserError(f"{run.path} is a run of {run.experiment.name}, which has no vectors of users and items")
    mass, found = run.experiment.mass(run.model), {}
    for side, table, ids in zip(("user", "item"), vectors, (data.user_ids, data.item_ids), strict=True):
        names = np.arange(len(table)) if ids is None else np.asarray(ids)
        found[side] = {"id": names, "vector": table.float().cpu().numpy()}
        if mass is not None and getattr(mass, side) is not None:
            found[side]["log_mass"] = getattr(mass, f"log_{side}")().detach().float().cpu().numpy()
    return found


def search_space(run: Loaded) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of users and items among which the nearest items of a user are its best ones.

    Keys u . v become squared distances by v' = [v, sqrt(M - |v|^2)], u' = [u, 0], M the largest |v|^2. UserError where
    the ranking is no dot product.
    """
    factors = run.experiment.scorer(run.model, "test").factors()
    if factors is None:
        raise UserError(f"the ranking of {run.path} is no dot product of keys, so no index can hold it")
    user, item = (part.detach().float().cpu().numpy() for part in factors)
    return augmented(user, item)


def _parquet(folder: Path, sides: dict[str, dict[str, np.ndarray]]) -> list[Path]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError("pyarrow is not installed: pip install pyarrow, or give --form npz") from None
    files = []
    for side, columns in sides.items():
        arrays = {
            name: pa.array(list(values) if values.ndim == 2 else values.tolist()) for name, values in columns.items()
        }
        files.append(folder / f"{side}s.parquet")
        with atomic_open(files[-1], "wb") as stream:
            parquet.write_table(pa.table(arrays), stream)
    return files


def _npz(folder: Path, sides: dict[str, dict[str, np.ndarray]]) -> list[Path]:
    from safetensors.numpy import save

    flat = {f"{side}_{name}": values for side, columns in sides.items() for name, values in columns.items()}
    names = {key: values.astype(str) if values.dtype == object else values for key, values in flat.items()}
    with atomic_open(folder / "vectors.npz", "wb") as stream:
        np.savez_compressed(stream, **{key: values for key, values in names.items() if values.ndim == 1})
    with atomic_open(folder / "vectors.safetensors", "wb") as stream:
        stream.write(save({key: np.ascontiguousarray(values) for key, values in flat.items() if values.ndim == 2}))
    return [folder / "vectors.npz", folder / "vectors.safetensors"]


def for_tools(scorer: Scorer, data: Interactions, out: Path) -> list[Path]:
    """Write every file for other tools into ``out``; what was written. UserError for a scorer that is no inner product."""
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
        import faiss

        index = faiss.IndexFlatIP(item.shape[1])
        index.add(item)
        with atomic_open(out / "index.faiss", "wb") as stream:
            stream.write(faiss.serialize_index(index).tobytes())
    return sorted(out.iterdir())


def augmented(user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[u ; 0] and [x ; sqrt(M^2 - |x|^2)], M the longest item: |u - x|^2 = |u|^2 + M^2 - 2 u.x, and all items are as long.

    Reference: Bachrach et al., Speeding Up the Xbox Recommender System, RecSys 2014.
    """
    length = np.square(item.astype(np.float64)).sum(axis=1)
    last = np.sqrt(np.maximum(length.max(initial=0.0) - length, 0.0))
    return np.pad(user, ((0, 0), (0, 1))), np.column_stack([item, last]).astype(np.float32)
