#!/usr/bin/env bash
# pytrec-eval-terrier 0.5.11: scores given as Python floats are compared in single precision.
#
# Behaviour: two documents whose scores differ only beyond about seven digits are tied, and ties go to the later document id,
# so the document with the HIGHER score may come second. Scores such as timestamps, large logits or close probabilities
# (0.999999999 against 0.999999998) are ranked by id.
# Good guess: the run is a dict of Python floats, so the higher double ranks first.
# Who is hurt: ranking by recency (seconds since 1970), or by saturated probabilities.
# Output seen: recip_rank 0.5 for all three pairs, 1.0 once the scores are replaced by their ranks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check pytrec-eval-terrier==0.5.11
"$folder/env/bin/python" - <<'PYTHON'
import pytrec_eval

judge = pytrec_eval.RelevanceEvaluator({"u": {"a": 1}}, {"recip_rank"})
pairs = [(1700000001.0, 1700000000.0), (0.999999999, 0.999999998), (16777217.0, 16777216.0)]
for first, second in pairs:
    assert first > second
    value = judge.evaluate({"u": {"a": first, "b": second}})["u"]["recip_rank"]
    print(f"a {first!r}, b {second!r}: recip_rank {value}")
    assert value == 0.5
assert judge.evaluate({"u": {"a": 2.0, "b": 1.0}})["u"]["recip_rank"] == 1.0
PYTHON
