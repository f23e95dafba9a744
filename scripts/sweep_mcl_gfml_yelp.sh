#!/usr/bin/env bash
# The fork's gravity grid on Yelp 2021: 25 runs.
# --dry-run prints their states; every other flag goes to each run, such as --data-root DIR --gpu_id 1.
set -euo pipefail
source "$(dirname "$0")/sweep_lib.sh"

for lr in 1e-2 1e-3 1e-4 1e-5 1e-6; do
  for lam in 0.01 0.1 1 3 5; do
    echo python mcl/main.py --gfml --dataset yelp --lr $lr --lambd $lam --multicore 0
  done
done | python scripts/run_commands.py "$@"
