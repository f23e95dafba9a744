from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gfml.topk import DenseScorer, topk_items

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ranking_metrics.npz"


def golden():
    return np.load(GOLDEN, allow_pickle=False)


def test_golden_lists():
    g = golden()
    scorer, seen = DenseScorer(torch.from_numpy(g["scores"])), sp.csr_array(g["train_mask"].astype(np.float32))
    top = topk_items(scorer, torch.arange(len(g["scores"])), int(g["topks"].max()), seen=seen)
    np.testing.assert_array_equal(top.numpy(), g["natural_topk_items"])


def test_golden_ties():
    g = golden()
    scorer, seen = DenseScorer(torch.from_numpy(g["tie_scores"])), sp.csr_array(g["tie_train_mask"].astype(np.float32))
    top = topk_items(scorer, torch.arange(4), 12, seen=seen)
    np.testing.assert_array_equal(top.numpy(), g["natural_tie_order"])
