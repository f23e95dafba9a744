"""Reproduce the tables of the papers: ``gfml reproduce``. All of it is in :mod:`gfml.report.reproduce`."""

import sys

from gfml.program.cli import run_main
from gfml.report.reproduce import main

if __name__ == "__main__":
    sys.exit(run_main(main))
