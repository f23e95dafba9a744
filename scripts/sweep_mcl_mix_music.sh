#!/usr/bin/env bash
# The fork's mixed grid on Amazon Digital-Music: 25 runs.
# --dry-run prints their states; every other flag goes to each run, such as --data-root DIR --gpu_id 1.
set -euo pipefail
source "$(dirname "$0")/sweep_lib.sh"

for pos in 2.0 1.7 1.5 1.3 1.0; do
  for neg in 1.0 0.9 0.8 0.7 0.6; do
    echo python mcl/main.py --mix --dataset amazon-digital-music --lambp 6.5 --lambn -0.5 --lr 1e-2 --lambd 0.01 --lamb_p $pos --lamb_n $neg --mix_ratio 0.7
  done
done | python scripts/run_commands.py "$@"
