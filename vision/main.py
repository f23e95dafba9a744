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

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfml.base.toml import LOCATION_FLAGS
from gfml.program.cli import Options, resolve_device, run_main, set_threads
from vision.options import NOT_IDENTITY, for_model, parse

if TYPE_CHECKING:
    from gfml.engine.distributed import World
    from vision.data import VisionData


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(None if argv is None else list(argv))

    # Heavy imports wait until the flags are known to be good.
    import torch

    from gfml.engine import distributed
    from vision.data import load
    from vision.report import write_report
    from vision.results import label_of, print_results

    device = resolve_device(options)
    set_threads(options)
    torch.backends.cudnn.benchmark = not options.off_benchmark
    with distributed.session(device) as world:
        with distributed.main_first():
            data = load(options)
        found = []
        for name in options.model_name:
            own = for_model(options, name)
            found.append((label_of(own), *run_one(own, data, world)))
        if world.is_main:
            print_results(found)
            if options.report and not options.eval_only:
                print(f"report: {write_report([path for _, _, path in found], data)}")
    return 0


def run_one(options: Options, data: VisionData, world: World) -> tuple[Mapping[str, Any], Path]:
    """Train and judge one model, or show what its finished run found: (result, run directory)."""
    from gfml.engine.distributed import open_run
    from gfml.engine.runs import seed_everything
    from gfml.engine.tracking import Tracker
    from gfml.engine.train import fit
    from vision import experiment
    from vision.experiment import Training
    from vision.results import judge, store

    with open_run(
        options.out, "vision", options.resolved, label=f"{options.project_name}-{data.source.name}-{options.model_name}",
        exclude=LOCATION_FLAGS | NOT_IDENTITY, name=options.run_name, resume=options.resume, overwrite=options.overwrite,
        read_only=options.eval_only,
    ) as run:  # fmt: skip
        if run.is_done and not options.eval_only:
            if world.is_main:
                print(f"{run.path} is done; this is its result (--overwrite trains anew)", file=sys.stderr)
            return run.result, run.path
        run.check_data(data.fingerprint)

        seed_everything(options.seed)
        if options.eval_only:
            model = experiment.load_reported(options, data, world.device, run.path, done=run.is_done)
            return judge(options, data, model, None, None, run, world)[0], run.path
        model = experiment.build_model(options, data, world.device)
        training = Training(options, data, model, world)
        if world.is_main:
            print(experiment.describe(options, data, model, training, run), file=sys.stderr)

        with Tracker(run.file("tensorboard") if options.tensorboard and world.is_main else None) as tracker:
            valid = data.source.valid
            fitted = fit(
                model, training.optimizer, batches=training.batches, loss_fn=training.loss, step=training.step, ema=training.ema,
                evaluate=None if valid is None else lambda _: experiment.metrics(
                    options, data, experiment.predict(options, data, model, valid, world), valid
                ),
                select=None if valid is None else "val/balanced_accuracy", run=run, epochs=1 if options.dry_run else options.epochs,
                checkpoint_every=options.checkpoint_every, amp=training.amp, progress=options.progress if world.is_main else False,
                tracker=tracker,
            )  # fmt: skip
            result, logits = judge(options, data, model, training, fitted, run, world)
            store(data, model, training, result, logits, run, tracker)
    return result, run.path


if __name__ == "__main__":
    sys.exit(run_main(main))
