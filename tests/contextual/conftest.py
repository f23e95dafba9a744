"""What the tests of this folder share: stored vectors and clustered batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from contextual import fused

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """The numeric arrays of tests/golden/contextual_losses.npz."""
    with np.load(GOLDEN / "contextual_losses.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind != "U"}


@pytest.fixture(params=("reference", "products", "lists"))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend's name, for each way to the loss: autograd, and the closed form both ways whatever the batch."""
    monkeypatch.setattr(fused, "DENSE", 2.0 if request.param == "lists" else 0.0)
    return "reference" if request.param == "reference" else "fused"


@pytest.fixture
def clustered():
    """clustered(classes, per_class, width, noise): normalised rows in float64, shuffled, and their labels."""

    def make(classes: int, per_class: int, width: int = 8, noise: float = 0.7, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(classes).repeat_interleave(per_class)[
            torch.randperm(classes * per_class, generator=generator)
        ]
        centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
        spread = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
        return functional.normalize(centres[labels] + noise * spread, dim=1), labels

    return make
