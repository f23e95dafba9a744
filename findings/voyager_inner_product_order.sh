#!/usr/bin/env bash
# voyager 2.2.3: what an inner product index finds depends on the order in which its items were added.
#
# Behaviour: 2,000 items of 16 dimensions with lengths exp(0.5 N(0, 1)), the ten best items of 100 queries: added by length, either
# way round, 9 of 10 are found, added in random order a quarter. With all lengths equal the order does not matter. The distances
# that query() returns are right. Space.InnerProduct gives every vector one more coordinate, sqrt(longest^2 - length^2); the same
# points made by hand in Space.Euclidean are found as badly (.26), and so are they with the longest vector added first (.27, .29).
# Good guess: as with other graphs of this kind the order matters by a few hundredths: hnswlib 0.8.0 with "ip" and the same M and ef
# finds .86 to .89 of the same items in all three orders.
# Who is hurt: recommenders, whose item vectors are of unequal length and added by id: the loss is put down to ef and M, and
# query_ef = 100 brings it to three quarters only. Adding the items by length helps.
# Output seen: recall@10 of .87 to .89 by length, .22 and .26 in random order; .85 to .87 with equal lengths, in any order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check voyager==2.2.3 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from voyager import Index, Space


def recall(spread, order, seed):
    rng = np.random.default_rng(seed)
    items = rng.normal(size=(2000, 16))
    lengths = np.sort(np.exp(spread * rng.normal(size=2000)))
    items = (items / np.linalg.norm(items, axis=1, keepdims=True) * lengths[:, None]).astype(np.float32)
    queries = rng.normal(size=(100, 16)).astype(np.float32)
    best = np.argsort(-queries @ items.T, axis=1)[:, :10]
    ids = {"rising": np.arange(2000), "falling": np.arange(2000)[::-1], "random": rng.permutation(2000)}[order]
    index = Index(Space.InnerProduct, num_dimensions=16)
    index.add_items(items[ids], ids=ids.astype(np.uint64), num_threads=1)
    assert np.allclose(index.get_vector(7), items[7])
    found, _ = index.query(queries, k=10, num_threads=1)
    return float(np.mean([len(set(one.tolist()) & set(two.tolist())) / 10 for one, two in zip(found, best)]))


for seed in (0, 1):
    unequal = {order: recall(0.5, order, seed) for order in ("rising", "falling", "random")}
    equal = {order: recall(0.0, order, seed) for order in ("rising", "falling", "random")}
    print("unequal lengths", unequal, "equal lengths", equal)
    assert min(unequal["rising"], unequal["falling"]) > 0.8 and unequal["random"] < 0.5
    assert min(equal.values()) > 0.75
PYTHON
