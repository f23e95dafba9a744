"""The toy data of the stored vectors, and models whose parameters are the stored ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfml.data.interactions import Interactions, csr_from_pairs
from gfml.ranking.sampling import Triples
from mirror_grad.data import MultimodalData
from mirror_grad.models import MODELS, load_model


def toy_data(toy: Mapping[str, Tensor]) -> MultimodalData:
    """mm_toy: 30 users, 24 items, features of 16 and 12 columns."""
    shape = int(toy["n_users"]), int(toy["n_items"])
    users, items, labels = (toy[f"inter_{name}"].numpy() for name in ("user", "item", "label"))
    parts = (csr_from_pairs(users[labels == part], items[labels == part], *shape) for part in range(3))
    features = {name: toy[f"feat_{name}"].to(torch.get_default_dtype()) for name in ("image", "text")}
    return MultimodalData(Interactions("toy", *parts), features)


def toy_batch(toy: Mapping[str, Tensor]) -> Triples:
    return Triples(toy["batch_user"], toy["batch_pos"], toy["batch_neg"])


def build(
    name: str, data: MultimodalData, *, behaviour: str = "fixed", embedding_dim: int = 8, seed: int = 0, **options: Any
) -> nn.Module:
    settings = MODELS[name].settings(**options)
    return load_model(name)(data, settings, behaviour=behaviour, embedding_dim=embedding_dim, seed=seed)


def fill(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Write the given tensors into the parameters (or buffers) of those names; every parameter must be named."""
    named = dict(model.named_parameters())
    assert named.keys() <= values.keys(), named.keys() - values.keys()
    with torch.no_grad():
        for name, value in values.items():
            target = named[name] if name in named else model.get_buffer(name)
            assert target.shape == value.shape, (name, target.shape, value.shape)
            target.copy_(value)
    return model


def scores(model: nn.Module) -> Tensor:
    scorer = model.eval().scorer()
    return scorer.score(torch.arange(scorer.num_users))


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter by name; zero where there is none."""
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def nodes(golden: Mapping[str, Tensor], prefix: str = "p_") -> Tensor:
    """User rows, then item rows: the table of all nodes."""
    return torch.cat([golden[f"{prefix}user"], golden[f"{prefix}item"]])


def pairs_to_csr(users: Tensor, items: Tensor, shape: tuple[int, int] = (30, 24)) -> Any:
    return csr_from_pairs(users.numpy(), items.numpy(), *shape)
