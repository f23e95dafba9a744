#!/usr/bin/env bash
# scikit-surprise 1.1.5: the fraction of concordant pairs is no fraction of pairs.
#
# Behaviour: accuracy.fcp divides the mean number of concordant pairs of the users who have any by that plus the mean number of
# discordant pairs of the users who have any. One user in the right order and ten in the wrong one, a pair each, give 0.5; with a
# thousand wrong users it is still 0.5. The other way round, too: a thousand right users and one wrong one give 0.5. A pair with
# equal predictions is discordant, so that a constant model has 0.0.
# Good guess: concordant / all pairs with different ratings, 1/11, or the mean of the users' own fractions, 1/11 here as well;
# 0.5 for a model without an order.
# Who is hurt: comparisons and searches by FCP on test parts with few ratings a user, where most users are all right or all
# wrong: the number hardly moves when the model gets better.
# Output seen: 1 right and 10 wrong 0.5, 1 right and 1000 wrong 0.5, 1000 right and 1 wrong 0.5, constant 0.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check scikit-surprise==1.1.5
"$folder/env/bin/python" - <<'PYTHON'
from surprise import Prediction
from surprise.accuracy import fcp


def users(count, name, estimates):
    rows = zip("xy", (5.0, 1.0), estimates)
    return [Prediction(f"{name}{number}", *row, {}) for row in rows for number in range(count)]


def judge(right, wrong):
    return fcp(users(right, "right", (4.0, 2.0)) + users(wrong, "wrong", (2.0, 4.0)), verbose=False)


found = [float(value) for value in (judge(1, 10), judge(1, 1000), judge(1000, 1), fcp(users(5, "equal", (3.0, 3.0)), verbose=False))]
print(found)
assert found == [0.5, 0.5, 0.5, 0.0]
PYTHON
