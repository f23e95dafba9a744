"""Examples in public docstrings run, and the parts that users start with have one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in package.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
# What a reader of the documentation meets first.
SHOWN = (
    "gfml.gravity.Gravity", "gfml.mirror.MirrorGradient", "gfml.attention.replace_attention", "gfml.distances.SquaredDistance",
    "gfml.losses.bpr", "gfml.losses.bce", "gfml.losses.pair_loss", "gfml.losses.warp_hinge", "gfml.longtail.class_loss",
    "gfml.metrics.ranking.ranking_metrics", "gfml.metrics.retrieval.retrieve", "gfml.metrics.classification.confusion_matrix",
    "gfml.ranking.topk.topk_items", "gfml.data.options.load_dataset", "gfml.data.readers.read_table",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted and not found.failed, f"see the output above: python -m doctest {name}"


@pytest.mark.parametrize("name", SHOWN)
def test_the_first_parts_have_examples(name: str) -> None:
    module, _, part = name.rpartition(".")
    assert ">>>" in (getattr(importlib.import_module(module), part).__doc__ or "")
