"""Loops as machine code, and work shared out among threads. Importing this module imports numba: do it where it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numba import njit


def compiled(function: Callable | None = None, *, any_order: bool = False) -> Callable:
    """``function`` as machine code that holds no lock, compiled at the first call for each kind of arguments.

    Kept on disk if some folder for it can be written. A division by zero gives infinity or NaN, as numpy's does.
    any_order: sums may be taken in an order that suits the processor, and products rounded together with them; the
        order is still the same in every call.
    """
    if function is None:
        return functools.partial(compiled, any_order=any_order)
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract"} if any_order else False,
    }
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no such folder
        return njit(**options)(function)


def in_threads(work: Callable[[Any], Any], parts: Iterable[Any]) -> list[Any]:
    """[work(part) for part in parts], shared out among as many threads as torch uses.

    Inside ``work`` torch's operations use one thread, so that results do not depend on how many threads there are;
    ``work`` should hold no lock for long, and write where no other part does. The first error is raised.
    """
    import torch

    number = torch.get_num_threads()
    if number == 1:
        return [work(part) for part in parts]
    try:
        with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(number)  # a thread's number becomes that of threads to come
