"""Every stored value of the eight conventions, from the stored lists; then each definition on lists of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from gfml.base.errors import UserError
from gfml.data.lists import read_lists, read_pairs
from gfml.metrics import conventions
from gfml.metrics.conventions import CONVENTIONS, Case, judge_as
from gfml.ranking.judged import case_of, ground_of, ours

STORED = Path(__file__).resolve().parents[2] / "golden" / "conventions"
VALUES = json.loads((STORED / "values.json").read_text(encoding="utf-8"))
KS = (5, 10, 20)


def case(*, ratings: bool = False, scores: bool = False) -> Case:
    """The stored example. Unless ratings are asked for, every truth row counts 1; scores: ordered by them, not by rank."""
    table = read_lists(STORED / "lists.tsv")
    truth, train = read_pairs(STORED / "truth.tsv"), read_pairs(STORED / "train.tsv")
    if not ratings:
        truth = replace(truth, ratings=np.ones(len(truth.users)))
    ground = ground_of(truth, train, [table])
    found, _ = case_of(replace(table, scores=None), ground)
    if scores:
        by_score, _ = case_of(replace(table, ranks=None), ground)
        found = replace(by_score, item_names=found.item_names)
    return found


def known_only(full: Case) -> Case:
    """Lists without the items that train lacks, closed up."""
    known = np.append(full.popularity > 0, False)[full.top]
    top = np.full_like(full.top, -1)
    for row, keep in enumerate(known):
        top[row, : keep.sum()] = full.top[row, keep]
    return replace(full, top=top)


# Per row: package, figures, the part of the stored name that names the variant, and what its names are called here.
SERENDIPITY = {"novelty[MeanInvUserFreq]": "novelty", "coverage[CatalogCoverage normalize]": "coverage_share",
               "coverage[CatalogCoverage]": "coverage", "precision[r_precision=True]": "r_precision",
               "arp[normalize]": "arp_share"}  # fmt: skip
ROWS = {
    "recbole": ("recbole", lambda: conventions.recbole(case(), KS), "", {}),
    "recbole matrix": ("recbole", lambda: conventions.recbole(case(), KS, matrix=True), "[score matrix, rest -inf]", {}),
    "elliot": ("elliot", lambda: conventions.elliot(case(), KS), "",
               {"entropy(SEntropy)": "entropy", "ndcg[nDCGRendle2020]": "nDCGRendle2020"}),
    "elliot ratings": ("elliot", lambda: conventions.elliot(case(ratings=True), KS), "[ratings]", {}),
    "elliot known": ("elliot", lambda: conventions.elliot(known_only(case()), KS),
                     "[unknown items dropped from the lists first]", {}),
    "elliot threshold": ("elliot", lambda: conventions.elliot(case(ratings=True), KS, threshold=4),
                         "[relevance_threshold 4]", {}),
    "warprec": ("warprec", lambda: conventions.warprec(case(), KS), "",
                {"entropy(ShannonEntropy)": "entropy", "ndcg[nDCGRendle2020]": "nDCGRendle2020"}),
    "warprec ratings": ("warprec", lambda: conventions.warprec(case(ratings=True), KS), "[ratings]", {}),
    "warprec ties": ("warprec", lambda: conventions.warprec(case(scores=True), KS), "[score ties]", {}),
    "rectools": ("rectools", lambda: conventions.rectools(case(), KS), "", SERENDIPITY),
    "rectools achievable": ("rectools", lambda: conventions.rectools(case(), KS, achievable=True),
                            "[divide_by_achievable=True]", {}),
    "rectools by k": ("rectools", lambda: conventions.rectools(case(), KS, divide_by_k=True), "[divide_by_k=True]", {}),
    "cornac": ("cornac", lambda: conventions.cornac(case(), KS), "", {"map(no cut-off)": "map", "mrr(no cut-off)": "mrr"}),
    "cornac all": ("cornac", lambda: conventions.cornac(case(), KS, exclude_unknowns=False), "[exclude_unknowns=False]",
                   {"map(no cut-off)": "map", "mrr(no cut-off)": "mrr"}),
    "mmrec": ("mmrec", lambda: conventions.mmrec(case(), KS), "", {}),
    "lightgcn": ("lightgcn-pytorch", lambda: conventions.lightgcn(case(), KS), "", {}),
    "trec": ("pytrec-eval-terrier", lambda: conventions.trec(case(), KS), "", {}),
    "trec ratings": ("pytrec-eval-terrier", lambda: conventions.trec(case(ratings=True), KS), "[ratings]", {}),
    "trec ties": ("pytrec-eval-terrier", lambda: conventions.trec(case(scores=True), KS), "[score ties]", {}),
    "trec complete": ("ir-measures", lambda: conventions.trec(case(), KS, complete=True), "", {}),
    "trec complete ratings": ("ir-measures", lambda: conventions.trec(case(ratings=True), KS, complete=True), "[ratings]", {}),
    "trec complete exp": ("ir-measures", lambda: conventions.trec(case(ratings=True), KS, complete=True, gain="exp"),
                          "[2^r-1]", {}),
    "trec complete ties": ("ir-measures", lambda: conventions.trec(case(scores=True), KS, complete=True), "[score ties]", {}),
}  # fmt: skip
# In the files, but no figure of a convention: the number of users is checked below.
NOT_FIGURES = {"n_queries"}


def wanted(package: str, variant: str, called: dict[str, str]) -> dict[str, float]:
    """The stored values of a variant under the names used here."""
    found = {}
    for stored, value in VALUES[package].items():
        name, at, k = stored.partition("@")
        if not isinstance(value, (int, float)) or name in NOT_FIGURES:
            continue
        plain = name.replace(variant, "") if variant else name
        own = called.get(plain, plain)
        if (variant and variant not in name) or "[" in own:
            continue
        found[f"{own}{at}{k}"] = value
    return found


@pytest.mark.parametrize("row", ROWS)
def test_stored_values(row: str) -> None:
    package, figures, variant, called = ROWS[row]
    values, found = wanted(package, variant, called), figures().means
    assert values and values.keys() <= found.keys()
    for name, value in values.items():
        # Half a unit of the ninth stored digit is beyond the values' own precision.
        assert found[name] == pytest.approx(value, rel=0, abs=1e-9 + 5e-10), name


def test_every_stored_variant_of_the_eight_is_checked() -> None:
    for package in {package for package, *_ in ROWS.values()}:
        stored = {name for name, value in VALUES[package].items() if isinstance(value, (int, float))}
        checked = set()
        for other, _, variant, called in ROWS.values():
            if other == package:
                back = {own: name for name, own in called.items()}
                for name in wanted(package, variant, called):
                    own, at, k = name.partition("@")
                    checked.add(f"{back.get(own, own)}{variant}{at}{k}")
        # A variant may stand before or after the cut-off's name: compare without order.
        assert {"".join(sorted(name)) for name in stored} - {"".join(sorted(name)) for name in checked} <= {
            "".join(sorted(name)) for name in NOT_FIGURES
        }, package


def test_users_of_trec() -> None:
    assert (
        np.count_nonzero(~np.isnan(conventions.trec(case(), KS).per_user["ndcg@10"]))
        == VALUES["pytrec-eval-terrier"]["n_queries"]
    )


def test_ours_are_the_stored_values_but_for_novelty() -> None:
    figures, users = ours(case(), KS)
    assert len(users) == 57
    found = figures.means
    for stored, value in VALUES["gfml"].items():
        name = stored.partition("@")[0]
        if not isinstance(value, float) or name in ("map_k", "map_n"):
            continue
        if name == "novelty":  # the stored one divided by all 60 users, ours by the 58 of train
            value += np.log2(58 / 60)
        assert found[stored] == pytest.approx(value, abs=2e-9), stored
    for denominator in ("k", "n"):
        means = ours(case(), KS, map_denominator=denominator)[0].means
        assert means["map@10"] == pytest.approx(VALUES["gfml"][f"map_{denominator}@10"], abs=2e-9)


OTHER = json.loads((STORED / "other_lists.json").read_text(encoding="utf-8"))["cases"]
OTHER_KS = (3, 10, 30)
VARIANTS = {"cornac-all": partial(conventions.cornac, exclude_unknowns=False), "ir": partial(conventions.trec, complete=True), "elliot-t3": partial(conventions.elliot, threshold=3),
            "rectools-ach": partial(conventions.rectools, achievable=True, divide_by_k=True)}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
def test_values_of_other_lists(kind: str, tmp_path: Path) -> None:
    for part in ("train", "truth", "lists"):
        (tmp_path / f"{part}.tsv").write_text(OTHER[kind][part], encoding="utf-8")
    table, truth, train = (read(tmp_path / f"{part}.tsv") for read, part in
                           ((read_lists, "lists"), (read_pairs, "truth"), (read_pairs, "train")))  # fmt: skip
    cases = {}
    for rating, ratings in (("ones", np.ones(len(truth.users))), ("ratings", truth.ratings)):
        ground = ground_of(replace(truth, ratings=ratings), train, [table])
        cases[rating, "rank"], cases[rating, "score"] = (
            case_of(replace(table, **{other: None}), ground)[0] for other in ("scores", "ranks")
        )
    for key, values in OTHER[kind]["values"].items():
        name, rating, order = key.split("/")
        how = VARIANTS.get(name) or CONVENTIONS[name]
        found = how(cases[rating, order], OTHER_KS).means
        # Values have ten digits.
        assert {metric: found.get(metric) for metric in values} == pytest.approx(values, rel=0, abs=1e-9), key


def test_tail_of_warprec_begins_beyond_80_percent() -> None:
    assert conventions._warprec_tail(np.array([0, 40, 25, 15, 12, 8])).tolist() == [False] * 5 + [
        True
    ]  # 80 is not more


def small(
    top: list[list[int]], truth: list[dict[int, float]], train: list[list[int]], items: int = 6, **more: object
) -> Case:
    def matrix(rows: list[dict[int, float]]) -> sp.csr_array:
        cells = [(r, c, v) for r, row in enumerate(rows) for c, v in row.items()]
        r, c, v = (np.array(part) for part in zip(*cells, strict=True))
        found = sp.coo_array((v.astype(float), (r, c)), shape=(len(rows), items)).tocsr()
        found.sort_indices()
        return found

    return Case(np.array(top), matrix(truth), matrix([dict.fromkeys(row, 1.0) for row in train]), **more)


def test_a_repeated_item_counts_once() -> None:
    twice = small([[2, 2, 3], [0, 1, -1]], [{2: 1}, {0: 1}], [[0], [2, 3]])
    for name in CONVENTIONS:
        means = judge_as(name, twice, [3]).means
        assert means["recall@3"] <= 1 and means["precision@3"] < 0.34, name
    means = ours(twice, [3])[0].means
    assert means["recall@3"] == means["ndcg@3"] == means["map@3"] == 1


def test_trec_orders_ties_by_later_name_in_single_precision() -> None:
    one = small([[0, 1]], [{1: 1}], [[5]], item_names=np.array(["a", "b", "c", "d", "e", "f"]),
                scores=np.array([[16777217.0, 16777216.0]]))  # fmt: skip
    assert conventions.trec(one, [1]).means["precision@1"] == 1  # one float32: b before a
    apart = replace(one, scores=np.array([[16777218.0, 16777216.0]]))
    assert conventions.trec(apart, [1]).means["precision@1"] == 0
    tied = replace(one, scores=np.array([[1.0, 1.0]]))
    means = conventions.trec(tied, [2]).means
    assert means["mrr"] == 1 and means["mrr@2"] == 0.5  # ir-measures' RR@K takes the earlier name first


def test_warprec_puts_unlisted_items_above_negative_scores() -> None:
    every = sp.csr_array(np.array([[0, 0, 0, 0, 1.0], [1, 1, 1, 1, 0]]))
    two = Case(np.array([[0, 1], [-1, -1]]), sp.csr_array(np.array([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])), every,
               np.array([[-1.0, -2.0], [-np.inf, -np.inf]]))  # fmt: skip
    assert conventions.warprec(two, [2]).means["hit@2"] == 0
    assert conventions.warprec(replace(two, scores=two.scores + 10), [2]).means["hit@2"] == 1


def test_elliot_drops_users_without_a_test_item_of_the_threshold() -> None:
    rated = small([[0, 1], [0, 1]], [{0: 5}, {1: 2}], [[4], [4]])
    assert conventions.elliot(rated, [2]).means["ndcg@2"] < 1
    assert conventions.elliot(rated, [2], threshold=4).means["ndcg@2"] == 1


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="did you mean 'recbole'"):
        judge_as("recbol", case(), KS)
