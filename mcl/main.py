"""Train a recommender with the mixed-centric loss (MCL), a gravity loss, or a mixture, and judge it.

    python mcl/main.py                                                   the embedded demo data, under a minute
    python mcl/main.py --config configs/mcl/amazon-music.toml            MCL as published: test recall@20 about .30
    python mcl/main.py --gfml --dataset $DATA --gpu_id $GPU --lr $LR --lambd $LAM --lamb_p $lamP --lamb_n $lamN

A batch is ``--batch-size`` users, all their positives and W negatives for each; it makes one optimizer step (two with
``--mirror two_step``). The terms are in ``mcl/losses.py``: two log-sum-exps over the hard pairs of all users (modes mcl
and mix), a pull and a push of gravity scores (modes gfml and mix), and an L2 on the free tables. Validation selects the
epoch; test is read once, at the end, with the selected weights (``--select-on test``: the original's protocol).

Sources: Gao et al., MCL: Mixed-Centric Loss for Collaborative Filtering, WWW 2022; Byun, Lim, Song, GFML, Engineering
Applications of Artificial Intelligence 139, 109463, 2025.
"""

import sys

from gfml.program.cli import run_main
from gfml.program.program import Program
from mcl.settings import MCLSettings

PROGRAM = Program(
    "mcl/main.py",
    "mcl",
    MCLSettings,
    "mcl.experiment:MCL",
    "Train and judge a recommender with the mixed-centric loss, a gravity loss, or both. Without flags: the embedded "
    "demo data.",
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(run_main(main))
