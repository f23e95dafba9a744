#!/usr/bin/env bash
# The fork's gravity grid on Amazon Digital-Music: 81 runs.
# --dry-run prints their states; every other flag goes to each run, such as --data-root DIR --gpu_id 1.
set -euo pipefail
source "$(dirname "$0")/sweep_lib.sh"

for lr in 1e-2 1e-4 1e-6; do
  for lam in 0.01 1 5; do
    for pos in 1.5 1.2 1.0; do
      for neg in 1.0 0.9 0.5; do
        echo python mcl/main.py --gfml --dataset amazon-digital-music --lr $lr --lambd $lam --lamb_p $pos --lamb_n $neg
      done
    done
  done
done | python scripts/run_commands.py "$@"
