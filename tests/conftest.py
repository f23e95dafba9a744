"""What the tests share: real data, stored vectors as tensors, their tolerances, every kind of distance."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gfml.distances import SquaredDistance

GOLDEN = Path(__file__).parent / "golden"
# (precision, gradients?) -> tolerance of the stored vectors
TOLERANCES = {
    (torch.float64, False): {"rtol": 1e-9, "atol": 1e-11},
    (torch.float64, True): {"rtol": 1e-8, "atol": 1e-10},
    (torch.float32, False): {"rtol": 2e-5, "atol": 1e-5},
    (torch.float32, True): {"rtol": 1e-4, "atol": 2e-5},
}

# The same examples on every machine and every run, however slow: a failure is never luck.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: GFML_SHARED_DATA, or shared/data beside the repository; skips without it."""
    folder = Path(os.environ.get("GFML_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set GFML_SHARED_DATA to its folder")
    return folder


@pytest.fixture
def recorded() -> Callable[..., tuple[Callable, list]]:
    """recorded(model, optimizer, step, loss, record=True): a call of a step with a batch, and the recordings it makes."""
    sys.path.insert(0, str(Path(__file__).parent))
    from stand_in import Replayed

    sys.path.remove(str(Path(__file__).parent))
    from gfml.engine.capture import StepCapture

    def made_of(model, optimizer, step, loss, *, record: bool = True) -> tuple[Callable, list]:
        made: list[Replayed] = []
        capture = StepCapture(
            model, optimizer, step, loss, record=lambda call: made.append(Replayed(capture, call)) or made[-1]
        )
        capture.reason = "" if record else "for comparison"
        return capture, made

    return made_of


def load_tensors(name: str) -> dict[str, Tensor]:
    """Arrays as tensors; texts as (lists of) str."""
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return {key: a.tolist() if a.dtype.kind == "U" else torch.from_numpy(a) for key, a in arrays.items()}


@pytest.fixture(scope="session")
def stored() -> Callable[[str], dict[str, Tensor]]:
    """stored(name): the arrays of tests/golden/<name>.npz."""
    cache: dict[str, dict[str, Tensor]] = {}
    return lambda name: cache.setdefault(name, load_tensors(f"{name}.npz"))


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """close(actual, expected, grad=False): equal within the tolerance of ``actual``'s precision; no NaN."""

    def check(actual: Tensor, expected: Tensor | float, grad: bool = False) -> None:
        expected = torch.as_tensor(expected).to(actual.dtype)
        torch.testing.assert_close(actual, expected, **TOLERANCES[actual.dtype, grad])

    return check


@pytest.fixture(scope="session")
def kinds() -> dict[str, SquaredDistance]:
    """Every distance by the name it has in the stored vectors; kl_compat is the published kl."""
    return {
        "l2": SquaredDistance("l2"),
        "l1": SquaredDistance("l1"),
        "emd": SquaredDistance("emd"),
        "kl": SquaredDistance("kl"),
        "emd_softmax": SquaredDistance("emd", emd_input="softmax"),
        "emd_power2": SquaredDistance("emd", emd_power=2),
        "kl_softmax": SquaredDistance("kl", kl_kind="softmax"),
        "kl_compat": SquaredDistance("kl", kl_kind="compat"),
    }


@pytest.fixture(scope="session")
def published(kinds: dict[str, SquaredDistance]) -> dict[str, SquaredDistance]:
    """The four distances as the published code computes them."""
    return {"l2": kinds["l2"], "l1": kinds["l1"], "emd": kinds["emd_power2"], "kl": kinds["kl_compat"]}


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation returned; of a sparse one those it stores."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor):
                stored = part._nnz() if part.layout in (torch.sparse_coo, torch.sparse_csr) else part.numel()
                self.numel = max(self.numel, stored)
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    """A context in which ``.numel`` grows to the size of the largest tensor that any operation returns."""
    return LargestTensor()


@pytest.fixture(scope="session")
def processes() -> Callable[..., list[str]]:
    """processes(n, script, *words): a program in n processes that find each other as torchrun's do; what each printed.

    fails: every process must end with exit code 2, a mistake of the user.
    """

    def run(number: int, script: str | Path, *words: object, fails: bool = False) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
                "WORLD_SIZE": str(number),
                "OMP_NUM_THREADS": "1",
            }
        started = [
            subprocess.Popen([sys.executable, str(script), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(number)})
            for rank in range(number)
        ]  # fmt: skip
        try:
            printed = [process.communicate(timeout=120)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        for process, text in zip(started, printed, strict=True):
            assert process.returncode == (2 if fails else 0), text
        return printed

    return run


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n): n threads of torch until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
