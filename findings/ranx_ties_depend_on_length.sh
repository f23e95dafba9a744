#!/usr/bin/env bash
# ranx 0.3.21: where tied documents land depends on how many documents the run has.
#
# Behaviour: all documents have the same score and the relevant one was given first. With 3 documents it stays first
# (MRR 1.0); with 20 it lands at rank 19, with 50 at rank 26: ties are neither kept in the given order nor ordered by id.
# Good guess: equal scores keep the order in which they were given, or go by document id; either way the rank of the first
# document does not depend on what is tied behind it.
# Who is hurt: runs with tied scores; cutting the same run at another depth changes MRR of its head.
# Output seen: 1.0, 0.0526, 0.0385.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check ranx==0.3.21
"$folder/env/bin/python" - <<'PYTHON'
from ranx import Qrels, Run, evaluate

found = {}
for count in (3, 20, 50):
    run = Run({"u": {f"d{number:02d}": 1.0 for number in range(count)}})
    found[count] = float(evaluate(Qrels({"u": {"d00": 1}}), run, "mrr"))
print(found)
assert found[3] == 1.0 and found[20] < 0.1 and found[50] < 0.1
PYTHON
