#!/usr/bin/env bash
# ir-measures 0.4.3: two measures of one call order tied documents in opposite ways.
#
# Behaviour: RR without a cut-off (and nDCG@K, P@K, AP, ...) is computed by pytrec_eval, which puts the tied document with the
# LATER id first; RR@10 is computed by another provider, which puts the EARLIER id first. So RR and RR@10 differ although the
# list has two documents and the first hit is at rank 1 or 2.
# Good guess: with fewer than 10 documents RR and RR@10 are the same number.
# Who is hurt: whoever reports nDCG@10 beside RR@10 of a model with tied scores (quantised, sigmoid-saturated, popularity):
# the two columns judge different lists.
# Output seen: RR 1.0, P@1 1.0, nDCG@10 1.0, RR@10 0.5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check ir-measures==0.4.3
"$folder/env/bin/python" - <<'PYTHON'
import ir_measures
from ir_measures import P, RR, nDCG

qrels = [ir_measures.Qrel("u", "b", 1)]
run = [ir_measures.ScoredDoc("u", "a", 1.0), ir_measures.ScoredDoc("u", "b", 1.0)]
found = ir_measures.calc_aggregate([RR, RR @ 10, P @ 1, nDCG @ 10], qrels, run)
print({str(name): value for name, value in found.items()})
assert found[RR] == 1.0 and found[P @ 1] == 1.0 and found[nDCG @ 10] == 1.0 and found[RR @ 10] == 0.5
PYTHON
