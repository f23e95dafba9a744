"""Scoring a catalogue against the plain way: the relation of every user with every item, as training makes it."""

from __future__ import annotations

import time

import pytest
import torch

from gfml.ranking.encoders import Tables
from hlrm.data import History
from hlrm.model import RelationModel
from hlrm.relations import MemoryRelation


def seconds(work, repeats=3):
    """Least processor time of some repeats: other programs on the machine do not count."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_all_item_scores_are_cheaper_than_plain_relations(kind):
    users, items, dim, width = 1000, 2000, 100, 20
    torch.manual_seed(0)
    model = RelationModel(Tables(users, items, dim, init="ball"), MemoryRelation(dim, 20, kind))
    history = History(torch.randint(items, (users, width)), torch.full((users,), width))
    few = torch.arange(8)
    some = History(history.ids[:8], history.counts[:8])
    with torch.no_grad():
        plain = seconds(lambda: model.distances(few, torch.arange(items).expand(8, -1), some)) / 8
    ours = seconds(lambda: model.scorer(history, train=None).score(torch.arange(users)), repeats=1) / users
    print(f"per user: plain {plain * 1e3:.1f} ms, ours {ours * 1e3:.1f} ms, {plain / ours:.1f} times")
    assert ours < plain / 1.5
