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

from __future__ import annotations

import sys
from collections.abc import Sequence

from contextual.options import NOT_IDENTITY, parse
from gfml.base.toml import LOCATION_FLAGS
from gfml.program.cli import resolve_device, run_main, set_threads


def main(argv: Sequence[str] | None = None, pipeline: str = "256") -> int:
    options = parse(pipeline, None if argv is None else list(argv))

    # Heavy imports wait until the flags are known to be good.
    from contextual import experiment
    from contextual.results import draw, judge, print_result, store
    from gfml.engine import distributed
    from gfml.engine.runs import seed_everything
    from gfml.engine.tracking import Tracker
    from gfml.engine.train import fit

    set_threads(options)
    with distributed.session(resolve_device(options)) as world:
        data = experiment.load_data(options)
        with distributed.open_run(
            options.out,
            f"contextual-{pipeline}",
            options.resolved,
            label=f"{data.name}-{options.loss}",
            exclude=LOCATION_FLAGS | NOT_IDENTITY,
            name=options.run_name,
            resume=options.resume,
            overwrite=options.overwrite,
            read_only=options.eval_only,
        ) as run:
            if run.is_done and not options.eval_only:
                say(f"{run.path} is done; this is its result (--overwrite trains anew)")
                print_result(run.result, run.path)
                return 0
            run.check_data(data.fingerprint)

            seed_everything(options.seed)
            if options.eval_only:
                model, data = experiment.load_reported(options, data, world, run)
                result, shown = judge(options, data, model, world, None, run)
                draw(options, data, result, shown, run)
                print_result(result, run.path)
                return 0
            model = experiment.build_model(options, data.num_classes, world.device)
            model.share(sync_batchnorm=experiment.syncs_batchnorm(options, world))
            batches = experiment.build_batches(options, data, world)
            say(experiment.describe(options, data, model, batches, world, run), sys.stderr)

            with Tracker(run.file("tensorboard") if options.tensorboard and world.is_main else None) as tracker:
                optimizer, scheduler, step = experiment.build_training(options, model)
                fitted = fit(
                    model,
                    optimizer,
                    batches=batches,
                    loss_fn=model.loss,
                    step=step,
                    scheduler=scheduler,
                    evaluate=experiment.Judge(options, data, model, world).metrics,
                    select=f"{options.select_on}/{options.select_metric}",
                    run=run,
                    epochs=options.epochs,
                    eval_every=options.eval_every,
                    patience=options.patience,
                    checkpoint_every=options.checkpoint_every,
                    amp=experiment.use_amp(options, world.device),
                    progress=options.progress if world.is_main else False,
                    tracker=tracker,
                )
                if options.refit:
                    model, data = experiment.refit(options, data, world, fitted, run)
                result, shown = judge(options, data, model, world, fitted, run)
                if world.is_main:
                    store(options, data, model, result, shown, run, tracker)
            print_result(result, run.path)
    return 0


def say(text: str, stream: object = None) -> None:
    """Print in the first process alone."""
    from gfml.engine.distributed import is_main

    if is_main():
        print(text, file=stream or sys.stdout)


if __name__ == "__main__":
    sys.exit(run_main(main))
