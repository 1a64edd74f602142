"""Rows of a Parquet file: a picture is bytes, {bytes, path} as the datasets library has it, or a path beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from training.data.importing.lines import NO_UTF_8
from training.data.importing.sources import Fault, Found, Source
from training.errors import UserError
from training.recipe import one_line

_AT_ONCE = 16  # rows, which may be photographs


class Parquet(Source):
    form = "Parquet file"

    def rows(self) -> Iterator[Found]:
        file, number = self._opened(), 0
        try:
            for batch in file.iter_batches(_AT_ONCE):
                for place in range(batch.num_rows):
                    number += 1
                    yield self._row(f"{self.name}:{number}", batch.slice(place, 1))
        except (OSError, pa.ArrowException) as error:
            reason = one_line(str(error))
            raise UserError(f"{self.path}: damaged after row {number:,} ({reason}); mend it or leave it out") from None

    def count(self) -> int:
        return self._opened().metadata.num_rows

    def _row(self, item: str, batch: pa.RecordBatch) -> Found:
        try:
            return Found(item, batch.to_pylist()[0], self.path.parent)
        except UnicodeDecodeError:
            return Found(item, fault=Fault(NO_UTF_8))

    def _opened(self) -> pq.ParquetFile:
        """Its row groups are read in pieces: one may hold more than fits."""
        try:
            return pq.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path}: no {self.form} ({one_line(str(error))})") from None
