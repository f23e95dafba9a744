"""Tables of finished runs: ``gfml results-table``. All of it is in :mod:`gfml.report.results_table`."""

import sys

from gfml.program.cli import run_main
from gfml.report.results_table import main

if __name__ == "__main__":
    sys.exit(run_main(main))
