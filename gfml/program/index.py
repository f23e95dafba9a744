"""Nearest-neighbour indexes of item vectors, measured against exact search. Any L2 index can be built from the vectors."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gfml.base.errors import UserError

KINDS = ("auto", "faiss", "sklearn")
# Neighbours a node of the graph keeps, how widely it is built, and how widely it is searched, in lengths of the list:
# speed against recall. A search narrower than the list cannot fill it.
LINKS, BUILD_WIDTH = 32, 200
SEARCH_WIDTHS = (1, 2, 4)
QUERIES = 2000


def measure_index(
    folder: Path, user: np.ndarray, item: np.ndarray, kind: str = "auto", top: int = 100
) -> dict[str, Any]:
    """Build an index of ``item`` [I, D] by squared distance, write it and ``ann.json`` into the folder, print how it does.

    user [U, D]: whose neighbours are looked up. kind: faiss, sklearn, or auto, the one that is installed. UserError for
    kind faiss without faiss.
    """

    from gfml.base.files import write_json

    kind = _available(kind)
    top = min(top, len(item))
    queries = user[np.random.default_rng(0).permutation(len(user))[:QUERIES]]
    exact, exact_seconds = _timed(lambda: exact_search(queries, item, top))
    rows = _faiss_rows(folder, item, queries, exact, top) if kind == "faiss" else _tree_rows(item, queries, exact, top)
    found = {"kind": kind, "items": len(item), "top": top, "queries": len(queries),
             "exact_queries_per_second": len(queries) / exact_seconds, "searches": rows}  # fmt: skip
    write_json(folder / "ann.json", found)
    print(f"\n{kind} index of {len(item):,} items, {top} neighbours of {len(queries):,} users, against exact search")
    print(f"{'search':<22}  recall@{top:<4}  queries/s")
    print(f"{'exact (one product)':<22}  {1:>11.4f}  {found['exact_queries_per_second']:>9,.0f}")
    for row in rows:
        print(f"{row['search']:<22}  {row['recall']:>11.4f}  {row['queries_per_second']:>9,.0f}")
    print(f"index           {folder}")
    return found


def exact_search(queries: np.ndarray, items: np.ndarray, top: int) -> np.ndarray:
    """The ``top`` nearest items of every query by squared distance: int64 [n, top]."""
    import torch

    from gfml.cml import SquaredDistanceScorer
    from gfml.ranking.topk import topk_items

    scorer = SquaredDistanceScorer(torch.from_numpy(queries), torch.from_numpy(items))
    return topk_items(scorer, torch.arange(len(queries)), top, seen=None).numpy()


def distance_recall(queries: np.ndarray, items: np.ndarray, found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of a list that lies within the K-th exact distance: of equally near items any may be found.

    Shape: queries [n, D]; items [I, D]; found, exact int64 [n, K], found with -1 where nothing was. Repeats count once.
    """
    good = 0
    for query, own, best in zip(queries.astype(np.float64), found, exact, strict=True):
        own = np.unique(own[own >= 0])
        sq_distance = [np.square(items[ids].astype(np.float64) - query).sum(1) for ids in (own, best)]
        # Exact search rounds in float32: an item that is farther by that much is as near.
        scale = np.square(query).sum() + np.square(items[best].astype(np.float64)).sum(1).max()
        good += int((sq_distance[0] <= sq_distance[1].max() + 1e-6 * scale).sum())
    return good / exact.size


def _available(kind: str) -> str:
    there = importlib.util.find_spec("faiss") is not None
    if kind == "auto":
        return "faiss" if there else "sklearn"
    if kind == "faiss" and not there:
        raise UserError("faiss is not installed: pip install -e '.[ann]', or give sklearn")
    return kind


def _faiss_rows(
    folder: Path, item: np.ndarray, queries: np.ndarray, exact: np.ndarray, top: int
) -> list[dict[str, Any]]:
    import faiss
    import torch

    from gfml.base.files import atomic_open

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexHNSWFlat(item.shape[1], LINKS)
    index.hnsw.efConstruction = BUILD_WIDTH
    index.add(item)
    rows = []
    for width in (top * times for times in SEARCH_WIDTHS):
        index.hnsw.efSearch = width
        (_, found), seconds = _timed(lambda: index.search(queries, top))
        rows.append(_row(f"HNSW, width {width}", distance_recall(queries, item, found, exact), len(found) / seconds))
    with atomic_open(folder / "index.faiss", "wb") as stream:
        stream.write(faiss.serialize_index(index).tobytes())
    return rows


def _tree_rows(item: np.ndarray, queries: np.ndarray, exact: np.ndarray, top: int) -> list[dict[str, Any]]:
    from sklearn.neighbors import NearestNeighbors

    tree = NearestNeighbors(n_neighbors=top, algorithm="ball_tree").fit(item)
    found, seconds = _timed(lambda: tree.kneighbors(queries, return_distance=False))
    return [_row("ball tree", distance_recall(queries, item, found, exact), len(found) / seconds)]


def _row(name: str, recall: float, queries_per_second: float) -> dict[str, Any]:
    return {"search": name, "recall": recall, "queries_per_second": queries_per_second}


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = call()
    return found, max(time.perf_counter() - started, 1e-9)
