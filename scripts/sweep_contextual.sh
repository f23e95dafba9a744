#!/usr/bin/env bash
# The hybrid and its tuned baselines, 224 x 224 pipeline, CUB, Cars and SOP: 21 runs. DATA=DIR holds the three data folders.
# --dry-run prints their states; every other flag goes to each run, such as --gpu_id 1 or --select-on test.
set -euo pipefail
source "$(dirname "$0")/sweep_lib.sh"

data=${DATA:-data}
for set in cub:CUB_200_2011 cars:car196 sop:Stanford_Online_Products; do
  for loss in hybrid contrastive roadmap triplet ms-miner proxy-anchor proxy-nca; do
    echo python contextual/train.py --config "configs/contextual/224-${set%%:*}-$loss.toml" --data_root "$data/${set#*:}"
  done
done | python scripts/run_commands.py "$@"
