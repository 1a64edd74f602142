"""Progress bars on the terminal's error stream, so that what a command prints stays clean."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track

T = TypeVar("T")
_console = Console(stderr=True)


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate under a progress bar; without a known total it counts only time."""
    yield from track(items, what, total=total, console=_console)


@contextmanager
def phase(what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the wall time of the block to `seconds[what]`."""
    start = time.perf_counter()
    yield
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start


@contextmanager
def working(what: str) -> Iterator[None]:
    """A moving sign for work that cannot tell how far it is."""
    with _console.status(what):
        yield


def bars() -> Progress:
    """A group of bars, one a task, that move while a task's total is unknown."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=_console)
