"""Train and judge image retrieval with the contextual similarity loss or a baseline: the 256 x 256 pipeline.

    python contextual/main.py                                                            embedded digits, a minute
    python contextual/main.py --dataset CUB --loss hybrid --lr 8e-05 --root <data_dir>/CUB_200_2011
    torchrun --nproc-per-node 2 contextual/main.py --dataset SOP --lr 4e-05 --root DIR   the batch is shared out

A batch is --batch-size pictures, --IPC of each of its classes; with several processes each encodes its part and all see
the loss of the whole. One optimizer step a batch. The hybrid loss is lam contextual + (1 - lam - gamma) contrastive +
gamma regulariser; every other loss goes by its name. Some training classes are held out: retrieval among them selects
the epoch, and the test classes are read once, at the end (``--select-on test``: the original's protocol).

Source: Liao, Tsiligkaridis, Kulis, Supervised Metric Learning to Rank for Retrieval via Contextual Similarity
Optimization, ICML 2023. Published with this pipeline (ResNet-50, ImageNet weights, selected on test), R@1: CUB 69.0,
Cars 89.6, SOP 83.3, iNat 46.2, In-Shop 90.7.
"""

import sys

from contextual.settings import ContextualSettings
from gfml.program.cli import run_main
from gfml.program.program import Program

PROGRAM = Program(
    "contextual/main.py",
    "contextual-256",
    ContextualSettings,
    "contextual.experiment:Retrieve",
    "Train and judge image retrieval, the 256 x 256 pipeline. Without flags: embedded digits.",
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(run_main(main))
