"""Judge recommendation lists that anyone made: ``gfml judge``. All of it is in :mod:`gfml.report.judge`."""

import sys

from gfml.program.cli import run_main
from gfml.report.judge import main

if __name__ == "__main__":
    sys.exit(run_main(main))
