"""Train a recommender with a gravity score and judge it beside simple baselines.

    python recsys/main.py                                            the embedded demo data, about a minute
    python recsys/main.py --dataset lastfm --model lgn --loss_mode bpr --lr 5e-3 --epochs 40
    python recsys/main.py --dataset ml1m --model mf --loss_mode mix_bpr --lamb 3.0825 --mix_ratio 0.2

A batch is users, one positive and W negatives each. The loss terms are in ``recsys/model.py``; a batch makes one
optimizer step (two with ``--mirror two_step``). Validation selects the epoch; test is read once, at the end, with
the selected weights (``--refit``: with a model trained anew on train and validation).

Source: Byun, Lim, Song, GFML, Engineering Applications of Artificial Intelligence 139, 109463, 2025.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recsys.options import NOT_IDENTITY, parse

from gfml.cli import LOCATION_FLAGS, resolve_device, run_main, set_threads


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(list(sys.argv[1:] if argv is None else argv))

    # Heavy imports wait until the flags are known to be good.
    from recsys import experiment
    from recsys.results import judge, print_result, store

    from gfml.data.options import load_from_args
    from gfml.program import check_judgeable, cut_offs, require_earlier_run
    from gfml.runs import Run, seed_everything
    from gfml.tracking import Tracker
    from gfml.train import fit

    device = resolve_device(options)
    set_threads(options)
    data = load_from_args(options)
    check_judgeable(data, cut_offs(options.topks, options.es_metric), options.es_on)
    selection = f"{options.es_on}/{options.es_metric}"

    label = f"{data.name}-{options.model}-{options.loss_mode}"
    exclude = LOCATION_FLAGS | NOT_IDENTITY
    with Run.open(
        options.out, "recsys", options.resolved, label=label, exclude=exclude, name=options.run_name,
        resume=options.resume, overwrite=options.overwrite, read_only=options.eval_only,
    ) as run:
        if run.is_done and not options.eval_only:
            print(f"{run.path} is done; this is its result (--overwrite trains anew)")
            print_result(run.result, run.path)
            return 0
        require_earlier_run(options.load, run)
        run.check_data(data.fingerprint)

        seed_everything(options.seed)
        if options.eval_only:
            model, data = experiment.load_reported(options, data, device, run.path, done=run.is_done)
            print_result(judge(options, data, model, None, run), run.path)
            return 0
        model = experiment.build_model(options, data, device)
        print(experiment.describe(options, data, model, device, run), file=sys.stderr)

        with Tracker(run.file("tensorboard") if options.tensorboard else None) as tracker:
            optimizer, scheduler, step, ema = experiment.build_training(options, model)
            sampler = experiment.build_sampler(options, data, device)
            fitted = fit(
                model, optimizer, batches=sampler.epoch, loss_fn=model.loss, step=step, scheduler=scheduler, ema=ema,
                evaluate=lambda split: experiment.metrics(options, data, model, split), select=selection, run=run,
                epochs=options.epochs, eval_every=options.eval_every,
                patience=options.patience if options.ES else None, checkpoint_every=options.checkpoint_every,
                amp=options.amp, compile_loss=options.compile, progress=options.progress, tracker=tracker,
            )
            if options.refit:
                model, data = experiment.refit(options, data, device, fitted, run)
            result = judge(options, data, model, fitted, run)
            store(options, data, model, result, run, tracker)
        print_result(result, run.path)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
