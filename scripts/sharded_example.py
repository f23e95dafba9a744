"""Tables too large for one machine: the gravity loss over embeddings that torchrec shards by rows.

    torchrun --standalone --nproc-per-node 2 scripts/sharded_example.py --users 20000 --items 5000 --steps 200

Each process holds a part of the rows of both tables and of their optimizer state; a batch's ids travel to the processes
that own them and their vectors come back (all-to-all). Rows that a batch does not touch cost nothing: the optimizer is
fused into the backward pass. Scores and losses are those of ``gfml``. Raw masses are four more columns of the tables,
of which the first counts, because the kernels want widths that are multiples of 4.

torchrec is no dependency of this repository: it needs the torch it was built for, such as torch 2.13 with
``pip install torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0``. See docs/scaling.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from gfml.base.errors import UserError
from gfml.program.cli import number, run_main

PADDING, SEED = 4, 2020
# Of the row-wise AdaGrad, and the weight of the distance.
LEARNING_RATE, LAMBDA = 0.05, 3.0


def main(argv: Sequence[str] | None = None) -> int:
    count = number(int, least=1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--users", type=count, default=20_000, help="rows of the user table")
    parser.add_argument("--items", type=count, default=5_000, help="rows of the item table")
    parser.add_argument("--embedding-dim", type=number(int, least=4), default=64, help="width, a multiple of 4")
    parser.add_argument("--batch-size", type=count, default=2048, help="triples per step, over all processes")
    parser.add_argument("--steps", type=count, default=200, help="steps to make")
    given = parser.parse_args(argv)
    if given.embedding_dim % 4:
        raise UserError(f"found --embedding-dim {given.embedding_dim}, wanted a multiple of 4")
    try:
        import torchrec  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(
            f"torchrec cannot be imported ({str(error).splitlines()[0]}): install it with the torch it was built for"
        ) from None
    train(given)
    return 0


def build_tables(given: argparse.Namespace, device):
    """Both tables as one collection, rows over all processes, AdaGrad in the backward pass; wrapped to be called by keys."""
    import torch
    from torchrec import EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    width = given.embedding_dim + PADDING
    sizes = {"user": given.users, "item": given.items}
    tables = [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=width, feature_names=[name],
                        init_fn=lambda table: torch.nn.init.normal_(table, std=0.1))
        for name, rows in sizes.items()
    ]  # fmt: skip
    collection = EmbeddingCollection(tables=tables, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": LEARNING_RATE})
    sharder = EmbeddingCollectionSharder()
    constraints = {name: ParameterConstraints(sharding_types=["row_wise"]) for name in sizes}
    topology = Topology(world_size=torch.distributed.get_world_size(), compute_device=device.type)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(collection, [sharder], torch.distributed.group.WORLD)
    return DistributedModelParallel(collection, device=device, plan=plan, sharders=[sharder])


def train(given: argparse.Namespace) -> None:
    """Draw triples of a made-up long-tailed data set, step, and print loss and speed from the first process."""
    import torch
    import torch.nn.functional as F
    from torch import distributed as dist
    from torchrec import KeyedJaggedTensor

    from gfml.losses import bpr

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}.items():
        os.environ.setdefault(name, value)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED + rank)
    tables = build_tables(given, device)
    # Every process draws the whole batch alike and keeps its part.
    generator = torch.Generator().manual_seed(SEED)
    each, dim = given.batch_size // size, given.embedding_dim
    if each == 0:
        raise UserError(
            f"found --batch-size {given.batch_size}, wanted at least one triple for each of {size} processes"
        )

    total, started = 0.0, time.perf_counter()
    for step in range(1, given.steps + 1):
        users = torch.randint(given.users, (given.batch_size,), generator=generator)
        # Items of a user's own neighbourhood, rarer ones less often: something that distances and masses can learn.
        offset = (torch.rand(given.batch_size, generator=generator) ** 3 * given.items / 20).long()
        pos = (users * given.items // given.users + offset) % given.items
        neg = torch.randint(given.items, (given.batch_size,), generator=generator)
        mine = slice(rank * each, (rank + 1) * each)
        # Of each triple one user, and two items: the positive and the negative.
        ids = torch.cat([users[mine], torch.stack([pos[mine], neg[mine]], 1).view(-1)]).to(device)
        lengths = torch.tensor([1, 2], device=device).repeat_interleave(each)
        found = tables(KeyedJaggedTensor(["user", "item"], ids, lengths=lengths))
        user, item = found["user"].values()[:, None], found["item"].values().view(each, 2, -1)
        sq_distance = (user[..., :dim] - item[..., :dim]).square().sum(-1)
        log_mass = F.softplus(user[..., dim]) + F.softplus(item[..., dim])
        scores = log_mass - LAMBDA * torch.log(sq_distance + 0.01)
        loss = bpr(scores[:, 0], scores[:, 1:])
        loss.backward()
        total += loss.item()
        if step % 50 == 0 or step == given.steps:
            share = torch.tensor(total / (step % 50 or 50))
            dist.all_reduce(share)
            total = 0.0
            if rank == 0:
                speed = step * each * size / (time.perf_counter() - started)
                print(
                    f"step {step}: loss {share.item() / size:.4f}, {speed:,.0f} triples/s over {size} processes",
                    flush=True,
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_main(main))
