"""What a stranger's rows come from: files and folders of several forms, each read as a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from training.errors import UserError

LOOKED_AT = 100  # rows of a source, for their columns, before an import begins
MOST_BYTES = 64 * 2**20  # of a picture's file
MOST_TEXT_BYTES = 2**20  # of a caption's file, or a row's JSON


class Fault(Exception):
    """Why a row is left out. `reason` is one of few, `detail` what of this row is so."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Found:
    """A row as it stands in its source, which `item` names, or its fault.

    Paths in its columns are looked for under `root`; None: it has no files.
    """

    item: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    root: Path | None = None
    fault: Fault | None = None


class Source(ABC):
    """A file or folder of one form. `rows` raises UserError for what is none, or is damaged."""

    form: ClassVar[str]

    def __init__(self, path: Path, name: str):
        """`name`: of its rows."""
        self.path, self.name = path, name

    @abstractmethod
    def rows(self) -> Iterator[Found]:
        """All, in an order that does not change."""

    def count(self) -> int | None:
        """How many rows there are, about; None if only reading tells."""
        return None

    def columns(self) -> list[str]:
        """Names of the columns of its first rows. Raises UserError if there is none that can be read."""
        names, sound, first = dict[str, None](), 0, None
        for found in self.rows():
            first = first or found
            names |= dict.fromkeys(found.columns)
            sound += not found.fault
            if sound == LOOKED_AT:
                break
        if not first:
            raise UserError(f"{self.path}: nothing in it")
        if not sound:
            raise UserError(f"{self.path}: no {self.form} that can be read; {plain(first.item)}: {first.fault}")
        return list(names)


def plain(text: str) -> str:
    """A name or a message that can be printed and encoded, whatever a stranger put into it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_named_once(path: Path, names: Sequence[str]) -> None:
    """Raises UserError for two columns of one name."""
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise UserError(f"{path}: column {twice[0]!r} is named twice; rename one of them")


def read_inside(root: Path, name: str, most: int) -> bytes:
    """The content of a file under `root`. Raises Fault if it is not there, not a file, or larger than `most`."""
    path = inside(root, name)
    try:
        if (size := path.stat().st_size) > most:
            raise Fault("a file too large", f"{name}: {size:,} bytes, more than {most:,}")
        return path.read_bytes()
    except OSError as error:
        raise Fault("a file that cannot be read", f"{name}: {error.strerror}") from None


def inside(root: Path, name: str) -> Path:
    """Where a file under `root` is, links followed. Raises Fault if it is not there, not a file, or elsewhere."""
    if "://" in name:
        raise Fault("a web address, not a file", name)
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise Fault("a path out of the source's folder", name)
        if not path.is_file():
            raise Fault("not a file" if path.exists() else "no such file", name)
        return path
    except (OSError, RuntimeError, ValueError) as error:  # of a loop of links, of a NUL
        raise Fault("a file that cannot be read", f"{name}: {getattr(error, 'strerror', None) or error}") from None
