#!/usr/bin/env bash
# torchmetrics 1.9.0: the same ranking has precision, recall, MAP and MRR of 0 once all scores are negative.
#
# Behaviour: RetrievalPrecision, RetrievalRecall, RetrievalMAP and RetrievalMRR take an item with a score of 0 or less for
# not retrieved. RetrievalHitRate and RetrievalNormalizedDCG do not: of one call per metric on the same tensors two are right.
# Good guess: retrieval metrics see the order of the scores alone, so that subtracting 5 from all of them changes nothing.
# Who is hurt: models that rank by logits, log-probabilities or minus a distance; nothing is raised, and the NDCG beside it
# looks right.
# Output seen: scores 4, 3, 2, 1 give .5, .5, 1, 1, 1, .6131; -1, -2, -3, -4 give 0, 0, 0, 0, 1, .6131.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check torchmetrics==1.9.0 torch==2.15.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
import torchmetrics.retrieval as metrics

NAMES = ("Precision", "Recall", "MAP", "MRR", "HitRate", "NormalizedDCG")
query, target, scores = torch.zeros(4, dtype=torch.long), torch.tensor([1, 0, 1, 0]), torch.tensor([4.0, 3, 2, 1])
found = []
for shift in (0, 5):
    made = (getattr(metrics, f"Retrieval{name}")(top_k=2) for name in NAMES)
    found.append([round(float(metric(scores - shift, target, indexes=query)), 4) for metric in made])
print(*found, sep="\n")
assert found == [[0.5, 0.5, 1.0, 1.0, 1.0, 0.6131], [0.0, 0.0, 0.0, 0.0, 1.0, 0.6131]]
PYTHON
