"""A stranger's rows, read and checked as a stream: those that are taken go to Arrow files, the others to a list."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from training.data import corpus
from training.data.build import schema_of
from training.data.importing.reading import Left, Reader, Taken, mark_of
from training.data.importing.sources import Fault, Found, Source
from training.data.progress import bar
from training.data.rows import Picture, Text

T = TypeVar("T")
U = TypeVar("U")

EXAMPLES = 3  # of each reason for which rows are left out
_THREADS, _AHEAD = 2, 8  # that read pictures; rows that they may be ahead, each a photograph
_BATCH = 64  # rows of an Arrow batch
_MOST_LICENCES = 3  # of a source that are told
_HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")


@dataclass
class Reason:
    """Why rows were left out: how many, and the first of them."""

    rows: int = 0
    examples: list[str] = field(default_factory=list)


class Kept:
    """Rows of one kind, on their way to an Arrow file; of each, its key and its mark."""

    def __init__(self, path: Path, kind: type):
        self.path, self.schema = path, schema_of(kind)
        self.keys: list[str] = []
        self.marks: list[bytes] = []
        self._rows: list[dict[str, Any]] = []
        self._writer = pa.ipc.new_stream(str(path), self.schema)

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, taken: Taken) -> None:
        self.keys.append(taken.key)
        self.marks.append(taken.mark)
        self._rows.append(asdict(taken.row))
        if len(self._rows) == _BATCH:
            self._flush()

    def table(self) -> pa.Table:
        """All rows, from the file, once the last is in it."""
        self._flush()
        self._writer.close()
        return pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()

    def _flush(self) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, self.schema))
        self._rows = []


class Intake:
    """What is taken from all sources and what is left, which `folder` gets a list of."""

    def __init__(self, folder: Path):
        self.pictures, self.texts = Kept(folder / ".pictures", Picture), Kept(folder / ".texts", Text)
        self.foreign = 0  # captions without a Chinese character
        self.left: dict[str, Reason] = {}
        self.skipped: Counter[str] = Counter()  # rows left out, by source
        self.files: dict[str, set[str]] = {}  # by what a row calls its source: what it was read from
        self.licences: dict[str, set[str]] = {}
        self._list = (folder / corpus.SKIPPED).open("w", encoding="utf-8")
        self._first: dict[bytes, str] = {}  # of each picture and its words, or text: where it was first

    def read(self, sources: Sequence[Source], readers: Sequence[Reader]) -> None:
        """All rows, under a progress bar. Raises UserError for a source that is damaged."""
        numbers = [source.count() for source in sources]
        total = None if None in numbers else sum(number or 0 for number in numbers)

        def found() -> Iterator[tuple[int, Found]]:
            for place, source in enumerate(sources):
                for row in source.rows():
                    yield place, row

        def read(job: tuple[int, Found]) -> tuple[int, Taken | Left]:
            place, row = job
            return place, readers[place](row)

        with self._list, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of damaged notes in pictures that are whole
            for place, outcome in bar(_ahead(read, found()), "rows", total):
                self._add(sources[place], outcome)

    def _add(self, source: Source, outcome: Taken | Left) -> None:
        if isinstance(outcome, Taken):
            row = outcome.row
            first = self._first.setdefault(mark_of(outcome.mark + outcome.words.encode()), row.id)
            if first is row.id:
                if isinstance(row, Picture):
                    self.pictures.add(outcome)
                    self.foreign += not _HAN.search(row.zh)
                else:
                    self.texts.add(outcome)
                self.files.setdefault(row.source, set()).add(f"{source.name} ({source.form})")
                self.licences.setdefault(row.source, set()).add(row.licence)
                return
            outcome = Left(row.id, Fault("a copy of a row before", first))
        self._leave(source, outcome)

    def _leave(self, source: Source, left: Left) -> None:
        fault = left.fault
        entry = {"source": source.name, "item": left.item, "reason": fault.reason, "detail": fault.detail}
        self._list.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.skipped[source.name] += 1
        reason = self.left.setdefault(fault.reason, Reason())
        reason.rows += 1
        if len(reason.examples) < EXAMPLES:
            reason.examples.append(f"{left.item} ({fault.detail})" if fault.detail else left.item)

    def sources(self) -> dict[str, dict[str, str]]:
        """As a manifest tells them, by the names that rows give their sources."""
        return {
            name: {"package": ", ".join(sorted(files)), "version": "", "licence": self._licence(name), "missing": ""}
            for name, files in sorted(self.files.items())
        }

    def _licence(self, name: str) -> str:
        licences = sorted(self.licences[name])
        more = f"; {len(licences) - _MOST_LICENCES:,} more" if len(licences) > _MOST_LICENCES else ""
        return "; ".join(licences[:_MOST_LICENCES]) + more


def _ahead(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`map` in threads, in order, that draws only a few items more than were asked for."""
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
