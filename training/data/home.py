"""The folder that a corpus lives in: one writer at a time; a new corpus takes the old one's place when it is whole."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.data import corpus
from training.errors import UserError
from training.files import exchange

BUILDING = "corpus.partial"
_OPTIONS = {"fetch": "--dir", "import": "--to"}  # that name a home


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process, however that ends. Raises UserError if another has it."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{home}: cannot be written to ({error.strerror}); give another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{home}: another `m6 data fetch` or `m6 data import` is at work there; wait for it to end"
            ) from error
        yield


def check_space(home: Path, needed: int) -> None:
    """Raises UserError if fewer bytes are free."""
    free = shutil.disk_usage(home).free
    if free < needed:
        raise UserError(f"{home}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed; give another folder")


def check_place(home: Path, command: str) -> None:
    """Raises UserError if anything is in the corpus' place that `command`, "fetch" or "import", has not built."""
    place = home / corpus.FOLDER
    if not os.path.lexists(place):
        return
    builder = corpus.builder(place)
    if builder is None:
        raise UserError(f"{place}: no corpus, by its manifest; move it elsewhere, or give another {_OPTIONS[command]}")
    if builder != command:
        raise UserError(f"{place}: a corpus that `m6 data {builder}` built; give another {_OPTIONS[command]}")


def start(home: Path) -> Path:
    """An empty folder to build a corpus in, beside the one that is there."""
    building = home / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir()
    except OSError as error:
        raise UserError(f"{building}: cannot be made ({error.strerror}); remove it, or give another folder") from None
    return building


def take_place(building: Path, home: Path) -> None:
    """Put the finished corpus where the old one is, in one step: whoever looks finds one of them."""
    place = home / corpus.FOLDER
    if place.exists():
        exchange(building, place)
        if building.is_symlink():
            building.unlink()  # what it leads to is not of this folder
        else:
            shutil.rmtree(building, ignore_errors=True)
    else:
        building.rename(place)
