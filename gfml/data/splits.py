"""From records to a data set: threshold, numbering, k-core, split, and the checks in between.

Every step works on whole arrays and draws from one seeded generator, so that equal input,
options and seed give equal data.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gfml.base.errors import UserError, choice_error
from gfml.data.interactions import Interactions, csr_from_pairs, sorted_unique
from gfml.data.readers import PARTS, Records, largest_table

SPLITS = ("native", "per-user", "global", "leave-one-out", "time")
TRAIN, VALID, TEST = range(3)


# Cutting ----------------------------------------------------------------------------------------


def check_ratios(ratios: tuple[float, float, float]) -> tuple[float, float, float]:
    """Shares of train, valid and test, scaled to sum 1; train must be positive."""
    if len(ratios) != 3 or not all(np.isfinite(ratios)) or min(ratios) < 0 or ratios[0] <= 0:
        wanted = "three numbers >= 0 with train > 0"
        raise UserError(f"found split ratios {tuple(ratios)}, wanted {wanted}: correct --split-ratios")
    total = sum(ratios)
    return ratios[0] / total, ratios[1] / total, ratios[2] / total


def _rank_in_group(groups: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Position 0, 1, ... of each entry among the entries of its group, ordered by ``keys`` (first key decides)."""
    order = np.lexsort((*reversed(keys), groups))
    ordered = groups[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, np.int64)
    rank = np.empty(len(groups), dtype=np.int64)
    rank[order] = np.arange(len(groups)) - np.repeat(first, np.diff(np.r_[first, len(groups)]))
    return rank


def split_per_user(users: np.ndarray, ratios: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Cut each user's pairs at random.

    Of n >= 3 pairs a part with share r > 0 gets max(1, round(r n)) and train keeps at least one;
    a user with fewer than three pairs stays in train.
    Shape: users int64 [N] from 0; returns int8 [N], 0 train, 1 valid, 2 test.
    """
    _, valid, test = check_ratios(ratios)
    degree = np.bincount(users)
    take_test = _take(degree, test, spare=2 if valid else 1)
    take_valid = np.minimum(_take(degree, valid, spare=1), np.maximum(degree - take_test - 1, 0))
    rank = _rank_in_group(users, rng.random(len(users)))
    cut_test, cut_valid = take_test[users], (take_test + take_valid)[users]
    return np.select([rank < cut_test, rank < cut_valid], [TEST, VALID], TRAIN).astype(np.int8)


def _take(degree: np.ndarray, share: float, spare: int) -> np.ndarray:
    wanted = np.clip(np.rint(share * degree).astype(np.int64), 1, np.maximum(degree - spare, 1))
    return np.where((degree >= 3) & (share > 0), wanted, 0)


def split_global(count: int, ratios: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Cut all pairs at random: round(r N) of them to valid and test, whoever they belong to. int8 [count]."""
    _, valid, test = check_ratios(ratios)
    labels = np.zeros(count, dtype=np.int8)
    order = rng.permutation(count)
    num_test, num_valid = round(test * count), round(valid * count)
    labels[order[:num_test]] = TEST
    labels[order[num_test : num_test + num_valid]] = VALID
    return labels


def split_leave_one_out(users: np.ndarray, times: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Each user's last pair to test, the one before to valid; ties and missing times at random.

    Users with two pairs give only a test pair, users with one stay in train. int8 [N].
    """
    when = np.zeros(len(users)) if times is None else times
    degree = np.bincount(users)[users] if len(users) else np.empty(0, np.int64)
    left = degree - 1 - _rank_in_group(users, when, rng.random(len(users)))
    is_test, is_valid = (left == 0) & (degree >= 2), (left == 1) & (degree >= 3)
    return np.select([is_test, is_valid], [TEST, VALID], TRAIN).astype(np.int8)


def split_by_time(times: np.ndarray, ratios: tuple[float, float, float]) -> np.ndarray:
    """Cut at global time quantiles: the earliest pairs train, then valid, the latest test.

    Pairs of one moment are never torn apart: they go to the earlier part. int8 [N].
    """
    train, valid, _ = check_ratios(ratios)
    ordered = np.sort(times)
    last = len(times) - 1
    end_train = ordered[min(max(round(train * len(times)) - 1, 0), last)]
    end_valid = ordered[min(max(round((train + valid) * len(times)) - 1, 0), last)]
    return np.where(times <= end_train, TRAIN, np.where(times <= end_valid, VALID, TEST)).astype(np.int8)


def split_labels(
    kind: str, users: np.ndarray, times: np.ndarray | None, ratios: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """Labels of the split named ``kind`` (one of :data:`SPLITS` except ``native``)."""
    if kind == "per-user":
        return split_per_user(users, ratios, rng)
    if kind == "global":
        return split_global(len(users), ratios, rng)
    if kind == "leave-one-out":
        return split_leave_one_out(users, times, rng)
    if kind == "time":
        if times is None:
            todo = "name it with --time-col or use another --split"
            raise UserError(f"a split by time needs a time column and none was found: {todo}")
        return split_by_time(times, ratios)
    raise choice_error("split", kind, SPLITS)


# Filtering and numbering ------------------------------------------------------------------------


def keep_positive(records: Records, threshold: float | None, *, strict: bool = False) -> Records:
    """Only the rows with rating >= threshold (> threshold if ``strict``); all rows when it is None."""
    if threshold is None:
        return records
    if records.ratings is None:
        todo = "drop --threshold or name --rating-col"
        raise UserError(f"a rating threshold was asked for, but the data has no ratings: {todo}")
    keep = records.ratings > threshold if strict else records.ratings >= threshold
    if not keep.any():
        found = f"ratings from {records.ratings.min():g} to {records.ratings.max():g}" if len(records) else "no rows"
        raise UserError(f"no interaction is left at --threshold {threshold:g}: found {found}, lower it")
    return records.take(keep)


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Mask of the largest set of pairs in which every user and every item has at least k pairs.

    Shape: users, items int64 [N] from 0, pairs distinct; returns bool [N]. May be all False.
    """
    keep = np.ones(len(users), dtype=bool)
    while True:
        by_user, by_item = np.bincount(users[keep], minlength=1), np.bincount(items[keep], minlength=1)
        # Ids that lost all their pairs may lie beyond the counts: they are out already.
        few = keep.copy()
        few[keep] = (by_user[users[keep]] < k) | (by_item[items[keep]] < k)
        if not few.any():
            return keep
        keep &= ~few


def renumber(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers 0..n-1 in the sort order of the ids, and the id of each row."""
    ids, rows = np.unique(raw, return_inverse=True)
    return rows.astype(np.int64), ids


def _number(records: Records, raw: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray | None, int]:
    """(row numbers, ids or None, how many rows) of one side."""
    if not records.numbered:
        rows, ids = renumber(raw)
        return rows, ids, len(ids)
    size = max(int(raw.max()) - records.first_id + 1 if len(raw) else 0, least)
    if size > largest_table(len(raw)):
        rows, ids = renumber(raw)
        return rows, ids, len(ids)
    ids = np.arange(records.first_id, records.first_id + size) if records.first_id else None
    return raw - records.first_id, ids, size


def _first_of_each(keys: np.ndarray) -> np.ndarray | None:
    """Mask of the first row with each key, or None when all keys differ."""
    ordered = np.sort(keys)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    mask = np.zeros(len(keys), dtype=bool)
    mask[np.unique(keys, return_index=True)[1]] = True
    return mask


def _is_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of ``values`` occur in ``known``, which is sorted."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


# The whole way ----------------------------------------------------------------------------------


def prepare(
    records: Records,
    name: str,
    *,
    threshold: float | None = None,
    strict: bool = False,
    kcore: int = 0,
    split: str | None = None,
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 2020,
) -> Interactions:
    """Threshold, number, drop duplicates, k-core, split and check ``records``.

    ``split`` None takes the source's own split if it has one, else ``per-user``. A test pair that
    is in train or valid too, and a valid pair that is in train, is dropped and counted in notes.
    Raises UserError when nothing is left to train on.
    """
    records = keep_positive(records, threshold, strict=strict)
    users, user_ids, num_users = _number(records, records.users, records.min_size[0])
    items, item_ids, num_items = _number(records, records.items, records.min_size[1])
    records = replace(records, users=users, items=items)
    records = _without_duplicates(records, num_items, own_split=split in (None, "native"))
    if kcore > 1:
        records, user_ids, item_ids = _cored(records, kcore, user_ids, item_ids)
        num_users, num_items = len(user_ids), len(item_ids)
    labels = _labels(records, name, split, ratios, seed)
    shape, ids = (num_users, num_items), {"user_ids": user_ids, "item_ids": item_ids}
    return assemble(name, records.users, records.items, labels, shape, notes=records.notes, **ids)


def _without_duplicates(records: Records, num_items: int, *, own_split: bool) -> Records:
    """Each pair once (once per part if the source's own split is kept); the number dropped is noted."""
    keys = records.users * max(num_items, 1) + records.items
    if own_split and records.parts is not None:
        keys = keys * len(PARTS) + records.parts
    first = _first_of_each(keys)
    if first is None:
        return records
    return replace(records.take(first), notes={**records.notes, "duplicate pairs dropped": int((~first).sum())})


def _cored(
    records: Records, k: int, user_ids: np.ndarray | None, item_ids: np.ndarray | None
) -> tuple[Records, np.ndarray, np.ndarray]:
    # A pair that two parts of the source hold is one interaction.
    keys = records.users * (records.items.max() + 1) + records.items
    _, row, pair = np.unique(keys, return_index=True, return_inverse=True)
    kept = records.take(k_core(records.users[row], records.items[row], k)[pair])
    if not len(kept):
        raise UserError(f"the {k}-core is empty: no set of users and items has {k} interactions each, lower --kcore")
    users, old_users = renumber(kept.users)
    items, old_items = renumber(kept.items)
    user_ids = old_users if user_ids is None else user_ids[old_users]
    item_ids = old_items if item_ids is None else item_ids[old_items]
    return replace(kept, users=users, items=items), user_ids, item_ids


def _labels(
    records: Records, name: str, split: str | None, ratios: tuple[float, float, float], seed: int
) -> np.ndarray:
    if split == "native" and records.parts is None:
        others = ", ".join(SPLITS[1:])
        raise UserError(f"{name} ships no split of its own: choose --split from {others}")
    if split in (None, "native") and records.parts is not None:
        return records.parts
    kind = "per-user" if split is None else split
    return split_labels(kind, records.users, records.times, ratios, np.random.default_rng(seed))


def assemble(
    name: str,
    users: np.ndarray,
    items: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, int],
    *,
    user_ids: np.ndarray | None = None,
    item_ids: np.ndarray | None = None,
    notes: dict[str, object] | None = None,
) -> Interactions:
    """Three disjoint CSR parts from labelled pairs; what overlaps is dropped from the later part and noted."""
    notes = dict(notes or {})
    if not len(users):
        raise UserError(f"{name} has no interaction at all: check the file and the filters")
    keys = users * max(shape[1], 1) + items
    taken, parts = np.empty(0, np.int64), []
    for label, part in enumerate(PARTS):
        own = sorted_unique(keys[labels == label])
        known = _is_in(own, taken)
        if known.any():
            earlier = "train" if part == "valid" else "train or valid"
            notes[f"{part} pairs also in {earlier}, dropped"] = int(known.sum())
        own = own[~known]
        taken = np.sort(np.concatenate([taken, own])) if len(taken) else own
        parts.append(csr_from_pairs(*np.divmod(own, max(shape[1], 1)), *shape))
    if parts[TRAIN].nnz == 0:
        raise UserError(f"{name} has no training interaction: check the split, --split-ratios and the filters")
    data = Interactions(name, *parts, user_ids=user_ids, item_ids=item_ids, notes=notes)
    return replace(data, notes={**notes, **_observations(data)})


def _observations(data: Interactions) -> dict[str, object]:
    """Counts worth telling: users and items without train pairs, parts without pairs."""
    test_users = np.diff(data.test.indptr) > 0
    counts = {
        "users without train pairs": int((data.user_activity == 0).sum()),
        "test users without train pairs": int((test_users & (data.user_activity == 0)).sum()),
        "items without train pairs": int((data.item_popularity == 0).sum()),
    }
    found: dict[str, object] = {what: count for what, count in counts.items() if count}
    if data.test.nnz == 0:
        found["test part"] = "empty"
    return found
