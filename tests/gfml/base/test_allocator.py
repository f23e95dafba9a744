"""Memory between two steps: what the C library keeps is not fetched again page by page."""

import os
import subprocess
import sys

import pytest

from gfml.base.allocator import keep_freed_memory

STEPS = """
import resource, sys
import torch
from gfml.base.allocator import keep_freed_memory

told = keep_freed_memory() if sys.argv[1] == "keep" else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.ones(2_000_000) for _ in range(8)]  # 8 MB each
for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print(told, faults() - before)
"""


def run(what: str, **more: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, what], capture_output=True, text=True, check=True, env=clean | more
    )
    told, faults = done.stdout.split()
    return told == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc")
def test_freed_blocks_serve_the_next_step():
    told, kept = run("keep")
    if not told:
        pytest.skip("the C library is not glibc")
    _, fetched = run("leave")
    # 64 MB in pages of 4 KiB are 15,625 a step where they are fetched again; larger pages, fewer.
    assert kept < 0.2 * fetched


def test_what_the_user_set_holds(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()


def test_no_glibc(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
