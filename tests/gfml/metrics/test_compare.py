from __future__ import annotations

import math

import numpy as np
import pytest

from gfml.metrics.compare import (
    bootstrap_difference,
    bootstrap_mean,
    effect_sizes,
    friedman,
    holm,
    paired_differences,
    paired_tests,
)


def test_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(0).exponential(size=4000)
    interval = bootstrap_mean(values, resamples=4000, seed=1)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    intervals = [bootstrap_mean(rng.normal(3, 1, 60), resamples=400, level=0.8, seed=s) for s in range(300)]
    covered = np.mean([i.low <= 3 <= i.high for i in intervals])
    assert 0.72 < covered < 0.87


def test_the_seed_decides():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_blocks_of_resamples_make_up_the_number_asked_for(monkeypatch):
    sizes, plain = [], np.random.default_rng

    class Watched:
        def __init__(self, seed):
            self.rng = plain(seed)

        def integers(self, high, size, dtype):
            sizes.append(size[0])
            return self.rng.integers(high, size=size, dtype=dtype)

    monkeypatch.setattr(np.random, "default_rng", Watched)
    bootstrap_mean(np.arange(1_000_000.0), resamples=5)
    assert sizes == [2, 2, 1]


def test_users_without_a_value_are_left_out():
    assert bootstrap_mean(np.array([1.0, np.nan, 1.0])) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_mean(np.array([np.nan]))
    with pytest.raises(ValueError, match="level 1"):
        bootstrap_mean(np.ones(3), level=1)


def test_pairing_is_narrower_than_two_independent_runs():
    rng = np.random.default_rng(6)
    second = rng.normal(size=500)
    first = second + 0.05 + 0.01 * rng.normal(size=500)
    interval = bootstrap_difference(first, second)
    assert 0.048 < interval.low < interval.mean < interval.high < 0.052
    assert bootstrap_difference(second, second) == (0, 0, 0)
    first[3] = np.nan
    assert bootstrap_difference(first, second).mean == pytest.approx(np.nanmean(first - second))


def test_runs_on_different_users_are_refused():
    with pytest.raises(ValueError, match="different users"):
        paired_differences(np.array([1, 2]), np.zeros(2), np.array([1, 3]), np.zeros(2))
    with pytest.raises(ValueError, match="different users"):
        bootstrap_difference(np.zeros(3), np.zeros(2))
    assert paired_differences(np.array([1, 2]), np.array([3, np.nan]), np.array([1, 2]), np.ones(2)).tolist() == [2]


def test_paired_tests_by_hand():
    """Differences 1, 2, 3, -4: t = 0.5 / (s / 2), signed ranks 1 + 2 + 3 against 4."""
    tests = paired_tests(np.array([1.0, 2, 3, -4]), np.zeros(4))
    assert (tests.n, tests.mean_difference) == (4, 0.5)
    assert tests.t == pytest.approx(0.5 / (np.std([1, 2, 3, -4], ddof=1) / 2))
    assert tests.wilcoxon == 4
    assert tests.wilcoxon_pvalue == pytest.approx(14 / 16)  # 7 of 16 sign patterns have a rank sum <= 4


def test_paired_tests_see_a_difference_and_its_absence():
    rng = np.random.default_rng(7)
    second, noise = rng.normal(size=200), rng.normal(size=200)
    clear = paired_tests(second + 1 + 0.1 * noise, second)
    assert clear.t > 0 and clear.t_pvalue < 1e-6 and clear.wilcoxon_pvalue < 1e-6
    swapped = paired_tests(second, second + 1 + 0.1 * noise)
    assert swapped.t == pytest.approx(-clear.t) and swapped.t_pvalue == pytest.approx(clear.t_pvalue)
    assert paired_tests(second, second)[1:] == (0.0, 0.0, 1.0, 0.0, 1.0)
    constant = paired_tests(np.ones(20), np.zeros(20))
    assert (constant.t, constant.t_pvalue) == (math.inf, 0.0) and constant.wilcoxon_pvalue < 1e-3
    with pytest.raises(ValueError, match="two users"):
        paired_tests(np.ones(1), np.zeros(1))


def test_effect_sizes_against_loops():
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 4, 60) / 4, rng.integers(0, 4, 60) / 4
    difference = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(difference) / 60
    spread = (sum((d - mean) ** 2 for d in difference) / 59) ** 0.5
    sizes = [abs(d) for d in difference if d]
    total = favourable = 0.0
    for d in difference:
        if d:
            # The mean rank of equal sizes, counted from 1.
            rank = sum(s < abs(d) for s in sizes) + (sum(s == abs(d) for s in sizes) + 1) / 2
            total, favourable = total + rank, favourable + (rank if d > 0 else -rank)
    found = effect_sizes(first, second)
    assert found.dz == pytest.approx(mean / spread, rel=1e-12) and found.rank_biserial == pytest.approx(
        favourable / total, rel=1e-12
    )
    assert (found.wins, found.ties, found.losses) == tuple(
        sum(test(d) for d in difference) for test in (lambda d: d > 0, lambda d: d == 0, lambda d: d < 0)
    )
    turned = effect_sizes(second, first)
    assert turned.dz == pytest.approx(-found.dz) and turned.rank_biserial == pytest.approx(-found.rank_biserial)


def test_effect_sizes_at_the_edges():
    ones, nan = np.ones(4), np.array([1.0, np.nan, 1.0, 1.0])
    assert effect_sizes(ones, ones) == (0.0, 0.0, 0, 4, 0)
    assert effect_sizes(ones, 0 * ones) == (np.inf, 1.0, 4, 0, 0) and effect_sizes(0 * ones, ones).dz == -np.inf
    assert effect_sizes(nan, 0 * ones).wins == 3
    with pytest.raises(ValueError, match="at least two users"):
        effect_sizes(ones[:1], ones[:1])


def test_holm_by_hand_and_against_its_definition():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04, made monotone .04 .06 .06 .06.
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0] and holm(np.array([])).tolist() == []
    values = np.random.default_rng(0).random(12) ** 3
    adjusted = holm(values)
    for level in (0.01, 0.05, 0.2, 0.5):
        # Step down: reject the smallest as long as p <= level / (number of those not rejected yet).
        rejected = set()
        for place in np.argsort(values):
            if values[place] > level / (len(values) - len(rejected)):
                break
            rejected.add(int(place))
        assert set(np.flatnonzero(adjusted <= level + 1e-15).tolist()) == rejected
    with pytest.raises(ValueError, match="outside"):
        holm(np.array([0.5, 1.5]))


def test_friedman_on_a_published_example():
    """Demsar's table 6: 14 data sets, 4 settings of C4.5; mean ranks, and the critical difference 1.25 he prints at level .05."""
    table = np.array([
        [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967], [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931], [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875], [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
    ])  # fmt: skip
    found = friedman(table)
    np.testing.assert_allclose(found.ranks, [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    assert found.cd == pytest.approx(1.25, abs=5e-3) and found.pvalue < 0.05
    with pytest.raises(ValueError, match="wanted at least 2 and 3"):
        friedman(table[:1])
