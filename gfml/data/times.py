"""Times of interactions: one convention for a whole column, decided by all of it and said in a note.

Numbers are seconds, milliseconds, microseconds or nanoseconds since 1970 by their range, or plain numbers whose order
counts. Texts are dates, with a clock or not: ISO, day first, month first or with a month's name. A column that can be
read in two ways is refused with both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gfml.base.errors import UserError
from gfml.data.tables import Table, as_strings, is_number

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Seconds of 1973 to 5138; a thousand times as much are milliseconds, and so on.
_LEAST = 10**8
_ORDERS = ("Y{0}m{0}d", "d{0}m{0}Y", "m{0}d{0}Y", "d{0}m{0}y", "m{0}d{0}y", "y{0}m{0}d")
_NUMERIC = tuple(
    "%" + order.format(mark + "%") for mark in ("-", "/", ".") for order in _ORDERS
)  # e.g. %Y-%m-%d; all that fit are tried
_WORDED = ("%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%b %d %Y", "%B %d %Y", "%d-%b-%Y", "%d-%b-%y", "%d/%b/%Y",
           "%m %d, %Y", "%Y%m%d")  # fmt: skip
_WHOLE = ("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Y", "%a, %d %b %Y %H:%M:%S %z", "%a, %d %b %Y %H:%M:%S GMT",
          "%d/%b/%Y:%H:%M:%S %z")  # fmt: skip
_CLOCKS = ("%H:%M:%S", "%H:%M", "%H:%M:%S.%f", "%I:%M:%S %p", "%I:%M %p", "%I:%M:%S%p", "%I:%M%p")
_PARTS = r"^\s*(?P<date>.*?)(?:(?:(?<=\d)T|[\s,]+|^)(?P<clock>\d{1,2}:\d{2}.*?))?\s*$"
_ZONE = r"\s*(?P<zone>[Zz]|UTC|GMT|[+-]\d{2}:?\d{2})$"


class Times(NamedTuple):
    """values int64 or float64 [n], in file order. per_second: how many make a second, None where they are no times."""

    values: np.ndarray
    per_second: int | None


def read_times(
    table: Table,
    column: str,
    cells: pa.ChunkedArray,
    time_format: str | None = None,
    *,
    clock: pa.ChunkedArray | None = None,
) -> Times:
    """The times of a column (and of a second one with the clock). UserError names the line of a cell that is none."""
    if cells.null_count:
        row = int(np.flatnonzero(np.asarray(pc.is_null(cells)))[0])
        raise table.error(row, "", f"a time in column {column}")
    if pa.types.is_duration(cells.type):
        cells = cells.cast(pa.int64())
    if pa.types.is_temporal(cells.type) and not pa.types.is_time(cells.type):
        cells = cells.cast(pa.timestamp("us", cells.type.tz if pa.types.is_timestamp(cells.type) else None))
        return _noted(table, column, np.asarray(cells.cast(pa.int64())), UNITS["us"], "dates of the file")
    if (clock is None and time_format is None) or time_format in UNITS:
        numbers = _numbers(table, column, cells)
        if numbers is not None:
            return _epoch(table, column, numbers, time_format)
        if time_format is not None:
            raise _unread(table, column, cells, f"a number, as `time_format {time_format}` says")
    try:
        cells = as_strings(cells)
    except pa.ArrowInvalid:
        raise table.error(0, str(cells.type), f"a time in column {column}") from None
    if time_format is None and clock is None and is_number(cells[0].as_py()):
        raise _unread(table, column, cells, "a number as in the rows before (`time_col none` declines the column)")
    return _dates(table, column, cells, time_format, clock)


def _numbers(table: Table, column: str, cells: pa.ChunkedArray) -> np.ndarray | None:
    """The cells as numbers, None where they are none; a number that is not finite is an error."""
    if pa.types.is_string(cells.type):
        try:
            cells = pc.utf8_trim_whitespace(cells).cast(pa.float64())
        except pa.ArrowInvalid:
            return None
    if not (pa.types.is_integer(cells.type) or pa.types.is_floating(cells.type)):
        return None
    values = np.asarray(cells)
    if values.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise table.error(int(bad[0]), str(values[bad[0]]), f"a time in column {column}")
        if (values == np.floor(values)).all() and np.abs(values).max(initial=0) < 2**53:
            values = values.astype(np.int64)
    return values


def _epoch(table: Table, column: str, values: np.ndarray, unit: str | None) -> Times:
    if unit is not None:
        return _noted(table, column, values, UNITS[unit], f"{_UNIT_NAMES[unit]} since 1970")
    days = _as_days(values)
    if days is not None:
        return _noted(table, column, days, 1, f"dates such as {values[0]}")
    edges = [_LEAST * 10**3, _LEAST * 10**6, _LEAST * 10**9]
    least, most = (int(np.searchsorted(edges, end, side="right")) for end in (values.min(), values.max()))
    if values.min() >= _LEAST and least == most:
        return _noted(table, column, values, list(UNITS.values())[most], f"{_UNIT_NAMES[list(UNITS)[most]]} since 1970")
    late = values >= _LEAST
    if not late.any():
        table.notes[f"time {column}"] = (
            f"plain numbers from {values.min():g} to {values.max():g}, the smaller the earlier"
        )
        return Times(values, None)
    group = np.searchsorted(edges, values, side="right")
    first, last = int(group[late].min()), int(group.max())
    names = list(UNITS)
    if first != last:
        one, other = int(np.flatnonzero(late & (group == first))[0]), int(np.flatnonzero(group == last)[0])
        raise UserError(
            f"{table.path}: column {column} mixes {_UNIT_NAMES[names[first]]} ({table.place(one)}: {values[one]}) and "
            f"{_UNIT_NAMES[names[last]]} ({table.place(other)}: {values[other]}): write one unit, or say it with `time_format s, ms, us or ns`"
        )
    early = int((~late).sum())
    more = f", {early:,} of them before 1973" if early else ""
    return _noted(table, column, values, UNITS[names[last]], f"{_UNIT_NAMES[names[last]]} since 1970{more}")


def _as_days(values: np.ndarray) -> np.ndarray | None:
    """Numbers such as 20170714 or 20170714024000 as seconds since 1970, None where one is no such date."""
    clock = values.dtype.kind == "i" and values.max() > 10**13
    whole = 10**6 if clock else 1
    if values.dtype.kind != "i" or values.min() < 19000101 * whole or values.max() >= 21010101 * whole:
        return None
    distinct, rows = np.unique(values, return_inverse=True)
    dates = _parsed([str(value) for value in distinct.tolist()], "%Y%m%d%H%M%S" if clock else "%Y%m%d")
    return None if np.isnan(dates).any() else dates[rows].astype(np.int64)


def _noted(table: Table, column: str, values: np.ndarray, per_second: int, what: str) -> Times:
    first, last = (str(np.datetime64(int(value // per_second), "s"))[:-9] for value in (values.min(), values.max()))
    table.notes[f"time {column}"] = f"{what}, from {first} to {last}"
    return Times(values, per_second)


def _parsed(texts: list[str], form: str) -> np.ndarray:
    """Seconds since 1970, NaN where a text is not of this form."""
    import pandas as pd

    # Whatever the form, pandas reads these two words as the moment of the run.
    given = pd.Series([None if text.strip().lower() in ("now", "today") else text for text in texts], dtype=object)
    dates = pd.to_datetime(given, format=form, errors="coerce", utc=True)
    return (dates - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy(dtype=np.float64)


def _dates(
    table: Table, column: str, cells: pa.ChunkedArray, time_format: str | None, clock: pa.ChunkedArray | None
) -> Times:
    encoded = cells.dictionary_encode()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    texts = encoded.chunk(encoded.num_chunks - 1).dictionary
    if time_format is None and clock is None:
        plain = _iso(texts)
        if plain is not None:
            return _micro(table, column, plain[codes], "ISO dates")
    found = _Column(table, column, texts.to_pylist(), codes)
    seconds, what = found.seconds(time_format)
    seconds = seconds[codes]
    if clock is not None:
        spelled = as_strings(clock).combine_chunks().dictionary_encode()
        seconds = (
            seconds
            + found.clock_seconds(spelled.dictionary.to_pylist(), spelled.indices.to_numpy())[
                spelled.indices.to_numpy()
            ]
        )
        what += ", with the clock of its own column"
    return _micro(table, column, np.rint(seconds * 10**6).astype(np.int64), what)


def _iso(texts: pa.Array) -> np.ndarray | None:
    """Microseconds of texts that are all ISO 8601, None else."""
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return np.asarray(texts.cast(kind).cast(pa.int64()))
        except pa.ArrowInvalid:
            continue
    return None


def _micro(table: Table, column: str, values: np.ndarray, what: str) -> Times:
    """Whole seconds where they are, else microseconds."""
    if (values % 10**6 == 0).all():
        return _noted(table, column, values // 10**6, UNITS["s"], what)
    return _noted(table, column, values, UNITS["us"], what)


class _Column(NamedTuple):
    """Distinct texts of a column and which one each row has."""

    table: Table
    column: str
    texts: list[str]
    codes: np.ndarray

    def error(
        self, text: int, wanted: str, codes: np.ndarray | None = None, texts: list[str] | None = None
    ) -> UserError:
        row = int(np.flatnonzero((self.codes if codes is None else codes) == text)[0])
        return self.table.error(row, (texts or self.texts)[text], wanted)

    def seconds(self, form: str | None) -> tuple[np.ndarray, str]:
        """Seconds since 1970 of every text, and the convention."""
        import pandas as pd

        if form is not None and ("%H" in form or "%I" in form or "%c" in form):
            return self._all(self.texts, [form], f"a time as `time_format {form}` says")
        for whole in _WHOLE:
            seconds = _parsed(self.texts[:1], whole)
            if not np.isnan(seconds).any():
                return self._all(self.texts, [whole], f"a time such as {self.texts[0]!r}")
        parts = pd.Series(self.texts, dtype=object).str.extract(_PARTS)
        dates = parts["date"].fillna("").tolist()
        if not any(dates):
            raise self.error(
                0,
                f"a date in column {self.column}: a clock alone orders nothing, name a date with `time_col DATE,CLOCK` or use `time_col none`",
            )
        seconds, what = self._all(dates, [form] if form else [*_NUMERIC, *_WORDED], f"a date in column {self.column}")
        clocks = parts["clock"].fillna("").tolist()
        if any(clocks):
            seconds = seconds + self.clock_seconds(clocks, np.arange(len(clocks)), rows=self.codes)
        return seconds, what

    def _all(self, texts: list[str], forms: list[str], wanted: str) -> tuple[np.ndarray, str]:
        """The one reading of all texts; UserError where there is none, or more than one."""
        likely = [form for form in forms if not np.isnan(_parsed(texts[:1], form)).any()] or forms
        found = {form: _parsed(texts, form) for form in likely}
        whole = {form: seconds for form, seconds in found.items() if not np.isnan(seconds).any()}
        if not whole:
            best = min(found.values(), key=lambda seconds: int(np.isnan(seconds).sum()))
            if len(found) > 1 and not np.isnan(list(found.values())).all(axis=0).any():
                raise self._mixed(texts, found)
            raise self.error(int(np.flatnonzero(np.isnan(best))[0]), wanted + ", or name its form with `time_format`")
        (form, first), *others = whole.items()
        for other, seconds in others:
            if not np.array_equal(first, seconds):
                raise self._ambiguous(texts, (form, first), (other, seconds))
        return first, f"dates of the form {form}"

    def _ambiguous(self, texts: list[str], one: tuple[str, np.ndarray], other: tuple[str, np.ndarray]) -> UserError:
        import pandas as pd

        text = int(np.flatnonzero(one[1] != other[1])[0])
        read = [f"{pd.Timestamp(values[text], unit='s'):%d %B %Y} ({form})" for form, values in (one, other)]
        return UserError(
            f"{self.table.path}: every date of column {self.column} can be read in two ways, {texts[text]!r} is {read[0]} or {read[1]}: "
            f"say which with `time_format {one[0]}` or {other[0]}, or `time_col none`"
        )

    def _mixed(self, texts: list[str], found: dict[str, np.ndarray]) -> UserError:
        """Dates of which no form reads all."""
        form, best = min(found.items(), key=lambda one: int(np.isnan(one[1]).sum()))
        odd = int(np.flatnonzero(np.isnan(best))[0])
        return self.error(
            odd, f"a date of the form {form}, as most of column {self.column} are, or name one with `time_format`"
        )

    def clock_seconds(self, clocks: list[str], codes: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Seconds since midnight UTC of each distinct clock; an empty one is midnight.

        codes: which clock each row has; rows: where the clocks stand in the texts of this column, which text a row has.
        """
        import pandas as pd

        series = pd.Series(clocks, dtype=object).str.strip()
        zone = series.str.extract(_ZONE)["zone"].fillna("")
        bare = series.str.replace(_ZONE, "", regex=True).str.replace(",", ".", regex=False)
        filled = np.flatnonzero(bare != "")
        texts = bare.iloc[filled].tolist()
        seconds = np.full(len(clocks), np.nan)
        for form in _CLOCKS:
            open_ = filled[np.isnan(seconds[filled])]
            seconds[open_] = _parsed([f"1970-01-01 {bare.iloc[place]}" for place in open_], f"%Y-%m-%d {form}")
        bad = filled[np.isnan(seconds[filled])]
        if len(bad):
            raise self.error(
                int(bad[0]),
                "a clock such as 14:05 or 02:05:00 PM",
                codes if rows is None else rows,
                clocks if rows is None else None,
            )
        seconds[bare.to_numpy() == ""] = 0
        return seconds - _offsets(zone.tolist()) if texts else seconds


def _offsets(zones: list[str]) -> np.ndarray:
    """Seconds that each zone (``+02:00``, ``Z``, ...) is ahead of UTC."""

    def one(zone: str) -> int:
        if zone[:1] not in "+-" or not zone:
            return 0
        digits = zone[1:].replace(":", "")
        return (1 if zone[0] == "+" else -1) * (int(digits[:2]) * 3600 + int(digits[2:]) * 60)

    known = {zone: one(zone) for zone in set(zones)}
    return np.array([known[zone] for zone in zones], dtype=np.float64)


def moment(text: str, flag: str) -> float:
    """Seconds since 1970 of a date that a flag gives, ISO 8601 or a number of seconds."""
    if is_number(text) and len(text.strip()) > 8:
        return float(text)
    found = _iso(pa.array([text.strip()]))
    if found is None:
        raise UserError(f"found {flag} {text!r}, wanted a date such as 2017-07-14 or 2017-07-14 02:40:00")
    return float(found[0]) / 10**6


def _unread(table: Table, column: str, cells: pa.ChunkedArray, wanted: str) -> UserError:
    texts = as_strings(cells).to_pylist()
    row = next((row for row, text in enumerate(texts) if not is_number(text)), 0)
    return table.error(row, texts[row], f"{wanted}, in column {column}")
