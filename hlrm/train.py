"""Train a recommender with hierarchical latent relations (HLR, HLR++) and judge it.

    python hlrm/train.py                                                         the embedded demo data
    python hlrm/train.py --config configs/hlrm/ml100k.toml                       MovieLens-100K, cut as in the paper
    python hlrm/train.py --train_batch_size 5000 --num_inter 50 --hlrm_type plus --lr 2e-4 --save_dir hlrm_plus.pt

A batch is users, one positive and one negative each, and up to P history items of every user; it makes one optimizer
step (two with ``--mirror two_step``) on a hinge over distances, then a projection into the ball. Validation selects the
epoch, by its loss as published or by a ranking metric; test is read once, at the end, with the selected weights. They
are written to the run directory and to ``--save_dir``, which ``hlrm/eval.py`` reads.

Source: Tran, Salha-Galvan, Hennequin, Moussallam, Hierarchical Latent Relation Modeling for Collaborative Metric
Learning, RecSys 2021.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gfml.base.toml import LOCATION_FLAGS
from gfml.program.cli import resolve_device, run_main, set_threads
from hlrm.options import NOT_IDENTITY, parse_train


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_train(None if argv is None else list(argv))

    # Heavy imports wait until the flags are known to be good.
    from gfml.data.options import load_from_args
    from gfml.engine.runs import Run, seed_everything
    from gfml.engine.tracking import Tracker
    from gfml.engine.train import fit, load_best
    from gfml.program.steps import check_judgeable
    from hlrm import experiment
    from hlrm.results import print_result, report, store

    device = resolve_device(options)
    set_threads(options)
    data = load_from_args(options)
    check_judgeable(data, options.topk, "val")

    kind = f"{options.relation_form}-{options.hlrm_type}" if options.model == "hlr" else options.model
    with Run.open(
        options.out,
        "hlrm",
        options.resolved,
        label=f"{data.name}-{kind}",
        exclude=LOCATION_FLAGS | NOT_IDENTITY,
        name=options.run_name,
        resume=options.resume,
        overwrite=options.overwrite,
        read_only=options.eval_only,
    ) as run:
        if run.is_done and not options.eval_only:
            print(f"{run.path} is done; this is its result (--overwrite trains anew)")
            print_result(run.result, f"run directory {run.path}")
            return 0
        run.check_data(data.fingerprint)

        seed_everything(options.seed)
        model = experiment.build_model(options, data, device, start=not options.eval_only)
        if options.eval_only:
            best = load_best(model, run.path)
            result, _ = report(options, data, model.eval(), "test")
            selection = (
                run.result["selection"] if run.is_done else best | {"protocol": "best so far of an unfinished run"}
            )
            print_result(result | {"selection": selection}, f"run directory {run.path}")
            return 0
        print(experiment.describe(options, data, model, device, run), file=sys.stderr)

        with Tracker(run.file("tensorboard") if options.tensorboard else None) as tracker:
            optimizer, scheduler, step = experiment.build_training(options, model)
            sampler = experiment.build_sampler(options, data, device)
            validation = experiment.Validation(options, data, model, device)
            fitted = fit(
                model,
                optimizer,
                batches=sampler.epoch,
                loss_fn=model.loss,
                step=step,
                scheduler=scheduler,
                evaluate=validation,
                select=validation.select,
                run=run,
                epochs=options.epochs,
                eval_every=options.eval_every,
                patience=options.patience,
                checkpoint_every=options.checkpoint_every,
                progress=options.progress,
                tracker=tracker,
            )
            result = store(options, data, model, fitted, run)
            tracker.scalars(fitted.best_epoch or 0, {f"test/{name}": value for name, value in result["test"].items()})
        print_result(
            result, f"run directory {run.path}" + (f"\nsaved model   {options.save_dir}" if options.save_model else "")
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
