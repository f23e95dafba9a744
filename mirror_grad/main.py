"""Train a multimodal recommender with mirror gradient and judge it.

    python mirror_grad/main.py                                     SELFCFED_LGN on baby, mirror gradient on
    python mirror_grad/main.py --model LayerGCN --dataset sports
    python mirror_grad/main.py --model FREEDOM --dataset ml-1m --not_mg
    python mirror_grad/main.py --model BPR --grid published        every run of the published search, then the best
    python mirror_grad/main.py --resume runs/NAME                  continue a run exactly where it stopped
    python mirror_grad/main.py --resume runs/NAME/best.pt          judge stored weights, train nothing

A batch is ``--batch-size`` train pairs with one negative each and makes one optimizer step; every ``--mirror-every``-th
batch makes two, the second with the inverted, smaller gradient of the same batch at the new point (``--mirror``).
Validation selects the epoch (``--select-metric``); test is read once, at the end, with the selected weights.

Sources: Zhong et al., Mirror Gradient: Towards Robust Multimodal Recommender Systems via Exploring Flat Local Minima,
WWW 2024; Zhou, MMRec, 2023 (protocol); the models' papers are named in ``mirror_grad/models``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gfml.program.cli import resolve_device, run_main, set_threads
from gfml.program.program import Program
from mirror_grad.settings import PROGRAM_FILE, MirrorGradSettings

PROGRAM = Program(
    PROGRAM_FILE,
    "mirror",
    MirrorGradSettings,
    "mirror_grad.experiment:MirrorGrad",
    "Train and judge a multimodal recommender with mirror gradient (on unless --not_mg). Hyper-parameters shown are those "
    "of --model.",
)


def main(argv: Sequence[str] | None = None) -> int:
    settings = PROGRAM.parse(argv)
    if settings.weights is None:
        return PROGRAM.run(settings)
    from gfml.engine.distributed import World
    from mirror_grad.experiment import judge_weights

    set_threads(settings)
    print(judge_weights(settings, World(0, 1, resolve_device(settings))))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
