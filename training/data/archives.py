"""Read members straight out of .tgz, .deb and .whl files; nothing is unpacked onto the disk.

Archives come from strangers: member names are only compared and never used as paths on disk, and a member
that claims to be larger than `MAX_MEMBER_BYTES` is refused before it is read.
"""

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from training.errors import UserError

MAX_MEMBER_BYTES = 256 * 2**20
_AR_HEADER_BYTES = 60


def read_tar(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the regular files of a .tgz, .tar.gz or .deb whose name is `wanted`.

    Archive order. Raises UserError if the archive is damaged.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".deb":
                _seek_deb_data(file)
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isreg() and wanted(name):
                        _check_size(path, name, member.size)
                        extracted = tar.extractfile(member)
                        assert extracted is not None
                        yield name, extracted.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged archive ({error}); delete it and fetch again") from error


def read_wheel(path: Path, name: str) -> bytes:
    """The content of one member of a wheel. Raises UserError if it is not there or the wheel is damaged."""
    try:
        with zipfile.ZipFile(path) as wheel:
            _check_size(path, name, wheel.getinfo(name).file_size)
            return wheel.read(name)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise UserError(f"{path}: damaged archive ({error}); delete it and fetch again") from error


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise UserError(f"{path}: member {name!r} claims {size} bytes, more than {MAX_MEMBER_BYTES}; not unpacked")


def _seek_deb_data(file: BinaryIO) -> None:
    """Place `file` at the start of the data tar in a Debian package, which is an `ar` archive.

    Each ar member has a header of 60 bytes: name in 0..16, decimal size in 48..58; bodies are padded to even
    length (deb(5), ar(5)). Streaming from here reads past the end of the member only by what follows the last
    tar block, which the tar reader ignores.
    """
    if file.read(8) != b"!<arch>\n":
        raise tarfile.ReadError("not a Debian package")
    while header := file.read(_AR_HEADER_BYTES):
        if header.startswith(b"data.tar"):
            return
        size_field = header[48:58].strip()
        if len(header) < _AR_HEADER_BYTES or not size_field.isdigit():
            break
        size = int(size_field)
        file.seek(size + size % 2, 1)
    raise tarfile.ReadError("no data.tar member")
