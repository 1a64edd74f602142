"""Rows that are lines of text: JSON lines, and tables in CSV or TSV. Paths are relative to the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from training.data.importing.sources import MOST_TEXT_BYTES, Fault, Found, Source
from training.errors import UserError
from training.recipe import one_line

_BOM, _UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_CHUNK = 2**20
NO_UTF_8 = "not UTF-8"


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
            return Found(item, fault=Fault("line too long", f"more than {MOST_TEXT_BYTES:,} bytes"))
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            return Found(item, fault=Fault(NO_UTF_8))
        except (ValueError, RecursionError) as error:
            return Found(item, fault=Fault("no JSON", one_line(str(error))))
        if not isinstance(row, dict):
            array = "; of an array `jq -c '.[]'` makes lines" if line.lstrip().startswith(b"[") else ""
            return Found(item, fault=Fault("no JSON object", f"a row is {{…}}{array}"))
        return Found(item, row, self.path.parent)


class Table(Source):
    """CSV with commas, or TSV with tabs; the first line names the columns."""

    form = "table"

    def rows(self) -> Iterator[Found]:
        with _opened(self.path) as raw:
            _skip_bom(raw, self.path)
        # What is not UTF-8 comes as lone surrogates, which whoever reads a cell refuses.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if self.path.suffix.lower() == ".tsv" else ",")
            header = self._header(reader)
            while True:
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    yield Found(f"{self.name}:{reader.line_num}", fault=Fault("no row of a table", str(error)))
                    continue
                if cells is None:
                    return
                if cells:
                    yield self._row(f"{self.name}:{reader.line_num}", header, cells)

    def count(self) -> int:
        return _count(self.path) - 1

    def _header(self, reader: Iterator[list[str]]) -> list[str]:
        try:
            header = [cell.strip() for cell in next(reader, [])]
        except csv.Error as error:
            raise UserError(f"{self.path}: no {self.form} ({error})") from None
        if not header:
            raise UserError(f"{self.path}: nothing in it")
        if any("\ud800" <= c <= "\udfff" for name in header for c in name):
            raise UserError(f"{self.path}: {NO_UTF_8}; if it is GB18030: iconv -f GB18030 -t UTF-8 {self.path.name}")
        if not all(name.isprintable() for name in header):
            raise UserError(f"{self.path}: no {self.form}")
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"{self.path}: column {twice[0]!r} is named twice; rename one of them")
        return header

    def _row(self, item: str, header: list[str], cells: list[str]) -> Found:
        if len(cells) != len(header):
            return Found(item, fault=Fault("not as many cells as columns", f"{len(cells)}, not {len(header)}"))
        return Found(item, dict(zip(header, cells, strict=True)), self.path.parent)


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
