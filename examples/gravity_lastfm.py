"""Gravity on Last.fm in one's own training loop: PyTorch, the gravity module, and nothing of the programs.

    python examples/gravity_lastfm.py --data-root DIR        seconds to a minute on one core; test recall@20 about .25
    python examples/gravity_lastfm.py --dataset demo         embedded data

Users and items are rows of two tables, and each item has a mass. A batch is pairs that happened and one random item for
each; the probability that a pair happens is sigmoid(g) with

    g(u, i) = log-mass_i - lambda * log(|x_u - y_i|^2 + eps),    x, y: unit vectors

Validation selects the epoch, test is read once. Mass takes popularity out of the geometry: compare with --mass none.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import Tensor, nn

from gfml import Gravity, GravityScorer, evaluate, load_dataset
from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, pairs_from_csr
from gfml.losses import bce, embedding_reg


class Model(nn.Module):
    """Two tables and the gravity between their rows."""

    def __init__(self, num_users: int, num_items: int, width: int, mass: str, lamb: float) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(num_users, width), nn.Embedding(num_items, width)
        self.gravity = Gravity(num_users, num_items, mass=mass, lamb=lamb)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)

    def loss(self, users: Tensor, pos: Tensor, neg: Tensor, decay: float) -> Tensor:
        """Cross-entropy of the pairs that happened and of those that were drawn; all int64 [B]."""
        x, y_pos, y_neg = self.user(users), self.item(pos), self.item(neg)
        scores = self.gravity(x, y_pos, users, pos), self.gravity(x, y_neg, users, neg)
        return bce(*scores) + decay * embedding_reg(x, y_pos, y_neg)

    def scorer(self) -> GravityScorer:
        """Scores of whole catalogues, for ranking."""
        return GravityScorer(self.gravity, self.user.weight.detach(), self.item.weight.detach())


def train_epoch(model: Model, optimizer: torch.optim.Optimizer, pairs: Tensor, num_items: int, batch: int) -> float:
    """One pass over the pairs [n, 2] in a new order; the mean loss. A drawn item may be a known one, rarely."""
    total = 0.0
    for rows in torch.randperm(len(pairs)).split(batch):
        users, pos = pairs[rows].unbind(1)
        loss = model.loss(users, pos, torch.randint(num_items, pos.shape), decay=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(pairs)


def run(data: Interactions, *, mass: str = "item", lamb: float = 3.0, width: int = 64, epochs: int = 40, lr: float = 5e-3,
        batch: int = 2048, seed: int = 2020) -> dict[str, float]:  # fmt: skip
    """Train, select by NDCG on validation, and judge the selected weights on test: {metric: value}."""
    torch.manual_seed(seed)
    model = Model(data.num_users, data.num_items, width, mass, lamb)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    pairs = torch.stack([torch.from_numpy(side).long() for side in pairs_from_csr(data.train)], 1)
    best, weights = -1.0, copy.deepcopy(model.state_dict())
    for epoch in range(1, epochs + 1):
        start, loss = time.perf_counter(), train_epoch(model, optimizer, pairs, data.num_items, batch)
        if epoch % 5 and epoch != epochs:
            continue
        found = evaluate(model.scorer(), data, "valid", [20]).means["ndcg@20"]
        print(f"epoch {epoch}: loss {loss:.4f}, validation ndcg@20 {found:.4f} ({time.perf_counter() - start:.1f} s)")
        if found > best:
            best, weights = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return evaluate(model.scorer(), data, "test", [20], beyond=True).means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="lastfm")
    parser.add_argument("--data-root", help="folder of the data sets")
    parser.add_argument("--mass", choices=("user", "item", "both", "none"), default="item")
    parser.add_argument("--lamb", type=float, default=3.0)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    try:
        data = load_dataset(options.dataset, data_root=options.data_root)
    except UserError as error:
        parser.error(str(error))
    found = run(data, mass=options.mass, lamb=options.lamb, epochs=options.epochs)
    for name in ("recall@20", "ndcg@20", "head_recall@20", "tail_recall@20", "coverage@20"):
        print(f"test {name}: {found[name]:.4f}")


if __name__ == "__main__":
    main()
