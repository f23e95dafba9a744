"""Every loss and every variant of the contextual similarity learns: planted classes that the start cannot tell apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextual.baselines import LossOptions, build_loss, parameter_groups
from contextual.losses import cosine_similarities
from contextual.names import ABLATIONS, HAS_PROXIES, LOSSES

CLASSES, TRAINED, EACH, NOISE = 60, 40, 20, 32


def planted(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The class in 8 dimensions beside louder noise in 32, mixed by one rotation: [1200, 40] and labels."""
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    centres = torch.randn(CLASSES, 8, generator=generator)[labels]
    signal = centres + 0.3 * torch.randn(len(labels), 8, generator=generator)
    noise = 2 * torch.randn(len(labels), NOISE, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8 + NOISE, 8 + NOISE, generator=generator))[0]
    return torch.cat([signal, noise], 1) @ rotation, labels


def recall_of_new_classes(net: torch.nn.Module, points: Tensor, labels: Tensor) -> float:
    """Share of points of classes that no batch had whose nearest other one is of their class."""
    new = labels >= TRAINED
    with torch.no_grad():
        nearest = cosine_similarities(net(points[new])).fill_diagonal_(-2).argmax(1)
    return (labels[new][nearest] == labels[new]).float().mean().item()


def learn(loss: str, ablation: str = "none") -> tuple[float, float]:
    """Recall@1 of new classes before and after a linear head's 200 steps, 600 for losses with proxies."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    points, labels = planted(generator)
    net = torch.nn.Linear(points.shape[1], 16)
    options = LossOptions(ablation=ablation)
    criterion = build_loss(loss, num_classes=TRAINED, embedding_dim=16, pipeline="224", options=options)
    groups = parameter_groups(criterion, pipeline="224", lr=3e-3, loss_lr=None)
    groups = [{key: value for key, value in group.items() if key != "name"} for group in groups]
    optimizer = torch.optim.Adam([{"params": net.parameters()}, *groups], lr=3e-3)
    before = recall_of_new_classes(net, points, labels)
    for _ in range(600 if loss in HAS_PROXIES else 200):
        classes = torch.randperm(TRAINED, generator=generator)[:16]
        rows = (classes[:, None] * EACH + torch.rand(16, EACH, generator=generator).argsort(1)[:, :4]).flatten()
        value = criterion(torch.nn.functional.normalize(net(points[rows])), labels[rows])["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return before, recall_of_new_classes(net, points, labels)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(loss: str) -> None:
    before, after = learn(loss)
    assert before < 0.2 and after > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_variant_of_the_similarity_learns(ablation: str) -> None:
    """The sigmoids of temperature 0.01 and common neighbours alone learn little, as the paper's ablation says."""
    weak = ablation in ("neighbours-sigmoid", "sigmoid", "intersection-inside", "inside")
    before, after = learn("contextual", ablation)
    assert before < 0.2 and after > (1.3 * before if weak else 0.7)
