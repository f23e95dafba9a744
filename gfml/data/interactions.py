"""The one type every recommender reads: who interacted with what, in three disjoint parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from gfml.base.errors import UserError

MANY = 100_000  # from so many rows on compiled code pays for its import


def sorted_unique(keys: np.ndarray) -> np.ndarray:
    """The distinct values in ascending order; by sorting, which is several times faster here than hashing."""
    ordered = np.sort(keys)
    keep = np.ones(len(ordered), dtype=bool)
    keep[1:] = ordered[1:] != ordered[:-1]
    return ordered[keep]


def pair_order(users: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, their users, their items) ordered by user, then item, then row."""
    if not MANY <= len(users) < 2**31 or items.max() >= 2**31:
        order = np.lexsort((items, users))
        return order, users[order], items[order]
    from gfml.kernels.orders import order_pairs

    degree = np.bincount(users)
    order, by_user, by_item = (np.empty(len(users), dtype=np.int32) for _ in range(3))
    small = (side.astype(np.int32, copy=False) for side in (users, items))
    order_pairs(*small, _starts(degree), order, by_user, by_item)
    return order, by_user, by_item


def place_in_groups(groups: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Position 0, 1, ... of each row within its group by ascending ``key``, equal keys by row; int [N]."""
    starts = _starts(np.bincount(groups, minlength=size))
    if MANY <= len(groups) < 2**31 and (groups[1:] >= groups[:-1]).all():
        from gfml.kernels.orders import rank_rows

        place = np.empty(len(groups), dtype=np.int32)
        rank_rows(key, starts, place)
        return place
    place, order = np.empty(len(groups), dtype=np.int64), np.lexsort((key, groups))
    place[order] = np.arange(len(groups)) - starts[groups[order]]
    return place


def column_counts(matrix: sp.csr_array, block: int = 1 << 20) -> np.ndarray:
    """Entries of each column, int64 [columns]; counted in blocks, since bincount copies what it counts to 64 bits."""
    counts = np.zeros(matrix.shape[1], dtype=np.int64)
    for start in range(0, matrix.nnz, block):
        counts += np.bincount(matrix.indices[start : start + block], minlength=len(counts))
    return counts


def _starts(degree: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(degree)])


def random_key(count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` draws of ``rng.random`` as whole numbers in the same order."""
    draws = rng.random(count)
    draws *= 2.0**53
    return draws.astype(np.int64)


def csr_from_pairs(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> sp.csr_array:
    """Binary CSR matrix [num_users, num_items]; repeated pairs count once, indices ascend in each row."""
    users = np.asarray(users, dtype=np.int64)
    items = np.asarray(items, dtype=np.int64)
    keys = sorted_unique(users * num_items + items)
    return csr_in_order(*np.divmod(keys, max(num_items, 1)), num_users, num_items)


def csr_in_order(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> sp.csr_array:
    """The same of distinct pairs that are ordered by user, then item."""
    return csr_from_parts(items, _starts(np.bincount(users, minlength=num_users)), (num_users, num_items))


def csr_from_parts(columns: np.ndarray, starts: np.ndarray, shape: tuple[int, int]) -> sp.csr_array:
    """Binary CSR matrix of sorted unique columns row by row, row r from starts[r]; both in the smallest index type."""
    small = np.int32 if max(len(columns), *shape) < 2**31 else np.int64
    columns, starts = columns.astype(small, copy=False), starts.astype(small, copy=False)
    matrix = sp.csr_array((np.ones(len(columns), dtype=np.float32), columns, starts), shape=shape)
    matrix.has_sorted_indices = True
    return matrix


def pairs_from_csr(matrix: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """The stored (user, item) pairs as two int64 arrays, ordered by user, then item."""
    users = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    return users, matrix.indices.astype(np.int64)


@dataclass(frozen=True)
class Interactions:
    """Implicit feedback of ``num_users`` users on ``num_items`` items.

    train, valid, test: binary CSR [U, I], float32 ones, sorted unique indices, disjoint.
        ``valid`` has no entries when the data set ships none and none was cut off.
    user_ids, item_ids: what row u / column i was called in the source (strings or integers);
        None when rows are the source's own 0-based numbers.
    true_item_mass, true_user_mass: log-masses of the generator, only for synthetic data.
    test_ratings: float64 [test.nnz], in the order of test's stored pairs; None where nobody asked or there are none.
    notes: what reading dropped or found (``{"duplicates dropped": 3}``), for the report.
    """

    name: str
    train: sp.csr_array
    valid: sp.csr_array
    test: sp.csr_array
    user_ids: np.ndarray | None = None
    item_ids: np.ndarray | None = None
    true_user_mass: np.ndarray | None = None
    true_item_mass: np.ndarray | None = None
    test_ratings: np.ndarray | None = None
    notes: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.train.shape == self.valid.shape == self.test.shape):
            shapes = f"{self.train.shape}, {self.valid.shape}, {self.test.shape}"
            raise ValueError(f"train, valid and test differ in shape: {shapes}")
        if self.test_ratings is not None and len(self.test_ratings) != self.test.nnz:
            raise ValueError(f"{len(self.test_ratings)} ratings for {self.test.nnz} test pairs")

    @property
    def num_users(self) -> int:
        return self.train.shape[0]

    @property
    def num_items(self) -> int:
        return self.train.shape[1]

    def split(self, name: str) -> sp.csr_array:
        """The part called ``train``, ``valid`` or ``test``."""
        if name not in ("train", "valid", "test"):
            raise ValueError(f"unknown split {name!r}: choose train, valid or test")
        return getattr(self, name)

    @property
    def rated_test(self) -> sp.csr_array:
        """test with its ratings as values, float64. UserError where it has none."""
        if self.test_ratings is None:
            raise UserError(
                f"{self.name} has no test ratings, wanted them for `graded`: drop it or give data with stars"
            )
        return sp.csr_array((self.test_ratings, self.test.indices, self.test.indptr), shape=self.test.shape)

    @cached_property
    def item_popularity(self) -> np.ndarray:
        """Train interactions of each item, int64 [I]."""
        return column_counts(self.train)

    @cached_property
    def user_activity(self) -> np.ndarray:
        """Train interactions of each user, int64 [U]."""
        return np.diff(self.train.indptr).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over shape and all three parts: equal data gives an equal fingerprint."""
        return _digest(self.train, self.valid, self.test)

    def part_fingerprint(self, split: str) -> str:
        """sha256 of one part: two runs are judged on the same pairs when theirs for ``test`` are equal."""
        return _digest(self.split(split))

    def seen(self, split: str) -> sp.csr_array:
        """What must not be recommended when ``split`` is judged: train, and for test also valid."""
        if split == "valid":
            return self.train
        if split == "test":
            return self.train_and_valid
        raise ValueError(f"only valid and test are judged, not {split!r}")

    @cached_property
    def train_and_valid(self) -> sp.csr_array:
        """Union of train and valid as binary CSR."""
        if self.valid.nnz == 0:
            return self.train
        first, second = pairs_from_csr(self.train), pairs_from_csr(self.valid)
        return csr_from_pairs(
            np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]]), self.num_users, self.num_items
        )

    def refit(self) -> Interactions:
        """The same data with valid moved into train: for the final number after selection."""
        empty = csr_from_pairs(np.empty(0, np.int64), np.empty(0, np.int64), self.num_users, self.num_items)
        return replace(self, train=self.train_and_valid, valid=empty)

    def with_validation(self, ratio: float, seed: int) -> Interactions:
        """Cut a validation part from train: ``ratio`` of each user's pairs, at random.

        A user with n train pairs gives max(1, round(ratio * n)) of them if n >= 3 and none
        otherwise, so at least two always stay. Train pairs already set aside are untouched.
        ratio 0 returns the data as it is.
        """
        if not 0 <= ratio < 1:
            raise UserError(f"found a validation ratio of {ratio}, wanted 0 <= ratio < 1: mend `val_ratio`")
        if ratio == 0:
            return self
        if self.valid.nnz:
            raise ValueError("the data has a validation part already; it would be mixed with a new one")
        users, items = pairs_from_csr(self.train)
        degree = self.user_activity
        take = np.where(degree >= 3, np.minimum(np.maximum(1, np.rint(ratio * degree).astype(np.int64)), degree - 2), 0)
        # The first `take` pairs of a user in a random order are held out.
        place = place_in_groups(users, self.num_users, random_key(len(users), np.random.default_rng(seed)))
        held = place < np.repeat(take, degree)
        shape = (self.num_users, self.num_items)
        return replace(
            self,
            train=csr_from_pairs(users[~held], items[~held], *shape),
            valid=csr_from_pairs(users[held], items[held], *shape),
        )


def check_gains(ratings: np.ndarray) -> np.ndarray:
    """The ratings as they are, for gains. UserError for one below 0: a list would be better without that hit than with it."""
    if len(ratings) and (least := ratings.min()) < 0:
        found = f"found a rating of {least:g} in the test part, wanted none below 0 for `graded`"
        raise UserError(f"{found}: move the scale, remove such rows, or drop the flag")
    return ratings


def _digest(*parts: sp.csr_array) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.asarray(part.shape, dtype=np.int64).tobytes())
        digest.update(part.indptr.astype(np.int64).tobytes())
        digest.update(part.indices.astype(np.int64).tobytes())
    return digest.hexdigest()
