"""Train Collaborative Metric Learning and judge it beside simple baselines.

    python cml_baseline/main.py                                     MovieLens-1M where its files are found, else a demo
    python cml_baseline/main.py --dataset ml1m --margin 1 --epochs 20        test recall@50 .40, recall@100 .54, a minute
    python cml_baseline/main.py --dataset ml1m --features features.npz --hide-items 0.1    films nobody has seen yet

A batch is N train pairs, each with U negatives; an epoch meets every pair once. The loss is the rank-weighted hinge of
the nearest negative, plus the covariance and feature penalties that are asked for (``gfml/cml.py``); a batch makes one
optimizer step (two with ``--mirror two_step``), after which every point is pulled back into the ball. Validation
selects the epoch; test is read once, at the end, with the selected weights.

Source: Hsieh, Yang, Cui, Lin, Belongie, Estrin, Collaborative Metric Learning, WWW 2017.
"""

import sys

from cml_baseline.settings import CMLSettings
from gfml.program.cli import run_main
from gfml.program.program import Program

PROGRAM = Program(
    "cml_baseline/main.py",
    "cml_baseline",
    CMLSettings,
    "cml_baseline.experiment:CML",
    "Train and judge Collaborative Metric Learning. Without flags: MovieLens-1M where its files are found, else the "
    "embedded demo data.",
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(run_main(main))
