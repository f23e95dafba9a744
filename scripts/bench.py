"""Time what training and evaluation cost, as ratios measured in one process.

    python scripts/bench.py recsys [--data-root DIR] [--only NAME ...] [--json FILE]
    python scripts/bench.py mcl [--data-root DIR] [--json FILE]
    python scripts/bench.py contextual [--sizes 128 256 512] [--json FILE]
    python scripts/bench.py mirror [--data baby] [--models BPR FREEDOM ...] [--data-root DIR] [--json FILE]
    python scripts/bench.py data [--sizes 1000000 10000000] [--json FILE]
    python scripts/bench.py vision [--batch N] [--only attention model] [--json FILE]

Every row times ours and something to hold it against in the same run: the library operations it cannot do without
(a floor) or the plain loop it replaces (kept in ``tests/*/reference_*.py``). CPU seconds are user + system of
the process over all threads; each figure is the smallest of several runs after a warm-up. Absolute numbers belong
to the machine named in the heading; ratios travel. Epochs of matrix factorisation and growth with the data are timed by
``benchmarks/mf.py`` and ``benchmarks/netflix.py``, everything on a GPU by ``scripts/gpu_check.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "family", choices=("recsys", "mcl", "cml", "mirror", "vision", "contextual", "data"), help="what to time"
    )
    parser.add_argument("--data-root", help="where the data sets lie")
    parser.add_argument("--big", default="gowalla", help="data set of the recsys rows")
    parser.add_argument("--data", default="baby", help="data set of the mirror rows")
    parser.add_argument("--models", nargs="+", help="models of the mirror rows; default all that are trained")
    parser.add_argument("--sizes", type=int, nargs="+", help="rows of the data table; batches of contextual")
    parser.add_argument("--batch", type=int, help="images of a vision step; default 64 for a layer, 16 for a model")
    parser.add_argument("--only", nargs="+", help="parts of the family",
                        choices=("sampling", "lightgcn", "evaluation", "scoring", "attention", "model"))  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args(argv)
    # Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from benchmarks import costs

    print(
        f"{platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print()
    rows = costs.FAMILIES[arguments.family](arguments)
    print("\n" + costs.table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([{**row._asdict(), "ratio": row.ratio} for row in rows], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
