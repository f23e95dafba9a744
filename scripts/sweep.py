"""Search over flags with Ray Tune: ``gfml sweep``. All of it is in :mod:`gfml.program.sweep`."""

import sys

from gfml.program.cli import run_main
from gfml.program.sweep import main

if __name__ == "__main__":
    sys.exit(run_main(main))
