"""Small files that are never seen half written."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of a disk that takes no more


def replace(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write a file whole or not at all; `durable`: it also outlasts a power cut. Raises OSError."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Make a file, or what was created and renamed in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> None:
    """Swap two files or folders of one file system: at any moment both names are there. Raises OSError.

    Where the file system cannot do that at once, `one` is missing for a moment, and then `other`.
    """
    swap = 2  # RENAME_EXCHANGE of renameat2(2), which Python has no name for
    here = -100  # AT_FDCWD
    failed = ctypes.CDLL(None, use_errno=True).renameat2(here, bytes(one), here, bytes(other), swap)
    if not failed:
        return
    if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(one))
    aside = one.with_name(f".{one.name}.aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
