"""Baselines beside a model, the mass report and the printed tables."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions
from gfml.data.synthetic import generate
from gfml.gravity import Mass
from gfml.ranking import baselines
from gfml.ranking.evaluation import Definitions, evaluate
from gfml.ranking.ials import ials
from gfml.report import recommenders as reporting


@pytest.fixture(scope="module")
def data() -> Interactions:
    return generate(120, 60, 2400, seed=3).with_validation(0.1, 0)


def test_baselines_are_judged_on_test_with_settings_chosen_on_validation(data: Interactions) -> None:
    found = reporting.baseline_results(["popularity", "item-knn", "ease", "ials"], data, [5, 10])
    popularity = evaluate(baselines.popularity(data), data, "test", [5, 10], beyond=True).means
    assert found["popularity"]["test"] == popularity and found["popularity"]["settings"] == {}
    choice = baselines.select(partial(baselines.ease, data), data, reporting.GRIDS["ease"])
    chosen = choice.settings
    assert found["ease"]["settings"] == chosen and found["ease"]["tried"] == len(choice.scores)
    assert (
        found["ease"]["test"]["ndcg@10"]
        == evaluate(baselines.ease(data, **chosen), data, "test", [5, 10]).means["ndcg@10"]
    )
    assert found["item-knn"]["test"]["recall@10"] > popularity["recall@10"]
    model = ials(data, **found["ials"]["settings"])
    assert found["ials"]["test"]["ndcg@10"] == evaluate(model, data, "test", [5, 10]).means["ndcg@10"]


def test_baselines_have_the_columns_of_other_conventions_and_of_ratings(data: Interactions, tmp_path: Path) -> None:
    rated = replace(data, test_ratings=np.random.default_rng(0).integers(1, 6, data.test.nnz).astype(float))
    asked = Definitions(("elliot", "trec"), "n", "exp1")
    found = reporting.baseline_results(["popularity", "ease"], rated, [5], definitions=asked, cache_dir=tmp_path)
    means = evaluate(baselines.popularity(data), rated, "test", [5], beyond=True, definitions=asked).means
    assert found["popularity"]["test"] == means and {"elliot:ndcg@5", "trec:map@5"} <= found["ease"]["test"].keys()
    # Everybody has a list, so that Elliot's graded NDCG is ours; the cut-off and the gain are as asked.
    assert means["elliot:ndcg@5"] == pytest.approx(means["graded_ndcg@5"]) != means["ndcg@5"]
    assert means["trec:map@5"] == means["map@5"]
    stored = reporting.baseline_results(["popularity"], rated, [5], definitions=asked, cache_dir=tmp_path)
    assert stored["popularity"] == found["popularity"]
    usual = reporting.baseline_results(["popularity"], rated, [5], cache_dir=tmp_path)["popularity"]["test"]
    assert "elliot:ndcg@5" not in usual and "graded_ndcg@5" not in usual
    text = reporting.judged_text({"data": {"name": "d"}, "topks": [5], "selection": {"epoch": 1, "protocol": "p"},
                                  "baselines": found}, {"model": means})  # fmt: skip
    assert "metrics as elliot" in text and "graded_ndcg@5" in text
    with pytest.raises(UserError, match="no test ratings, wanted them for `graded`"):
        evaluate(baselines.popularity(data), data, "test", [5], definitions=asked)


def test_a_grid_may_be_given_and_chosen_points_are_told(data: Interactions, tmp_path: Path) -> None:
    grids = {"item-knn": {"k": [7], "shrink": [2.0]}, "ease": {"l2": [3.0, 30.0]}}
    found = reporting.baseline_results(["popularity", "item-knn", "ease"], data, [5], grids=grids, cache_dir=tmp_path)
    assert found["item-knn"]["settings"] == {"k": 7, "shrink": 2.0} and found["item-knn"]["tried"] == 1
    assert found["ease"]["settings"]["l2"] in (3.0, 30.0) and found["ease"]["tried"] == 2
    again = reporting.baseline_results(["ease"], data, [5], cache_dir=tmp_path)["ease"]
    assert again["tried"] > 2  # another grid is another question
    result = {"baselines": found, "selection": {"epoch": 1, "protocol": "p"}, "data": {"name": "d"}, "topks": [5]}
    lines = reporting.judged_text(result, {}).splitlines()
    assert "item-knn: k 7, shrink 2 (best on validation of 1 points tried)" in lines
    assert not any(line.startswith("popularity:") for line in lines)


def test_without_validation_part_one_is_cut_for_the_choice_and_train_stays_whole(data: Interactions) -> None:
    whole = data.refit()
    found = reporting.baseline_results(["ease"], whole, [10])["ease"]
    assert (
        found["test"]["recall@10"]
        == evaluate(baselines.ease(whole, **found["settings"]), whole, "test", [10]).means["recall@10"]
    )


def test_results_are_kept_by_data_and_cut_offs(
    data: Interactions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reporting.baseline_results(["popularity"], data, [5], cache_dir=tmp_path)
    monkeypatch.setattr(reporting, "_judge_baseline", lambda *args: pytest.fail("judged again"))
    assert reporting.baseline_results(["popularity"], data, [5], cache_dir=tmp_path) == first
    monkeypatch.setattr(reporting, "_judge_baseline", lambda *args: {"test": {"recall@10": 1.0}})
    # Other cut-offs or other data are another question.
    assert reporting.baseline_results(["popularity"], data, [10], cache_dir=tmp_path)["popularity"]["test"] == {
        "recall@10": 1.0
    }
    other = generate(120, 60, 2400, seed=4).with_validation(0.1, 0)
    assert reporting.baseline_results(["popularity"], other, [10], cache_dir=tmp_path)["popularity"]["test"] == {
        "recall@10": 1.0
    }


def test_a_damaged_store_is_made_again(data: Interactions, tmp_path: Path) -> None:
    first = reporting.baseline_results(["popularity"], data, [5], cache_dir=tmp_path)
    [file] = tmp_path.glob("*.json")
    file.write_text(file.read_text()[:40])
    second = reporting.baseline_results(["popularity"], data, [5], cache_dir=tmp_path)
    assert second["popularity"]["test"] == first["popularity"]["test"]
    assert json.loads(file.read_text())["result"]["test"] == first["popularity"]["test"]


def test_ease_beyond_the_memory_limit_says_why(data: Interactions) -> None:
    [found] = reporting.baseline_results(["ease"], data, [5], memory_gib=1e-9).values()
    assert "GiB" in found["skipped"] and "test" not in found


def test_mass_report_against_plain_correlations(data: Interactions) -> None:
    torch.manual_seed(0)
    mass = Mass(data.num_users, data.num_items, "both", param="relu", init="xavier")
    report = reporting.mass_report(mass, data, np.random.default_rng(0).random(data.num_items))
    values = np.log1p(np.maximum(mass.item.detach().double().numpy(), 0))
    seen = data.item_popularity > 0
    assert report["item_spearman_popularity"] == pytest.approx(
        stats.spearmanr(values[seen], data.item_popularity[seen]).statistic
    )
    assert report["item_spearman_true"] == pytest.approx(
        stats.spearmanr(values[seen], data.true_item_mass[seen]).statistic
    )
    assert report["item_dead"] == pytest.approx(np.mean(mass.item.detach().numpy() <= 0))
    assert {"user_log_mass_mean", "item_norm_spearman_popularity"} <= report.keys()


def test_mass_report_has_no_side_that_has_no_mass(data: Interactions) -> None:
    mass = Mass(data.num_users, data.num_items, "user")
    report = reporting.mass_report(
        mass, replace(data, true_item_mass=None, true_user_mass=None), np.ones(data.num_items)
    )
    # Equal masses and equal norms have no rank correlation: left out, never NaN.
    assert set(report) == {"user_log_mass_mean", "user_log_mass_std"}
    assert report["user_log_mass_mean"] == pytest.approx(np.log(2))


def test_baselines_that_tie_everything_are_told_apart_from_equal_ones() -> None:
    """Two rows of the same figures are no coincidence where users are unknown: both list items by their numbers."""
    same, other = {"recall@5": 0.25}, {"recall@5": 0.5}
    baselines = {"item-knn": {"test": same, "settings": {}}, "ease": {"test": dict(same), "settings": {}},
                 "ials": {"test": other, "settings": {}}, "popularity": {"skipped": "asked"}}  # fmt: skip
    result = {"data": {"name": "d"}, "topks": [5], "selection": {"epoch": 1, "protocol": "p"}, "baselines": baselines}
    [line] = reporting.equal_rows(result | {"cold_users": 1200})
    assert line.startswith("item-knn and ease have the same figures: of the 1,200 judged users")
    assert "listed in the order of their numbers" in line
    assert line in reporting.judged_text(result | {"cold_users": 1200}, {"model": other})
    # Where every user is known, equal figures are what they are.
    assert reporting.equal_rows(result) == []


def test_tables_align_and_show_what_is_missing() -> None:
    rows = {"ours": {"recall@10": 0.1, "recall@20": 0.25, "arp@20": 123.4}, "popularity": {"recall@10": 0.05}}
    columns = reporting.table_columns(rows, [10, 20])
    assert columns == ["recall@10", "recall@20", "arp@20"]
    text = reporting.text_table(rows, columns).splitlines()
    assert text[1].split() == ["ours", "0.1000", "0.2500", "123.4"]
    assert text[2].split() == ["popularity", "0.0500", "-", "-"]
    assert len({len(line) for line in text}) == 1
