"""Small files that are never seen half written."""

from __future__ import annotations

import os
from pathlib import Path


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
