"""Run the commands of a sweep: ``gfml run-commands``. All of it is in :mod:`gfml.program.run_commands`."""

import sys

from gfml.program.cli import run_main
from gfml.program.run_commands import main

if __name__ == "__main__":
    sys.exit(run_main(main))
