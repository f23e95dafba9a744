"""Judge a model that hlrm/train.py saved: HitRate, MAP, MRR, NDCG, PREC and REC at --topk, printed and stored.

    python hlrm/eval.py                                                 hlrm_base.pt, as train.py left it
    python hlrm/eval.py --save_dir runs/NAME --topk 5 10 --attention 4  a run; also explain four recommendations

Flags that are not given are those of the training, so the numbers are those that it printed. ``--hlrm_type``,
``--emb_size`` and ``--num_relations`` are checked against the model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from gfml.program.cli import Options, resolve_device, run_main, set_threads
from hlrm.options import build_train_parser, parse_eval

# Flags of eval.py that take the place of the training's.
OVERRIDES = (
    "topk", "eval_size", "num_cohorts", "mask_seen", "eval_batch_size", "judge_inter", "history_sampling", "baselines",
    "data_root", "dataset", "device", "threads",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_eval(None if argv is None else list(argv))

    from pathlib import Path

    from gfml.base.errors import UserError
    from gfml.base.files import write_json
    from gfml.data.options import load_from_args
    from hlrm.attention import explain
    from hlrm.results import print_result, read_model, report, restore

    saved, file = read_model(Path(given.save_dir))
    options = flags_of(given, saved["options"], file)
    set_threads(options)
    device = resolve_device(options)
    data = load_from_args(options)
    if max(options.topk) > data.num_items:
        raise UserError(
            f"found a list length of {max(options.topk)}, wanted at most {data.num_items} items: mend --topk"
        )
    model = restore(options, data, saved, file, device)
    result, evaluation = report(options, data, model, given.eval_split)
    result["selection"] = saved["selection"]
    target = Path(getattr(given, "result", file.with_suffix(".eval.json")))
    write_json(target, result)
    notes = [f"saved model   {file}", f"numbers       {target}"]
    if given.attention or hasattr(given, "pair"):
        notes += explain(given, options, data, model, evaluation, file)
    print_result(result, "\n".join(notes))
    return 0


def flags_of(given: Options, trained: dict[str, Any], file: object) -> Options:
    """The training's flags under those of eval.py; UserError where these contradict the saved model."""
    from gfml.base.errors import UserError

    for name in ("hlrm_type", "emb_size", "num_relations"):
        if hasattr(given, name) and getattr(given, name) != trained[name]:
            found = f"{file} was trained with --{name} {trained[name]}, found --{name} {getattr(given, name)}"
            raise UserError(f"{found}: drop the flag or give another --save_dir")
    if getattr(given, "judge_inter", 0) and trained["model"] in ("cml", "lrml"):
        raise UserError(f"{file} is a model without histories ({trained['model']}): drop --num_inter")
    options = build_train_parser().parse_args([])
    for name, value in trained.items():
        setattr(options, name, value)
    for name in OVERRIDES:
        if hasattr(given, name):
            setattr(options, name, getattr(given, name))
    return options


if __name__ == "__main__":
    sys.exit(run_main(main))
