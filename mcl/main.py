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

from __future__ import annotations

import sys
from collections.abc import Sequence

from gfml.base.toml import LOCATION_FLAGS
from gfml.program.cli import resolve_device, run_main, set_threads
from mcl.options import NOT_IDENTITY, parse


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(None if argv is None else list(argv))

    # Heavy imports wait until the flags are known to be good.
    from gfml.data.options import load_from_args
    from gfml.engine.runs import Run, seed_everything
    from gfml.engine.tracking import Tracker
    from gfml.engine.train import fit
    from gfml.program.steps import check_judgeable, cut_offs, require_earlier_run
    from mcl import experiment
    from mcl.results import judge, print_result, store

    device = resolve_device(options)
    set_threads(options)
    data = load_from_args(options)
    check_judgeable(data, cut_offs(options.topks, options.select_metric), options.select_on)

    with Run.open(
        options.out,
        "mcl",
        options.resolved,
        label=f"{data.name}-{options.encoder}-{options.mode}",
        exclude=LOCATION_FLAGS | NOT_IDENTITY,
        name=options.run_name,
        resume=options.resume,
        overwrite=options.overwrite,
        read_only=options.eval_only,
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
            print_result(judge(options, data, model, None, run)[0], run.path)
            return 0
        model = experiment.build_model(options, data, device)
        sampler = experiment.build_sampler(options, data, device)
        print(experiment.describe(options, data, model, sampler, run), file=sys.stderr)

        with Tracker(run.file("tensorboard") if options.tensorboard else None) as tracker:
            optimizer, step, ema = experiment.build_training(options, model)
            fitted = fit(
                model,
                optimizer,
                batches=sampler.epoch,
                loss_fn=model.loss,
                step=step,
                ema=ema,
                evaluate=lambda split: experiment.metrics(options, data, model, split),
                select=f"{options.select_on}/{options.select_metric}",
                run=run,
                epochs=options.epochs,
                eval_every=options.eval_every,
                patience=options.patience,
                checkpoint_every=options.checkpoint_every,
                progress=options.progress,
                tracker=tracker,
            )
            if options.refit:
                model, data = experiment.refit(options, data, device, fitted, run)
            result, test = judge(options, data, model, fitted, run)
            store(data, model, result, test, run, tracker)
        print_result(result, run.path)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
