#!/usr/bin/env bash
# RecTools 0.19.0: NDCG(k) divides by the DCG of k hits for everybody, however few test items a user has.
#
# Behaviour: a user whose only test item is recommended first has NDCG@10 = 0.22. No list can reach 1 unless all users have k
# test items or more; divide_by_achievable=True is the usual definition.
# Good guess: a perfect list has NDCG 1.
# Who is hurt: comparisons with other libraries; with leave-one-out splits the number is at most 1 / 4.54 at k = 10.
# Output seen: 0.2200917662980802, and 1.0 with divide_by_achievable=True.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check rectools==0.19.0
"$folder/env/bin/python" - <<'PYTHON'
import pandas as pd
from rectools.metrics import NDCG

lists = pd.DataFrame({"user_id": [1] * 10, "item_id": range(10), "rank": range(1, 11)})
truth = pd.DataFrame({"user_id": [1], "item_id": [0]})
usual = NDCG(10, divide_by_achievable=True).calc(lists, truth)
found = NDCG(10).calc(lists, truth)
print(found, usual)
assert abs(found - 0.2200917662980802) < 1e-12 and usual == 1.0
PYTHON
