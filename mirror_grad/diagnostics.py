"""How flat the place is that training found, and what feature noise does to the ranking.

Pure functions of a model, its data and its batches; :mod:`mirror_grad.robustness` is the program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mirror_grad.data import MultimodalData

Loss = Callable[[], Tensor]
Gradients = list[Tensor]


@contextlib.contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """Inside, the default generators (CPU and CUDA) start from ``seed``; afterwards they are as before."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def gradients(loss: Loss, parameters: Sequence[nn.Parameter], seed: int = 0) -> Gradients:
    """Gradient of ``loss()`` for every parameter, zeros where there is none; random draws are those of ``seed``."""
    with same_draws(seed), torch.enable_grad():
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def mean_loss(model: nn.Module, batches: Sequence[object]) -> Loss:
    """The mean over some batches of a model's loss, as one function of its parameters."""
    return lambda: torch.stack([model.loss(batch)["loss"] for batch in batches]).mean()


def dot(first: Gradients, second: Gradients) -> Tensor:
    """Inner product, float64 scalar."""
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)]).sum()


@contextlib.contextmanager
def moved(parameters: Sequence[nn.Parameter], direction: Gradients, factor: float) -> Iterator[None]:
    """Inside, the parameters are theta + factor * direction; afterwards exactly theta."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_add_([p.data for p in parameters], direction, alpha=factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)


def half_steps(
    loss: Loss, parameters: Sequence[nn.Parameter], lr: float, alpha1: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """Norms of g1 = grad L(theta) and g2 = grad L(theta - alpha1 lr g1), and their cosine (1 where the loss is flat)."""
    first = gradients(loss, parameters, seed)
    with moved(parameters, first, -alpha1 * lr):
        second = gradients(loss, parameters, seed)
    norms = dot(first, first).sqrt(), dot(second, second).sqrt()
    cosine = dot(first, second) / (norms[0] * norms[1]).clamp_min(1e-300)
    return {"grad_norm": float(norms[0]), "mirror_grad_norm": float(norms[1]), "cosine": float(cosine)}


def hessian_product(
    loss: Loss, parameters: Sequence[nn.Parameter], vector: Gradients, *, step: float = 1e-3, seed: int = 0
) -> Gradients:
    """H v by central differences of gradients: (g(theta + e v) - g(theta - e v)) / 2e with e = step (1 + |theta|) / |v|.

    Propagation over a graph has no second derivative of its own; differences need none, and both gradients see the same
    random draws.
    """
    theta = [p.detach() for p in parameters]
    size = (1 + float(dot(theta, theta).sqrt())) * step
    e = size / max(float(dot(vector, vector).sqrt()), 1e-300)
    with moved(parameters, vector, e):
        above = gradients(loss, parameters, seed)
    with moved(parameters, vector, -e):
        below = gradients(loss, parameters, seed)
    return [(a - b) / (2 * e) for a, b in zip(above, below, strict=True)]


def top_eigenvalue(
    loss: Loss,
    parameters: Sequence[nn.Parameter],
    *,
    iterations: int = 20,
    tolerance: float = 1e-3,
    seed: int = 0,
    step: float = 1e-3,
) -> tuple[float, int]:
    """(Rayleigh quotient, iterations used) of the Hessian's eigenvalue of largest size, by power iteration.

    Stops when the quotient changes by less than ``tolerance`` of itself. Negative if the largest is.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in parameters]
    value = float("nan")
    for count in range(1, iterations + 1):
        norm = float(dot(vector, vector).sqrt())
        if norm == 0:
            return 0.0, count
        vector = [v / norm for v in vector]
        image = hessian_product(loss, parameters, vector, step=step, seed=seed)
        before, value = value, float(dot(vector, image))
        vector = image
        if abs(value - before) <= tolerance * abs(value):
            return value, count
    return value, iterations


# -- features that change


def with_noise(features: Mapping[str, Tensor], level: float, seed: int) -> dict[str, Tensor]:
    """Every feature plus level * rms of its table * standard normal noise: the paper's inherent noise."""
    noisy = {}
    for place, (name, table) in enumerate(features.items()):
        generator = torch.Generator().manual_seed(seed * 1000 + place)
        noise = torch.randn(table.shape, generator=generator).to(table)
        noisy[name] = table + level * table.square().mean().sqrt() * noise
    return noisy


def swapped_rows(num_items: int, share: float, seed: int) -> Tensor:
    """Row of every item, int64 [I], after a random share of the items passed their features round in a circle.

    round(share * I) items take part, none keeps its own; fewer than two take part: nothing changes.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(num_items, generator=generator)[: round(share * num_items)]
    rows = torch.arange(num_items)
    if len(chosen) > 1:
        rows[chosen] = chosen.roll(1)
    return rows


def with_swap(features: Mapping[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    """Features of which a share of the items has another item's: the paper's information adjustment."""
    return {name: table[swapped_rows(len(table), share, seed)] for name, table in features.items()}


def changed_model(
    model: nn.Module, data: MultimodalData, changed: Mapping[str, Tensor], build: Callable[[MultimodalData], nn.Module]
) -> nn.Module:
    """A model with the parameters of ``model`` that sees ``changed`` features wherever it reads features.

    Graphs and fixed tables are built anew from them. Feature tables that were trained (their names end in
    MODALITY.table) get the same change as the data: trained + (changed - original), which for a swap of rows is the
    trained table with the difference of the original rows.
    """
    other = build(data.with_features(changed))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, table in data.features.items():
        for key, value in state.items():
            if key.endswith(f"{name}.table") and value.shape == table.shape:
                state[key] = value + (changed[name] - table).to(value)
    other.load_state_dict(state)
    return other.eval()
