"""One report of one or several finished runs of a recommender; see :mod:`gfml.report.ranking_page`.

python recsys/report.py runs/recsys-demo-mf-gravity-1a2b3c4d
python recsys/report.py runs/recsys-lastfm-* --out comparison
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gfml.program.cli import run_main
from gfml.report.ranking_page import build_parser, write_report


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser("recsys/report.py").parse_args(argv)
    print(write_report(options.runs, options.out, options.format and (options.format,)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
