"""Several processes: shares, collectives with gradients, one run directory, training equal to one process, resume."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from gfml.base.errors import UserError
from gfml.engine import distributed
from gfml.engine.distributed import Follower, World, session

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def done(tmp_path_factory, processes):
    """Where two processes left what they found."""
    folder = tmp_path_factory.mktemp("processes")
    for name in ("both", "whole/noisy", "parts/noisy"):
        (folder / name).mkdir(parents=True)
    processes(2, WORKER, folder)
    return folder


def rows_of(path):
    return without_clock([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()])


def without_clock(rows):
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]


def test_alone_everything_is_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = torch.ones(2, 3, requires_grad=True)
    with session(torch.device("cpu")) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True) and world.rows(7) == slice(0, 7)
        assert distributed.gather(rows) is rows and distributed.wrap(model := torch.nn.Linear(2, 2)) is model
        assert distributed.mean_of({"a": 2.0}) == {"a": 2.0} and not distributed.sum_over(rows).requires_grad
        distributed.barrier()
        distributed.share_buffers(model)


@pytest.mark.parametrize(("count", "size"), [(10, 3), (2, 4), (8, 2), (0, 2)])
def test_shares_are_a_partition(count, size):
    shares = [World(rank, size, torch.device("cpu")).rows(count) for rank in range(size)]
    assert [n for share in shares for n in range(count)[share]] == list(range(count))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_more_processes_than_devices_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="found 1 CUDA devices, wanted one for each process"),
        session(torch.device("cuda")),
    ):
        pass
    with pytest.raises(UserError, match="found cuda:0 for every process"), session(torch.device("cuda:0")):
        pass


def test_a_follower_writes_nothing(tmp_path):
    run = Follower(tmp_path, {"epochs": 1})
    run.note(seed=1)
    run.log({"epoch": 1})
    run.truncate_metrics(0)
    run.checkpoint({})
    run.save_best({})
    run.finish({})
    with run:
        pass
    assert not list(tmp_path.iterdir()) and run.load_checkpoint() is None


def test_collectives(done):
    """Rows of unequal number, gradients to every process, sums, means, buffers, and an error that all see."""
    one, other = (torch.load(done / f"gathered-{rank}.pt", weights_only=True) for rank in (0, 1))
    whole = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    weights = 3 * torch.arange(1.0, 9.0).reshape(4, 2)  # (1 + 2) times, from both processes
    for found in (one, other):
        assert torch.equal(found["rows"], whole) and torch.equal(found["empty"], torch.ones(1, 2))
        assert found["there"]
        assert (found["sum"].item(), found["mean"].item(), found["named"].item(), found["buffer"][0].item()) == (
            3.0,
            1.5,
            0.5,
            5.0,
        )
    assert torch.equal(one["gradient"], weights[:1]) and torch.equal(other["gradient"], weights[1:])
    texts = [(done / f"refused-{rank}").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1] and "found the run name 'not/a/name'" in texts[0]


def test_two_processes_train_as_one(done, tmp_path):
    both = done / "both"
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    spec.loader.exec_module(worker := importlib.util.module_from_spec(spec))
    worker.trained(tmp_path, World(0, 1, torch.device("cpu")), 4)
    single = torch.load(tmp_path / "trained-1-4-0.pt", weights_only=True)
    pair = [torch.load(both / f"trained-2-4-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in single["model"].items():
        torch.testing.assert_close(pair[0]["model"][name], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(pair[0]["model"][name], pair[1]["model"][name])
    assert not torch.equal(pair[0]["noise"], pair[1]["noise"])
    rows = rows_of(both / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and all(row["train/rank"] == 0.5 for row in rows)
    for row, expected in zip(rows, rows_of(tmp_path / "run"), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-12)


def test_two_processes_go_on_exactly(done):
    """Two epochs and two more equal four, bit for bit, random numbers of each process included."""
    whole, parts = done / "whole" / "noisy", done / "parts" / "noisy"
    for rank in (0, 1):
        one, other = (torch.load(folder / f"trained-2-4-{rank}.pt", weights_only=True) for folder in (whole, parts))
        assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
        assert torch.equal(one["noise"], other["noise"])
        assert without_clock(one["history"]) == without_clock(other["history"])
    assert rows_of(whole / "run") == rows_of(parts / "run")
