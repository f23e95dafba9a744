"""Whether finished runs differ on the same users: ``gfml compare``. All of it is in :mod:`gfml.report.compare`."""

import sys

from gfml.program.cli import run_main
from gfml.report.compare import main

if __name__ == "__main__":
    sys.exit(run_main(main))
