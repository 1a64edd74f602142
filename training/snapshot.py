"""State on its way from the training to a checkpoint's file, through a buffer of bounded size."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from training.states import ELEMENT, FileRange, Part

CHUNK = 16 * 2**20  # bytes that are copied, hashed and written at once


class Snapshot:
    """Chunks in order: one thread copies them in and waits while `limit` bytes are held; another takes them out.

    Training stands still only while the copying thread is at work: once all is in, the state may change. So of state
    in memory, taking begins when all is in or there is no more room: until then it would only slow the copying down.
    Of state in files it begins at once, since reading leaves the processor idle.
    """

    def __init__(self, limit: int):
        self._limit = max(limit, CHUNK)
        self._chunks: deque[Tensor] = deque()
        self._held = 0
        self._closed = self._ended = self._begun = False
        self._change = threading.Condition()

    def fill(self, parts: list[Part]) -> None:
        """Copy all parts in, waiting for room; returns early if the other side has given up."""
        for part in parts:
            if isinstance(part.source, FileRange):
                self._begin()
            for size, copy in _chunks(part):
                if not self._put(size, copy):
                    return

    def await_turn(self) -> None:
        """Wait until taking may begin. Whatever the taking side does before would slow the copying down too."""
        with self._change:
            self._change.wait_for(lambda: self._ended or self._begun)

    def take(self, size: int) -> Iterator[Tensor]:
        """The next chunks, `size` bytes in all; each is released when the next one is asked for."""
        while size:
            with self._change:
                self._change.wait_for(lambda: self._ended or (self._begun and self._chunks))
                if not self._chunks:
                    raise OSError("the state could not be read to its end")
                chunk = self._chunks.popleft()
            yield chunk
            size -= chunk.nbytes
            with self._change:
                self._held -= chunk.nbytes
                self._change.notify_all()

    def end(self) -> None:
        """Nothing more is put in: who waits for more is told so."""
        with self._change:
            self._ended = True
            self._change.notify_all()

    def close(self) -> None:
        """Nothing more is taken out: who waits for room is let go."""
        with self._change:
            self._closed = True
            self._chunks.clear()
            self._change.notify_all()

    def _begin(self) -> None:
        with self._change:
            self._begun = True
            self._change.notify_all()

    def _put(self, size: int, copy: Callable[[], Tensor]) -> bool:
        with self._change:
            if self._held + size > self._limit:
                self._begin()
                self._change.wait_for(lambda: self._closed or self._held + size <= self._limit)
            if self._closed:
                return False
            self._held += size
        chunk = copy()
        with self._change:
            self._chunks.append(chunk)
            self._change.notify_all()
        return True


def _chunks(part: Part) -> Iterator[tuple[int, Callable[[], Tensor]]]:
    """Size and copy of each piece of a part, in order."""
    if isinstance(part.source, Tensor):
        for piece in part.source.split(CHUNK // part.source.element_size()):
            yield piece.nbytes, partial(piece.to, "cpu", copy=True)
        return
    if not isinstance(part.source, FileRange):
        for first in range(0, part.numel, CHUNK // ELEMENT):
            count = min(CHUNK // ELEMENT, part.numel - first)
            yield count * ELEMENT, partial(part.source, first, count)
        return
    file = part.source
    for start in range(0, file.size, CHUNK):
        size = min(CHUNK, file.size - start)
        yield size, partial(_read, file.path, file.start + start, size)


def _read(path: Path, start: int, size: int) -> Tensor:
    """Bytes [start, start + size) of a file. Raises OSError where it is shorter."""
    chunk = torch.empty(size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        view = chunk.numpy().data
        while view:
            got = file.readinto(view)
            if not got:
                raise OSError(f"{path}: ends {len(view)} bytes too early")
            view = view[got:]
    return chunk
