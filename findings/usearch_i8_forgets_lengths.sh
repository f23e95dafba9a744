#!/usr/bin/env bash
# usearch 2.26.6: dtype="i8" makes every vector a unit vector first, whatever the metric.
#
# Behaviour: Index(metric="ip" or "l2sq", dtype="i8") scales each vector to length 127 by itself. For the query (1, 0) the items
# (1, 0) and (10, 0) are equally good by inner product, and both are at squared distance 0. With "f32" they score 1 and 10, and
# lie 0 and 81 away. get() returns (127, 0) for both.
# Good guess: one factor for the whole index, or values clipped at a known range; lengths survive, coarsely.
# Who is hurt: recommenders that rank by inner product, where an item's length is its popularity: the index answers by cosine,
# and its recall against exact search is put down to eight bits.
# Output seen: ip f32 [10 before 1], i8 equal distances; l2sq i8 distances 0 and 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check usearch==2.26.6
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from usearch.index import Index

items, query = np.array([[1, 0], [10, 0], [0, 5]], np.float32), np.array([1, 0], np.float32)
found = {}
for metric in ("ip", "l2sq"):
    for kind in ("f32", "i8"):
        index = Index(ndim=2, metric=metric, dtype=kind)
        index.add(np.arange(3), items)
        hits = index.search(query, 3, exact=True)
        found[metric, kind] = {int(key): float(distance) for key, distance in zip(hits.keys, hits.distances)}
        stored = [index.get(key).tolist() for key in range(2)]
        print(metric, kind, found[metric, kind], stored)
        assert stored == ([[1.0, 0.0], [10.0, 0.0]] if kind == "f32" else [[127, 0], [127, 0]])
assert found["ip", "f32"][1] < found["ip", "f32"][0] and found["ip", "i8"][1] == found["ip", "i8"][0]
assert found["l2sq", "f32"][1] == 81 and found["l2sq", "i8"][1] == found["l2sq", "i8"][0] == 0
PYTHON
