"""Train Collaborative Metric Learning and judge it beside simple baselines.

    python cml_baseline/main.py                                     MovieLens-1M where its files are found, else a demo
    python cml_baseline/main.py --dataset ml1m --margin 1 --epochs 20        test recall@50 .40, recall@100 .54, a minute
    python cml_baseline/main.py --dataset ml1m --features features.npz --hide-items 0.1    films nobody has seen yet

A batch is N train pairs, each with U negatives; an epoch meets every pair once. The loss is the rank-weighted hinge of
the nearest negative, plus the covariance and feature penalties that are asked for (``gfml/cml.py``); a batch makes one
optimizer step (two with ``--mirror two_step``), after which every point is pulled back into the ball. Validation
selects the epoch; test is read once, at the end, with the selected weights.

Source: Hsieh, Yang, Cui, Lin, Belongie, Estrin, Collaborative Metric Learning, WWW 2017.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cml_baseline.options import NOT_IDENTITY, parse
from gfml.base.toml import LOCATION_FLAGS
from gfml.program.cli import resolve_device, run_main, set_threads


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(list(sys.argv[1:] if argv is None else argv))

    # Heavy imports wait until the flags are known to be good.
    from cml_baseline import data as sources
    from cml_baseline import experiment
    from cml_baseline.ann import export
    from cml_baseline.report import write_items, write_report
    from cml_baseline.results import judge, print_result, store
    from cml_baseline.table import EpochTable
    from gfml.engine.runs import Run, seed_everything
    from gfml.engine.train import fit

    device = resolve_device(options)
    set_threads(options)
    data = sources.load(options)
    selection = f"{options.select_on}/{options.select_metric}"

    with Run.open(
        options.out,
        "cml_baseline",
        options.resolved,
        label=data.name,
        exclude=LOCATION_FLAGS | NOT_IDENTITY,
        name=options.run_name,
        resume=options.resume,
        overwrite=options.overwrite,
        read_only=options.eval_only,
    ) as run:
        if run.is_done and not options.eval_only:
            print(f"{run.path} is done; this is its result (--overwrite trains anew)")
            if options.ann != "off":
                export(run.path, options.ann)
            print_result(run.result, run.path)
            return 0
        run.check_data(data.fingerprint)

        seed_everything(options.seed)
        if options.eval_only:
            model, judged = experiment.load_reported(options, data, device, run.path, done=run.is_done)
            print_result(judge(options, judged, model, None, run)[0], run.path)
            return 0
        model = experiment.build_model(options, data, device)
        print(experiment.describe(options, data, model, device, run), file=sys.stderr)

        optimizer, step = experiment.build_training(options, model)
        sampler = experiment.build_sampler(options, data, model, device)
        log_dir = run.file("tensorboard") if options.tensorboard else None
        shown = [f"recall@{k}" for k in options.topks]
        first = sampler.epoch(1)
        # The reported loss is a mean over batches; times this it is the sum over the epoch's pairs.
        factor = len(first) if options.reduction == "sum" else len(first.users)
        with EpochTable(log_dir, run.file("epochs.csv"), options.select_on, shown, factor) as table:
            fitted = fit(
                model,
                optimizer,
                batches=lambda epoch: table.timed(sampler.epoch(epoch)),
                loss_fn=model.loss,
                step=step,
                evaluate=lambda split: experiment.judge_split(options, data, model, split).means,
                select=selection,
                run=run,
                epochs=options.epochs,
                eval_every=options.eval_every,
                patience=options.patience,
                checkpoint_every=options.checkpoint_every,
                progress=options.progress or False,
                tracker=table,
            )
            if options.refit:
                model, data = experiment.refit(options, data, device, fitted, run)
            result, test = judge(options, data, model, fitted, run)
            write_items(run.path, data, sources.item_info(options, data))
            store(data, model, result, test, run)
        if options.ann != "off":
            export(run.path, options.ann)
        if options.report:
            write_report(run.path)
        print_result(result, run.path)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
