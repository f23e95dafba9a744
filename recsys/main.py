"""Train a recommender with a gravity score and judge it beside simple baselines.

    python recsys/main.py                                            the embedded demo data, about a minute
    python recsys/main.py --dataset lastfm --model lgn --loss_mode bpr --lr 5e-3 --epochs 40
    python recsys/main.py --dataset ml1m --model mf --loss_mode mix_bpr --lamb 3.0825 --mix_ratio 0.2
    torchrun --nproc-per-node 2 recsys/main.py --dataset gowalla --model lgn      every batch shared by two processes

A batch is users, one positive and W negatives each. The loss terms are in ``recsys/model.py``; a batch makes one
optimizer step (two with ``--mirror two_step``). Validation selects the epoch; test is read once, at the end, with
the selected weights (``--refit``: with a model trained anew on train and validation).

Source: Byun, Lim, Song, GFML, Engineering Applications of Artificial Intelligence 139, 109463, 2025.
"""

import sys

from gfml.program.cli import run_main
from gfml.program.program import Program
from recsys.settings import DEMO_DEFAULTS, RecsysSettings

PROGRAM = Program(
    "recsys/main.py",
    "recsys",
    RecsysSettings,
    "recsys.experiment:Recsys",
    "Train and judge a recommender with a gravity score. Without flags: the embedded demo data, with "
    f"{', '.join(f'--{name} {value:g}' for name, value in DEMO_DEFAULTS.items())}.",
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(run_main(main))
