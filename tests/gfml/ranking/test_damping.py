"""Damped popularity: scores against a plain loop, areas against counted squares, frontiers against single evaluations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gfml.data.interactions import Interactions
from gfml.data.synthetic import generate
from gfml.ranking.damping import damped, frontier, frontier_area
from gfml.ranking.evaluation import evaluate
from gfml.ranking.topk import DenseScorer


@pytest.fixture(scope="module")
def world() -> tuple[DenseScorer, Interactions]:
    """Scores that mix taste, here the truth with noise, and popularity."""
    data = generate(60, 40, 900, seed=3).with_validation(0.1, 0)
    rng = np.random.default_rng(0)
    taste = data.split("test").toarray() + data.split("valid").toarray() + rng.normal(0, 0.6, (60, 40))
    return DenseScorer(torch.from_numpy(taste + 0.8 * np.log1p(data.item_popularity))), data


@pytest.mark.parametrize("gamma", (-0.5, 0.7))
def test_the_penalty_is_that_of_the_formula_at_any_scale(world: tuple[DenseScorer, Interactions], gamma: float) -> None:
    scorer, data = world
    for factor in (1.0, 1000.0):
        base = (scorer.scores * factor).tolist()
        found = damped(DenseScorer(scorer.scores * factor), data, gamma).score(torch.tensor([4, 7]))
        deviations = []
        for row in base:
            mean = sum(row) / len(row)
            deviations.append(math.sqrt(sum((value - mean) ** 2 for value in row) / (len(row) - 1)))
        spread = sum(deviations) / len(deviations)
        for place, user in enumerate((4, 7)):
            for item in range(40):
                count = int(data.train[:, [item]].sum())
                wanted = base[user][item] - gamma * spread * math.log(1 + count)
                assert float(found[place, item]) == pytest.approx(wanted, rel=1e-9)


def test_damping_trades_head_for_tail(world: tuple[DenseScorer, Interactions]) -> None:
    scorer, data = world
    points = [point for point in frontier(scorer, data, (-1, 0, 1, 4), 5) if point["split"] == "test"]
    arp = [point["arp@5"] for point in points]
    assert arp == sorted(arp, reverse=True) and arp[0] > 1.3 * arp[-1]
    assert points[0]["tail_recall@5"] < points[1]["tail_recall@5"] < points[2]["tail_recall@5"]
    plain = evaluate(scorer, data, "test", [5], beyond=True).means
    assert {name: plain[name] for name in points[1] if "@" in name} == {k: v for k, v in points[1].items() if "@" in k}


def test_the_area_counts_every_square_once() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        heads, tails = rng.integers(0, 9, (2, 6))
        squares = {(h, t) for head, tail in zip(heads, tails, strict=True) for h in range(head) for t in range(tail)}
        assert frontier_area(heads.tolist(), tails.tolist()) == len(squares)
    assert frontier_area([0.2, 0.4], [0.3, 0.1]) == pytest.approx(0.2 * 0.3 + 0.2 * 0.1)
