"""How the C library hands out memory to the tensors of a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

# Blocks up to this size come from the heap, whose free end stays until it is larger than the second number: bytes.
LARGEST_BLOCK, LARGEST_REST = 32 << 20, 256 << 20
# Numbers of glibc's malloc.h, and what a user sets in their place.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next step of a training loop; whether it was told to.

    Left alone, it gives a block of some megabytes back to the system as soon as nobody holds it and fetches it again
    a moment later, page by page: up to a third of the CPU time of a step over a graph. Numbers do not change, the
    resident size stays up to 256 MiB above what is held. False where the C library is another one, or where the user
    has said in the environment how memory is to be handed out.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in OF_THE_USER):
        return False
    try:
        library = ctypes.CDLL(None)
        # Another C library may have a function of this name that does nothing.
        library.gnu_get_libc_version  # noqa: B018
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(name, size) for name, size in ((M_MMAP_THRESHOLD, LARGEST_BLOCK), (M_TRIM_THRESHOLD, LARGEST_REST))
    )
