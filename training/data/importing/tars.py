"""A tar's members, one after the other, as a stream.

Of the standard library's reader only the parser of a header is used: the rest of it believes what headers say of their
own length, of where the next one is and of what a sparse file is made of, so that a hostile tar fills the memory, or
never ends.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

MOST_HEADER_BYTES = 2**20  # of a member's attributes, or of a name that has no room in its header
_MOST_NAME = 4096  # characters
_GZIP = b"\x1f\x8b"
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_AHEAD = (*_LONG, *_PAX, tarfile.XGLTYPE)  # of the next member, or of all
_CHUNK = 2**20


def opened(path: Path) -> BinaryIO:
    """The tar, unpacked if it is gzipped."""
    with path.open("rb") as file:
        zipped = file.read(len(_GZIP)) == _GZIP
    return cast(BinaryIO, gzip.open(path)) if zipped else path.open("rb")


class Tar:
    """Of an open file. Raises tarfile.TarError for what is none, or is damaged."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = 0  # bytes of the latest member, to the next header

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Members, by their own names and sizes."""
        about: dict[str, bytes] = {}
        while (member := self._header()) is not None:
            if member.type in _AHEAD:
                about |= self._ahead(member)
            else:
                _complete(member, about)
                has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                self._left = _blocks(member.size) if has_content else 0
                yield member
                about = {}

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The content of the latest member."""
        self._left -= member.size
        return self._exactly(member.size)

    def _header(self) -> tarfile.TarInfo | None:
        """The next; None at the end."""
        while self._left:  # nothing tells that a file is cut off but reading it
            self._left -= len(self._exactly(min(self._left, _CHUNK)))
        block = self._exactly(tarfile.BLOCKSIZE)
        if not any(block):
            return None
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.size < 0:
            raise tarfile.ReadError("a negative size")
        return header

    def _ahead(self, header: tarfile.TarInfo) -> dict[str, bytes]:
        """What is said of the next member: its `path` and `size`, and whether it is `sparse`."""
        if header.size > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        self._left = _blocks(header.size)
        content = self.read(header)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": content.partition(b"\0")[0]}
        return _attributes(content) if header.type in _PAX else {}

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise tarfile.ReadError("cut off")
        return data


def _complete(member: tarfile.TarInfo, about: dict[str, bytes]) -> None:
    """Give it what was said of it before."""
    if member.type == tarfile.GNUTYPE_SPARSE or "sparse" in about:
        raise tarfile.ReadError("a sparse file, which `tar --sparse` made")
    if "path" in about:
        member.name = about["path"].decode("utf-8", "surrogateescape").rstrip("/")
    if "size" in about:
        member.size = _number(about["size"])
    if len(member.name) > _MOST_NAME:
        raise tarfile.ReadError(f"a name of {len(member.name):,} characters")


def _attributes(content: bytes) -> dict[str, bytes]:
    """Those that matter here, of records LENGTH NAME=VALUE, each with the length of all of it and a newline."""
    found: dict[str, bytes] = {}
    start = 0
    while start < len(content):
        space = content.find(b" ", start, start + 10)
        end = start + _number(content[start : max(space, start)])
        name, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not equals or end > len(content):
            raise tarfile.ReadError("damaged attributes")
        if name in (b"path", b"size"):
            found[name.decode()] = value
        elif name.startswith(b"GNU.sparse."):
            found["sparse"] = b""
        start = end
    return found


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise tarfile.ReadError(f"{digits[:20]!r} is no number")
    return int(digits)


def _blocks(size: int) -> int:
    """A size, with what fills the last block."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
