"""Splits and filters against naive loops and the properties they promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gfml.base.errors import UserError
from gfml.data import interactions, splits
from gfml.data.interactions import column_counts, pairs_from_csr, sorted_unique
from gfml.data.readers import Records
from gfml.data.splits import Split

RATIOS = (0.6, 0.2, 0.2)


def toy(seed: int = 0, num_users: int = 30, num_items: int = 40, count: int = 400) -> Records:
    rng = np.random.default_rng(seed)
    users, items = rng.integers(num_users, size=count), rng.integers(num_items, size=count)
    ratings, times = rng.integers(1, 6, size=count), rng.integers(50, size=count)
    return Records(users, items, ratings.astype(float), times.astype(float))


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@given(values=st.lists(st.integers(-5, 5)))
def test_sorted_unique(values):
    assert sorted_unique(np.array(values, dtype=np.int64)).tolist() == sorted(set(values))


@settings(max_examples=50, deadline=None)
@given(pairs=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1), k=st.integers(1, 4))
def test_k_core_equals_naive_removal(pairs, k):
    users, items = np.array(sorted(pairs)).T
    left = set(pairs)
    while True:
        by_user, by_item = Counter(u for u, _ in left), Counter(i for _, i in left)
        kept = {(u, i) for u, i in left if by_user[u] >= k and by_item[i] >= k}
        if kept == left:
            break
        left = kept
    mask = splits.k_core(users, items, k)
    assert {(int(u), int(i)) for u, i in zip(users[mask], items[mask], strict=True)} == left


def test_k_core_renumbers_and_keeps_ids():
    records = Records(np.array([10, 10, 20, 20, 30]), np.array([5, 6, 5, 6, 7]))
    data = splits.prepare(records, "toy", Split(ratios=(1, 0, 0)), kcore=2)
    assert data.user_ids.tolist() == [10, 20] and data.item_ids.tolist() == [5, 6]
    assert data.train.nnz == 4
    with pytest.raises(UserError, match="the 3-core is empty"):
        splits.prepare(records, "toy", kcore=3)


def test_k_core_keeps_the_published_split():
    users, items = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2])
    records = Records(users, items, parts=np.array([0, 2, 0, 0, 0], np.int8), numbered=True)
    data = splits.prepare(records, "toy", kcore=2)
    assert (data.train.nnz, data.test.nnz) == (3, 1) and data.test[0, 1] == 1


@pytest.mark.parametrize("kind", splits.SPLITS[1:])
def test_parts_are_disjoint_and_complete_and_repeatable(kind):
    records = toy()
    data = splits.prepare(records, "toy", Split(kind, RATIOS, 3))
    columns = [[side.tolist() for side in pairs_from_csr(data.split(part))] for part in ("train", "valid", "test")]
    parts = [set(zip(users, items, strict=True)) for users, items in columns]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    ids = {(data.user_ids[u], data.item_ids[i]) for part in parts for u, i in part}
    assert ids == set(zip(records.users.tolist(), records.items.tolist(), strict=True))
    assert all(parts)
    again = splits.prepare(records, "toy", Split(kind, RATIOS, 3))
    assert again.fingerprint == data.fingerprint
    if kind != "time":
        assert splits.prepare(records, "toy", Split(kind, RATIOS, 4)).fingerprint != data.fingerprint


@settings(max_examples=50, deadline=None)
@given(
    degrees=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    ratios=st.sampled_from([(0.8, 0.1, 0.1), (0.8, 0, 0.2), (0.5, 0.5, 0), (1, 0, 0), (0.1, 0.1, 0.8)]),
)
def test_per_user_counts(degrees, ratios):
    users = np.random.default_rng(0).permutation(np.repeat(np.arange(len(degrees)), degrees))
    labels = splits.split_per_user(users, ratios, rng())
    for user, degree in enumerate(degrees):
        train, valid, test = (int((labels[users == user] == part).sum()) for part in range(3))
        assert train + valid + test == degree
        if degree < 3:
            assert train == degree
            continue
        assert train >= 1
        for share, taken in zip(ratios[1:], (valid, test), strict=True):
            wanted = max(1, round(share * degree)) if share else 0
            assert taken == wanted or (taken < wanted and train == 1) or (taken >= 1 and valid + test == degree - 1)


def test_global_counts():
    labels = splits.split_global(1003, (0.8, 0.0, 0.2), rng())
    assert np.bincount(labels, minlength=3).tolist() == [802, 0, 201]


def test_leave_one_out_takes_the_last():
    users, times = np.array([0, 0, 0, 1, 1, 2]), np.array([5.0, 9.0, 7.0, 2.0, 1.0, 3.0])
    assert splits.split_leave_out(users, times, rng()).tolist() == [0, 2, 1, 2, 0, 0]
    random = splits.split_leave_out(np.repeat(np.arange(50), 4), None, rng()).reshape(50, 4)
    assert (np.sort(random, axis=1) == [0, 0, 1, 2]).all()
    assert len(np.unique(random.argmax(axis=1))) == 4  # not always the same place


def test_time_cuts_at_quantiles_and_keeps_moments_together():
    times = np.random.default_rng(0).integers(40, size=500).astype(float)
    labels = splits.split_by_time(times, RATIOS)
    assert times[labels == 0].max() < times[labels == 1].min() and times[labels == 1].max() < times[labels == 2].min()
    assert abs((labels == 0).mean() - 0.6) < 0.05 and abs((labels == 2).mean() - 0.2) < 0.05


def test_thresholds():
    records = toy()
    assert len(splits.keep_positive(records, 3)) == int((records.ratings >= 3).sum())
    assert len(splits.keep_positive(records, 3, strict=True)) == int((records.ratings > 3).sum())
    with pytest.raises(UserError, match="no interaction is left at `threshold 6`: found ratings from 1 to 5"):
        splits.keep_positive(records, 6)
    with pytest.raises(UserError, match="has no ratings"):
        splits.keep_positive(Records(records.users, records.items), 3)


def test_duplicates_and_overlap_are_dropped_and_counted():
    users, items = np.array([0, 0, 0, 1, 1, 1, 2]), np.array([1, 1, 2, 1, 2, 2, 1])
    parts = np.array([0, 0, 1, 0, 0, 2, 2], dtype=np.int8)
    data = splits.prepare(Records(users, items, parts=parts, numbered=True), "toy")
    assert (data.train.nnz, data.valid.nnz, data.test.nnz) == (3, 1, 1)
    assert data.notes["rows"] == "7 read; 1 repeated pairs, merged; 6 left"
    assert data.notes["test pairs also in train or valid, dropped"] == 1
    assert data.notes["users without train pairs"] == data.notes["test users without train pairs"] == 1
    assert data.notes["items without train pairs"] == 1  # item 0


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(UserError, match="no interaction at all"):
        splits.prepare(Records(np.empty(0, np.int64), np.empty(0, np.int64), numbered=True), "toy")
    only_test = Records(np.array([0]), np.array([1]), parts=np.array([2], np.int8), numbered=True)
    with pytest.raises(UserError, match="no training interaction"):
        splits.prepare(only_test, "toy")


def test_wrong_requests_are_named():
    records = toy()
    untimed = Records(records.users, records.items)
    with pytest.raises(UserError, match="needs a time column"):
        splits.prepare(untimed, "toy", Split("time"))
    with pytest.raises(UserError, match="ships no split of its own"):
        splits.prepare(untimed, "toy", Split("native"))
    with pytest.raises(UserError, match="unknown split 'weekly': choose one of"):
        splits.prepare(untimed, "toy", Split("weekly"))
    for ratios in ((0, 0.5, 0.5), (0.8, -0.1, 0.3), (float("nan"), 0, 1)):
        with pytest.raises(UserError, match="split ratios"):
            splits.prepare(untimed, "toy", Split(ratios=ratios))


# Times decide, the order of the rows does not ----------------------------------------------------


def as_sets(data) -> list[set]:
    parts = [pairs_from_csr(data.split(part)) for part in ("train", "valid", "test")]
    return [{(data.user_ids[u], data.item_ids[i]) for u, i in zip(*side, strict=True)} for side in parts]


def test_cuts_by_time_equal_plain_loops():
    records = toy(seed=3)
    first = {}
    for user, item, time in zip(
        *(column.tolist() for column in (records.users, records.items, records.times)), strict=True
    ):
        first[user, item] = min(time, first.get((user, item), np.inf))
    by_user = {}
    for (user, _), time in first.items():
        by_user.setdefault(user, []).append(time)
    for kind, leave in (("user-time", 1), ("leave-k-out", 2), ("leave-one-out", 1)):
        parts = as_sets(splits.prepare(records, "toy", Split(kind, RATIOS, leave=leave)))
        for user, times in by_user.items():
            own = [sorted(first[pair] for pair in part if pair[0] == user) for part in parts]
            count = len(times)
            if kind == "user-time":
                test = min(max(1, round(0.2 * count)), count - 2) if count >= 3 else 0
                valid = min(test, count - test - 1) if count >= 3 else 0
            else:
                test, valid = leave * (count > leave), leave * (count > 2 * leave)
            assert [len(part) for part in own] == [count - valid - test, valid, test]
            assert own[0] + own[1] + own[2] == sorted(times)  # nothing in train is later than what is held out


@pytest.mark.parametrize("kind", ["user-time", "leave-one-out", "leave-k-out", "per-user"])
def test_a_cut_by_time_without_an_order_is_told(kind):
    """Of one moment: the pairs held out are drawn at random."""
    pairs = np.arange(60)
    records = splits.Records(pairs // 6, pairs % 6, times=np.full(60, 7.0))
    notes = splits.prepare(records, "toy", Split(kind, RATIOS)).notes
    told = f"all 60 pairs have one moment: --split {kind} cuts them at random"
    assert notes.get("times") == (None if kind == "per-user" else told)
    records = splits.Records(pairs // 6, pairs % 6, times=np.where(pairs == 3, 8.0, 7.0))
    assert "times" not in splits.prepare(records, "toy", Split(kind, RATIOS)).notes


def test_a_date_cuts_at_that_moment():
    records = Records(
        np.array([0, 0, 0, 1]),
        np.array([0, 1, 2, 0]),
        times=np.array([10_000, 20_000, 30_000, 20_000]),
        per_second=1000,
    )
    two = splits.prepare(records, "toy", Split("time", dates=(15.0, 30.0)))
    assert as_sets(two) == [{(0, 0)}, {(0, 1), (1, 0)}, {(0, 2)}]
    one = splits.prepare(records, "toy", Split("time", dates=(20.0,)))
    assert (one.train.nnz, one.valid.nnz, one.test.nnz) == (1, 0, 3)
    with pytest.raises(UserError, match="needs times that are dates"):
        splits.prepare(toy(), "toy", Split("time", dates=(20.0,)))


@pytest.mark.parametrize("kind", splits.SPLITS[1:])
@pytest.mark.parametrize("duplicates", ["first", "last", "sum"])
def test_the_order_of_the_rows_decides_nothing(kind, duplicates):
    records = toy(seed=5)
    shuffled = records.take(np.random.default_rng(1).permutation(len(records)))
    one, other = (
        splits.prepare(r, "toy", Split(kind, RATIOS), threshold=3, duplicates=duplicates) for r in (records, shuffled)
    )
    assert one.fingerprint == other.fingerprint and one.notes == other.notes


def test_repeated_pairs_count_once_at_the_time_asked_for():
    users, items = np.array([0, 0, 0, 0, 1]), np.array([5, 6, 5, 7, 5])
    records = Records(users, items, np.array([2.0, 4.0, 3.0, 4.0, 1.0]), np.array([9, 5, 1, 7, 2]))
    last = lambda **options: as_sets(splits.prepare(records, "toy", Split("leave-one-out"), **options))[2]  # noqa: E731
    assert last(duplicates="first") == {(0, 7)} and last(duplicates="last") == {(0, 5)}
    kept = lambda **options: set().union(*as_sets(splits.prepare(records, "toy", **options)))  # noqa: E731
    assert kept(threshold=3, duplicates="first") == {(0, 5), (0, 6), (0, 7)}  # its second rating is 3
    assert kept(threshold=3, duplicates="last") == {(0, 6), (0, 7)}  # its last rating is 2
    assert kept(threshold=5, duplicates="sum") == {(0, 5)}
    notes = splits.prepare(records, "toy", threshold=5, duplicates="sum").notes
    assert notes["rows"] == "5 read; 1 repeated pairs, merged; 3 below --threshold, dropped; 1 left"
    with pytest.raises(UserError, match="`duplicates last` needs a time column"):
        splits.prepare(replace(records, times=None), "toy", duplicates="last")


def test_every_dropped_row_is_counted():
    records = toy(seed=2)
    pairs = len({*zip(records.users.tolist(), records.items.tolist(), strict=True)})
    data = splits.prepare(records, "toy", kcore=5)
    left = data.train.nnz + data.valid.nnz + data.test.nnz
    found = f"400 read; {400 - pairs} repeated pairs, merged; {pairs - left} outside the 5-core, dropped; {left} left"
    assert data.notes["rows"] == found and 0 < left < pairs < 400


def test_a_test_part_of_strangers_says_so():
    records = Records(
        np.array([0, 1, 2, 0]), np.array([0, 1, 2, 3]), parts=np.array([0, 2, 2, 2], np.int8), numbered=True
    )
    note = splits.prepare(records, "toy").notes["most of the test part is unknown to train"]
    assert note.startswith("2 of 3 test users and 3 of 3 test items")
    assert (
        "most of the test part is unknown to train" not in splits.prepare(toy(), "toy", Split("per-user", RATIOS)).notes
    )


@pytest.mark.parametrize("many", [1, 10**9])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=150), seed=st.integers(0, 9))
def test_orders_equal_sorting_of_tuples(monkeypatch, many, groups, seed):
    monkeypatch.setattr(interactions, "MANY", many)
    groups = np.array(sorted(groups) if seed % 2 else groups)
    key = np.random.default_rng(seed).integers(0, len(groups), len(groups)) * 2**40
    place = interactions.place_in_groups(groups, 7, key)
    pairs = list(zip(groups.tolist(), key.tolist(), strict=True))
    found = [
        sum(other == pair[0] and (late, row) < (pair[1], own) for row, (other, late) in enumerate(pairs))
        for own, pair in enumerate(pairs)
    ]
    assert place.tolist() == found
    items = np.random.default_rng(seed).integers(0, 4, len(groups))
    order, by_user, by_item = interactions.pair_order(groups, items)
    assert order.tolist() == sorted(range(len(groups)), key=lambda row: (groups[row], items[row], row))
    assert by_user.tolist() == groups[order].tolist() and by_item.tolist() == items[order].tolist()


def test_column_counts_are_those_of_every_block_size() -> None:
    rows = sp.csr_array((np.ones(5), [0, 2, 2, 1, 2], [0, 2, 2, 5]), shape=(3, 4))
    for block in (1, 2, 5, 100):
        assert column_counts(rows, block).tolist() == [1, 1, 3, 0]
