"""What others' numbers mean: the same lists judged by the definitions of other frameworks.

Every function takes a :class:`Case` (lists, truth, train) and gives :class:`Figures`: one value a user, NaN for users who
are not counted there, and figures of all lists together. T is a user's truth, L his list, K the cut-off; names are those
of ``gfml.metrics.ranking`` where the idea is the same, others in the framework's own spelling. docs/metrics.md has the
table, the versions and what each gives on one example.

    recbole    RecBole 1.2.1: all T; ratings ignored; empty slots of a short list are its padding item
    warprec    WarpRec 2.2.8: users and items of train alone; unlisted items score 0 and fill short lists
    elliot     Elliot 0.3.1: users with T and L; gain 2^(r+1-t)-1; "MAP" is the mean of precision@1..K
    rectools   RecTools 0.19.0: all T; NDCG against K hits for everybody; MAP over T
    cornac     Cornac 3.0.1: known users and items; MAP and MRR over the whole ranking
    mmrec      MMRec: users of train with T
    lightgcn   LightGCN-PyTorch: all T
    trec       trec_eval (pytrec-eval-terrier 0.5.11): users with T and L; by score, ties by item name; RR without cut-off

All were written from their definitions and compared with what the packages answer; no code is theirs. WarpRec's means are
taken in single precision, as it takes them: they differ from exact ones in the seventh digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch

from gfml.base.errors import choice_error
from gfml.data.interactions import column_counts
from gfml.metrics.beyond import exposure_counts, list_mean, mass_head
from gfml.metrics.ranking import (
    average_precision,
    find_hits,
    find_places,
    graded_ndcg,
    hit,
    list_gains,
    means,
    mrr,
    ndcg,
    precision,
    recall,
    with_gains,
)

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What is judged; rows are users, columns items, of everything that occurs anywhere.

    top: int64 [U, L], best first, -1 for no item. truth, train: CSR [U, I]; truth's data are ratings, or ones.
    scores: float64 [U, L] of the lists, where they have any. user_names, item_names: text [U], [I], where they have any.
    again: int64 [U, L], what a list has once more, at its later places, where top has no item. given: int64 [U, L], the ranks
    that the file itself gives the places.
    ranks: int64 [nnz], the rank of each truth item among the known candidates, where the model that made the lists is at hand.
    appeared: int64 [I], the place of each item in order of first appearance in train, then truth; None: by id.
    """

    top: np.ndarray
    truth: sp.csr_array
    train: sp.csr_array
    scores: np.ndarray | None = None
    item_names: np.ndarray | None = None
    ranks: np.ndarray | None = None
    appeared: np.ndarray | None = None
    again: np.ndarray | None = None
    given: np.ndarray | None = None
    repeats: bool = False

    @property
    def num_users(self) -> int:
        return self.truth.shape[0]

    @property
    def num_items(self) -> int:
        return self.truth.shape[1]

    @cached_property
    def places(self) -> np.ndarray:
        """Where each listed item is in ``truth.data``; -1 for a miss, int64 [U, L]."""
        return find_places(self.top, self.truth, repeats=self.repeats)

    def as_listed(self) -> Case:
        """The lists with what they have more than once, which then counts each time."""
        if self.again is None:
            return self
        return replace(self, top=np.where(self.top < 0, self.again, self.top), again=None, repeats=True)

    @cached_property
    def hits(self) -> np.ndarray:
        return self.places >= 0

    @cached_property
    def num_relevant(self) -> np.ndarray:
        return np.diff(self.truth.indptr)

    @cached_property
    def listed(self) -> np.ndarray:
        """bool [U]: the user has a list."""
        return np.asarray((self.top >= 0).any(axis=1))

    @cached_property
    def lengths(self) -> np.ndarray:
        return (self.top >= 0).sum(axis=1)

    @cached_property
    def popularity(self) -> np.ndarray:
        """Train interactions of each item, int64 [I]."""
        return column_counts(self.train)

    @cached_property
    def active(self) -> np.ndarray:
        """bool [U]: the user has train interactions."""
        return np.diff(self.train.indptr) > 0

    def with_truth(self, keep: np.ndarray) -> Case:
        """Only the truth entries that ``keep`` (bool [nnz]) selects."""
        rows = np.repeat(np.arange(self.num_users), np.diff(self.truth.indptr))[keep]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self.num_users))])
        truth = sp.csr_array((self.truth.data[keep], self.truth.indices[keep], indptr), shape=self.truth.shape)
        return replace(self, truth=truth, ranks=None if self.ranks is None else self.ranks[keep])


@dataclass(frozen=True)
class Figures:
    """What a convention gives: per_user {"ndcg@10": float64 [U]}, NaN for users it does not count; totals of all lists.

    single: bool [U], the rows over which means are taken in single precision; None for exact means.
    """

    per_user: Values
    totals: dict[str, float] = field(default_factory=dict)
    single: np.ndarray | None = None

    @property
    def means(self) -> dict[str, float]:
        """Means over the users that are counted, and the totals; without those that are undefined."""
        totals = {name: float(value) for name, value in self.totals.items() if value == value}
        if self.single is None:
            return means(self.per_user) | totals
        rows = {name: torch.from_numpy(value[self.single].astype(np.float32)) for name, value in self.per_user.items()}
        found = {name: float(torch.nanmean(value)) for name, value in rows.items()}
        return {name: value for name, value in found.items() if value == value} | totals


def judge_as(name: str, case: Case, ks: Sequence[int]) -> Figures:
    """The figures of a convention by its name. UserError for an unknown one."""
    if name not in CONVENTIONS:
        raise choice_error("convention", name, CONVENTIONS)
    if not case.truth.has_sorted_indices:
        case = replace(case, truth=case.truth.sorted_indices())
    return CONVENTIONS[name](case, ks)


# -- the conventions


def recbole(case: Case, ks: Sequence[int], *, matrix: bool = False) -> Figures:
    """RecBole's evaluator on given lists; empty slots hold its padding item, which has a column and cannot hit.

    Users: all with T. Ratings are ignored. Catalogue: all items and the padding, so coverage is over I + 1.
    matrix: the lists stand in a score matrix whose other entries, and train's, are -inf, as when a model ranks: torch.topk
    then fills short lists with such items, in its own order, and they can hit.
    shannonentropy is in nats over the number of distinct items, tailpercentage the share of slots in the least
    popular tenth of train's items (ties by lower id).
    """
    if matrix:
        case = replace(case, top=_filled_by_topk(case, max(ks)))
    values: Values = {}
    totals: dict[str, float] = {}
    users = case.num_relevant > 0
    pad, size = case.num_items, case.num_items + 1
    counted = np.append(case.popularity, 0)
    known = np.flatnonzero(case.popularity)
    tail = np.zeros(size, dtype=bool)
    tail[known[np.argsort(case.popularity[known], kind="stable")][: max(1, int(len(known) * 0.1))]] = True
    for k in ks:
        values |= _binary(case, k)
        slots = _padded(case.top, k, pad)
        values |= {f"arp@{k}": counted[slots].mean(axis=1), f"tailpercentage@{k}": tail[slots].mean(axis=1)}
        exposure = np.bincount(slots[users].ravel(), minlength=size)
        totals |= {
            f"coverage@{k}": np.count_nonzero(exposure) / size,
            f"gini@{k}": _gini(exposure, size),
            f"shannonentropy@{k}": _entropy(exposure) / max(1, int(np.count_nonzero(exposure))),
        }
    return Figures(_only(values, users), totals)


def elliot(case: Case, ks: Sequence[int], *, threshold: float = 0.0) -> Figures:
    """Elliot's evaluator. Users: those with a list and a test item rated ``threshold`` or more, which alone is relevant;
    aclt, aplt, arp and the figures of all lists count every user with a list and a test item.

    ndcg has the gain 2^(r + 1 - threshold) - 1 of the ratings, nDCGRendle2020 is binary. "map" is the mean of precision@n
    over n = 1..K and no average precision; "mar" the same of recall. gini is 1 - Gini: high is even. coverage counts
    items, entropy is in bits. Tail: items beyond the fewest most popular that hold 80 % of train. An item unknown to
    train is most novel, and its popularity is undefined: ``arp`` is NaN for such a list, where Elliot itself stops. An item
    that a list has twice counts twice, so that recall may pass 1, but once in the tail.
    """
    once = case.top
    case = case.as_listed()
    judged = (case.num_relevant > 0) & case.listed  # whose lists count, whatever their ratings
    case = case.with_truth(case.truth.data >= threshold)
    users = (case.num_relevant > 0) & case.listed
    lists: Values = {}
    values: Values = {}
    totals: dict[str, float] = {}
    gains = with_gains(_shifted(case.truth, threshold), "exp1")
    found = list_gains(case.places, gains)
    tail = (case.popularity > 0) & ~mass_head(case.popularity)
    unknown = np.where(case.popularity > 0, case.popularity, np.nan)
    users_of_train = int(np.count_nonzero(case.active))
    novelty = {"epc": 1 - np.where(case.popularity > 0, case.popularity, 0) / max(1, users_of_train),
               "efd": _information(case.popularity)}  # fmt: skip
    for k in ks:
        values |= _binary(case, k) | {f"ndcg@{k}": graded_ndcg(found, gains, k)}
        values[f"nDCGRendle2020@{k}"] = ndcg(case.hits, case.num_relevant, k)
        running = _cumulated(case.hits, k)
        values[f"map@{k}"] = (running / np.arange(1, k + 1)).mean(axis=1)
        values[f"mar@{k}"] = running.mean(axis=1) / np.maximum(case.num_relevant, 1)
        top = case.top[:, :k]
        taken = np.maximum(1, (top >= 0).sum(axis=1))
        in_tail = ((once[:, :k] >= 0) & tail[top]).sum(axis=1)
        lists |= {f"aclt@{k}": in_tail.astype(float), f"aplt@{k}": in_tail / taken,
                  f"arp@{k}": np.where(top >= 0, unknown[top], 0).sum(axis=1) / taken}  # fmt: skip
        values |= {f"{name}@{k}": _discounted_hits(case, table, k) for name, table in novelty.items()}
        exposure = exposure_counts(top[judged], case.num_items)
        known_items = int(np.count_nonzero(case.popularity))
        totals |= {f"coverage@{k}": float(np.count_nonzero(exposure)), f"gini@{k}": 1 - _gini(exposure, known_items, known_items - 1),
                   f"entropy@{k}": _list_entropy(top[judged], exposure)}  # fmt: skip
    return Figures(_only(values, users) | _only(lists, judged), totals)


def warprec(case: Case, ks: Sequence[int], *, seed: int = 42) -> Figures:
    """WarpRec's evaluator on a list file. Users: those of train with a known test item.

    Users and items that train lacks are dropped from truth and lists, and so is truth rated 0 or less. Train pairs are never
    recommended, so a test pair that is in train is a sure miss. Unlisted items score 0 (above listed ones with negative scores) and fill up short
    lists; equal scores are ordered by a hash of ``seed``, user and item. Tail: beyond the most popular items that hold more
    than 80 % of train. ndcg has the gain 2^(r+1)-1, map min(T, K).
    """
    known = case.popularity > 0
    rated = case.truth.data > 0
    case = case.with_truth(rated & known[case.truth.indices] & np.repeat(case.active, case.num_relevant))
    case = replace(case, top=_warprec_lists(case, max(ks), seed), scores=None)
    values: Values = {}
    totals: dict[str, float] = {}
    users = case.num_relevant > 0
    tail = _warprec_tail(case.popularity)
    popular = torch.from_numpy(np.maximum(case.popularity, 1)).float()
    tables = {"epc": 1 - popular / max(1, int(case.active.sum())), "efd": -torch.log2(popular / case.train.nnz)}
    for k in ks:
        top = case.top[:, :k]
        values |= _binary(case, k) | {f"map@{k}": _warprec_map(case, k)}
        values |= _warprec_ndcg(case, k) | _warprec_novelty(case, tables, k)
        in_tail = ((top >= 0) & tail[top]).sum(axis=1)
        values |= {f"aclt@{k}": in_tail.astype(float), f"aplt@{k}": in_tail / k,
                   f"arp@{k}": list_mean(top, np.maximum(case.popularity, 1).astype(float))}  # fmt: skip
        exposure = torch.from_numpy(exposure_counts(top[users], case.num_items)[known]).float()
        totals |= _warprec_exposure(exposure, k)
    return Figures(_only(values, users), totals, case.active)


def rectools(case: Case, ks: Sequence[int], *, achievable: bool = False, divide_by_k: bool = False) -> Figures:
    """RecTools' ``calc_metrics``. Users: all with T; coverage, arp, novelty: all lists.

    ndcg divides by the DCG of K hits for everybody (achievable: of min(T, K), its ``divide_by_achievable``), map by T
    (divide_by_k: by K). coverage is a number of items; novelty divides by the users of train. serendipity weighs a hit by how
    much higher it stands here than in the ranking by popularity, items of equal popularity sharing a place. Ranks are those of
    the file, gaps and all. A relevant item that a list has n times is n hits, and n of the user's truth.
    """
    case = case.as_listed()
    values: Values = {}
    totals: dict[str, float] = {}
    users = case.num_relevant > 0
    lists: Values = {}
    share = np.maximum(case.popularity, 1) / max(1, int(np.count_nonzero(case.active)))
    known = int(np.count_nonzero(case.popularity))
    ranks = np.arange(1.0, case.top.shape[1] + 1)[None, :] if case.given is None else case.given
    once = find_hits(case.top, case.truth).sum(axis=1)
    relevant = np.maximum(1, case.num_relevant + case.hits.sum(axis=1) - once)
    for k in ks:
        hits, top = case.hits & (ranks <= k), np.where(ranks <= k, case.top, -1)
        found, ideal = hits.sum(axis=1), np.cumsum(1 / np.log2(np.arange(2, k + 2)))
        reached = np.minimum(relevant, k) if achievable else np.full(case.num_users, k)
        precise = (hits * np.cumsum(hits, axis=1) / ranks).sum(axis=1)
        values |= {f"precision@{k}": found / k, f"recall@{k}": found / relevant, f"hit@{k}": (found > 0).astype(float),
                   f"ndcg@{k}": (hits / np.log2(ranks + 1)).sum(axis=1) / ideal[reached - 1],
                   f"map@{k}": precise / (k if divide_by_k else relevant),
                   f"mrr@{k}": (hits / ranks).max(axis=1, initial=0.0),
                   f"r_precision@{k}": found / np.minimum(relevant, k),
                   f"covered_users@{k}": case.listed.astype(float)}  # fmt: skip
        arp = list_mean(top, case.popularity.astype(float))
        lists |= {f"arp@{k}": arp, f"arp_share@{k}": arp / max(1, case.train.nnz), f"novelty@{k}": list_mean(top, -np.log2(share)),
                  f"serendipity@{k}": _serendipity(case, hits, top, ranks),
                  f"sufficient@{k}": ((top >= 0).sum(axis=1) >= k).astype(float)}  # fmt: skip
        covered = float(np.count_nonzero(exposure_counts(top, case.num_items)))
        totals |= {f"coverage@{k}": covered, f"coverage_share@{k}": covered / max(1, known)}
    return Figures(_only(values, users) | _only(lists, case.listed), totals)


def cornac(case: Case, ks: Sequence[int], *, exclude_unknowns: bool = True, threshold: float = 1.0) -> Figures:
    """Cornac's ``ranking_eval``. Users: those with a test item rated ``threshold`` or more, by default known ones alone.

    exclude_unknowns: users and items that train lacks are dropped; without it items of the test part are candidates too.
    Candidates are all known items but train's, a test item that is in train stays one. ``map`` and ``mrr`` have no cut-off:
    unlisted items follow the list in order of first appearance unless the case has the whole ranking. ncrr: sum of 1 / rank of the hits over its best value.
    """
    keep = case.truth.data >= threshold
    known = case.popularity > 0
    if not exclude_unknowns:
        known = known | (np.bincount(case.truth.indices, minlength=case.num_items) > 0)
    else:
        keep &= known[case.truth.indices] & np.repeat(case.active, case.num_relevant)
    case = case.with_truth(keep)
    users = case.num_relevant > 0
    if case.ranks is None:
        top, ranks = _cornac_ranking(case, known, max(ks))
        judged = replace(case, top=top)
    else:  # the lists are a model's own and full: only unknown items go
        judged, ranks = replace(case, top=_closed_up(np.where(known[case.top], case.top, -1))), case.ranks
    values: Values = {"map": _whole_precision(case, ranks), "mrr": 1 / _first_rank(case, ranks)}
    for k in ks:
        values |= {name: value for name, value in _binary(judged, k).items() if not name.startswith(("map@", "mrr@"))}
        harmonic = np.concatenate([[np.nan], np.cumsum(1 / np.arange(1, k + 1))])
        kept = judged.hits[:, :k]
        found = (kept / np.arange(1, kept.shape[1] + 1)).sum(axis=1)
        values[f"ncrr@{k}"] = found / harmonic[np.minimum(case.num_relevant, k)]
    return Figures(_only(values, users))


def mmrec(case: Case, ks: Sequence[int]) -> Figures:
    """MMRec's evaluator. Users: those with T and train interactions (its ``filter_out_cod_start_users``).

    recall, precision, ndcg and map as ours; ``recall2`` pools all users: sum of hits over sum of T. It prints four digits.
    """
    users = (case.num_relevant > 0) & case.active
    values: Values = {}
    totals: dict[str, float] = {}
    for k in ks:
        values |= {name: value for name, value in _binary(case, k).items() if not name.startswith(("hit@", "mrr@"))}
        totals[f"recall2@{k}"] = float(case.hits[users, :k].sum() / max(1, case.num_relevant[users].sum()))
    return Figures(_only(values, users), totals)


def lightgcn(case: Case, ks: Sequence[int]) -> Figures:
    """LightGCN-PyTorch's ``Test``: precision, recall and ndcg over all users with T, as ours."""
    values: Values = {}
    for k in ks:
        found = _binary(case, k)
        values |= {f"{name}@{k}": found[f"{name}@{k}"] for name in ("precision", "recall", "ndcg")}
    return Figures(_only(values, case.num_relevant > 0))


def trec(case: Case, ks: Sequence[int], *, complete: bool = False, gain: str = "linear") -> Figures:
    """trec_eval. Users: with T and L; complete: all with T (``-c``, and what ir-measures does).

    Lists are ordered by score, held in single precision, ties by item name, later names first; the rank only counts where
    there are no scores. An item stands in a list once, which closes up. Truth rated 0 or less is not relevant. ndcg's gain is the rating; map divides by T; mrr has no
    cut-off. mrr@K is ir-measures' RR@K, which takes tied items the other way round, earlier names first.
    """
    users = (case.num_relevant > 0) & (complete | case.listed)
    case = case.with_truth(case.truth.data > 0)
    if case.scores is None:  # a run is a table of scores, where an item stands once
        early = case = replace(case, top=_closed_up(case.top))
    else:
        early = replace(case, top=order_by_score(case.top, case.scores, case.item_names, later_first=False))
        case = replace(case, top=order_by_score(case.top, case.scores, case.item_names))
    gains = with_gains(case.truth, gain)
    found = list_gains(case.places, gains)
    values: Values = {"mrr": mrr(case.hits, case.hits.shape[1])}
    for k in ks:
        values |= _binary(case, k, denominator="n") | {f"ndcg@{k}": graded_ndcg(found, gains, k)}
        values[f"mrr@{k}"] = mrr(early.hits, k)
    return Figures({name: np.where(users, np.nan_to_num(value), np.nan) for name, value in values.items()})


CONVENTIONS: Mapping[str, Callable[..., Figures]] = {
    "recbole": recbole,
    "warprec": warprec,
    "elliot": elliot,
    "rectools": rectools,
    "cornac": cornac,
    "mmrec": mmrec,
    "lightgcn": lightgcn,
    "trec": trec,
}


# -- parts


def order_by_score(
    top: np.ndarray, scores: np.ndarray, names: np.ndarray | None, *, later_first: bool = True
) -> np.ndarray:
    """The lists by score descending, equal ones by item name in byte order, later names first or last; no item at the end.

    later_first is trec_eval's rule, which holds scores in single precision: they are compared so.
    """
    held = np.where(top >= 0, scores.astype(np.float32) if later_first else scores, -np.inf)
    if names is None:
        place = np.arange(int(top.max(initial=0)) + 1)
    else:
        place = np.empty(len(names), dtype=np.int64)
        place[np.argsort(np.char.encode(names.astype(str), "utf-8"), kind="stable")] = np.arange(len(names))
    name = np.where(top >= 0, place[top], -1)
    order = np.lexsort((-name if later_first else name, top < 0, -held), axis=1)
    return np.take_along_axis(top, order, axis=1)


def _binary(case: Case, k: int, denominator: str = "min") -> Values:
    """The six of gfml.metrics.ranking at one cut-off."""
    hits, count = case.hits, case.num_relevant
    return {f"precision@{k}": precision(hits, k), f"recall@{k}": recall(hits, count, k), f"ndcg@{k}": ndcg(hits, count, k),
            f"hit@{k}": hit(hits, k), f"mrr@{k}": mrr(hits, k),
            f"map@{k}": average_precision(hits, count, k, denominator)}  # fmt: skip


def _only(values: Values, users: np.ndarray) -> Values:
    return {name: np.where(users, value, np.nan) for name, value in values.items()}


def _padded(top: np.ndarray, k: int, pad: int) -> np.ndarray:
    """int64 [U, k], ``pad`` where there is no item."""
    slots = np.full((len(top), k), pad, dtype=np.int64)
    slots[:, : top.shape[1]] = top[:, :k]
    return np.where(slots < 0, pad, slots)


def _filled_by_topk(case: Case, k: int) -> np.ndarray:
    """int64 [U, k]: torch.topk of a float32 matrix with a padding column, -inf wherever nothing better is known."""
    scores = torch.full((case.num_users, case.num_items + 1), -torch.inf)
    rows, columns = np.nonzero(case.top >= 0)
    scores[rows, case.top[rows, columns] + 1] = torch.from_numpy(case.top.shape[1] - columns).float()
    scores[np.repeat(np.arange(case.num_users), np.diff(case.train.indptr)), case.train.indices + 1] = -torch.inf
    return scores.topk(min(k, scores.shape[1]), dim=1).indices.numpy() - 1


def _cumulated(hits: np.ndarray, k: int) -> np.ndarray:
    """Hits among the first n, for n = 1..k; int64 [U, k]."""
    wide = np.zeros((len(hits), k), dtype=np.int64)
    wide[:, : hits.shape[1]] = hits[:, :k]
    return wide.cumsum(axis=1)


def _gini(exposure: np.ndarray, size: int, below: int | None = None) -> float:
    """sum_j (2j - size - 1) c_j / (below sum c) over the recommended items, as the last of ``size`` in ascending order."""
    counts = np.sort(exposure[exposure > 0]).astype(np.float64)
    divided = counts.sum() * (size if below is None else below)
    if divided <= 0:
        return float("nan")
    weight = 2 * np.arange(size - len(counts) + 1, size + 1) - size - 1
    return float(weight @ counts / divided)


def _entropy(exposure: np.ndarray) -> float:
    """Of the exposure shares, in nats."""
    p = exposure[exposure > 0] / max(1, exposure.sum())
    return float(-(p * np.log(p)).sum())


def _list_entropy(top: np.ndarray, exposure: np.ndarray) -> float:
    """Mean over lists of the mean of -log2(exposure share) of their items."""
    surprise = -np.log2(np.maximum(exposure, 1) / max(1, exposure.sum()))
    return float(np.nanmean(list_mean(top, surprise))) if len(top) else float("nan")


def _information(popularity: np.ndarray) -> np.ndarray:
    """-log2 of the share of train interactions, [I]; an unknown item has that of the rarest known one."""
    known = popularity[popularity > 0]
    return -np.log2(np.where(popularity > 0, popularity, known.min(initial=1)) / max(1, popularity.sum()))


def _discounted_hits(case: Case, table: np.ndarray, k: int) -> np.ndarray:
    """sum of table[i] / log2(rank + 1) over the hits, over the same sum of ones for all items of the list."""
    top, hits = case.top[:, :k], case.hits[:, :k]
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    norm = np.where(top >= 0, discount, 0.0).sum(axis=1)
    found = np.where(hits, table[top] * discount, 0.0).sum(axis=1)
    return np.divide(found, norm, out=np.zeros(len(top)), where=norm > 0)


def _shifted(truth: sp.csr_array, by: float) -> sp.csr_array:
    return sp.csr_array((truth.data - by, truth.indices, truth.indptr), shape=truth.shape)


def _serendipity(case: Case, hits: np.ndarray, top: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Mean over the list of max(P_user - P_any, 0) of the hits, P = (I + 1 - rank) / I over the items of train."""
    known = case.popularity[case.popularity > 0]
    size = len(known)
    levels = np.unique(known)[::-1]  # the place of a popularity is its own rank among distinct ones
    place = len(levels) - np.searchsorted(levels[::-1], np.maximum(case.popularity, 1))
    anyone = np.where(case.popularity > 0, (size + 1 - place) / max(1, size), 0.0)
    gained = np.where(hits, np.maximum((size + 1 - ranks) / max(1, size) - anyone[top], 0.0), 0.0)
    return gained.sum(axis=1) / np.maximum(1, (top >= 0).sum(axis=1))


def _blocks(users: np.ndarray, num_items: int) -> Iterator[np.ndarray]:
    """The users in parts whose users x items tables hold at most 4 million entries."""
    size = max(1, (4 << 20) // max(1, num_items))
    return (users[start : start + size] for start in range(0, len(users), size))


def _marked(part: sp.csr_array, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the stored pairs of these rows are: their place among ``rows``, and the column."""
    block = part[rows]
    return np.repeat(np.arange(len(rows)), np.diff(block.indptr)), block.indices


def _cornac_ranking(case: Case, known: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [U, k], the best candidates, and int64 [nnz], the rank of every truth item among all of them.

    Candidates: known items but train's, and the truth; listed ones first, then the others in order of appearance.
    """
    best = np.full((case.num_users, k), -1, dtype=np.int64)
    ranks = np.empty(case.truth.nnz, dtype=np.int64)
    behind = case.num_items + (np.arange(case.num_items) if case.appeared is None else case.appeared)
    for rows in _blocks(np.flatnonzero(case.num_relevant), case.num_items):
        key = np.where(known, behind, np.inf)[None, :].repeat(len(rows), axis=0)
        row, place = np.nonzero(case.top[rows] >= 0)
        item = case.top[rows][row, place]
        key[row, item] = np.where(known[item], place, np.inf)
        own, truth = _marked(case.truth, rows)
        wanted = key[own, truth]
        key[_marked(case.train, rows)] = np.inf
        key[own, truth] = wanted
        order = np.argsort(key, axis=1, kind="stable")
        top = np.where(np.isinf(np.take_along_axis(key, order, axis=1)), -1, order)[:, :k]
        best[rows, : top.shape[1]] = top
        position = np.empty_like(order)
        np.put_along_axis(position, order, np.arange(case.num_items)[None, :].repeat(len(rows), axis=0), axis=1)
        ranks[np.isin(np.repeat(np.arange(case.num_users), case.num_relevant), rows)] = position[own, truth] + 1
    return best, ranks


def _closed_up(top: np.ndarray) -> np.ndarray:
    """The same lists with the gaps (-1) at the end."""
    return np.take_along_axis(top, np.argsort(top < 0, axis=1, kind="stable"), axis=1)


def _whole_precision(case: Case, ranks: np.ndarray) -> np.ndarray:
    """Average precision over the whole ranking from the ranks of the truth items, [U]."""
    rows = np.repeat(np.arange(case.num_users), case.num_relevant)
    order = np.lexsort((ranks, rows))
    nth = np.arange(len(rows)) - np.repeat(case.truth.indptr[:-1], case.num_relevant) + 1
    found = np.bincount(rows, weights=nth / ranks[order], minlength=case.num_users)
    return found / np.maximum(case.num_relevant, 1)


def _first_rank(case: Case, ranks: np.ndarray) -> np.ndarray:
    """The lowest rank of a truth item, [U]; infinite without one."""
    first = np.full(case.num_users, np.inf)
    np.minimum.at(first, np.repeat(np.arange(case.num_users), case.num_relevant), ranks)
    return first


def _warprec_tail(popularity: np.ndarray) -> np.ndarray:
    """bool [I]: known items after the most popular that hold more than 80 % of train; of equal ones in torch's own order."""
    known = np.flatnonzero(popularity)
    counts, order = torch.sort(torch.from_numpy(popularity[known]).float(), descending=True)
    head = int((counts.cumsum(0) <= counts.sum() * 0.8).sum()) + 1
    tail = np.zeros(len(popularity), dtype=bool)
    tail[known[order[head:].numpy()]] = True
    return tail


def _warprec_map(case: Case, k: int) -> np.ndarray:
    """Average precision over min(T, K), in single precision."""
    hits = torch.zeros(case.num_users, k)
    hits[:, : case.hits.shape[1]] = torch.from_numpy(case.hits[:, :k]).float()
    found = (hits.cumsum(dim=1) / torch.arange(1, k + 1) * hits).sum(dim=1)
    return (found / torch.from_numpy(case.num_relevant).clamp(1, k)).double().numpy()


def _warprec_ndcg(case: Case, k: int) -> Values:
    """Graded and binary NDCG in single precision."""
    found = {}
    for name, gains in (("ndcg", with_gains(case.truth, "exp1")), ("nDCGRendle2020", _ones(case.truth))):
        ideal = np.zeros((case.num_users, k), dtype=np.float32)
        rows = np.repeat(np.arange(case.num_users), case.num_relevant)
        order = np.lexsort((-gains.data, rows))
        rank = np.arange(len(rows)) - np.repeat(gains.indptr[:-1], case.num_relevant)
        ideal[rows[rank < k], rank[rank < k]] = gains.data[order][rank < k]
        best = _dcg(torch.from_numpy(ideal)).clamp(min=1e-10)
        own = torch.from_numpy(list_gains(case.places, gains)[:, :k].astype(np.float32))
        found[f"{name}@{k}"] = (_dcg(own) / best).double().numpy()
    return found


def _warprec_novelty(case: Case, tables: Mapping[str, torch.Tensor], k: int) -> Values:
    """Discounted sum of the novelty of the hits over the discount of K slots, in single precision."""
    hits, norm = torch.from_numpy(case.hits[:, :k]).float(), _dcg(torch.ones(1, k))
    top = torch.from_numpy(case.top[:, :k])
    return {f"{name}@{k}": (_dcg(hits * table[top]) / norm).double().numpy() for name, table in tables.items()}


def _warprec_exposure(exposure: torch.Tensor, k: int) -> dict[str, float]:
    """coverage (a number of items), gini over I - 1 and entropy in nats, in single precision."""
    size, counts = len(exposure), exposure[exposure > 0].sort().values
    weight = 2.0 * torch.arange(size - len(counts) + 1, size + 1) - size - 1
    share = counts / counts.sum()
    kept = exposure[exposure > 0] / exposure.sum()
    return {f"coverage@{k}": float(len(counts)), f"gini@{k}": float((weight * share).sum() / max(1, size - 1)),
            f"entropy@{k}": float(-(kept * kept.log()).sum())}  # fmt: skip


def _dcg(gains: torch.Tensor) -> torch.Tensor:
    """sum of gains / log2(rank + 1), [U, k] -> [U]."""
    return (gains / torch.log2(torch.arange(2, gains.shape[1] + 2))).sum(dim=1)


def _ones(truth: sp.csr_array) -> sp.csr_array:
    return sp.csr_array((np.ones(truth.nnz), truth.indices, truth.indptr), shape=truth.shape)


def _warprec_lists(case: Case, k: int, seed: int) -> np.ndarray:
    """int64 [U, k]: the best k by score as WarpRec ranks a list file; -1 in rows of users without known truth."""
    items = np.flatnonzero(case.popularity)
    column = np.full(case.num_items, -1)
    column[items] = np.arange(len(items))
    number = np.cumsum(case.active) - 1  # of each user, among those of train
    found = np.full((case.num_users, k), -1, dtype=np.int64)
    for users in _blocks(np.flatnonzero(case.num_relevant), len(items)):
        matrix = np.zeros((len(users), len(items)), dtype=np.float32)
        top = case.top[users]
        rows, ranks = np.nonzero((top >= 0) & (column[top] >= 0))
        given = top.shape[1] - ranks if case.scores is None else case.scores[users][rows, ranks]
        matrix[rows, column[top[rows, ranks]]] = given
        rows, train = _marked(case.train, users)
        matrix[rows, column[train]] = -np.inf
        order = np.lexsort((-_tie_keys(seed, number[users], len(items)), -matrix), axis=1)[:, :k]
        found[users, : order.shape[1]] = items[order]
    return found


def _tie_keys(seed: int, users: np.ndarray, items: int) -> np.ndarray:
    """int64 [users, items]: WarpRec's random key of a pair, a MurmurHash3 finaliser of seed, user and item number."""
    golden = np.uint32(0x9E3779B1)
    start = np.uint32((seed ^ (seed >> 32)) & 0xFFFFFFFF)
    with np.errstate(over="ignore"):
        user = _murmur(_murmur(users.astype(np.uint32) * golden ^ start))
        item = _murmur(np.arange(items, dtype=np.uint32) * golden + np.uint32(1))
        return (_murmur(user[:, None] ^ item[None, :]) >> np.uint32(2)).astype(np.int64)


def _murmur(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's 32-bit finaliser, a public algorithm."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
