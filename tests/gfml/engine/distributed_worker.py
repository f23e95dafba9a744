"""What each of two processes does in test_distributed.py: python distributed_worker.py DIRECTORY."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from gfml.base.errors import UserError
from gfml.engine import distributed
from gfml.engine.runs import seed_everything
from gfml.engine.train import fit

X = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(10, 4).sin()
Y = X.cos().sum(1, keepdim=True)


def gathered(where: Path, world: distributed.World) -> None:
    """Values and gradients of collectives, saved by each process."""
    rows = torch.arange(6.0).reshape(3, 2)[: 1 + 2 * world.rank].clone().requires_grad_()
    whole = distributed.gather(rows)
    # Each process weighs the rows in its own way: every gradient must arrive.
    ((world.rank + 1) * torch.arange(1.0, 9.0).reshape(4, 2) * whole).sum().backward()
    empty = distributed.gather(torch.ones(world.rank, 2))
    found = {
        "rows": whole.detach(), "gradient": rows.grad, "empty": empty, "sum": distributed.sum_over(torch.tensor([1.0 + world.rank])),
        "mean": distributed.mean_over(torch.tensor(3.0 * world.rank)), "named": torch.tensor(distributed.mean_of({"a": world.rank})["a"]),
    }  # fmt: skip
    with distributed.main_first():
        if world.is_main:
            time.sleep(0.2)
            (where / "fetched").touch()
        found["there"] = torch.tensor((where / "fetched").exists())
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(world.rank + 5.0)
    distributed.share_buffers(norm)
    torch.save({**found, "buffer": norm.running_mean}, where / f"gathered-{world.rank}.pt")


def trained(where: Path, world: distributed.World, epochs: int) -> None:
    """A network on this process's share of each batch; dropout shows that processes draw their own random numbers."""
    seed_everything(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    net = distributed.wrap(model)

    def batches(epoch: int) -> list[torch.Tensor]:
        order = torch.randperm(10, generator=torch.Generator().manual_seed(epoch))
        return list(order.split(5))

    def loss(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        own = batch[world.rows(len(batch))]
        share = len(own) * world.size / len(batch)
        noise = torch.rand(()) if where.name == "noisy" else torch.zeros(())
        return {
            "loss": share * (net(X[own]) - Y[own]).square().mean() + noise * model[0].bias.sum(),
            "rank": torch.tensor(float(world.rank)),
        }

    def evaluate(split: str) -> dict[str, float]:
        return {"score": -float((model(X) - Y).square().mean())}

    with distributed.open_run(
        where, "toy", {"epochs": epochs}, name="run", resume=where / "run" if (where / "run").exists() else None
    ) as run:
        fitted = fit(
            model,
            optimizer,
            batches=batches,
            loss_fn=loss,
            evaluate=evaluate,
            select="val/score",
            run=run,
            epochs=epochs,
            progress=False,
        )
        run.finish({"selection": fitted.selection()})
    torch.save(
        {"model": model.state_dict(), "history": fitted.history, "noise": torch.rand(())},
        where / f"trained-{world.size}-{epochs}-{world.rank}.pt",
    )


def refused(where: Path, world: distributed.World) -> None:
    """A run that cannot be opened is an error in every process."""
    try:
        distributed.open_run(where, "toy", {"epochs": 1}, name="not/a/name")
    except UserError as error:
        (where / f"refused-{world.rank}").write_text(str(error))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    with distributed.session(torch.device("cpu")) as me:
        assert me.size == distributed.world_size() == 2 and me.is_main == (me.rank == 0)
        gathered(directory, me)
        refused(directory, me)
        for folder, last in (("both", 4), ("whole/noisy", 4), ("parts/noisy", 2), ("parts/noisy", 4)):
            trained(directory / folder, me, last)
            distributed.barrier()
    assert distributed.world_size() == 1
