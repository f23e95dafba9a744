"""Lists: filters against a plain loop, scores of the listed items, cells that are no formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.ranking.lists import Among, best_items, item_rows, read_ids, safe_cell, scores_at
from gfml.ranking.topk import DenseScorer, FactorScorer, topk_items


def test_only_allowed_items_are_listed():
    scores = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    allowed = np.zeros(300, dtype=bool)
    allowed[[3, 50, 51, 299]] = True
    top = topk_items(Among(DenseScorer(scores), allowed), torch.arange(6), 6, seen=None)
    for row in range(6):
        wanted = sorted([3, 50, 51, 299], key=lambda item: -float(scores[row, item]))
        assert top[row].tolist() == [*wanted, -1, -1]


def test_scores_alone_and_in_a_batch_are_equal():
    torch.manual_seed(0)
    for scorer in (FactorScorer(torch.randn(3000, 20), torch.randn(500, 20)), DenseScorer(torch.randn(3000, 500))):
        users = torch.arange(3000)
        items = topk_items(scorer, users, 20, seen=None)
        items[0, -1] = -1
        found = scores_at(scorer, users, items)
        assert np.isnan(found[0, -1]) and np.isfinite(found).sum() == found.size - 1
        for user in (0, 1, 1024, 2999):
            alone = topk_items(scorer, users[[user]], 20, seen=None)
            assert alone[0, :19].tolist() == items[user, :19].tolist()
            assert np.array_equal(scores_at(scorer, users[[user]], items[[user]])[0], found[user], equal_nan=True)


class RoundedByCompany:
    """Scores of whole rows that are off by up to 3e-7, by another amount for every number of users."""

    def __init__(self, scores):
        self.scores, (self.num_users, self.num_items) = scores, scores.shape

    def score(self, users):
        noise = torch.rand(self.num_items, generator=torch.Generator().manual_seed(len(users)))
        return self.scores[users] + 6e-7 * (noise - 0.5)

    def at(self, users, items):
        return self.scores[users].gather(1, items)

    def factors(self):
        return None


@pytest.mark.parametrize("allowed", [None, np.arange(200) % 3 > 0])
def test_scores_that_company_rounds_give_one_list(allowed):
    # Whole groups of items that are equal or differ by less than the rounding, at the ends of lists too.
    scores = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    scores += 1e-7 * torch.randint(0, 2, scores.shape, generator=torch.Generator().manual_seed(1))
    seen = csr_from_pairs(np.repeat(np.arange(40), 60), np.tile(np.arange(60), 40), 40, 200)
    seen = csr_from_pairs(*np.nonzero((seen.toarray() > 0) & (np.arange(40)[:, None] != 7)), 40, 200)
    scorer, users = RoundedByCompany(scores), torch.arange(40)
    items, found = best_items(scorer, users, 9, seen=seen, allowed=allowed)
    for user in range(40):
        known = seen.indices[seen.indptr[user] : seen.indptr[user + 1]].tolist()
        free = [item for item in range(200) if item not in known and (allowed is None or allowed[item])]
        wanted = sorted(free, key=lambda item: (-float(scores[user, item]), item))[:9]
        assert items[user].tolist() == wanted and found[user].tolist() == scores[user, wanted].double().tolist()
        alone = best_items(scorer, users[[user]], 9, seen=seen, allowed=allowed)
        assert torch.equal(alone[0][0], items[user]) and np.array_equal(alone[1][0], found[user])


def test_a_list_ends_where_no_item_is_left():
    scorer = RoundedByCompany(torch.tensor([[3.0, 1.0, 2.0, 2.0]]))
    seen = csr_from_pairs(np.array([0]), np.array([0]), 1, 4)
    items, scores = best_items(scorer, torch.tensor([0]), 4, seen=seen)
    assert items.tolist() == [[2, 3, 1, -1]] and scores[0, :3].tolist() == [2, 2, 1] and np.isnan(scores[0, 3])


def test_ids_of_files(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_bytes(b"item_id\r\n007\r\n7\r\nunknown\r\n")
    assert read_ids(file, "--only") == ["007", "7", "unknown"]
    empty = csr_from_pairs(np.zeros(1, int), np.zeros(1, int), 1, 2)
    data = Interactions("toy", empty, empty, empty, item_ids=np.array(["007", "7"]))
    rows, unknown = item_rows(data, ["7", "unknown", "007", "7"])
    assert rows.tolist() == [0, 1] and unknown == 1
    with pytest.raises(UserError, match="there is no file .*absent: check --not"):
        read_ids(tmp_path / "absent", "--not")


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|x", "'+cmd|x"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("-5", "-5"),
        ("+7", "+7"),
        ("Title = x", "Title = x"),
        ("", ""),
        (-1.5, -1.5),
        (7, 7),
    ],
)
def test_cells_that_a_spreadsheet_would_run(cell, written):
    assert safe_cell(cell) == written
