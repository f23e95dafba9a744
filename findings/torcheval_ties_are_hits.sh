#!/usr/bin/env bash
# torcheval 0.0.7: a model that scores all candidates alike has a hit rate and a reciprocal rank of 1.
#
# Behaviour: the rank of the target is the number of candidates that score strictly higher. Equal scores are all first, so a
# collapsed model, whose scores are one constant, is perfect: hit_rate at 1 and reciprocal_rank are 1.0 for every row.
# retrieval_precision of the same package cuts a list of k and gives what its order of equal scores happens to give.
# Good guess: ties are broken by position or at random, or the mean over orders is taken: about 1/100 among 100 candidates.
# Who is hurt: sampled evaluation of metric learning, where collapse is the usual failure, and scores that saturate or are
# rounded to 16 bits; early stopping picks the collapsed epoch.
# Output seen: constant scores 1.0 and 1.0; a model that puts every target last 0.0 and 0.01.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check torcheval==0.0.7 torch==2.15.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torcheval.metrics.functional import hit_rate, reciprocal_rank

targets = torch.arange(100)
wrong = torch.arange(100.0).repeat(100, 1) - 200 * torch.eye(100)
found = {}
for name, scores in (("constant", torch.zeros(100, 100)), ("wrong", wrong)):
    found[name] = [round(float(judge.mean()), 4) for judge in (hit_rate(scores, targets, k=1), reciprocal_rank(scores, targets))]
print(found)
assert found == {"constant": [1.0, 1.0], "wrong": [0.0, 0.01]}
PYTHON
