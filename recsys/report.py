"""One report of one or several finished runs of a recommender; see :mod:`gfml.report.ranking_page`.

python recsys/report.py runs/recsys-demo-mf-gravity-1a2b3c4d
python recsys/report.py runs/recsys-lastfm-* --out comparison
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gfml.program.cli import Parser, run_main
from gfml.report.ranking_page import beside, write_report


def build_parser() -> Parser:
    """The command line of ``recsys/report.py``."""
    parser = Parser(
        prog="recsys/report.py", description="A report with tables and plots of one or several finished runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: RUN/report; of several runs, report beside them)"
    )
    parser.add_argument("--format", choices=("html", "md"), help="write only this form of the page (default: both)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    formats = (options.format,) if options.format else ("html", "md")
    print(write_report(options.runs, options.out or beside(options.runs), formats))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
