"""Short seeded runs of every program, and what of them a change of the code must leave as it is.

    python tests/golden_runs/run.py FILE.json        run all of them and store what they gave; FILE: - for stdout
    python tests/golden_runs/run.py FILE.json mcl    only those whose name begins so

The losses of the first three steps are those that the trainer checks for not being finite; the result is ``result.json``
without times, places and what depends on them. ``test_golden_runs.py`` compares with ``golden.json``.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

SMALL = "--dataset demo --demo-users 150 --demo-items 110 --demo-interactions 3000 --baselines popularity"
SHORT = f"{SMALL} --epochs 3 --eval-every 1"
DIGITS = "--dataset digits --epochs 1 --workers 0 --batches-per-epoch 4 --pictures 0 --baselines none --width 8"
# name -> (module with main, command line)
RUNS: dict[str, tuple[str, str]] = {
    "recsys": ("recsys.main", f"{SHORT} --report 0"),
    "recsys-lgn-mirror": (
        "recsys.main",
        f"{SHORT} --report 0 --model lgn --loss_mode mix_bpr --lr_decay 0 --mirror two_step --refit --dropout 1",
    ),
    "recsys-cml": ("recsys.main", f"{SHORT} --report 0 --model cml --loss_mode cml --use_rank_weight --use_cov_loss"),
    "recsys-compat": (
        "recsys.main",
        f"{SHORT} --report 0 --loss_mode bpr_gra --compat 1 --ema-scope all --lr-schedule cosine",
    ),
    "mcl": ("mcl.main", f"{SHORT} --batch-size 64"),
    "mcl-gfml": (
        "mcl.main",
        f"{SHORT} --batch-size 64 --gfml --lamb_p 0.7 --lamb_n 0.3 --ema --ema-scope mass --refit",
    ),
    "mcl-mix-mirror": ("mcl.main", f"{SHORT} --batch-size 64 --mix --encoder tables --mirror two_step --score gravity"),
    "cml": ("cml_baseline.main", f"{SHORT} --batch-size 500 --report 0"),
    "cml-two-stage": (
        "cml_baseline.main",
        f"{SHORT} --batch-size 500 --report 0 --sampler two-stage --candidates 50 --optimizer adam --mirror two_step --refit",
    ),
    "hlrm": ("hlrm.train", f"{SHORT} --train_batch_size 500 --save_model 0 --lr 1e-3 --select-metric ndcg@10"),
    "hlrm-plus": (
        "hlrm.train",
        f"{SHORT} --train_batch_size 500 --save_dir {{out}}/plus.pt --hlrm_type plus --mirror two_step",
    ),
    "hlrm-eval": ("hlrm.eval", "--save_dir {out}/plus.pt --topk 5 10 --result {out}/eval/result.json"),
    "vision": (
        "vision.main",
        "--epochs 1 --report 0 --num-layers 2 --val_fraction 0.2 --model-name vit_gra --warmup-epoch 1 --autoaugment",
    ),
    "vision-mirror": (
        "vision.main",
        "--epochs 1 --report 0 --num-layers 1 --model-name vit --mirror two_step --ema 0.9 --long-tail ldam-drw --mixup",
    ),
    "contextual-256": ("contextual.main", DIGITS),
    "contextual-256-proxy": ("contextual.main", f"{DIGITS} --loss proxy-anchor --refit --warm 1"),
    "contextual-224": ("contextual.train", f"{DIGITS} --backbone small"),
    "mirror-grad": ("mirror_grad.main", f"--model VBPR {SHORT} --features random --random-widths 12 8"),
    "mirror-grad-plain": ("mirror_grad.main", f"--model LightGCN {SHORT} --features none --not_mg"),
    "mirror-grad-selfcf": ("mirror_grad.main", f"{SHORT} --features none --test-mask train"),
    "mirror-grad-untrained": ("mirror_grad.main", f"--model ItemKNNCBF {SMALL} --features random --random-widths 12 8"),
}
# Times, places and sizes of memory: no part of what a run computes.
LEFT_OUT = frozenset({"seconds", "peak_memory_gib", "epochs", "per_class", "fingerprint"})


@contextmanager
def recorded_losses() -> Iterator[list[float]]:
    """The loss of every step that is trained inside the block."""
    from gfml.engine.train import TermMeans

    found: list[float] = []
    count = TermMeans._count

    def keep(self: Any, terms: dict[str, float]) -> None:
        found.append(terms["loss"])
        count(self, terms)

    with mock.patch.object(TermMeans, "_count", keep):
        yield found


def facts(result: Any) -> Any:
    """A stored result without what is left out, at every depth."""
    if isinstance(result, dict):
        return {key: facts(value) for key, value in result.items() if key not in LEFT_OUT}
    return [facts(value) for value in result] if isinstance(result, list) else result


def run(name: str, out: Path) -> dict[str, Any]:
    """One of :data:`RUNS`: {"losses": of the first three steps, "result"}; its run directory is below ``out``."""
    module, flags = RUNS[name]
    argv = flags.format(out=out).split()
    if module != "hlrm.eval":
        argv += ["--device", "cpu", "--out", str(out / name), "--progress" if "cml" in module else "--no-progress"]
    with recorded_losses() as losses:
        code = importlib.import_module(module).main(argv)
    assert not code, f"{name} ended with {code}"
    file = out / "eval" / "result.json" if module == "hlrm.eval" else next((out / name).glob("*-*/result.json"))
    return {"losses": losses[:3], "result": facts(json.loads(file.read_text(encoding="utf-8")))}


def main() -> None:
    target, prefix = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run(name, Path(folder)) for name in RUNS if name.startswith(prefix)}
    text = json.dumps(found, sort_keys=True, separators=(",", ":")).replace('},"', '},\n"') + "\n"
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
