#!/usr/bin/env bash
# The fork's mixed grid on Yelp 2021: 243 runs.
# --dry-run prints their states; every other flag goes to each run, such as --data-root DIR --gpu_id 1.
# As in the fork, alpha and beta stay at 1.25 and 5; the paper's for this data are --alpha 1 --beta 4.
set -euo pipefail
source "$(dirname "$0")/sweep_lib.sh"

for lr in 1e-3 1e-4 1e-2; do
  for lam in 5 1 0.01; do
    for pos in 1 1.2 1.5; do
      for neg in 0.5 0.9 1; do
        for mix in 0.7 0.5 0.3; do
          echo python mcl/main.py --mix --dataset yelp --lambp 8 --lambn -1 --lr $lr --lambd $lam --lamb_p $pos --lamb_n $neg --mix_ratio $mix --multicore 0
        done
      done
    done
  done
done | python scripts/run_commands.py "$@"
