"""Tables of cells: CSV, TSV, atomic files, Parquet and JSON lines, plain or packed, read column by column.

One tokenizer for every program. Cells come as they stand: nothing is stripped, guessed or turned into numbers here.
Columns that nobody asks for are counted (every row must be as wide as the header) and otherwise not looked at.
"""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gfml.base.errors import UserError, suggest
from gfml.data.interning import Interning

PACKED = ("gz", "zst")
ATOMIC = ("inter", "item", "user", "kg", "link", "net")
TABLE_SUFFIXES = ("csv", "tsv", "tab", "txt", "dat", "data", "parquet", "json", "jsonl", *ATOMIC)
KINDS = ("token", "token_seq", "float", "float_seq")
SEPARATORS = ("\t", ",", ";", "|", "::", " ")
SEPARATOR_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " ", "blank": " "}
# '::' is two bytes; tables that have it are read with this character, which no text has, in its place.
UNIT = "\x1f"
_BLOCK = 4 << 20
_HEAD = 1 << 18
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_MARKS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
# What is no text, by its first bytes, and what to do about it.
_OTHERS = {b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or export the sheet as CSV",
           b"BZh": "packed by bzip2: unpack it", b"\xfd7zXZ": "packed by xz: unpack it", b"7z\xbc\xaf": "a 7z archive: unpack it",
           b"PAR1": "a Parquet table: let its name end in .parquet", b"\x93NUMPY": "a numpy array: write a table"}  # fmt: skip
# Lines before a table as graph collections write them; a name may begin with the mark, but not with a blank after it.
_COMMENTS = re.compile(rb"(?:[#%] [^\r\n]*(?:\r\n|\r|\n))+")


# Bytes ------------------------------------------------------------------------------------------


def suffix(path: Path) -> str:
    """The last ending without that of a packer, lower case: ``csv`` of ``own.CSV.gz``."""
    ends = [end.lstrip(".").lower() for end in path.suffixes]
    while ends and ends[-1] in PACKED:
        ends.pop()
    return ends[-1] if ends else ""


def short(error: Exception) -> str:
    """The text of an error on one line."""
    return " ".join(str(error).split())[:160]


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of ``path``, unpacked if it is gzip or Zstandard (told by its first bytes, not its name)."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path given with `dataset` or `data_root`") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from error
    packer = next((name for magic, name in _MAGIC.items() if raw.startswith(magic)), None)
    if packer is not None:
        try:
            with pa.CompressedInputStream(pa.BufferReader(raw), packer) as stream:
                raw = stream.read()
        except OSError as error:
            raise UserError(
                f"{path} is truncated or damaged {packer} ({short(error)}): fetch the file again"
            ) from error
    if not raw.strip():
        raise UserError(f"{path} is empty: wanted at least one row, fetch or write the file again")
    return raw.removeprefix(b"\xef\xbb\xbf")


def without_comments(raw: bytes, path: Path, notes: dict[str, object]) -> bytes:
    """Text with empty lines in place of the comments (``# ...``, ``% ...``) that it begins with; noted."""
    found = _COMMENTS.match(raw)
    if found is None:
        return raw
    lines = len(found[0].splitlines())
    notes[f"comment lines at the beginning of {path.name}, not read"] = lines
    return b"\n" * lines + raw[found.end() :]


def utf8_bytes(raw: bytes, path: Path, notes: dict[str, object], *, header_only: bool = False) -> bytes:
    """``raw`` in UTF-8: UTF-16 and UTF-32 by their mark or their zero bytes, else latin-1 where it is no UTF-8.

    header_only: judge by the first line; a column that nobody reads may hold anything. What was found is noted.
    """
    other = next((what for mark, what in _OTHERS.items() if raw.startswith(mark)), None)
    if other is not None:
        raise UserError(f"{path} is {other}")
    found = next((name for mark, name in _MARKS if raw.startswith(mark)), None)
    head = np.frombuffer(raw[: 1 << 12], dtype=np.uint8)
    if found is None and (head == 0).any():
        even, odd = (head[::2] == 0).mean(), (head[1::2] == 0).mean()
        found = "utf-16-le" if odd > 0.4 and even < 0.1 else "utf-16-be" if even > 0.4 and odd < 0.1 else None
        if found is None:
            raise UserError(f"{path} holds zero bytes and is no text: save it as UTF-8")
    if found is None:
        try:
            (raw.lstrip(b"\r\n").splitlines()[0] if header_only else raw).decode("utf-8")
            return raw
        except UnicodeDecodeError:
            found = "latin-1"
    try:
        text = raw.decode(found)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} starts as {found} and is not ({short(error)}): save it as UTF-8") from error
    notes[f"encoding of {path.name}"] = f"{found}, not UTF-8"
    return text.lstrip("\ufeff").encode("utf-8")


# Dialect ----------------------------------------------------------------------------------------


class Dialect(NamedTuple):
    """How a text file spells a table. start: characters before the header."""

    separator: str
    quoted: bool
    start: int = 0


def given_separator(text: str | None) -> str | None:
    """What ``--sep`` means: a character, ``::``, or the name of one."""
    if text is None:
        return None
    found = SEPARATOR_NAMES.get(text.lower(), text)
    if found != "::" and (len(found) != 1 or found in '\r\n"' or ord(found) > 127):
        raise UserError(f"found `sep {text!r}`, wanted one character, '::' or one of {', '.join(SEPARATOR_NAMES)}")
    return found


def _rows(text: str, dialect: Dialect) -> Iterator[tuple[list[str], int, int]]:
    """(cells, line from 1, characters up to its end) of every row that is no empty line."""
    ends = itertools.accumulate((len(line[0]) for line in _LINE.finditer(text, dialect.start)), initial=dialect.start)
    lines = (line[0] for line in _LINE.finditer(text, dialect.start))
    before = len(_LINE.findall(text[: dialect.start]))
    if not dialect.quoted or '"' not in text:
        cells = (line.rstrip("\r\n").split(dialect.separator) for line in lines)
        for number, (row, end) in enumerate(zip(cells, itertools.islice(ends, 1, None), strict=False), start=1):
            if row != [""]:
                yield row, before + number, end
        return
    reader, place = csv.reader(lines, delimiter=dialect.separator, strict=True), list(ends)
    for row in reader:
        if row:
            yield row, before + reader.line_num, place[reader.line_num]


_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def _first(text: str, dialect: Dialect, count: int) -> list[list[str]]:
    rows: list[list[str]] = []
    try:
        for row, *_ in itertools.islice(_rows(text, dialect), count):
            rows.append(row)
    except csv.Error:  # told with its line when the whole file is checked
        rows += (row for row, *_ in itertools.islice(_rows(text, dialect._replace(quoted=False)), len(rows), count))
    return rows


def normal(name: str) -> str:
    """A column's name without case, blanks, underscores, hyphens and dots: ``Item ID`` is ``item_id``."""
    return re.sub(r"[\s_.\-]+", "", name).casefold()


def _sniff(path: Path, head: str, separator: str | None, wanted: set[str]) -> Dialect:
    """The separator that cuts the header and the next three rows alike."""
    start, kind = 0, suffix(path)
    named = re.match(r'"?sep=(.)"?(?:\r\n|\r|\n)', head)
    if named:  # the line that spreadsheets write
        separator, start = separator or named[1], named.end()
    plain = kind in (*ATOMIC, "tsv", "tab")

    def of(mark: str) -> Dialect:
        return Dialect(mark, not plain and mark not in ("\t", "::"), start)

    if separator is not None:
        return of(separator)
    first = next((line[0].rstrip("\r\n") for line in _LINE.finditer(head, start) if line[0].strip()), "")
    marks = [mark for mark in SEPARATORS if mark in first]
    if not marks:
        raise UserError(
            f"{path}, line 1: found one column {first[:40]!r}, wanted at least user and item, separated by commas or tabs: "
            "name another separator with `sep`"
        )

    def score(mark: str) -> tuple[bool, bool, bool, int]:
        rows = _first(head, of(mark), 4)
        width = len(rows[0])
        known = sum(normal(name.partition(":")[0]) in wanted for name in rows[0])
        alike = width > 1 and all(_fitting(len(row), row[-1], width, rows[0][-1]) for row in rows)
        return alike, plain and mark == "\t", known > 1, width

    return of(max(marks, key=score))


def _fitting(found: int, last: str, width: int, last_name: str) -> bool:
    """Whether a row is as wide as the header but for a separator at the end of either."""
    return found == width or (found == width + 1 and not last.strip()) or (found == width - 1 and not last_name.strip())


def is_number(cell: str) -> bool:
    """Whether a cell is a number, whatever it means."""
    return bool(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", cell))


# Tables -----------------------------------------------------------------------------------------


@dataclass
class Table:
    """Columns of a file. names: as the header has them; kinds: types of an atomic header, by name.

    notes: what reading found.
    """

    path: Path
    names: list[str]
    kinds: Mapping[str, str] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    def read(self, columns: Sequence[str], whole: Sequence[str] = (), coded: Sequence[str] = ()) -> dict[str, Any]:
        """The ``columns``, one entry a row: strings, or the file's own types, as ``pyarrow.ChunkedArray``.

        whole: try these as int64 on the way. coded: a table of text gives these as :class:`~gfml.data.interning.Coded`.
        """
        raise NotImplementedError

    def place(self, row: int) -> str:
        """Where a row (from 0) stands in the file."""
        return f"row {row + 1}"

    def error(self, row: int, found: object, wanted: str) -> UserError:
        """The error for a cell."""
        shown = found if not isinstance(found, str) or len(found) <= 40 else found[:37] + "..."
        return UserError(f"{self.path}, {self.place(row)}: found {shown!r}, wanted {wanted}: correct or remove it")

    def column(self, asked: str, flag: str) -> str:
        """The column a user asks for: by its name, else the only one that is the same name but for case and blanks."""
        alike = [name for name in self.names if name == asked] or [n for n in self.names if normal(n) == normal(asked)]
        if len(alike) == 1:
            return alike[0]
        listed = ", ".join(self.names)
        if alike:
            raise UserError(f"{self.path} has several columns {asked!r} for {flag}: found {listed}; rename one")
        raise UserError(f"{self.path} has no column {asked!r} for {flag}: found {listed}{suggest(asked, self.names)}")

    def find(self, usual: Sequence[str]) -> str | None:
        """The column with the first of the ``usual`` names, whatever its case, blanks and underscores."""
        for name in usual:
            alike = [own for own in self.names if normal(own) == normal(name)]
            if len(alike) > 1:
                raise UserError(f"{self.path} has several columns {name!r}: found {', '.join(self.names)}; name one")
            if alike:
                return alike[0]
        return None

    def texts(self, column: str) -> list[str]:
        """A column as strings; cells without value are empty."""
        array = as_strings(self.read([column])[column])
        return ["" if cell is None else cell for cell in array.to_pylist()]


def as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as strings; ArrowInvalid for one of lists or other structures."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column if pa.types.is_string(column.type) else cast(column, pa.string())


def cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """The column as another type; ArrowInvalid also where there is no such conversion."""
    try:
        return column.cast(kind)
    except pa.ArrowNotImplementedError as error:
        raise pa.ArrowInvalid(str(error)) from None


def open_table(
    path: str | os.PathLike[str],
    *,
    separator: str | None = None,
    header: bool | None = None,
    wanted: Sequence[str] = (),
) -> Table:
    """The table in ``path``, by its ending: Parquet, JSON lines, else text.

    header: False for a file whose columns have numbers only (``1``, ``2``, ...); None: it has one unless its first
    line is all numbers. wanted: usual names, which tell the separator where several would do.
    Raises UserError, one line, for what is no table, and for rows that are not as wide as the header.
    """
    path = Path(path)
    kind = suffix(path)
    if kind == "parquet":
        return ParquetTable.open(path)
    if kind in ("json", "jsonl"):
        return JsonTable.open(path)
    return TextTable.open(path, given_separator(separator), header, {normal(name) for name in wanted})


@dataclass
class ParquetTable(Table):
    """Parquet: typed columns."""

    @classmethod
    def open(cls, path: Path) -> ParquetTable:
        import pyarrow.parquet as pq

        if not path.exists():
            raise UserError(f"no file {path}: check the path given with `dataset` or `data_root`")
        try:
            return cls(path, [str(name) for name in pq.read_schema(path).names])
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is no readable Parquet file ({short(error)}): write it again") from error

    def read(self, columns: Sequence[str], whole: Sequence[str] = (), coded: Sequence[str] = ()) -> dict[str, Any]:
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(self.path, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path} is no readable Parquet file ({short(error)}): write it again") from error
        if not table.num_rows:
            raise UserError(f"{self.path} has no rows: wanted at least one row, write the file again")
        return {name: table[name] for name in columns}


@dataclass
class TextTable(Table):
    """Text with a separator. raw: the content where the file had to be unpacked or recoded, else None.

    width: cells of a row, with one after a last separator (``extra``). start: bytes before the first row.
    """

    dialect: Dialect = field(default=None)
    header: bool = True
    raw: bytes | None = None
    width: int = 0
    start: int = 0
    extra: bool = False
    many_lines: bool = False

    @classmethod
    def open(cls, path: Path, separator: str | None, header: bool | None, wanted: set[str]) -> TextTable:
        notes: dict[str, object] = {}
        raw = _unpacked(path, notes)
        head = _head(path, raw)
        if _COMMENTS.match(head.encode()):
            raw = without_comments(raw or read_bytes(path), path, notes)
            head = _head(path, raw)
        dialect = _sniff(path, head, separator, wanted)
        if dialect.separator == "::":
            raw = (raw or read_bytes(path)).replace(b"::", UNIT.encode())
            head, dialect = _head(path, raw), dialect._replace(separator=UNIT)
        rows = _first(head, dialect, 2)
        if not rows:
            raise UserError(f"{path} is empty: wanted at least one row, fetch or write the file again")
        if header is None:
            bare = rows[0][:1] if suffix(path) == "dat" else [cell for cell in rows[0] if cell.strip()]
            header = not all(is_number(cell) for cell in bare)
        if header and len(rows) == 1:
            raise UserError(f"{path} has a header and no rows: wanted at least one row, write the file again")
        names, kinds = _typed(rows[0]) if header else ([str(column + 1) for column in range(len(rows[0]))], {})
        table = cls(path, names, kinds, notes, dialect=dialect, header=header, raw=raw, width=len(names))
        table._fit(rows[1] if header else rows[0], rows[0][-1])
        table._find_start(head)
        return table

    def _fit(self, row: list[str], last_name: str) -> None:
        """A separator at the end of the rows, or of the header alone, stands for no column."""
        if not self.header and not row[-1].strip() and len(row) > 2:
            self.names, self.extra = self.names[:-1], True
        elif len(row) == self.width + 1 and not row[-1].strip():
            self.width, self.extra = len(row), True
        elif len(row) == self.width - 1 and not last_name.strip():
            self.width, self.names = len(row), self.names[:-1]

    def _find_start(self, head: str) -> None:
        end = next(_rows(head, self.dialect))[2] if self.header else self.dialect.start
        marked = self.raw is None and _starts(self.path, b"\xef\xbb\xbf")
        self.start = len(head[:end].encode()) + (3 if marked else 0)

    def read(self, columns: Sequence[str], whole: Sequence[str] = (), coded: Sequence[str] = ()) -> dict[str, Any]:
        if self.dialect.quoted and not self.many_lines:
            self._check_quotes()
        asked = [*columns, *([""] if self.extra else [])]
        odd: list[Any] = []
        try:
            found = self._chunks(asked, whole, coded, odd)
        except pa.ArrowInvalid as error:
            if "invalid UTF8" not in str(error):
                raise self._explain(error, odd) from error
            # Only columns that are read are looked at: one that is not UTF-8 makes the file latin-1.
            self.raw = utf8_bytes(self.raw or read_bytes(self.path), self.path, self.notes)
            self._find_start(_head(self.path, self.raw))
            found = self._chunks(asked, whole, coded, odd)
        if self.extra:
            self._check_extra(found.pop(""))
        return found

    def _chunks(
        self, columns: Sequence[str], whole: Sequence[str], coded: Sequence[str], odd: list[Any]
    ) -> dict[str, Any]:
        """Every column chunk by chunk, so that numbers and ids never stand in memory as text."""
        place = {name: str(self.names.index(name) if name or not self.extra else self.width - 1) for name in columns}
        numeric, interned = set(whole), {name: Interning() for name in coded}
        found: dict[str, list[pa.Array]] = {name: [] for name in columns if name not in interned}
        with self._reader(list(place.values()), odd) as reader:
            for batch in reader:
                for name, texts in interned.items():
                    texts.add(batch.column(place[name]))
                for name, chunks in found.items():
                    cells = batch.column(place[name])
                    if name in numeric:
                        try:
                            cells = cells.cast(pa.int64())
                        except pa.ArrowInvalid:
                            numeric.discard(name)
                            chunks[:] = [chunk.cast(pa.string()) for chunk in chunks]
                    chunks.append(cells)
        types = {name: pa.int64() if name in numeric else pa.string() for name in found}
        return {
            **{name: pa.chunked_array(chunks, types[name]) for name, chunks in found.items()},
            **{name: texts.result() for name, texts in interned.items()},
        }

    def _reader(self, keys: list[str], odd: list[Any]) -> Any:
        """A stream of batches; rows of another width end it and go to ``odd``. In one thread: less CPU, and rows are numbered."""
        import pyarrow.csv as arrow_csv

        source = pa.OSFile(str(self.path)) if self.raw is None else pa.BufferReader(self.raw)
        source.seek(self.start)
        names = [str(column) for column in range(self.width)]

        def end(row: Any) -> str:
            odd.append(row)
            return "error"

        parse = arrow_csv.ParseOptions(
            delimiter=self.dialect.separator,
            quote_char='"' if self.many_lines else False,
            newlines_in_values=self.many_lines,
            invalid_row_handler=end,
        )
        convert = arrow_csv.ConvertOptions(
            include_columns=keys,
            column_types=dict.fromkeys(keys, pa.string()),
            strings_can_be_null=False,
            null_values=[],
        )
        read = arrow_csv.ReadOptions(column_names=names, block_size=_BLOCK, use_threads=False)
        return arrow_csv.open_csv(source, read, parse, convert)

    def _blocks(self) -> Iterator[bytes]:
        """The rows without the header, in pieces."""
        with io.BytesIO(self.raw) if self.raw is not None else open(self.path, "rb") as stream:
            stream.seek(self.start)
            while block := stream.read(_BLOCK):
                yield block

    def _explain(self, error: pa.ArrowInvalid, odd: list[Any]) -> UserError:
        """Which row is not as wide as the header."""
        if not odd:
            return UserError(f"{self.path} is no readable table ({short(error)}): correct it, or name its `sep`")
        shown = "::" if self.dialect.separator == UNIT else self.dialect.separator
        return UserError(
            f"{self.path}, {self.place(odd[0].number - 1)}: found {odd[0].actual_columns} cells, wanted {self.width} separated by "
            f"{shown!r}, as in the {'header' if self.header and not self.extra else 'first row'}: correct the row, or name the separator with `sep`"
        )

    def place(self, row: int) -> str:
        text = (self.raw if self.raw is not None else read_bytes(self.path)).decode("utf-8", "replace")
        try:
            found = next(
                itertools.islice(_rows(text, self.dialect._replace(quoted=self.many_lines)), row + self.header, None)
            )
        except (StopIteration, csv.Error):
            return super().place(row)
        return f"line {found[1]}"

    def _check_extra(self, cells: pa.ChunkedArray) -> None:
        """Cells after a last separator must be empty; nothing is shifted."""
        filled = np.flatnonzero(np.asarray(pc.not_equal(pc.utf8_trim_whitespace(cells), "")))
        if len(filled):
            row = int(filled[0])
            raise self.error(
                row, cells[row].as_py(), f"nothing after the last separator, the header has {self.width - 1} columns"
            )
        self.notes["separator at the end of every row"] = "stands for no column"

    def _check_quotes(self) -> None:
        """Whether cells are quoted at all, and every quotation mark opens or closes a cell.

        One that does not, swallows rows up to the next one. Raises UserError with its line.
        """
        sound = _well_quoted(self._blocks(), self.dialect.separator.encode())
        if sound is None:
            return
        self.many_lines = True
        if sound:
            return
        line, text = 0, (self.raw or read_bytes(self.path)).decode("utf-8", "replace")
        try:
            for row in _rows(text, self.dialect):
                line = row[1]
        except csv.Error as error:
            raise UserError(
                f"{self.path}, in the row after line {line}: a quotation mark is not closed where its cell ends ({error}): "
                "double or remove it, or write the table with tabs, where it is a character"
            ) from error


def _well_quoted(blocks: Iterator[bytes], separator: bytes) -> bool | None:
    """Whether odd quotation marks follow a separator or a line's end and even ones stand before one, or before another.

    None where there is no quotation mark. blocks: the rows, in pieces.
    """
    edge = np.zeros(256, dtype=bool)
    edge[[10, 13, 34, *separator]] = True
    count, last, sound, waits = 0, 10, True, False
    for block in blocks:
        if waits:  # the closing mark at the end of the block before
            sound, waits = sound and bool(edge[block[0]]), False
        if b'"' in block:
            cells = np.frombuffer(block, dtype=np.uint8)
            marks = np.flatnonzero(cells == 34)
            opens = (np.arange(count, count + len(marks)) % 2) == 0
            count += len(marks)
            waits = bool(marks[-1] == len(cells) - 1 and not opens[-1])
            before = cells[np.maximum(marks - 1, 0)]
            before[marks == 0] = last
            after = cells[np.minimum(marks + 1, len(cells) - 1)]
            sound = sound and bool(edge[np.where(opens, before, after)].all())
        last = block[-1]
    return None if count == 0 else sound and count % 2 == 0


def _starts(path: Path, mark: bytes) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(mark)) == mark


def _unpacked(path: Path, notes: dict[str, object]) -> bytes | None:
    """The content in UTF-8 where the file is packed or in another encoding; None where it can be read as it is."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return read_bytes(path)  # says what is wrong
    if head.startswith(tuple(_MAGIC)) or not head.strip():
        return utf8_bytes(read_bytes(path), path, notes, header_only=True)
    recoded = utf8_bytes(head, path, {}, header_only=True)
    return None if recoded is head else utf8_bytes(read_bytes(path), path, notes)


def _head(path: Path, raw: bytes | None) -> str:
    """The first rows, whole lines."""
    if raw is None:
        with open(path, "rb") as stream:
            raw = stream.read(_HEAD)
    head = raw[:_HEAD].removeprefix(b"\xef\xbb\xbf")
    cut = max(head.rfind(b"\n"), head.rfind(b"\r")) + 1 if len(raw) >= _HEAD else 0
    return head[: cut or None].decode("utf-8", "replace")


def _typed(cells: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names and types of a header; ``name:token`` has a type."""
    split = [cell.strip().rpartition(":") for cell in cells]
    names = [
        (name if name and kind in KINDS else cell).strip() for cell, (name, _, kind) in zip(cells, split, strict=True)
    ]
    return names, {name: kind for name, (own, _, kind) in zip(names, split, strict=True) if own and kind in KINDS}


# JSON lines -------------------------------------------------------------------------------------


@dataclass
class JsonTable(Table):
    """One object a line, JSON or a Python literal."""

    raw: bytes = b""

    @classmethod
    def open(cls, path: Path) -> JsonTable:
        notes: dict[str, object] = {}
        raw = _lines_of(path, notes)
        head = [row for _, row in itertools.islice(_objects(raw[: 1 << 20], path, whole=len(raw) <= 1 << 20), 100)]
        return cls(path, list(dict.fromkeys(name for row in head for name in row)), {}, notes, raw)

    def read(self, columns: Sequence[str], whole: Sequence[str] = (), coded: Sequence[str] = ()) -> dict[str, Any]:
        import pyarrow.json as arrow_json

        rows = [
            row
            for _, row in itertools.islice(
                _objects(self.raw[: 1 << 20], self.path, whole=len(self.raw) <= 1 << 20), 100
            )
        ]
        kinds = {name: {type(row[name]) for row in rows if row.get(name) is not None} for name in columns}
        plain = {str: pa.string(), int: pa.int64(), float: pa.float64()}
        if all(len(found) == 1 and found <= plain.keys() for found in kinds.values()):
            schema = pa.schema([(name, plain[next(iter(found))]) for name, found in kinds.items()])
            options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            try:
                table = arrow_json.read_json(
                    pa.BufferReader(self.raw), arrow_json.ReadOptions(block_size=1 << 24), options
                )
                return {name: table[name] for name in columns}
            except pa.ArrowInvalid:
                pass  # fields of several types, or no JSON: line by line, which names the line
        found: dict[str, list[str | None]] = {name: [] for name in columns}
        for place, row in _objects(self.raw, self.path):
            for name, cells in found.items():
                value = row.get(name)
                if name in coded and isinstance(value, (dict, list)):
                    raise UserError(
                        f"{self.path}, line {place}: found {json.dumps(value)[:40]!r} for {name}, wanted one id: write an object "
                        "for each interaction (pandas: orient='records', lines=True)"
                    )
                cells.append(
                    value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                )
        return {name: pa.chunked_array([pa.array(cells, pa.string())]) for name, cells in found.items()}

    def place(self, row: int) -> str:
        return f"line {next(itertools.islice(_objects(self.raw, self.path), row, None))[0]}"


def json_objects(path: Path, notes: dict[str, object]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, object) of every line that is not blank; nothing is evaluated. UserError names a line that is none."""
    return _objects(_lines_of(path, notes), path)


def _lines_of(path: Path, notes: dict[str, object]) -> bytes:
    """The file with an object a line; one list of objects is written so, and noted."""
    raw = utf8_bytes(read_bytes(path), path, notes)
    if not raw.lstrip().startswith(b"["):
        return raw
    try:
        rows = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path} starts as a list and is no JSON ({short(error)}): fetch the file again") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: found a list of other things, wanted objects, or one JSON object a line")
    notes[f"form of {path.name}"] = "one list of objects, a row each"
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _objects(raw: bytes, path: Path, *, whole: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    for place, line in enumerate(io.BytesIO(raw), start=1):
        if not whole and not line.endswith(b"\n"):
            return
        if line.strip():
            yield place, _object(line.decode("utf-8"), path, place)


def _object(line: str, path: Path, place: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        try:
            found = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{path}, line {place}: found {line[:40]!r}, wanted one JSON object a line: fetch the file again"
        )
    return found
