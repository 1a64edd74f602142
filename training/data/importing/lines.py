"""Rows that are lines of text: JSON lines, and tables in CSV or TSV. Paths are relative to the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from training.data.images import SUFFIXES
from training.data.importing.sources import MOST_TEXT_BYTES, Fault, Found, Source, check_named_once
from training.errors import UserError
from training.recipe import one_line

_BOM, _UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_CHUNK = 2**20
NO_UTF_8, TOO_LONG = "not UTF-8", "line too long"


class JsonLines(Source):
    """An object a line."""

    form = "JSON lines"

    def rows(self) -> Iterator[Found]:
        with _opened(self.path) as file:
            for number, line in enumerate(_lines(file), 1):
                if not line.isspace():
                    yield self._row(f"{self.name}:{number}", line)

    def count(self) -> int:
        return _count(self.path)

    def _row(self, item: str, line: bytes) -> Found:
        if len(line) > MOST_TEXT_BYTES:
            return Found(item, fault=Fault(TOO_LONG, f"more than {MOST_TEXT_BYTES:,} bytes"))
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            return Found(item, fault=Fault(NO_UTF_8))
        except (ValueError, RecursionError) as error:
            return Found(item, fault=Fault("no JSON", one_line(str(error)) + _remedy(line)))
        if not isinstance(row, dict):
            return Found(item, fault=Fault("no JSON object", f"a row is {{…}}{_remedy(line)}"))
        return Found(item, row, self.path.parent)


def _remedy(line: bytes) -> str:
    """For a whole list, on one line or several."""
    return "; of an array `jq -c '.[]'` makes lines" if line.lstrip().startswith(b"[") else ""


class Table(Source):
    """CSV with commas, or TSV with tabs; the first line names the columns.

    A row may go on for lines in a quoted cell. If such a row is none, or has pictures of others in a cell, a quote that
    is not closed has taken rows in, and what follows cannot be trusted: the table is refused.
    """

    form = "table"

    def rows(self) -> Iterator[Found]:
        with _opened(self.path) as raw:
            _skip_bom(raw, self.path)
        # What is not UTF-8 comes as lone surrogates, which whoever reads a cell refuses.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _RowLines(file)
            delimiter = "\t" if self.path.suffix.lower() == ".tsv" else ","
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = self._header(reader)
            while True:
                lines.begin_row()
                try:
                    cells = next(reader, None)
                except (csv.Error, Fault) as error:
                    yield self._no_row(lines, error)
                    continue
                if cells is None:
                    return
                if _take_in_rows(cells, delimiter):
                    raise self._not_closed(lines, "the rows after it are in a cell")
                if cells:
                    yield self._row(f"{self.name}:{lines.number}", header, cells)

    def count(self) -> int:
        return _count(self.path) - 1

    def _header(self, reader: Iterator[list[str]]) -> list[str]:
        try:
            header = [cell.strip() for cell in next(reader, [])]
        except (csv.Error, Fault) as error:
            raise UserError(f"{self.path}: no {self.form} ({error})") from None
        if not header:
            raise UserError(f"{self.path}: nothing in it")
        if any("\ud800" <= c <= "\udfff" for name in header for c in name):
            raise UserError(f"{self.path}: {NO_UTF_8}; if it is GB18030: iconv -f GB18030 -t UTF-8 {self.path.name}")
        if not all(name.isprintable() for name in header):
            raise UserError(f"{self.path}: no {self.form}")
        if header.count("") > 1:
            raise UserError(f"{self.path}: its first line does not name the columns; delete what is above the names")
        if len(header) == 1 and ";" in header[0]:
            raise UserError(
                f"{self.path}: its cells are divided by semicolons; save it with commas, or as .tsv with tabs"
            )
        check_named_once(self.path, header)
        return header

    def _no_row(self, lines: _RowLines, error: csv.Error | Fault) -> Found:
        if lines.number > lines.first:
            raise self._not_closed(lines, str(error))
        fault = error if isinstance(error, Fault) else Fault("no row of a table", str(error))
        return Found(f"{self.name}:{lines.number}", fault=fault)

    def _not_closed(self, lines: _RowLines, sign: str) -> UserError:
        where = f"a quote that line {lines.first} opens is not closed by line {lines.number} ({sign})"
        return UserError(f"{self.path}: {where}; close it, and double quotes that are meant")

    def _row(self, item: str, header: list[str], cells: list[str]) -> Found:
        if len(cells) != len(header):
            return Found(item, fault=Fault("not as many cells as columns", f"{len(cells)}, not {len(header)}"))
        return Found(item, dict(zip(header, cells, strict=True)), self.path.parent)


def _take_in_rows(cells: list[str], delimiter: str) -> bool:
    """Whether a later line of a cell has cells of its own, and names a picture in the place where the row does."""
    later = (line.split(delimiter) for cell in cells for line in cell.split("\n")[1:])
    return any(len(line) > 1 and any(map(_name_pictures, cells, line)) for line in later)


def _name_pictures(*cells: str) -> bool:
    return all(cell.strip('" \r').lower().endswith(SUFFIXES) for cell in cells)


class _RowLines:
    """Lines for the csv module, of one row no more than MOST_TEXT_BYTES characters. Raises Fault for more.

    `first` and `number`: of the row's first line, and of the latest.
    """

    def __init__(self, file: TextIO):
        self._file = file
        self.number = 0
        self.begin_row()

    def begin_row(self) -> None:
        self.first, self._left = self.number + 1, MOST_TEXT_BYTES

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if self._left < 0:
            while line and not line.endswith(("\n", "\r")):
                line = self._file.readline(_CHUNK)
            raise Fault(TOO_LONG, f"more than {MOST_TEXT_BYTES:,} characters")
        return line


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _count(path: Path) -> int:
    """Of lines, about."""
    with _opened(path) as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK), b""))


def _skip_bom(file: BinaryIO, path: Path) -> None:
    """Raises UserError for UTF-16."""
    start = file.read(len(_BOM))
    if start.startswith(_UTF_16):
        raise UserError(f"{path}: UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8 {path.name}")
    if start != _BOM:
        file.seek(0)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, of long ones the beginning: one byte more than may be."""
    _skip_bom(file, Path(file.name))
    while line := file.readline(MOST_TEXT_BYTES + 1):
        yield line
        while len(line) > MOST_TEXT_BYTES and not line.endswith(b"\n"):
            line = file.readline(MOST_TEXT_BYTES + 1)
