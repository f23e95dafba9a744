"""One page about many runs: ``gfml report``. All of it is in :mod:`gfml.report.collection`."""

import sys

from gfml.program.cli import run_main
from gfml.report.collection import main

if __name__ == "__main__":
    sys.exit(run_main(main))
