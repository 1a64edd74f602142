"""A folder of pictures: NAME.txt beside NAME.jpg, or a metadata file that names them (Hugging Face's imagefolder)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from training.data.images import SUFFIXES
from training.data.importing.columnar import Parquet
from training.data.importing.lines import NO_UTF_8, JsonLines, Table
from training.data.importing.sources import MOST_TEXT_BYTES, Fault, Found, Source, inside, read_inside
from training.errors import UserError

_METADATA: dict[str, type[Source]] = {
    "metadata.jsonl": JsonLines,
    "metadata.csv": Table,
    "metadata.parquet": Parquet,
}
FILE_NAME, CAPTION = "file_name", "txt"


class Folder(Source):
    """Of a picture, columns `file_name` (its path) and `txt` (the first line of its caption); or those of the metadata.

    Files and folders whose names begin with a dot are no rows. Links to folders are not followed.
    """

    form = "folder of pictures"

    def rows(self) -> Iterator[Found]:
        metadata = [path for path in self._files() if path.name in _METADATA]
        yield from self._described(metadata) if metadata else self._captioned()

    def count(self) -> int:
        return sum(path.suffix.lower() in SUFFIXES for path in self._files())

    def _captioned(self) -> Iterator[Found]:
        pictures: set[Path] = set()
        for path in self._files():
            if path.suffix.lower() in SUFFIXES:
                pictures.add(path.with_suffix(""))
        for path in self._files():
            if path.suffix.lower() in SUFFIXES:
                yield self._picture(path)
            elif path.suffix.lower() != ".txt":
                yield self._left(path, "neither a picture nor a caption", path.suffix.lower())
            elif path.with_suffix("") not in pictures:
                yield self._left(path, "a caption without its picture")

    def _picture(self, path: Path) -> Found:
        caption = path.with_suffix(".txt")
        if not os.path.isfile(caption):
            return self._left(path, "no caption beside it", f"{caption.name} is not there")
        try:
            text = read_inside(self.path, str(caption.relative_to(self.path)), MOST_TEXT_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError:
            return self._left(path, NO_UTF_8, caption.name)
        except Fault as fault:
            return Found(self._item(path), fault=fault)
        lines = text.splitlines()
        columns = {FILE_NAME: str(path.relative_to(self.path)), CAPTION: lines[0] if lines else ""}
        return Found(self._item(path), columns, self.path)

    def _described(self, metadata: list[Path]) -> Iterator[Found]:
        named: set[Path] = set()
        for path in metadata:
            for found in self._rows_of(path):
                if name := _named(found):
                    named.add(Path(os.path.normpath(path.parent / name)))
                yield found
        for path in self._files():
            if path.suffix.lower() in SUFFIXES and path not in named:
                yield self._left(path, "a picture that the metadata do not name")

    def _rows_of(self, metadata: Path) -> Iterator[Found]:
        """Of a file that is in the folder, as pictures must be."""
        try:
            inside(self.path, str(metadata.relative_to(self.path)))
        except Fault as fault:
            yield Found(self._item(metadata), fault=fault)
        else:
            yield from _METADATA[metadata.name](metadata, self._item(metadata)).rows()

    def _files(self) -> Iterator[Path]:
        """In order."""
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder")
        for parent, folders, names in os.walk(self.path, onerror=_unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted([*names, *(name for name in folders if Path(parent, name).is_symlink())]):
                if not name.startswith("."):
                    yield Path(parent, name)

    def _item(self, path: Path) -> str:
        return f"{self.name}/{path.relative_to(self.path)}"

    def _left(self, path: Path, reason: str, detail: str = "") -> Found:
        return Found(self._item(path), fault=Fault(reason, detail))


def _named(found: Found) -> str | None:
    """The picture that a row of the metadata names."""
    try:
        name = found.columns.get(FILE_NAME)
    except Fault:  # which the row is left out for when it is read
        return None
    return name if isinstance(name, str) else None


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend it or leave it out")
