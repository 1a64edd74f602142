"""Rows of a Parquet file: a picture is bytes, {bytes, path} as the datasets library has it, or a path beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.data.importing.lines import NO_UTF_8
from training.data.importing.sources import MOST_BYTES, MOST_TEXT_BYTES, Fault, Found, Source, check_named_once
from training.errors import UserError
from training.recipe import one_line

_MOST_ROW_BYTES = MOST_BYTES + MOST_TEXT_BYTES
_MOST_AVERAGE = 2 * _MOST_ROW_BYTES  # of a row group's rows, by what the file says of it


class Parquet(Source):
    """Read a row at a time: one may be as large as a page, and many of one dictionary larger than the file."""

    form = "Parquet file"

    def rows(self) -> Iterator[Found]:
        file, number = self._opened(), 0
        self._check(file)
        try:
            for batch in file.iter_batches(1):
                number += 1
                yield self._row(f"{self.name}:{number}", batch)
        except (OSError, pa.ArrowException) as error:
            reason = one_line(str(error))
            raise UserError(f"{self.path}: damaged after row {number:,} ({reason}); mend it or leave it out") from None

    def count(self) -> int:
        return self._opened().metadata.num_rows

    def _row(self, item: str, batch: pa.RecordBatch) -> Found:
        if batch.nbytes > _MOST_ROW_BYTES:
            detail = f"{batch.nbytes:,} bytes, more than {_MOST_ROW_BYTES:,}"
            return Found(item, fault=Fault("a row too large", detail))
        return Found(item, _Cells(batch), self.path.parent)

    def _check(self, file: pq.ParquetFile) -> None:
        """Raises UserError for what is not to be read at all."""
        check_named_once(self.path, file.schema_arrow.names)
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            average = group.total_byte_size // max(1, group.num_rows)
            if average > _MOST_AVERAGE:
                reason = f"{average:,} bytes a row in row group {number}, more than {_MOST_AVERAGE:,}"
                raise UserError(f"{self.path}: {reason}; leave such rows out")

    def _opened(self) -> pq.ParquetFile:
        """Its row groups are read in pieces: one may hold more than fits."""
        try:
            return pq.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path}: no {self.form} ({one_line(str(error))})") from None


class _Cells(Mapping[str, Any]):
    """Of a row. Each is made a Python value when it is asked for: what has none matters only where it is wanted."""

    def __init__(self, batch: pa.RecordBatch):
        self._batch = batch

    def __getitem__(self, name: str) -> Any:
        """Raises Fault for what has no Python value, as a date beyond the year 9999."""
        if name not in self:
            raise KeyError(name)
        try:
            return self._batch.column(name)[0].as_py()
        except UnicodeDecodeError:
            raise Fault(NO_UTF_8, name) from None
        except (pa.ArrowException, ValueError, OverflowError, LookupError) as error:
            raise Fault(f"{name}: a value that cannot be read", one_line(str(error))) from None

    def __contains__(self, name: object) -> bool:
        return name in self._batch.schema.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return self._batch.num_columns
