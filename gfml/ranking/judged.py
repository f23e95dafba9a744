"""Lists that others made, against a truth: from tables of names to what the metrics read, with every treatment counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp

from gfml.base.errors import UserError
from gfml.data.lists import ListTable, PairTable, ordered
from gfml.metrics.beyond import beyond_accuracy
from gfml.metrics.conventions import Case, Figures
from gfml.metrics.ranking import find_hits, ranking_metrics


@dataclass(frozen=True)
class Ground:
    """What lists are judged against. Rows and columns are all users and items of truth, train and the lists.

    truth: CSR [U, I] of ratings (ones where there are none); train: CSR [U, I] of ones. user_names, item_names: text,
    in numerical order where all are whole numbers. rated: truth has ratings. appeared: see :class:`Case`.
    """

    truth: sp.csr_array
    train: sp.csr_array
    user_names: np.ndarray
    item_names: np.ndarray
    rated: bool
    appeared: np.ndarray
    notes: dict[str, int] = field(default_factory=dict)


def ground_of(truth: PairTable, train: PairTable, lists: Sequence[ListTable]) -> Ground:
    """Number everything that occurs. UserError where the lists and truth have no user, or no item, in common."""
    for what, side in (("user", "users"), ("item", "items")):
        listed = np.concatenate([getattr(table, side) for table in lists])
        own = getattr(truth, side)
        if not np.isin(listed, own).any() and (side == "users" or not np.isin(listed, train.items).any()):
            where = "the truth" if side == "users" else "truth or train"
            found = f"{str(listed[0])!r} against {str(own[0])!r}"
            raise UserError(f"no {what} of the lists is in {where} (ids such as {found}): give files with the same ids")
    users = _names(train.users, truth.users, *(table.users for table in lists))
    items = _names(train.items, truth.items, *(table.items for table in lists))
    seen, first = np.unique(np.concatenate([train.items, truth.items]), return_index=True)
    appeared = np.full(len(items), len(items), dtype=np.int64) + np.arange(len(items))
    appeared[_places(items, seen)] = first
    notes = {f"truth: {key}": n for key, n in truth.notes.items()} | {
        f"train: {key}": n for key, n in train.notes.items()
    }
    return Ground(
        _matrix(truth, users, items), _matrix(replace(train, ratings=np.ones(len(train.users))), users, items), users, items, truth.rated,
        np.argsort(np.argsort(appeared)), notes,
    )  # fmt: skip


def case_of(table: ListTable, ground: Ground) -> tuple[Case, dict[str, int]]:
    """The lists as arrays, and what was found in them: {"tied scores, ordered as in the file": 12}.

    Gaps between ranks are closed. An item that a user has twice keeps its best place; its later places stay as misses.
    """
    table, place = ordered(table)
    users, items = _places(ground.user_names, table.users), _places(ground.item_names, table.items)
    shape = (len(ground.user_names), int(place.max(initial=-1)) + 1)
    top, scores = np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf)
    top[users, place] = items
    if table.scores is not None:
        scores[users, place] = np.nan_to_num(table.scores, nan=-np.inf)
    notes = dict(table.notes)
    repeats = _repeats(top)
    again = np.where(repeats, top, -1)
    top[repeats] = -1
    by_score = table.scores is not None and (table.ranks is None or table.by_score)
    case = Case(
        top,
        ground.truth,
        ground.train,
        scores if by_score else None,
        ground.item_names,
        appeared=ground.appeared,
        again=again if repeats.any() else None,
        given=_given(table, users, place, shape),
    )
    known_item = np.bincount(
        np.concatenate([ground.train.indices, ground.truth.indices]), minlength=ground.truth.shape[1]
    )
    has_truth, trained = case.num_relevant > 0, case.active
    taken = top >= 0
    notes |= {
        "items that a user has twice, counted at the better place (elliot, rectools: each time)": int(repeats.sum()),
        "listed users without truth, not judged": int((case.listed & ~has_truth).sum()),
        "listed users in neither train nor truth": int((case.listed & ~has_truth & ~trained).sum()),
        "users with truth and without a list, counted as 0": int((has_truth & ~case.listed).sum()),
        "places taken by items in neither train nor truth, misses": int((taken & (known_item[top] == 0)).sum()),
        "places taken by the user's own train items": int(find_hits(top, ground.train).sum()),
    }
    return case, {key: n for key, n in notes.items() if n}


def ours(
    case: Case, ks: Sequence[int], *, map_denominator: str = "min", graded: str | None = None
) -> tuple[Figures, np.ndarray]:
    """The figures of this project, beyond accuracy too, and the judged users: those with truth, in order.

    per_user arrays have a row per judged user, as :class:`gfml.ranking.evaluation.Evaluation` has.
    """
    users = np.flatnonzero(case.num_relevant)
    top = np.full((len(users), max(*ks, case.top.shape[1])), -1, dtype=np.int64)
    top[:, : case.top.shape[1]] = case.top[users]
    relevant = case.truth[users]
    values = ranking_metrics(top, relevant, ks, map_denominator=map_denominator, graded=graded)
    beyond, totals = beyond_accuracy(top, relevant, case.train, users, ks)
    return Figures(values | beyond, totals), users


def _names(known: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """The distinct ids, as text; where all known ones are whole numbers, numbers by value and then what is none."""
    names = np.unique(np.concatenate([known, *others]))
    if not np.char.isdecimal(known).all():
        return names
    number = np.char.isdecimal(names)
    values = np.where(number, names, "0").astype(object).astype(int)
    return names[np.lexsort((names, values, ~number))]


def _given(table: ListTable, users: np.ndarray, place: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """The file's ranks by place, from 1; None where it has none, or other than whole numbers from 0 or 1 for all rows."""
    ranks = table.ranks
    if ranks is None or np.isnan(ranks).any() or (ranks < 0).any() or (ranks % 1 != 0).any():
        return None
    given = np.tile(np.arange(1.0, shape[1] + 1), (shape[0], 1))
    given[users, place] = ranks + (ranks.min(initial=1) == 0)
    return given


def _places(names: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted name is in ``names``, which has them all."""
    order = np.argsort(names)
    return order[np.searchsorted(names, wanted, sorter=order)]


def _matrix(table: PairTable, users: np.ndarray, items: np.ndarray) -> sp.csr_array:
    rows, columns = _places(users, table.users), _places(items, table.items)
    matrix = sp.coo_array((table.ratings, (rows, columns)), shape=(len(users), len(items))).tocsr()
    matrix.sort_indices()
    return matrix


def _repeats(top: np.ndarray) -> np.ndarray:
    """bool [U, L]: the item was in an earlier place of the row."""
    order = np.argsort(top, axis=1, kind="stable")
    sorted_items = np.take_along_axis(top, order, axis=1)
    again = np.zeros(top.shape, dtype=bool)
    again[:, 1:] = (sorted_items[:, 1:] == sorted_items[:, :-1]) & (sorted_items[:, 1:] >= 0)
    found = np.zeros(top.shape, dtype=bool)
    np.put_along_axis(found, order, again, axis=1)
    return found
