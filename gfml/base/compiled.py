"""Loops as machine code, and work shared out among threads. Importing this module imports numba: do it where it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def compiled(function: Callable | None = None, *, any_order: bool = False) -> Callable:
    """``function`` as machine code that holds no lock, compiled at the first call for each kind of arguments.

    Kept on disk if some folder for it can be written. A division by zero gives infinity or NaN, as numpy's does.
    any_order: sums may be taken in an order that suits the processor, and products rounded together with them; the
        order is still the same in every call.
    """
    if function is None:
        return functools.partial(compiled, any_order=any_order)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    if any_order:
        options["fastmath"] = {"reassoc", "contract"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no such folder
        return njit(**options)(function)


@intrinsic
def prefetch(typing_context: Any, array: types.Array, row: types.Integer, column: types.Integer) -> Any:
    """Ask for array[row, column] to be brought into the cache, and go on: scattered rows then cost less waiting.

    No more than a hint: nothing is read, and an index out of bounds does no harm. Inside compiled functions only.
    """
    if not isinstance(array, types.Array) or array.ndim != 2:
        return None

    def build(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = [context.cast(builder, value, kind, types.intp)
                 for value, kind in zip(arguments[1:], signature.args[1:], strict=True)]  # fmt: skip
        pointer = cgutils.get_item_pointer(context, builder, signature.args[0], data, place, wraparound=False)
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [builder.bitcast(pointer, cgutils.voidptr_t), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, row, column), build


class Team:
    """Threads that stay between calls, for work of a millisecond; they start at the first call that needs them.

    ``team(work, parts)`` calls work(0), ..., work(parts - 1), the first in the caller's thread. ``work`` should be
    compiled code that holds no lock.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0

    def __call__(self, work: Callable[[int], Any], parts: int) -> None:
        if parts > 1 + self._size:
            self._pool, self._size = ThreadPoolExecutor(parts - 1), parts - 1
        others = [self._pool.submit(work, part) for part in range(1, parts)] if self._pool else []
        work(0)
        for other in others:
            other.result()


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
