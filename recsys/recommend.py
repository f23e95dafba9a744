"""Recommendations of a finished run, or the items nearest to an item; see :mod:`gfml.program.recommend`.

python recsys/recommend.py RUN --user 12 57 --top 20
python recsys/recommend.py RUN --similar-items 4012 --titles items.csv
"""

import sys

from gfml.program.cli import run_main
from gfml.program.recommend import main

if __name__ == "__main__":
    sys.exit(run_main(main))
