"""Train a recommender with hierarchical latent relations (HLR, HLR++) and judge it.

    python hlrm/train.py                                                         the embedded demo data
    python hlrm/train.py --config configs/hlrm/ml100k.toml                       MovieLens-100K, cut as in the paper
    python hlrm/train.py --train_batch_size 5000 --num_inter 50 --hlrm_type plus --lr 2e-4 --save_dir hlrm_plus.pt

A batch is users, one positive and one negative each, and up to P history items of every user; it makes one optimizer
step (two with ``--mirror two_step``) on a hinge over distances, then a projection into the ball. Validation selects the
epoch, by its loss as published or by a ranking metric; test is read once, at the end, with the selected weights. They
are written to the run directory and to ``--save_dir``, which ``hlrm/eval.py`` reads.

Source: Tran, Salha-Galvan, Hennequin, Moussallam, Hierarchical Latent Relation Modeling for Collaborative Metric
Learning, RecSys 2021.
"""

import sys

from gfml.program.cli import run_main
from gfml.program.program import Program
from hlrm.settings import HLRMSettings

PROGRAM = Program(
    "hlrm/train.py",
    "hlrm",
    HLRMSettings,
    "hlrm.experiment:HLRM",
    "Train and judge a recommender with latent relations. Without flags: the embedded demo data.",
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(run_main(main))
