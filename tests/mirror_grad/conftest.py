"""A small data folder in the published layout, with item groups that the features show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mirror_grad import layout

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

USERS, ITEMS, GROUPS = 80, 60, 4


def write_planted(folder: Path, seed: int = 0) -> Path:
    """80 users and 60 items in 4 groups; users mostly take items of their own group; features are the group plus noise."""
    rng = np.random.default_rng(seed)
    group = rng.integers(GROUPS, size=ITEMS)
    rows = []
    for user in range(USERS):
        weight = np.where(group == user % GROUPS, 12.0, 1.0) * rng.pareto(3, ITEMS)
        for place, item in enumerate(rng.choice(ITEMS, 12, replace=False, p=weight / weight.sum())):
            rows.append((user, item, 5, 1000 + place, 2 if place >= 10 else 1 if place >= 8 else 0))
    users, items, ratings, times, labels = (np.array(column) for column in zip(*rows, strict=True))
    folder.mkdir(parents=True)
    layout.write_rows(folder / f"{folder.name}.inter", layout.INTER_HEAD, users, items, ratings, times, labels)
    for name, width in (("image", 24), ("text", 10)):
        centres = rng.standard_normal((GROUPS, width))
        layout.write_feature_file(
            folder / f"{name}_feat.npy", centres[group] + 0.3 * rng.standard_normal((ITEMS, width))
        )
    return folder


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    return write_planted(tmp_path_factory.mktemp("data") / "planted")


@pytest.fixture(scope="session")
def numbers() -> Callable[[str], dict[str, np.ndarray]]:
    """numbers(name): the arrays of tests/golden/<name>.npz, texts included."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return read
