"""Judge a simple recommender, its settings chosen on validation, as a run like any other.

    python recsys/baseline.py --method ease --dataset lastfm
    python recsys/baseline.py --method item-knn --dataset lastfm --baseline-grid item-knn.k=50,100,200

The other programs show these beside their model; here one has lists, figures per user and a record of its own, so that it can be
compared by paired tests and ranked anew. It draws nothing at random: ``--seed`` changes nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from gfml.base.settings import changed, setting
from gfml.data.options import DataSettings, DemoSettings
from gfml.program.cli import run_main
from gfml.program.flags import BASELINES, JudgingSettings, RunSettings
from gfml.program.program import Program


@dataclass(frozen=True)
class BaselineSettings(RunSettings, JudgingSettings, DemoSettings, DataSettings):
    """all settings of recsys/baseline.py"""

    method: str = setting("ease", "which one", choices=BASELINES)
    seed: int = changed(RunSettings, "seed", 2020, beside=True)
    baselines: tuple[str, ...] = changed(JudgingSettings, "baselines", ("none",))
    baseline_grid: tuple[str, ...] | None = changed(JudgingSettings, "baseline_grid", None, beside=False)


PROGRAM = Program(
    "recsys/baseline.py", "baseline", BaselineSettings, "recsys.experiment:Baseline", "Judge a simple recommender."
)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(run_main(main))
