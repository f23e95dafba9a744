#!/usr/bin/env bash
# ranx 0.3.21: compare(stat_test="fisher", random_seed=...) answers with another p-value at every call.
#
# Behaviour: the permutations are drawn in a parallel numba loop, and the seed is given to the thread that starts it; the workers
# draw from states of their own. With two threads or more the same call in the same process gives 0.32, 0.31, 0.31, 0.29, so that
# near max_p "significant" comes and goes. And a p-value may be 0: the share of permutations as extreme as what was seen does not
# count what was seen, so that 1,000 permutations say "impossible" where they can say "at most 1 in 1,001".
# Good guess: the same seed, 42 unless said, gives the same p-value; the least one is 1 / (n_permutations + 1).
# Who is hurt: papers that quote p-values or stars, corrections for many comparisons (0 stays 0 under all of them), and builds
# that compare the report with a stored one.
# Output seen: several values among six equal calls; 0.0 for a model that is better for all of 40 users.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check ranx==0.3.21 numba==0.68.1 numpy==2.4.6
NUMBA_NUM_THREADS=2 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from ranx import Qrels, Run, compare

rng = np.random.default_rng(0)
users = [f"user{number}" for number in range(40)]
truth = Qrels({user: {f"item{number}": 1 for number in range(3)} for user in users})


def run(name, lift):
    noise = rng.normal(size=(40, 10))
    noise[:, :3] += lift
    return Run({user: {f"item{n}": float(s) for n, s in enumerate(row)} for user, row in zip(users, noise)}, name=name)


def p(one, two):
    report = compare(truth, [one, two], ["ndcg@10"], stat_test="fisher", random_seed=42).to_dict()
    return report[one.name]["comparisons"][two.name]["ndcg@10"]


near, far = [run("a", 1.0), run("b", 1.3)], [run("c", -9.0), run("d", 9.0)]
found = [p(*near) for _ in range(6)]
print(found, p(*far))
assert len(set(found)) > 1 and p(*far) == 0.0
PYTHON
