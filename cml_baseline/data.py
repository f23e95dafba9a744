"""Data of a run: interactions, hidden items, item features, titles and genres."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cml_baseline.settings import CMLSettings
from gfml.data.interactions import Interactions, csr_from_pairs, pairs_from_csr
from gfml.data.items import (
    FeatureTable,
    ItemInfo,
    beside,
    info_beside,
    read_item_features,
    read_item_info,
    standardised,
)
from gfml.data.options import load_from_args

# Files with titles and genres that come with known data sets.
INFO_FILES = ("movies.dat", "ml-100k.item", "*.item")


def load(options: CMLSettings) -> Interactions:
    """The interactions, with items hidden as ``--hide-items`` asks."""
    data = load_from_args(options)
    return hide_items(data, options.hide_items, options.split_seed) if options.hide_items else data


def hide_items(data: Interactions, share: float, seed: int) -> Interactions:
    """The data with a random share of its items taken out of train and validation: cold, but still judged on test."""
    chosen = np.random.default_rng(seed).permutation(data.num_items)[: round(share * data.num_items)]
    hidden = np.zeros(data.num_items, dtype=bool)
    hidden[chosen] = True
    parts = {}
    for name in ("train", "valid"):
        users, items = pairs_from_csr(data.split(name))
        keep = ~hidden[items]
        parts[name] = csr_from_pairs(users[keep], items[keep], data.num_users, data.num_items)
    lost = data.train.nnz + data.valid.nnz - parts["train"].nnz - parts["valid"].nnz
    notes = data.notes | {"items hidden from train and validation": f"{len(chosen):,}, with {lost:,} interactions"}
    return replace(data, **parts, notes=notes)


def features(options: CMLSettings, data: Interactions) -> FeatureTable | None:
    """The features of ``--features``: a path, else the name of a file in the data set's folder."""
    if options.features is None:
        return None
    file = beside(options.dataset, options.data_root, [options.features]) or options.features
    table = read_item_features(file, data, options.feature_columns)
    return standardised(table) if options.feature_norm == "standard" else table


def item_info(options: CMLSettings, data: Interactions) -> ItemInfo | None:
    """Titles and genres of ``--item-info`` or of the data set's own folder; None when there are none."""
    if data.name == "demo" and options.item_info is None:
        return None
    if options.item_info is None:
        return info_beside(options.dataset, options.data_root, INFO_FILES, data)
    return read_item_info(options.item_info, data)
