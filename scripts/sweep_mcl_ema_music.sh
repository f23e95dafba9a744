#!/usr/bin/env bash
# The fork's averaging grid on Amazon Digital-Music: 3 runs.
# --dry-run prints their states; every other flag goes to each run, such as --data-root DIR --gpu_id 1.
set -euo pipefail
source "$(dirname "$0")/sweep_lib.sh"

for decay in 0.995 0.999 0.990; do
  echo python mcl/main.py --mix --dataset amazon-digital-music --lambp 6.5 --lambn -0.5 --lr 1e-4 --lambd 1 --lamb_p 1.5 --lamb_n 1.0 --mix_ratio 0.5 --ema --ema_decay $decay
done | python scripts/run_commands.py "$@"
