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

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gfml.base.toml import LOCATION_FLAGS
from gfml.program.cli import Options, resolve_device, run_main, set_threads
from recsys.options import NOT_IDENTITY, parse

if TYPE_CHECKING:
    from gfml.data.interactions import Interactions
    from gfml.engine.distributed import World
    from gfml.engine.runs import Run


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(list(sys.argv[1:] if argv is None else argv))

    # Heavy imports wait until the flags are known to be good.
    from gfml.data.options import load_from_args
    from gfml.engine import distributed
    from gfml.program.steps import check_judgeable, cut_offs

    set_threads(options)
    with distributed.session(resolve_device(options)) as world:
        data = load_from_args(options)
        check_judgeable(data, cut_offs(options.topks, options.es_metric), options.es_on)
        label = f"{data.name}-{options.model}-{options.loss_mode}"
        exclude = LOCATION_FLAGS | NOT_IDENTITY
        with distributed.open_run(
            options.out,
            "recsys",
            options.resolved,
            label=label,
            exclude=exclude,
            name=options.run_name,
            resume=options.resume,
            overwrite=options.overwrite,
            read_only=options.eval_only,
        ) as run:
            train_and_judge(options, data, run, world)
    return 0


def train_and_judge(options: Options, data: Interactions, run: Run, world: World) -> None:
    """One run, from its settings to its printed result; several processes share each batch, the first one reports."""
    from gfml.engine.runs import seed_everything
    from gfml.engine.tracking import Tracker
    from gfml.engine.train import fit
    from gfml.program.steps import require_earlier_run
    from recsys import experiment
    from recsys.results import judge, print_result, store

    if run.is_done and not options.eval_only:
        if world.is_main:
            print(f"{run.path} is done; this is its result (--overwrite trains anew)")
            print_result(run.result, run.path)
        return
    require_earlier_run(options.load, run)
    run.check_data(data.fingerprint)

    seed_everything(options.seed)
    if options.eval_only:
        model, data = experiment.load_reported(options, data, world.device, run.path, done=run.is_done)
        print_result(judge(options, data, model, None, run), run.path)
        return
    model = experiment.build_model(options, data, world.device)
    if world.is_main:
        print(experiment.describe(options, data, model, world.device, run), file=sys.stderr)

    with Tracker(run.file("tensorboard") if options.tensorboard and world.is_main else None) as tracker:
        optimizer, scheduler, step, ema = experiment.build_training(options, model)
        sampler = experiment.build_sampler(options, data, world.device)
        fitted = fit(
            model,
            optimizer,
            batches=sampler.epoch,
            loss_fn=experiment.loss_of(options, model, world),
            step=step,
            scheduler=scheduler,
            ema=ema,
            evaluate=lambda split: experiment.metrics(options, data, model, split),
            select=f"{options.es_on}/{options.es_metric}",
            run=run,
            epochs=options.epochs,
            eval_every=options.eval_every,
            patience=options.patience if options.ES else None,
            checkpoint_every=options.checkpoint_every,
            amp=options.amp,
            compile_loss=options.compile,
            cuda_graph=options.cuda_graph,
            progress=options.progress if world.is_main else False,
            tracker=tracker,
        )
        if options.refit:
            model, data = experiment.refit(options, data, world, fitted, run)
        if world.is_main:
            result = judge(options, data, model, fitted, run)
            store(options, data, model, result, run, tracker)
            print_result(result, run.path)


if __name__ == "__main__":
    sys.exit(run_main(main))
