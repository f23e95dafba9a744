"""Judge a model that hlrm/train.py saved: HitRate, MAP, MRR, NDCG, PREC and REC at --topk, printed and stored.

    python hlrm/eval.py                                                 hlrm_base.pt, as train.py left it
    python hlrm/eval.py --save_dir runs/NAME --topk 5 10 --attention 4  a run; also explain four recommendations
    python hlrm/eval.py --analyse 20000                                 do pairs with near relations share genres?

Flags that are not given are those of the training, so the numbers are those that it printed. ``--hlrm_type``,
``--emb_size`` and ``--num_relations`` are checked against the model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gfml.base.errors import UserError
from gfml.base.toml import UNSAVED
from gfml.program.cli import Options, resolve_device, run_main, set_threads
from hlrm.settings import CHECKED, OVERRIDES, parse_eval
from hlrm.train import PROGRAM


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_eval(None if argv is None else list(argv))

    # Heavy imports wait until the flags are known to be good.
    from gfml.base.files import write_json
    from gfml.engine.distributed import World
    from hlrm.attention import explain
    from hlrm.experiment import HLRM, read_model, restore
    from hlrm.meaning import lines, meaning

    saved, file = read_model(Path(given.save_dir))
    settings = settings_of(given, saved["options"], file)
    set_threads(settings)
    this = HLRM(settings, HLRM.load(settings), World(0, 1, resolve_device(settings)))
    model = restore(this, saved, file)
    judged = this.report(model, given.eval_split)
    result = judged.result | {"selection": saved["selection"]}
    notes = []
    if given.analyse:
        found = meaning(this, model, given.eval_split, given.analyse, getattr(given, "item_info", None))
        result, notes = result | {"meaning": found}, lines(found)
    target = Path(getattr(given, "result", file.with_suffix(".eval.json")))
    write_json(target, result)
    notes = [f"saved model     {file}", f"numbers         {target}", *notes]
    if given.attention or hasattr(given, "pair"):
        notes += explain(given, this, model, judged.detail, file)
    print("\n".join([HLRM.result_text(result), *notes]))
    return 0


def settings_of(given: Options, trained: dict[str, Any], file: object) -> Any:
    """The training's settings under those of eval.py; UserError where these contradict the saved model."""
    kept = {
        name: value for name, value in trained.items() if value is not None and name.replace("-", "_") not in UNSAVED
    }
    before = PROGRAM.of(kept)
    for name in CHECKED:
        if hasattr(given, name) and getattr(given, name) != getattr(before, name):
            flag = f"--{name.replace('_', '-')}"
            found = f"{file} was trained with {flag} {getattr(before, name)}, found {flag} {getattr(given, name)}"
            raise UserError(f"{found}: drop the flag or give another --save_dir")
    if getattr(given, "judge_inter", 0) and before.model in ("cml", "lrml"):
        raise UserError(f"{file} is a model without histories ({before.model}): drop --num_inter")
    changes = {name: getattr(given, name) for name in OVERRIDES if hasattr(given, name)}
    return PROGRAM.of(kept, **changes)


if __name__ == "__main__":
    sys.exit(run_main(main))
