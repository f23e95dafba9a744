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
from pathlib import Path
from typing import Any

from gfml.base.toml import LOCATION_FLAGS
from gfml.program.cli import Options, resolve_device, run_main, set_threads
from mirror_grad.models import MODELS
from mirror_grad.options import NOT_IDENTITY, arm_of, parse


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.points:
        from mirror_grad.grid import search

        return search(options, train)
    if options.weights is not None:
        return judge_weights(options)
    result, path = train(options)
    from mirror_grad.results import print_result

    print_result(result, path)
    return 0


def train(options: Options) -> tuple[dict[str, Any], Path]:
    """One run: its result and its directory. A finished run is read, an unfinished one continued."""
    # Heavy imports wait until the flags are known to be good.
    from gfml.engine.runs import Run, seed_everything
    from gfml.engine.tracking import Tracker
    from gfml.engine.train import fit
    from gfml.program.steps import check_judgeable, cut_offs
    from mirror_grad import experiment
    from mirror_grad.data import load
    from mirror_grad.results import judge, store

    device = resolve_device(options)
    set_threads(options)
    data = load(options, needs_features=MODELS[options.model].needs_features)
    check_judgeable(data.interactions, cut_offs(options.topks, options.select_metric), options.select_on)

    with Run.open(
        options.out,
        "mirror",
        options.resolved,
        label=f"{data.interactions.name}-{options.model}-{arm_of(options)}",
        exclude=LOCATION_FLAGS | NOT_IDENTITY,
        name=options.run_name,
        resume=options.resume,
        overwrite=options.overwrite,
        read_only=options.eval_only,
    ) as run:
        if run.is_done and not options.eval_only:
            print(f"{run.path} is done; this is its result (--overwrite trains anew)")
            return dict(run.result), run.path
        run.check_data(data.fingerprint)

        seed_everything(options.seed)
        if options.eval_only:
            model = experiment.load_reported(options, data, device, run)
            return judge(options, data, model, None, run)[0], run.path
        model = experiment.build_model(options, data, device)
        print(experiment.describe(options, data, model, run), file=sys.stderr)

        with Tracker(run.file("tensorboard") if options.tensorboard else None) as tracker:
            fitted = None
            if MODELS[options.model].trains:
                optimizer, step, scheduler = experiment.build_training(options, model)
                fitted = fit(
                    model,
                    optimizer,
                    batches=experiment.build_batches(options, data, model, device),
                    loss_fn=model.loss,
                    step=step,
                    scheduler=scheduler,
                    evaluate=lambda split: experiment.metrics(options, data, model, split),
                    select=f"{options.select_on}/{options.select_metric}",
                    run=run,
                    epochs=options.epochs,
                    eval_every=options.eval_every,
                    patience=None if options.patience is None else options.patience + 1,
                    checkpoint_every=options.checkpoint_every,
                    cuda_graph=options.cuda_graph,
                    progress=options.progress,
                    tracker=tracker,
                )
            result, test = judge(options, data, model, fitted, run)
            store(data, model, result, test, run, tracker)
        return result, run.path


def judge_weights(options: Options) -> int:
    """``--resume FILE``: the test figures of stored weights. Nothing is trained or written."""
    from gfml.report.recommenders import USUAL_METRICS, other_conventions, table_columns, text_table
    from mirror_grad import experiment
    from mirror_grad.data import load

    device = resolve_device(options)
    set_threads(options)
    data = load(options, needs_features=MODELS[options.model].needs_features)
    model, notes = experiment.weights_model(options, data, device, Path(options.weights))
    for note in notes:
        print(f"note: {options.weights}: {note}", file=sys.stderr)
    rows = {options.model: experiment.judge_split(options, data, model, "test", beyond=True).means}
    masked = "train and validation" if options.test_mask == "seen" else "train"
    print(f"test of {data.interactions.name}, weights of {options.weights}, {masked} items masked; {USUAL_METRICS}")
    print(
        text_table(
            rows,
            [
                *table_columns(rows, options.topks),
                *(f"{name}@{k}" for name in ("precision", "map") for k in options.topks),
            ],
        )
    )
    print("\n".join(other_conventions(rows)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
