#!/usr/bin/env bash
# recommenders 1.2.1: recall, precision and MAP are means over users who got recommendations, nDCG over all test users.
#
# Behaviour: three users with one test item each; the model serves the first one alone, with his item on top. recall_at_k, map
# and map_at_k are 1.0: the other two are left out without a word. ndcg_at_k of the same two tables is 1/3.
# Good guess: one call of an evaluation averages over one set of users, those of the test table; who gets nothing counts as 0.
# Who is hurt: models that cannot score some users (neighbourhoods, cold users, a failed batch): the fewer they serve the better
# they look by recall and MAP, and an ndcg below the recall is put down to the order of the lists.
# Output seen: precision@2 0.5, recall@2 1.0, map 1.0, map@2 1.0, ndcg@2 0.3333.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip=("$folder/env/bin/pip" install -q --disable-pip-version-check)
"${pip[@]}" numpy==2.4.6 pandas==3.1.1 scikit-learn==1.9.1
"${pip[@]}" --no-deps recommenders==1.2.1
"$folder/env/bin/python" - <<'PYTHON'
import pandas as pd
from recommenders.evaluation.python_evaluation import map, map_at_k, ndcg_at_k, precision_at_k, recall_at_k

test = pd.DataFrame({"userID": [1, 2, 3], "itemID": [10, 20, 30], "rating": 1.0})
lists = pd.DataFrame({"userID": [1, 1], "itemID": [10, 11], "prediction": [2.0, 1.0]})
found = {judge.__name__: round(judge(test, lists, k=2), 4) for judge in (precision_at_k, recall_at_k, map, map_at_k, ndcg_at_k)}
print(found)
assert found == {"precision_at_k": 0.5, "recall_at_k": 1.0, "map": 1.0, "map_at_k": 1.0, "ndcg_at_k": 0.3333}
PYTHON
