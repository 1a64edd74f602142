"""`m6 data import`: from a stranger's sources to a corpus on disk. Safe to interrupt, and to repeat.

Rows are read, checked and written as a stream; once all are known, each gets its split, and what is new is described
by the feature network. Tokenizer and network are those of another corpus, `base`, so that its models can read this one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import load_from_disk

from training.data import build, corpus, home
from training.data.corpus import Corpus
from training.data.features import AUGMENTATIONS, CHANNELS, PATCHES
from training.data.importing.families import families, splits
from training.data.importing.folder import Folder
from training.data.importing.forms import open_sources
from training.data.importing.intake import Intake, Kept, Reason
from training.data.importing.reading import (
    MARK_BYTES,
    Reader,
    Settings,
    check_columns,
    mark_of,
    mark_of_text,
)
from training.data.importing.sources import Source
from training.data.progress import phase, working
from training.data.rows import Picture
from training.errors import UserError
from training.files import NO_ROOM

Tell = Callable[[str], object]
Known = dict[tuple[bytes, bool], np.ndarray]  # by a picture and whether it may be mirrored: its features

SECONDS_A_PICTURE = 0.16  # that a core takes to describe its views, about
_FEATURE_BYTES = len(AUGMENTATIONS) * PATCHES * CHANNELS * 2  # of a picture
_SPARE_BYTES = 64 * 2**20


@dataclass
class Summary:
    """What an import took and left. `seconds` is by phase.

    `trained`: pictures that the base, or a base of the base, trains on, too; `foreign`: captions without a Chinese
    character.
    """

    folder: Path
    up_to_date: bool
    manifest: dict[str, Any]
    left: dict[str, Reason]
    trained: int
    foreign: int
    seconds: dict[str, float]


def import_corpus(
    paths: Sequence[Path], to: Path, base: Path, settings: Settings | None = None, tell: Tell = lambda line: None
) -> Summary:
    """Build `to`/corpus from the sources, with the tokenizer and feature network of the corpus under `base`.

    An import of the same rows is verified and kept; another one is replaced when the new one is whole. `tell` is given
    what is to be said before the end. Raises UserError for what the person can mend, and for anything in the corpus'
    place that is no import; then nothing has changed.
    """
    settings = settings or Settings()
    sources = open_sources(paths)
    _check_apart(to, base, sources)
    known = [source.columns() for source in sources]
    check_columns(settings, known)
    readers = [Reader(source, columns, settings) for source, columns in zip(sources, known, strict=True)]
    origin = Corpus.open(base)
    with home.alone(to):
        present = _present(to)
        building = home.start(to)
        try:
            with working("verifying the base"):
                origin.verify()
            task = _Import(building, to, origin, present, settings, tell)
            return task.run(sources, readers)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise UserError(f"{to}: {error.strerror}; make room, or give another folder") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _check_apart(to: Path, base: Path, sources: Sequence[Source]) -> None:
    """Raises UserError for an import into its own source, or over its source or base."""
    places = [(to / corpus.FOLDER).resolve(), to.resolve() / home.BUILDING]
    if (base / corpus.FOLDER).resolve() == places[0]:
        raise UserError(f"--base {base}: its corpus is what --to would replace; give another --base, or another --to")
    for source in sources:
        path = source.path.resolve()
        if isinstance(source, Folder) and to.resolve().is_relative_to(path):
            raise UserError(f"--to {to}: inside the source {source.path}; give a folder elsewhere")
        if any(path.is_relative_to(place) for place in places):
            raise UserError(f"{source.path}: inside what --to {to} would replace; move it elsewhere")


def _present(to: Path) -> Corpus | None:
    """The import that is there, if it is whole. Raises UserError for anything else that is there."""
    home.check_place(to, "import")
    try:
        present = Corpus.open(to)
        present.verify()
    except UserError:
        return None
    return present


@dataclass
class _Import:
    """One under way, in the folder `building`. `present`: the import that it may take the place of."""

    building: Path
    to: Path
    base: Corpus
    present: Corpus | None
    settings: Settings
    tell: Tell

    def run(self, sources: Sequence[Source], readers: Sequence[Reader]) -> Summary:
        seconds: dict[str, float] = {}
        intake = Intake(self.building)
        with phase("rows", seconds):
            intake.read(sources, readers)
        self._check_something(intake)
        features, trained = self._known()
        trained |= _trained_texts(self.base) | self._carried()
        (self.building / corpus.TRAINED).write_bytes(b"".join(sorted(trained)))
        with phase("columns", seconds), working("columns"):
            pictures = self._save(corpus.PICTURES, intake.pictures, self._pictures(intake.pictures, trained))
            texts = self._save(corpus.TEXTS, intake.texts, self._texts(intake.texts, trained))
        shutil.copyfile(self.base.folder / corpus.TOKENIZER, self.building / corpus.TOKENIZER)
        shutil.copyfile(self.base.feature_network, self.building / corpus.FEATURE_NETWORK)
        files = build.checksums(self.building)
        identity = build.fingerprint(files, f"base {self.base.fingerprint}")
        seen = _count(intake.pictures.marks, trained)
        summary = Summary(self.to / corpus.FOLDER, False, {}, intake.left, seen, intake.foreign, seconds)
        if self.present and self._is_present(identity, files):
            summary.up_to_date, summary.manifest = True, self.present.manifest
            return summary
        with phase("features", seconds):
            self._describe(pictures, intake.pictures.marks, features)
        with phase("checksums", seconds), working("checksums"):
            files[corpus.FEATURES] = build.checksum(self.building / corpus.FEATURES)
            told = {
                "base": self.base.fingerprint,
                "split_by": self.settings.split_by,
                "held_out": self.settings.held_out,
                "sources": intake.sources(),
                "pictures": _by_source(pictures),
                "texts": _by_source(texts),
                "skipped": dict(sorted(intake.skipped.items())),
                "dropped": {},
            }
            build.write_manifest(self.building, files, identity, told)
        home.take_place(self.building, self.to)
        summary.manifest = Corpus.open(self.to).manifest
        return summary

    def _check_something(self, intake: Intake) -> None:
        if not len(intake.pictures) + len(intake.texts):
            reason, told = max(intake.left.items(), key=lambda item: item[1].rows)
            total = intake.skipped.total()
            first = told.examples[0]
            raise UserError(
                f"nothing to import: all {total:,} rows are left out, {told.rows:,} for: {reason}, as {first}"
            )

    def _known(self) -> tuple[Known, set[bytes]]:
        """Features of the base's pictures and the present import's, and the marks of those that the base trains on."""
        features: Known = {}
        trained: set[bytes] = set()
        for of in filter(None, (self.base, self.present)):
            columns = [of.pictures.data.column(name) for name in ("image", "mirrorable", "split")]
            same = of.manifest["feature_network_sha256"] == self.base.manifest["feature_network_sha256"]
            for row, (image, mirrorable, split) in enumerate(zip(*columns, strict=True)):
                mark = mark_of(image.as_buffer())
                if same:
                    features.setdefault((mark, mirrorable.as_py()), of.features[row])
                if of is self.base and split.as_py() == "train":
                    trained.add(mark)
        return features, trained

    def _pictures(self, kept: Kept, trained: set[bytes]) -> pa.Table:
        """With families and splits."""
        found = families(kept.keys, kept.marks)
        chosen = splits(found, kept.marks, trained, self.settings.held_out)
        return _with(kept.table(), family=found, split=chosen)

    def _carried(self) -> set[bytes]:
        """Marks of what the base's own base trains on, and the bases of that. What was fetched has none."""
        if corpus.TRAINED not in self.base.manifest["files"]:
            if self.base.imported:
                self.tell(
                    f"{self.base.folder}: does not say what its own base trains on, which may be held out here: "
                    "run the `m6 data import` that made it again"
                )
            return set()
        marks = (self.base.folder / corpus.TRAINED).read_bytes()
        return {marks[place : place + MARK_BYTES] for place in range(0, len(marks), MARK_BYTES)}

    def _texts(self, kept: Kept, trained: set[bytes]) -> pa.Table:
        """With splits."""
        return _with(kept.table(), split=splits(kept.keys, kept.marks, trained, self.settings.held_out))

    def _save(self, name: str, kept: Kept, table: pa.Table) -> pa.Table:
        """Write the table, and read it from there."""
        build.save_rows(self.building / name, table)
        kept.path.unlink()
        return load_from_disk(self.building / name).data.table

    def _is_present(self, identity: str, files: build.Files) -> bool:
        """Whether the present import holds the same rows, left the same out, and hands the same marks on."""
        assert self.present
        present = self.present.manifest["files"]
        same = all(present.get(name) == files[name] for name in (corpus.SKIPPED, corpus.TRAINED))
        return same and self.present.fingerprint == identity

    def _describe(self, pictures: pa.Table, marks: Sequence[bytes], known: Known) -> None:
        """Write the features: those that are known or stand at an earlier row are copied."""
        home.check_space(self.to, len(pictures) * _FEATURE_BYTES + _SPARE_BYTES)
        keys = list(zip(marks, pictures["mirrorable"].to_pylist(), strict=True))
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        new = sorted(row for key, row in first.items() if key not in known)
        seconds = len(new) * SECONDS_A_PICTURE / build.FEATURE_THREADS
        took = f": about {_time(seconds)} on {build.FEATURE_THREADS} cores" if new else ""
        self.tell(f"{len(new):,} of {len(keys):,} pictures are to be described{took}")
        columns = {field.name: pictures[field.name] for field in fields(Picture)}

        def picture(row: int) -> Picture:
            return Picture(**{name: column[row].as_py() for name, column in columns.items()})

        out = build.write_features(self.building, len(keys), picture, new)
        for row, key in enumerate(keys):
            if key in known:
                out[row] = known[key]
            elif first[key] != row:
                out[row] = out[first[key]]
        out.flush()


def _trained_texts(base: Corpus) -> set[bytes]:
    """Marks of the texts that it trains on."""
    columns = (base.texts.data.column(name) for name in ("text", "split"))
    return {mark_of_text(text.as_py()) for text, split in zip(*columns, strict=True) if split.as_py() == "train"}


def _with(table: pa.Table, **columns: Sequence[str]) -> pa.Table:
    """The table with other values in these columns."""
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, pa.string()))
    return table


def _by_source(table: pa.Table) -> dict[str, dict[str, int]]:
    return build.count(zip(table["source"].to_pylist(), table["split"].to_pylist(), strict=True))


def _count(marks: Sequence[bytes], among: set[bytes]) -> int:
    return sum(mark in among for mark in marks)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
