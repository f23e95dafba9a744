#!/usr/bin/env bash
# replay-rec 0.22.0: a user who gets no recommendations counts as perfectly served with novelty.
#
# Behaviour: Novelty(K) averages over all users of train, and whoever has no list has 1.0, the best value. A model that serves one
# user of ten, with one item that he knows and one that he does not, has 0.95; the documented formula gives 0.05 over ten users
# and 0.5 over the one that is served. A shorter list is divided by its own length, where the formula has K: one new item for
# K = 4 is 1.0, not 0.25. HitRate of the same package gives such users 0.
# Good guess: |new items| / K, 0 for an empty list, or users without a list left out.
# Who is hurt: models that leave users or places empty (filters, neighbourhoods, cold users): the less they recommend the more
# novel they are, and beside coverage or recall the number is read as a trade of accuracy for novelty.
# Output seen: 0.95 from pandas, polars and dict alike; 1.0 for the list of one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check replay-rec==0.22.0 pandas==2.3.3 polars==1.44.2
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import pandas as pd
import polars as pl
from replay.metrics import HitRate, Novelty

train = pd.DataFrame({"query_id": range(10), "item_id": [f"item{number}" for number in range(10)]})
lists = pd.DataFrame({"query_id": [0, 0], "item_id": ["item0", "new"], "rating": [2.0, 1.0]})
found = {
    "pandas": Novelty(2)(lists, train),
    "polars": Novelty(2)(pl.from_pandas(lists), pl.from_pandas(train)),
    "dict": Novelty(2)({0: [("item0", 2.0), ("new", 1.0)]}, train.groupby("query_id")["item_id"].apply(list).to_dict()),
    "short list": Novelty(4)(lists[1:], train[:1]),
    "hits": HitRate(2)(lists, train),
}
found = {name: round(float(next(iter(value.values()))), 4) for name, value in found.items()}
print(found)
assert found == {"pandas": 0.95, "polars": 0.95, "dict": 0.95, "short list": 1.0, "hits": 0.1}
PYTHON
