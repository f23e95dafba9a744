"""Train and judge image retrieval with the contextual similarity loss or a baseline: the 224 x 224 pipeline.

    python contextual/train.py                                                          embedded digits, a minute
    python contextual/train.py --config configs/contextual/224-cub-hybrid.toml --data_root <data_dir>/CUB_200_2011

The same trainer as ``contextual/main.py`` with this pipeline's network (GeM pooling, frozen batch norm, a bottleneck
behind the embedding that only training sees), optimizer (AdamW, falling every --lr-decay-step epochs), crops and batches.
--lam weighs the CONTRASTIVE term here: (1 - lam) contextual + lam contrastive + gamma regulariser, and every other loss
takes + gamma regulariser too.

Source: as ``contextual/main.py``; this pipeline follows Kim et al., Proxy Anchor Loss, CVPR 2020.
"""

import sys

from contextual.settings import SmallSettings
from gfml.program.cli import run_main
from gfml.program.program import Program

PROGRAM = Program(
    "contextual/train.py",
    "contextual-224",
    SmallSettings,
    "contextual.experiment:Retrieve",
    "Train and judge image retrieval, the 224 x 224 pipeline. Without flags: embedded digits.",
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(run_main(main))
