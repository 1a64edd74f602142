"""What a machine's disk, memory and links reach, by doing what training does with them: large blocks, many times."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from training.peak import wait

BLOCK, STREAMS, BLOCKS = 16 * 2**20, 4, 16  # a gigabyte, by four threads
COPIED, COPIES = 256 * 2**20, 5
MESSAGE, MESSAGES = 32 * 2**20, 3


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second that `folder`'s disk writes and reads past the page cache; a gigabyte that is gone afterwards."""
    files = [folder / f".measured-{os.getpid()}-{stream}" for stream in range(STREAMS)]
    rates = []
    try:
        for write in (True, False):
            start = time.perf_counter()
            with ThreadPoolExecutor(STREAMS) as threads:
                list(threads.map(lambda path, write=write: _stream(path, write), files))
            rates.append(STREAMS * BLOCKS * BLOCK / (time.perf_counter() - start))
    finally:
        for path in files:
            path.unlink(missing_ok=True)
    return rates[0], rates[1]


def _stream(path: Path, write: bool) -> None:
    """One file's worth of whole blocks. Direct I/O wants memory at page boundaries, as mmap gives."""
    with mmap.mmap(-1, BLOCK) as buffer:
        buffer.write(os.urandom(2**20) * (BLOCK // 2**20))
        way = os.O_WRONLY | os.O_CREAT if write else os.O_RDONLY
        file = os.open(path, way | os.O_DIRECT)
        try:
            for number in range(BLOCKS):
                (os.pwritev if write else os.preadv)(file, [buffer], number * BLOCK)
            if write:
                os.fsync(file)
        finally:
            os.close(file)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a device's memory, read and written, in large copies."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / min(_seconds(lambda: target.copy_(source), device) for _ in range(COPIES))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Meanwhile torch has so many on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def partner(here: int, count: int, meeting: int) -> int | None:
    """Whom one of `count` meets in a round of a tournament in which all meet each other once; None: nobody."""
    seats = count + count % 2
    last = seats - 1
    other = meeting % last if here == last else (2 * meeting - here) % last
    other = last if other == here else other
    return other if other < count else None


def link_rate(device: torch.device, other: int) -> float:
    """Bytes a second that this rank sends to another one, which sends as many at once."""
    sent, got = (torch.ones(MESSAGE, dtype=torch.uint8, device=device) for _ in range(2))

    def exchange() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, got, other)]):
            work.wait()

    return MESSAGE / _best(exchange, device)


def all_to_all_rate(device: torch.device) -> float:
    """Bytes a second that a rank sends to the others, all ranks at once, as experts' tokens go."""
    count = dist.get_world_size()
    rows = max(MESSAGE // count, 1)
    sent, got = (torch.ones(rows * count, dtype=torch.uint8, device=device) for _ in range(2))
    return rows * (count - 1) / _best(lambda: dist.all_to_all_single(got, sent), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    work()
    return min(_seconds(work, device) for _ in range(MESSAGES))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start
