"""Training triples drawn one by one in plain Python: the oracle of the vectorised sampler, and its speed baseline."""

from __future__ import annotations

import random

import scipy.sparse as sp


def rows_as_lists(train: sp.csr_array) -> list[list[int]]:
    """The train items of every user."""
    return [train.indices[a:b].tolist() for a, b in zip(train.indptr[:-1], train.indptr[1:], strict=True)]


def reference_epoch(
    positives: list[list[int]], num_items: int, rng: random.Random, *, scheme: str = "user", num_negatives: int = 1
) -> list[tuple[int, int, tuple[int, ...]]]:
    """One epoch of (user, positive, negatives); positives: the train items of every user.

    user: as many uniform users as train pairs, each with a uniform positive. interaction: every pair once,
    shuffled. per_user: the same number of positives for every user. Negatives are uniform items, drawn again
    while they are train items of the user. Users without positives, or with every item, give no triples.
    """
    total = sum(map(len, positives))
    users = range(len(positives))
    if scheme == "user":
        pairs = [(user, None) for user in rng.choices(users, k=total)]
    elif scheme == "per_user":
        pairs = [(user, None) for user in users for _ in range(max(1, total // len(positives)))]
    else:
        pairs = [(user, item) for user in users for item in positives[user]]
        rng.shuffle(pairs)
    known = [set(items) for items in positives]
    triples = []
    for user, item in pairs:
        if 0 < len(known[user]) < num_items:
            item = rng.choice(positives[user]) if item is None else item
            negatives = tuple(draw_negative(known[user], num_items, rng) for _ in range(num_negatives))
            triples.append((user, item, negatives))
    return triples


def draw_negative(known: set[int], num_items: int, rng: random.Random) -> int:
    """A uniform item outside ``known``, by rejection."""
    while True:
        item = rng.randrange(num_items)
        if item not in known:
            return item
