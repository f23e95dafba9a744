"""How sure a mean over users is, and whether two runs on the same users differ."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


class PairedTests(NamedTuple):
    """Two-sided tests of a mean difference (first - second) over ``n`` users.

    t, t_pvalue: paired t-test. wilcoxon, wilcoxon_pvalue: signed-rank test, zero differences dropped.
    """

    n: int
    mean_difference: float
    t: float
    t_pvalue: float
    wilcoxon: float
    wilcoxon_pvalue: float


def bootstrap_mean(values: np.ndarray, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile interval of the mean over users, users drawn with replacement; NaN values are left out.

    Memory: a block of resamples at a time, at most about 32 MiB.
    Errors: ValueError without values, or for a level outside (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) == 0 or not 0 < level < 1:
        raise ValueError(f"a bootstrap needs values and 0 < level < 1, not {len(values)} values and level {level}")
    rng = np.random.default_rng(seed)
    rows = max(1, (2 << 20) // len(values))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    drawn = [values[rng.integers(len(values), size=(size, len(values)), dtype=np.int32)].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_differences(
    first_users: np.ndarray, first: np.ndarray, second_users: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """first - second for each user, where both have a value.

    Errors: ValueError unless both runs judged the same users in the same order.
    """
    if not np.array_equal(first_users, second_users):
        raise ValueError(
            f"the runs judged different users ({len(first_users)} and {len(second_users)}): they cannot be paired"
        )
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return difference[~np.isnan(difference)]


def bootstrap_difference(
    first: np.ndarray, second: np.ndarray, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of mean(first - second), the same users drawn for both; users without a value in either are left out."""
    difference = paired_differences(np.arange(len(first)), first, np.arange(len(second)), second)
    return bootstrap_mean(difference, resamples=resamples, level=level, seed=seed)


def paired_tests(first: np.ndarray, second: np.ndarray) -> PairedTests:
    """Paired t-test and Wilcoxon signed-rank test; p = 1 if the runs do not differ anywhere.

    Errors: ValueError for fewer than two users.
    """
    from scipy import stats

    difference = paired_differences(np.arange(len(first)), first, np.arange(len(second)), second)
    if len(difference) < 2:
        raise ValueError(f"a paired test needs at least two users, not {len(difference)}")
    mean = float(difference.mean())
    if not difference.any():
        return PairedTests(len(difference), mean, 0.0, 1.0, 0.0, 1.0)
    if np.ptp(difference) == 0:
        t = (float(np.copysign(np.inf, mean)), 0.0)
    else:
        t = stats.ttest_1samp(difference, 0.0)
    signed = stats.wilcoxon(difference, zero_method="wilcox")
    return PairedTests(len(difference), mean, float(t[0]), float(t[1]), float(signed.statistic), float(signed.pvalue))


class Effect(NamedTuple):
    """How large a paired difference (first - second) is, over ``n`` users.

    dz: mean difference in standard deviations of the differences (Cohen's d for pairs); 0 when all are 0, infinite when
    they are all the same. rank_biserial: in [-1, 1], (sum of ranks of positive differences - of negative ones) / sum of
    all ranks, zero differences dropped; 0 when all are 0. wins, ties, losses: users with a positive, no, a negative one.
    """

    dz: float
    rank_biserial: float
    wins: int
    ties: int
    losses: int


def effect_sizes(first: np.ndarray, second: np.ndarray) -> Effect:
    """Effect sizes of first - second; users without a value in either are left out.

    Errors: ValueError for fewer than two users.
    Reference: Kerby, The simple difference formula, Comprehensive Psychology 3, 2014 (rank-biserial correlation).
    """
    from scipy.stats import rankdata

    difference = paired_differences(np.arange(len(first)), first, np.arange(len(second)), second)
    if len(difference) < 2:
        raise ValueError(f"an effect size needs at least two users, not {len(difference)}")
    mean, spread = float(difference.mean()), float(difference.std(ddof=1))
    dz = mean / spread if spread else 0.0 if mean == 0 else float(np.copysign(np.inf, mean))
    nonzero = difference[difference != 0]
    ranks = rankdata(np.abs(nonzero))
    biserial = float((ranks * np.sign(nonzero)).sum() / ranks.sum()) if len(nonzero) else 0.0
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return Effect(dz, biserial, wins, len(difference) - wins - losses, losses)


def holm(pvalues: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values: of m, the i-th smallest becomes max over j <= i of min(1, (m - j + 1) p_(j)).

    Shape: [m] -> [m], in the order given. Rejecting where the adjusted value is below a level keeps the chance of any
    false rejection below it, whatever the tests have to do with each other.
    Errors: ValueError for values outside [0, 1].
    Reference: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    values = np.asarray(pvalues, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("found p-values outside [0, 1]")
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(1.0, values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


class Friedman(NamedTuple):
    """Whether k methods differ over N data sets. ranks [k]: mean ranks, 1 the best; cd: the least difference of two that counts."""

    ranks: np.ndarray
    pvalue: float
    cd: float


def friedman(values: np.ndarray, level: float = 0.05) -> Friedman:
    """Friedman's test of values [N, k], larger is better, and Nemenyi's critical difference of mean ranks.

    cd = q sqrt(k (k + 1) / (6 N)), q the upper ``level`` point of the studentised range of k groups with infinite degrees of
    freedom, over sqrt(2). Errors: ValueError for fewer than 2 data sets or 3 methods.
    Reference: Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006.
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    sets, methods = values.shape
    if sets < 2 or methods < 3:
        raise ValueError(f"found {sets} data sets and {methods} methods, wanted at least 2 and 3")
    ranks = stats.rankdata(-values, axis=1).mean(axis=0)
    q = stats.studentized_range.ppf(1 - level, methods, np.inf) / np.sqrt(2)
    pvalue = float(stats.friedmanchisquare(*values.T).pvalue)
    return Friedman(ranks, pvalue, float(q * np.sqrt(methods * (methods + 1) / (6 * sets))))
