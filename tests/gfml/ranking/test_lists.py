"""Lists: filters against a plain loop, scores of the listed items, cells that are no formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.ranking.lists import Among, item_rows, read_ids, safe_cell, scores_at
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
