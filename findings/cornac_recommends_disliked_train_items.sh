#!/usr/bin/env bash
# cornac 3.0.1: with a rating_threshold, train items rated below it are candidates again when rankings are judged.
#
# Behaviour: rating_threshold=4 says which test ratings are relevant. It also decides what counts as known: an item that the
# user rated 1 in train is ranked among the unknown items and, where it comes first, is a false positive: Precision@1 of 0 and
# MRR of 1/3 for a list whose first unknown item (b, rated 1 in test) and second (a, rated 5) follow it.
# Good guess: the threshold chooses the relevant test items; whatever a user rated in train is left out, as elsewhere.
# Who is hurt: comparisons with packages that leave all train items out, and models that learn that somebody rated (implicit
# ones above all): their own train pairs come back at the top of the list and cost accuracy.
# Output seen: ranked candidates disliked, b, a; MRR 1/3. With all train ratings above the threshold b, a; MRR 1/2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check cornac==3.0.1
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from cornac.eval_methods import BaseMethod
from cornac.metrics import MRR, Precision
from cornac.models import Recommender

ORDER = {"disliked": 4.0, "liked": 3.0, "b": 2.0, "a": 1.0}


class Fixed(Recommender):
    """The same order for everybody."""

    def score(self, user_idx, item_idx=None):
        scores = np.zeros(self.total_items)
        for name, place in self.iid_map.items():
            scores[place] = ORDER[name]
        return scores if item_idx is None else scores[item_idx]

    def rank(self, user_idx, item_indices=None, k=-1, **more):
        found = super().rank(user_idx, item_indices, k=k, **more)
        names = {place: name for name, place in self.iid_map.items()}
        self.ranked = [names[place] for place in found[0]]
        return found


def judged(rating):
    train = [("u", "liked", 5.0), ("u", "disliked", rating), *(("v", item, 5.0) for item in ORDER)]
    method = BaseMethod.from_splits(train, [("u", "a", 5.0), ("u", "b", 1.0)], rating_threshold=4.0, verbose=False)
    model = Fixed("fixed", trainable=False)
    result, _ = method.evaluate(model, [Precision(k=1), MRR()], user_based=True)
    return model.ranked, round(float(result.metric_avg_results["MRR"]), 4)


found = judged(1.0), judged(5.0)
print(*found)
assert found == ((["disliked", "b", "a"], 0.3333), (["b", "a"], 0.5))
PYTHON
