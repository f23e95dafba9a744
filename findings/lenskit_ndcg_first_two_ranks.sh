#!/usr/bin/env bash
# LensKit 2025.8.1: NDCG is the same whether the one relevant item stands first or second.
#
# Behaviour: the default discount is log2(max(rank, 2)), so that ranks 1 and 2 both weigh 1 and rank 3 weighs what rank 2 has
# elsewhere. A list whose only relevant item is second has NDCG 1.0, a perfect list; with it third NDCG is 0.6309.
# LogRankWeight(offset=1) is the usual discount log2(rank + 1).
# Good guess: log2(rank + 1) as in other packages, 1.0, 0.6309 and 0.5; only a list with the relevant item first is perfect.
# Who is hurt: everybody who compares LensKit's NDCG with a figure from elsewhere (0.8035 against 0.8117 on one example),
# and who reads 1.0 as a perfect ranking.
# Output seen: 1.0, 1.0, 0.6309 by default; 1.0, 0.6309, 0.5 with offset=1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check lenskit==2025.8.1
"$folder/env/bin/python" - <<'PYTHON'
from lenskit.data import ItemList
from lenskit.metrics import NDCG
from lenskit.metrics.ranking import LogRankWeight

truth, found = ItemList(item_ids=["a"]), {}
for name, metric in (("default", NDCG(n=3)), ("offset=1", NDCG(n=3, weight=LogRankWeight(offset=1)))):
    lists = ("abc", "bac", "bca")
    found[name] = [round(float(metric.measure_list(ItemList(item_ids=list(ids), ordered=True), truth)), 4) for ids in lists]
print(found)
assert found == {"default": [1.0, 1.0, 0.6309], "offset=1": [1.0, 0.6309, 0.5]}
PYTHON
