#!/usr/bin/env bash
# The recommender grid: three models, six losses, four distances, four kinds of mass, and the CML hinge: 200 runs.
# DATASET=ml1m chooses other data than lastfm; GPUS=0,1,2 spreads the runs over devices, --workers 4 over CPU cores.
# --dry-run prints their states; every other flag goes to each run, such as --data-root DIR.
set -euo pipefail
source "$(dirname "$0")/sweep_lib.sh"
run="python recsys/main.py --dataset ${DATASET:-lastfm}"

{
  for model in mf lgn cml; do
    for loss in dot bpr; do
      echo $run --model $model --loss_mode $loss
    done
    for loss in gravity mix bpr_gra mix_bpr; do
      for dist in l2 l1 kl emd; do
        for mass in both item user none; do
          echo $run --model $model --loss_mode $loss --lamb 3 --dist_mode $dist --mass_mode $mass
        done
      done
    done
  done
  for model in mf cml; do
    echo $run --model $model --loss_mode cml
  done
} | python scripts/run_commands.py "$@"
