"""The toy experiment: five noisy circles, a network with two outputs, three losses, one figure.

    python contextual/toy.py [--steps 20000] [--seed 0] [--out toy.png]

The neighbourhood loss is piecewise constant: its true gradient is 0 almost everywhere. Trained with the constant slope
that stands for the step's derivative it orders the circles all the same. Points lie on circles of radius 0.2 to 1, with
radial noise of standard deviation 1/5 in training, where the circles overlap, and 1/20 in the pictures. A batch is four
fresh points of each circle. Losses see the outputs normalised; the pictures show them as they are.

Published: pytorch-metric-learning's contrastive loss and the neighbourhood loss (step 1 alone). They put the nearest
point by angle in the right circle for 94 % and 93 % of the points (31 % before training, seed 0). The full contextual
loss is added here and does worse on two coordinates and batches of 20: 48 %, at the best of four learning rates.
20,000 steps of all three take about three CPU minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gfml.program.cli import Parser, number, run_main

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RADII = (0.2, 0.4, 0.6, 0.8, 1.0)
COLOURS = ("red", "blue", "green", "orange", "purple")
TRAIN_NOISE, EVAL_NOISE = 1 / 5, 1 / 20
PER_CLASS, EVAL_PER_CLASS = 4, 500


class Trained(NamedTuple):
    """outputs [N, 2] and labels [N] of the fresh points; losses [steps]; recall: share of points whose nearest
    neighbour by angle is of their circle; start: the same before training."""

    outputs: Tensor
    labels: Tensor
    losses: Tensor
    recall: float
    start: float


def circles(per_class: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points [5 per_class, 2] with uniform angles and Gaussian radii around :data:`RADII`, and their labels."""
    import torch

    labels = torch.arange(len(RADII)).repeat_interleave(per_class)
    angle = 2 * torch.pi * torch.rand(len(labels), generator=generator)
    radius = torch.tensor(RADII)[labels] + noise * torch.randn(len(labels), generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels


def network() -> nn.Module:
    """2-100-100-2 with leaky rectifiers."""
    from torch import nn

    return nn.Sequential(
        nn.Linear(2, 100), nn.LeakyReLU(0.2), nn.Linear(100, 100), nn.LeakyReLU(0.2), nn.Linear(100, 2)
    )


def objectives() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]]:
    """title -> (loss of outputs and labels, learning rate, weight decay), as published for the first two."""
    from pytorch_metric_learning.losses import ContrastiveLoss

    from contextual.losses import ContextualLoss
    from contextual.similarity import Steps

    return {
        "contrastive": (ContrastiveLoss(), 1e-4, 1e-5),
        "neighbourhoods (step 1)": (ContextualLoss(backend="reference", steps=Steps(last="neighbours")), 4e-5, 1e-4),
        "contextual": (ContextualLoss(), 4e-3, 1e-4),
    }


def recall_at_1(outputs: Tensor, labels: Tensor) -> float:
    """Share of points whose nearest other point by angle has their label. Shape: [N, 2], [N]."""
    from contextual.losses import cosine_similarities

    nearest = cosine_similarities(outputs).fill_diagonal_(-2).argmax(1)
    return (labels[nearest] == labels).float().mean().item()


def train(loss: Callable[[Tensor, Tensor], Tensor], lr: float, weight_decay: float, steps: int, seed: int) -> Trained:
    """One network from the same start and the same batches for every loss."""
    import torch

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    points, labels = circles(EVAL_PER_CLASS, EVAL_NOISE, generator)
    net, losses = network(), torch.empty(steps)
    start = recall_at_1(net(points).detach(), labels)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        batch, own = circles(PER_CLASS, TRAIN_NOISE, generator)
        value = loss(net(batch), own)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses[step] = value.detach()
    outputs = net(points).detach()
    return Trained(outputs, labels, losses, recall_at_1(outputs, labels), start)


def draw(found: dict[str, Trained], points: Tensor, labels: Tensor, path: Path) -> None:
    """Inputs, outputs of every loss, and loss curves averaged over windows of a fiftieth of the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * (len(found) + 1), 7.4), layout="constrained")
    panels = figure.subplots(2, len(found) + 1)
    _scatter(panels[0, 0], points, labels, "inputs")
    panels[1, 0].axis("off")
    for column, (title, trained) in enumerate(found.items(), 1):
        _scatter(
            panels[0, column], trained.outputs, trained.labels, f"{title}\nnearest by angle right: {trained.recall:.1%}"
        )
        window = max(1, len(trained.losses) // 50)
        curve = trained.losses[: len(trained.losses) // window * window].view(-1, window).mean(1)
        panels[1, column].plot([(at + 1) * window for at in range(len(curve))], curve)
        panels[1, column].set(title=f"{title}: loss", xlabel="step")
    handles, names = panels[0, 0].get_legend_handles_labels()
    panels[1, 0].legend(handles, names, loc="center", title="radius", markerscale=3, frameon=False)
    figure.savefig(path, dpi=110)


def _scatter(panel: object, points: Tensor, labels: Tensor, title: str) -> None:
    for label, (radius, colour) in enumerate(zip(RADII, COLOURS, strict=True)):
        own = points[labels == label]
        panel.scatter(own[:, 0], own[:, 1], s=4, color=colour, label=f"{radius:g}")
    panel.set(title=title)
    panel.locator_params(nbins=5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="contextual/toy.py", description="Draw the toy experiment of the contextual loss.")
    parser.add_argument(
        "--steps", type=number(int, least=1), default=20_000, metavar="N", help="steps of each training"
    )
    parser.add_argument(
        "--seed", type=number(int, least=0), default=0, metavar="N", help="of network, batches and points"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("toy.png"), metavar="FILE", help="the figure; its ending chooses the format"
    )
    options = parser.parse_args(argv)
    import torch

    found = {}
    for title, objective in objectives().items():
        found[title] = train(*objective, options.steps, options.seed)
        window = max(1, options.steps // 40)
        first, last = (found[title].losses[part].mean().item() for part in (slice(window), slice(-window, None)))
        recall = f"nearest by angle right: {found[title].start:.1%} -> {found[title].recall:.1%}"
        print(f"{title:24} loss {first:.4f} -> {last:.4f}   {recall}")
    draw(found, *circles(EVAL_PER_CLASS, EVAL_NOISE, torch.Generator().manual_seed(options.seed)), options.out)
    print(f"figure {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
