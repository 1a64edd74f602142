"""The folder that a corpus lives in: one writer at a time; a new corpus takes the old one's place when it is whole."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.data import corpus
from training.errors import UserError
from training.files import exchange

BUILDING = "corpus.partial"


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process, however that ends. Raises UserError if another has it."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / ".lock").open("w")
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


def start(home: Path) -> Path:
    """An empty folder to build a corpus in, beside the one that is there."""
    building = home / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    return building


def take_place(building: Path, home: Path) -> None:
    """Put the finished corpus where the old one is, in one step: whoever looks finds one of them."""
    place = home / corpus.FOLDER
    if place.exists():
        exchange(building, place)
        shutil.rmtree(building, ignore_errors=True)
    else:
        building.rename(place)
