#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0: AccuracyCalculator compares labels in single precision.
#
# Behaviour: queries, references and both kinds of labels are turned into float32. Integer labels above 2^24 that lie near each
# other are one label: 64 products numbered from 2,000,000,000 on are a single class, and random embeddings have a precision_at_1
# and a MAP@R of 1.0. The same labels less 2,000,000,000 give the right numbers. The losses and miners of the package compare
# the integers, so that training sees 64 classes.
# Good guess: integer labels are compared as integers, here as in the losses; only which are equal matters.
# Who is hurt: retrieval with article numbers, hashes, or category * 10^6 + instance as labels: scores that are too good by
# as much as numbers are close, and "precision" of an untrained network.
# Output seen: precision_at_1 1.0 and MAP@R 1.0 with large labels; 0.0 and 0.0 for the same pictures with small ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check pytorch-metric-learning==2.9.0 torch==2.15.0 faiss-cpu==1.15.1 numpy==2.4.6
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

# Two pictures of each of 64 products. A picture's neighbours show other products, so that no honest hit is among its best.
places = torch.arange(64) * 2 * torch.pi / 64
circle = torch.stack([places.cos(), places.sin()], 1)
pictures, small = torch.cat([circle, -circle]), torch.arange(64).repeat(2)
calculator = AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count")
found, loss = {}, ContrastiveLoss()
for name, labels in (("large", small + 2_000_000_000), ("small", small)):
    found[name] = calculator.get_accuracy(pictures, labels)
    print(name, found[name], "loss", float(loss(pictures, labels)))
assert set(found["large"].values()) == {1.0} and set(found["small"].values()) == {0.0}
assert loss(pictures, small + 2_000_000_000) == loss(pictures, small)
PYTHON
