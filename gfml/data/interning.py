"""Columns of texts as codes while they are read: no column of ids ever stands in memory as text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from gfml.data.interactions import MANY


class Coded(NamedTuple):
    """codes int32, chunk by chunk, into texts, which are distinct and in the order of their first appearance."""

    codes: list[np.ndarray]
    texts: pa.Array


class Interning:
    """A column chunk by chunk: :meth:`add` each, then :meth:`result`.

    Few rows go through Arrow's dictionaries, many through a table of our own in compiled code, two to four times as fast.
    """

    def __init__(self) -> None:
        self._waiting: list[pa.Array] = []
        self._rows = 0
        self._codes: list[np.ndarray] = []
        self._known = 0
        self._table = np.zeros((1 << 16, 4), dtype=np.uint64)
        self._ends = np.zeros(1 << 15, dtype=np.int64)
        self._content = np.empty(1 << 20, dtype=np.uint8)

    def add(self, texts: pa.Array) -> None:
        """The next rows, strings without nulls."""
        if not len(texts):  # without buffers, perhaps
            return
        self._waiting.append(texts)
        self._rows += len(texts)
        if self._rows >= MANY:
            for chunk in self._waiting:
                self._look_up(chunk)
            self._waiting = []

    def result(self) -> Coded:
        """The codes of all rows and the distinct texts."""
        if self._waiting or not self._codes:
            encoded = pa.chunked_array(self._waiting, pa.string()).combine_chunks().dictionary_encode()
            return Coded([encoded.indices.to_numpy()], encoded.dictionary)
        ends = self._ends[: self._known + 1]
        texts = pa.LargeStringArray.from_buffers(
            self._known, pa.py_buffer(ends), pa.py_buffer(self._content[: ends[-1]])
        )
        return Coded(self._codes, texts.cast(pa.string()))

    def _look_up(self, texts: pa.Array) -> None:
        from gfml.kernels.texts import grow, hashes, look_up

        _, edges, content = texts.buffers()
        edges = np.frombuffer(edges, dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]
        data = np.frombuffer(content or b"", dtype=np.uint8)
        found, codes, done = np.empty(len(texts), np.uint64), np.empty(len(texts), np.int32), 0
        hashes(edges, data, found)
        while True:
            rows, self._known = look_up(
                edges[done:], data, found[done:], codes[done:], self._table, self._ends, self._content, self._known
            )
            done += rows
            if done == len(codes):
                break
            if 2 * (self._known + 1) > len(self._table):
                larger = np.zeros((2 * len(self._table), 4), dtype=np.uint64)
                grow(self._table, larger)
                self._table = larger
            self._ends = _room(self._ends, self._known + 2)
            self._content = _room(self._content, int(self._ends[self._known] + edges[done + 1] - edges[done]))
        self._codes.append(codes)


def _room(array: np.ndarray, least: int) -> np.ndarray:
    """``array`` with room for ``least`` entries, at least twice as many as before where it had too few."""
    if len(array) >= least:
        return array
    larger = np.empty(max(2 * len(array), least), dtype=array.dtype)
    larger[: len(array)] = array
    return larger
