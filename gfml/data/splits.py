"""From records to a data set: threshold, numbering, k-core, split, and the checks in between.

Every step works on whole arrays and draws from one seeded generator, so that equal input,
options and seed give equal data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from gfml.base.errors import UserError, choice_error
from gfml.data.interactions import Interactions, csr_in_order, pair_order, place_in_groups, random_key, sorted_unique
from gfml.data.readers import PARTS, Records, largest_table

SPLITS = ("native", "per-user", "global", "leave-one-out", "leave-k-out", "time", "user-time")
TRAIN, VALID, TEST = range(3)


# Cutting ----------------------------------------------------------------------------------------


def check_ratios(ratios: tuple[float, float, float]) -> tuple[float, float, float]:
    """Shares of train, valid and test, scaled to sum 1; train must be positive."""
    if len(ratios) != 3 or not all(np.isfinite(ratios)) or min(ratios) < 0 or ratios[0] <= 0:
        wanted = "three numbers >= 0 with train > 0"
        raise UserError(f"found split ratios {tuple(ratios)}, wanted {wanted}: correct `split_ratios`")
    total = sum(ratios)
    return ratios[0] / total, ratios[1] / total, ratios[2] / total


def time_key(times: np.ndarray | None, count: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers >= 0 that order ``count`` pairs by time, those of one moment at random."""
    draws = random_key(count, rng)
    if times is None or not count:
        return draws
    late = times
    if times.dtype.kind not in "iu" or (int(times.max()) - int(times.min())).bit_length() > 42:
        late = np.unique(times, return_inverse=True)[1]
    late = late.astype(np.int64) - int(late.min())
    spare = min(62 - int(late.max()).bit_length(), 53)
    late <<= spare
    draws >>= 53 - spare
    late |= draws
    return late


def split_per_user(
    users: np.ndarray, ratios: tuple[float, float, float], rng: np.random.Generator, times: np.ndarray | None = None
) -> np.ndarray:
    """Cut each user's pairs at random, or by time: the latest to test, those before to valid, one moment's at random.

    Of n >= 3 pairs a part with share r > 0 gets max(1, round(r n)) and train keeps at least one;
    a user with fewer than three pairs stays in train.
    Shape: users int64 [N] from 0; returns int8 [N], 0 train, 1 valid, 2 test.
    """
    _, valid, test = check_ratios(ratios)
    degree = np.bincount(users)
    take_test = _take(degree, test, spare=2 if valid else 1)
    take_valid = np.minimum(_take(degree, valid, spare=1), np.maximum(degree - take_test - 1, 0))
    if times is None:
        place = place_in_groups(users, len(degree), random_key(len(users), rng))
    else:
        place = _from_the_end(users, degree, times, rng)
    return _held(place, users, take_test, take_valid)


def _from_the_end(
    users: np.ndarray, degree: np.ndarray, times: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """How many pairs of its user are later than each pair."""
    place = place_in_groups(users, len(degree), time_key(times, len(users), rng))
    return np.subtract((degree - 1).astype(place.dtype)[users], place, out=place)


def _held(place: np.ndarray, users: np.ndarray, test: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Labels: of each user's places the first ``test`` test, the next ``valid`` valid."""
    labels = (place < test.astype(np.int32)[users]).view(np.int8)
    labels += place < (test + valid).astype(np.int32)[users]  # 2 test, 1 valid
    return labels


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


def split_leave_out(
    users: np.ndarray, times: np.ndarray | None, rng: np.random.Generator, count: int = 1
) -> np.ndarray:
    """Each user's last ``count`` pairs to test, the ``count`` before to valid; ties and missing times at random.

    Train keeps at least one: users with ``2 count`` pairs or fewer give no valid pair, those with ``count`` or fewer
    none at all. int8 [N].
    """
    degree = np.bincount(users)
    left = _from_the_end(users, degree, times, rng)
    test, valid = count * (degree > count), count * (degree > 2 * count)
    return _held(left, users, test, valid)


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


def split_at_dates(times: np.ndarray, per_second: int | None, dates: tuple[float, ...]) -> np.ndarray:
    """Cut at moments (seconds since 1970): pairs from the last of ``dates`` on test, with two those from the first valid."""
    if per_second is None:
        raise UserError(
            "a split at a date needs times that are dates, found plain numbers: use `split time` or name `time_col`"
        )
    first, last = (dates[0] * per_second, dates[-1] * per_second)
    return np.select([times >= last, times >= first], [TEST, VALID], TRAIN).astype(np.int8)


@dataclass(frozen=True)
class Split:
    """How to cut. kind: one of :data:`SPLITS`, None for the source's own, else ``per-user``.

    leave: pairs of a user that ``leave-k-out`` takes for each part. dates: moments (seconds since 1970) for ``time``
    instead of ratios, one or two.
    """

    kind: str | None = None
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 2020
    leave: int = 1
    dates: tuple[float, ...] = ()


TIMED = ("leave-one-out", "leave-k-out", "time", "user-time")


def split_labels(split: Split, records: Records) -> np.ndarray:
    """Labels of the split of that kind (one of :data:`SPLITS` except ``native``)."""
    users, times, rng = records.users, records.times, np.random.default_rng(split.seed)
    if split.kind == "per-user":
        return split_per_user(users, split.ratios, rng)
    if split.kind == "global":
        return split_global(len(users), split.ratios, rng)
    if split.kind in ("leave-one-out", "leave-k-out"):
        return split_leave_out(users, times, rng, split.leave if split.kind == "leave-k-out" else 1)
    if split.kind in ("time", "user-time"):
        if times is None:
            todo = "name it with `time_col` (order: the order of the rows) or use another `split`"
            raise UserError(f"a split by time needs a time column and none was found: {todo}")
        if split.kind == "user-time":
            return split_per_user(users, split.ratios, rng, times)
        return (
            split_at_dates(times, records.per_second, split.dates)
            if split.dates
            else split_by_time(times, split.ratios)
        )
    raise choice_error("split", split.kind, SPLITS)


# Filtering and numbering ------------------------------------------------------------------------


def keep_positive(records: Records, threshold: float | None, *, strict: bool = False) -> Records:
    """Only the rows with rating >= threshold (> threshold if ``strict``); all rows when it is None."""
    if threshold is None:
        return records
    if records.ratings is None:
        todo = "drop `threshold` or name `rating_col`"
        raise UserError(f"a rating threshold was asked for, but the data has no ratings: {todo}")
    keep = records.ratings > threshold if strict else records.ratings >= threshold
    if not keep.any():
        found = f"ratings from {records.ratings.min():g} to {records.ratings.max():g}" if len(records) else "no rows"
        raise UserError(f"no interaction is left at `threshold {threshold:g}`: found {found}, lower it")
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


def _as_rows(records: Records) -> Records:
    """With names for ids that are no small numbers, so that every id is a row of something."""
    for side in ("user", "item"):
        raw, names = getattr(records, f"{side}s"), getattr(records, f"{side}_names")
        if names is not None or not len(raw):
            continue
        shifted = raw - records.first_id
        if records.numbered and int(shifted.max()) < largest_table(len(raw)):
            records = replace(records, **{f"{side}s": shifted})
        else:
            rows, ids = renumber(raw)
            records = replace(records, **{f"{side}s": rows, f"{side}_names": ids})
    return records


def _compact(records: Records, side: str, least: int, *, core: bool) -> tuple[np.ndarray, np.ndarray | None, int]:
    """(rows, ids or None, how many) of one side, without names that no row has. core: without numbers either."""
    rows, names = getattr(records, f"{side}s"), getattr(records, f"{side}_names")
    size = int(rows.max()) + 1 if len(rows) else 0
    if names is None and not core:
        size = max(size, least)
        return rows, np.arange(records.first_id, records.first_id + size) if records.first_id else None, size
    used = np.bincount(rows, minlength=size) > 0
    ids = np.flatnonzero(used) + records.first_id if names is None else names[: len(used)][used]
    return rows if used.all() else (np.cumsum(used) - 1)[rows], ids, len(ids)


def _is_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of ``values`` occur in ``known``, which is sorted."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


# The whole way ----------------------------------------------------------------------------------


def prepare(
    records: Records,
    name: str,
    split: Split = Split(),
    *,
    threshold: float | None = None,
    strict: bool = False,
    kcore: int = 0,
    duplicates: str = "first",
    file_order: bool = False,
) -> Interactions:
    """Threshold, drop duplicates, k-core, number, split and check ``records``.

    A split of kind None takes the source's own split if it has one, else ``per-user``. A test pair that
    is in train or valid too, and a valid pair that is in train, is dropped and counted in notes.
    duplicates: a repeated pair counts once, at its ``first`` time (among the rows that the threshold keeps), at its
        ``last`` with the rating it has there, or at its first with the ``sum`` of its ratings; the threshold follows.
    file_order: random cuts draw in the order of the rows, as for published files; else that order decides nothing.
    Raises UserError when nothing is left to train on.
    """
    counts = {"read": len(records)}
    if duplicates == "first":
        records = _counted(counts, keep_positive(records, threshold, strict=strict), "below --threshold, dropped")
    records = _as_rows(records)
    own_split = split.kind in (None, "native") and records.parts is not None
    records = _counted(
        counts,
        _without_duplicates(records, duplicates, own_split=own_split, file_order=file_order),
        "repeated pairs, merged",
    )
    if duplicates != "first":
        records = _counted(counts, keep_positive(records, threshold, strict=strict), "below --threshold, dropped")
    if kcore > 1:
        records = _counted(counts, _cored(records, kcore), f"outside the {kcore}-core, dropped")
    users, user_ids, num_users = _compact(records, "user", records.min_size[0], core=kcore > 1)
    items, item_ids, num_items = _compact(records, "item", records.min_size[1], core=kcore > 1)
    records = replace(records, users=users, items=items, notes=_row_notes(records.notes, counts, always=not file_order))
    labels = _labels(records, name, split)
    by_time = split.kind in TIMED and split.kind != "time" and records.times is not None and len(records)
    if by_time and np.ptp(records.times) == 0:
        told = f"all {len(records):,} pairs have one moment: --split {split.kind} cuts them at random"
        records = replace(records, notes={**records.notes, "times": told})
    shape, ids = (num_users, num_items), {"user_ids": user_ids, "item_ids": item_ids}
    return assemble(name, records.users, records.items, labels, shape, notes=records.notes, **ids)


def ratings_of(records: Records, data: Interactions, which: str) -> np.ndarray:
    """The rating of every test pair of ``data``, float64 [test.nnz], from the rows it was made of.

    which: of a repeated pair the rating of its ``first`` or ``last`` row by time (then by rating), or the ``sum``.
    """
    users, items = _rows_in(records.ids("users"), data.user_ids), _rows_in(records.ids("items"), data.item_ids)
    wanted = np.repeat(np.arange(data.num_users), np.diff(data.test.indptr)) * data.num_items + data.test.indices
    pairs = np.where((users >= 0) & (items >= 0), users * data.num_items + items, -1)
    rows = np.flatnonzero(_is_in(pairs, wanted))
    ratings = records.ratings[rows].astype(np.float64)
    if which == "sum":
        return np.bincount(np.searchsorted(wanted, pairs[rows]), weights=ratings, minlength=len(wanted))
    times = np.zeros(len(rows)) if records.times is None else records.times[rows]
    pairs = pairs[rows]
    order = np.lexsort((ratings, times, pairs))
    last = which == "last"
    return ratings[order][np.searchsorted(pairs[order], wanted, "right" if last else "left") - last]


def _rows_in(raw: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """The row of each source id among ``ids``, -1 for one that is not there; without ids they are the rows."""
    import pandas as pd

    return raw.astype(np.int64) if ids is None else pd.Index(ids).get_indexer(raw)


def _counted(counts: dict[str, int], records: Records, why: str) -> Records:
    """``records``, with how many rows fewer they are than were kept before."""
    gone = counts["read"] - sum(count for key, count in counts.items() if key != "read") - len(records)
    if gone:
        counts[why] = gone
    return records


def _row_notes(notes: dict[str, object], counts: dict[str, int], *, always: bool) -> dict[str, object]:
    """The notes with one line for the rows: how many were read, dropped or merged and why, and are left."""
    if len(counts) == 1 and not always:
        return notes
    gone = {why: count for why, count in counts.items() if why != "read"}
    told = [f"{counts['read']:,} read", *(f"{count:,} {why}" for why, count in gone.items())]
    return {"rows": "; ".join([*told, f"{counts['read'] - sum(gone.values()):,} left"]), **notes}


def _without_duplicates(records: Records, which: str, *, own_split: bool, file_order: bool) -> Records:
    """Each pair once (once per part if the source's own split is kept), in the order of users and items.

    file_order: in the order of the file, by the place of the row that is kept.
    """
    order, users, items = pair_order(records.users, records.items)
    if own_split:
        order = order[np.lexsort((records.parts[order], items, users))]  # users and items stay as they are
    ordered = replace(records, users=users, items=items)
    for name in ("ratings", "times", "parts"):
        column = getattr(records, name)
        if column is not None:
            ordered = replace(ordered, **{name: column[order]})
    same = (ordered.users[1:] == ordered.users[:-1]) & (ordered.items[1:] == ordered.items[:-1])
    if own_split:
        same &= ordered.parts[1:] == ordered.parts[:-1]
    if not same.any():
        return records if file_order else ordered
    first = np.concatenate([[True], ~same])
    again = ~first
    again[:-1] |= same  # every row of a repeated pair
    kept = _merge(ordered, np.flatnonzero(again), first, which)
    if not file_order:
        return ordered.take(first)
    order[first & again] = order[kept]
    return ordered.take(first).take(np.argsort(order[first], kind="stable"))


def _merge(records: Records, rows: np.ndarray, first: np.ndarray, which: str) -> np.ndarray:
    """Write the time and rating that stand for each repeated pair to its first row; the rows that they are from.

    rows: of the repeated pairs, pair after pair; first: of all rows, whether a pair begins there.
    """
    times, ratings = records.times, records.ratings
    if which == "last" and times is None:
        raise UserError(
            "`duplicates last` needs a time column and none was found: name it with `time_col`, or use first or sum"
        )
    pair = np.cumsum(first[rows]) - 1
    keys = [column[rows] for column in (ratings, times) if column is not None]
    inner = rows[np.lexsort((*keys, pair))] if keys else rows
    ends = np.flatnonzero(np.concatenate([pair[1:] != pair[:-1], [True]]))
    starts = np.concatenate([[0], ends[:-1] + 1])
    kept, head = inner[ends if which == "last" else starts], rows[starts]
    if times is not None:
        times[head] = times[kept]
    if ratings is not None:
        ratings[head] = np.add.reduceat(ratings[rows], starts) if which == "sum" else ratings[kept]
    return kept


def _cored(records: Records, k: int) -> Records:
    # A pair that two parts of the source hold is one interaction.
    keys = records.users.astype(np.int64) * (int(records.items.max(initial=0)) + 1) + records.items
    _, row, pair = np.unique(keys, return_index=True, return_inverse=True)
    kept = records.take(k_core(records.users[row], records.items[row], k)[pair])
    if not len(kept):
        raise UserError(f"the {k}-core is empty: no set of users and items has {k} interactions each, lower `kcore`")
    return kept


def _labels(records: Records, name: str, split: Split) -> np.ndarray:
    if split.kind == "native" and records.parts is None:
        others = ", ".join(SPLITS[1:])
        raise UserError(f"{name} ships no split of its own: choose `split` from {others}")
    if split.kind in (None, "native") and records.parts is not None:
        return records.parts
    return split_labels(replace(split, kind=split.kind or "per-user"), records)


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
    rising = users[1:] > users[:-1]
    rising |= (users[1:] == users[:-1]) & (items[1:] > items[:-1])
    if rising.all():  # in order and each once: no part can hold a pair of another
        parts = [csr_in_order(users[own], items[own], *shape) for own in (labels == part for part in range(len(PARTS)))]
    else:
        parts = _disjoint(users.astype(np.int64) * max(shape[1], 1) + items, labels, shape, notes)
    if parts[TRAIN].nnz == 0:
        raise UserError(f"{name} has no training interaction: check the split, `split_ratios` and the filters")
    data = Interactions(name, *parts, user_ids=user_ids, item_ids=item_ids, notes=notes)
    return replace(data, notes={**notes, **_observations(data)})


def _disjoint(
    keys: np.ndarray, labels: np.ndarray, shape: tuple[int, int], notes: dict[str, object]
) -> list[sp.csr_array]:
    """The parts of pairs (user x items + item) in any order, each pair in the first part that has it."""
    taken, parts = np.empty(0, np.int64), []
    for label, part in enumerate(PARTS):
        own = sorted_unique(keys[labels == label])
        known = _is_in(own, taken)
        if known.any():
            earlier = "train" if part == "valid" else "train or valid"
            notes[f"{part} pairs also in {earlier}, dropped"] = int(known.sum())
            own = own[~known]
        taken = np.sort(np.concatenate([taken, own]))
        parts.append(csr_in_order(*np.divmod(own, max(shape[1], 1)), *shape))
    return parts


def _observations(data: Interactions) -> dict[str, object]:
    """Counts worth telling: users and items without train pairs, parts without pairs, a test part of strangers."""
    test_users, test_items = np.diff(data.test.indptr) > 0, np.bincount(data.test.indices, minlength=data.num_items) > 0
    strange_users = int((test_users & (data.user_activity == 0)).sum())
    strange_items = int((test_items & (data.item_popularity == 0)).sum())
    counts = {
        "users without train pairs": int((data.user_activity == 0).sum()),
        "test users without train pairs": strange_users,
        "items without train pairs": int((data.item_popularity == 0).sum()),
    }
    found: dict[str, object] = {what: count for what, count in counts.items() if count}
    if data.test.nnz == 0:
        found["test part"] = "empty"
    elif 2 * strange_users > test_users.sum() or 2 * strange_items > test_items.sum():
        found["most of the test part is unknown to train"] = (
            f"{strange_users:,} of {int(test_users.sum()):,} test users and {strange_items:,} of {int(test_items.sum()):,} test "
            "items: results say little of a model, another --split keeps more"
        )
    return found
