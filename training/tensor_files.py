"""Safetensors files, as checkpoints and exports lay them out: heads, and where a checkpoint's slices lie."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from training.errors import UserError
from training.recipe import one_line, shown

ELEMENT = 4  # bytes: checkpoints are fp32
LENGTH = 8  # bytes that hold the head's length
OFFSETS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint keeps the slices' offsets


@dataclass(frozen=True)
class SavedSlice:
    """Elements [offset, offset + numel) of a flat global tensor, in fp32 from byte `start` of a file on."""

    file: Path
    start: int
    offset: int
    numel: int


def head(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]) -> bytes:
    """The head of a file that holds `tensors` one after the other: name, dtype, shape and number of bytes of each."""
    entries: dict[str, object] = {}
    end = 0
    for name, dtype, shape, size in tensors:
        start, end = end, end + size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries | {"__metadata__": metadata}).encode()
    text += b" " * (-len(text) % 8)  # values are aligned
    return len(text).to_bytes(LENGTH, "little") + text


def slices_head(slices: Iterable[tuple[str, int, int]]) -> bytes:
    """The head of a checkpoint's file: key, offset and number of elements of each slice, in order.

    With what torch.distributed.checkpoint's reader wants to know of slices.
    """
    own = list(slices)
    offsets = {key: {"saved_offsets": [offset]} for key, offset, _ in own}
    tensors = [(key, "F32", [numel], numel * ELEMENT) for key, _, numel in own]
    return head(tensors, {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"})


class HashedFile:
    """A file that is hashed while it is written, and flushed to the disk before it is closed."""

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self._hash, self._size = xxhash.xxh3_128(), 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._size += len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def facts(self) -> dict[str, Any]:
        return {"bytes": self._size, "xxh3": self._hash.hexdigest()}


def saved_slices(folder: Path, names: Iterable[str]) -> dict[str, list[SavedSlice]]:
    """The slices of each flat tensor in a checkpoint's files `names`, in order: together they are the whole tensor.

    Raises UserError, naming the file, for a head that is none or is not of such slices: a checksum finds damage, not
    what somebody made up.
    """
    found: dict[str, list[SavedSlice]] = {}
    for name in sorted(names):
        for key, piece in _slices_in(folder / name):
            found.setdefault(key, []).append(piece)
    for key, pieces in found.items():
        pieces.sort(key=lambda piece: piece.offset)
        end = 0
        for piece in pieces:
            if piece.offset != end:
                raise UserError(f"{piece.file}: {shown(key)} goes on at {piece.offset:,} where {end:,} is due")
            end += piece.numel
    return found


def size_of(file: Path) -> int:
    """Bytes of a file. Raises OSError also for a link, and for a pipe or a device, which could be read for ever."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a link or a special file, not the one that was written", str(file))
    return found.st_size


def _slices_in(file: Path) -> Iterator[tuple[str, SavedSlice]]:
    try:
        size_of(file)
        # The library checks that the tensors fill the file, one after the other.
        with safe_open(file, framework="np") as opened, file.open("rb") as raw:
            offsets = json.loads((opened.metadata() or {})[OFFSETS])
            start = LENGTH + int.from_bytes(raw.read(LENGTH), "little")
            for key in opened.offset_keys():
                entry = opened.get_slice(key)
                if (dtype := entry.get_dtype()) != "F32":
                    raise UserError(f"{file}: {shown(key)} is {dtype}, where a checkpoint has F32")
                [numel], [offset] = entry.get_shape(), offsets[key]["saved_offsets"]
                if not isinstance(offset, int):
                    raise TypeError(f"an offset is {shown(offset)}")
                yield key, SavedSlice(file, start, offset, numel)
                start += numel * ELEMENT
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))[:200]
        raise UserError(f"{file}: not a checkpoint's file ({reason})") from None
