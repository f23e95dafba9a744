"""Train vision transformers, with plain and with gravity attention, on balanced or long-tailed images, and judge them.

    python vision/main.py                                            the embedded digits, vit beside vit_gra, a minute
    python vision/main.py --dataset cimb10 --model-name vit vit_gra  long-tailed CIFAR-10, see --data-root, --download
    python vision/main.py --model-name vit_gra --max-epochs 200 --batch-size 128 --weight-decay 5e-5 --lr 1e-3 --min-lr 1e-5 \
        --warmup-epoch 5 --dropout 0.0 --head 12 --num-layers 7 --hidden 384 --mlp-hidden 384 --autoaugment --label-smoothing \
        --lamb_gra 3.0 --lamb_mix 0.5 --mix_on 1 --mix_mode split --dist_mode l2 --mass_pos tail --num_split 6 --split_mix 1 \
        --dataset cimb10 --num-classes 10 --project-name 221104-cimb10
    torchrun --nproc-per-node 8 vision/main.py ...                   several processes, one batch between them

A batch is ``--batch-size`` augmented images and makes one optimizer step (two with ``--mirror two_step``) on one loss,
``--long-tail``. Each model has a run of its own. The headline is the test accuracy after the last epoch; test is read
once. ``--val_fraction`` sets a part of each train class aside and reports the epoch with the best mean class accuracy
on it too.

Source: Byun, Lim, Song, GFML, Engineering Applications of Artificial Intelligence 139, 109463, 2025, whose vision part
changes the public ViT-CIFAR.
"""

import sys

from gfml.program.cli import run_main
from gfml.program.program import Program
from vision.settings import VisionSettings

PROGRAM = Program(
    "vision/main.py",
    "vision",
    VisionSettings,
    "vision.experiment:Vision",
    "Train vision transformers with and without gravity attention on balanced and long-tailed images. Without flags: "
    "the embedded digits, vit and vit_gra side by side.",
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(run_main(main))
