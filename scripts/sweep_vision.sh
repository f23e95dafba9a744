#!/usr/bin/env bash
# Gravity attention on long-tailed CIFAR-10: lambda x where x mass, plain attention and long-tail losses beside it; 3 seeds, 81 runs.
# --dry-run prints their states; every other flag goes to each run, such as --data-root DIR --epochs 100.
set -euo pipefail
source "$(dirname "$0")/sweep_lib.sh"

base="python vision/main.py --dataset cimb10 --autoaugment --label-smoothing --dot_scale sqrt_head --report 0"
for seed in 1 2 3; do
  for lamb in 0.25 0.5 1 2 4; do
    for mass in position none; do
      for where in full tail; do
        echo $base --seed $seed --model-name vit_gra --gra_scale none --lamb_gra $lamb --mass_from $mass --mass_pos $where
      done
    done
  done
  echo $base --seed $seed --model-name vit
  for loss in class-balanced balanced-softmax ldam-drw; do
    echo $base --seed $seed --model-name vit --long-tail $loss
    echo $base --seed $seed --model-name vit_gra --gra_scale none --long-tail $loss
  done
done | python scripts/run_commands.py "$@"
