#!/usr/bin/env bash
# implicit 0.7.3: precision_at_k is hits / min(K, test items), both summed over all users.
#
# Behaviour: two users with one test item each, both recommended among ten items: precision@10 is 1.0, not 0.1. And users do
# not count alike: one user with ten test items of which none is found, beside a user whose only item is found, give 1/11,
# not the mean of 1 and 0.
# Good guess: the mean over users of hits / K.
# Who is hurt: whoever puts the number into a table beside other libraries; it is nearer to a recall.
# Output seen: 1.0 and 0.0909.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check implicit==0.7.3
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import scipy.sparse as sp
from implicit.evaluation import precision_at_k


class Lists:
    """Ten items for everybody."""

    def recommend(self, users, seen, N=10, **_):
        return np.tile(np.arange(10, dtype=np.int32)[:N], (len(users), 1)), None


def matrix(pairs):
    rows, columns = zip(*pairs)
    return sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(2, 40))


train = matrix([(0, 30), (1, 31)])
each = precision_at_k(Lists(), train, matrix([(0, 3), (1, 4)]), K=10, show_progress=False)
one = precision_at_k(Lists(), train, matrix([(0, 3), *((1, item) for item in range(10, 20))]), K=10, show_progress=False)
print(each, one)
assert each == 1.0 and abs(one - 1 / 11) < 1e-12
PYTHON
