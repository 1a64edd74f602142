"""Where DeepSpeed's operators are compiled, and the locks that a killed process left there."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

COMPILERS = {"ninja", "c++", "g++", "cc1plus", "nvcc", "cudafe++"}
LOADING_SECONDS = 30.0  # an operator that is built already is locked for a few seconds while it is loaded


def extension_root() -> Path:
    """The folder of the builds: TORCH_EXTENSIONS_DIR, else one of this virtual environment's own.

    PyTorch's default is shared by all environments of a user, but compile commands name the environment's headers:
    two checkouts would compile over each other's operators again and again.
    """
    own = Path(sys.prefix) if sys.prefix != sys.base_prefix else Path("~/.cache").expanduser()
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or own / "torch_extensions")


def prepare_extensions() -> None:
    """Make this process, and those it starts, use `extension_root()`, free of stale locks, and its own ninja.

    Another version, as a system may have it, takes what this one built to be out of date, and this one what it built.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extension_root())
    own, others = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if others.split(os.pathsep)[0] != own:
        os.environ["PATH"] = f"{own}{os.pathsep}{others}"
    clear_stale_locks(extension_root())


def clear_stale_locks(root: Path) -> list[Path]:
    """Remove locks that nobody can be holding: older than a load takes, and no compiler at work beside them.

    PyTorch's lock is a file without an owner, which the next load would wait for for ever. Returns what went.
    """
    stale = [lock for lock in root.glob("*/lock") if _age(lock) > LOADING_SECONDS and not _compiling(lock.parent)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def clear_orphaned_locks(root: Path, since: float) -> list[Path]:
    """Remove locks that were made after `since` (wall time) and that no process has open. Returns what went.

    To be called when the processes that may have made them were killed: whoever holds a lock keeps its file open.
    """
    made = [lock for lock in root.glob("*/lock") if time.time() - _age(lock) >= since]
    opened = set(_open_files()) if made else set()
    orphaned = [lock for lock in made if str(lock.resolve()) not in opened]
    for lock in orphaned:
        lock.unlink(missing_ok=True)
    return orphaned


def _open_files() -> Iterator[str]:
    """Of all processes that may be looked into."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield from (file.path for file in process.open_files())


def _compiling(folder: Path) -> bool:
    """Whether a compiler works in the folder, or names it. What other users' processes do cannot be seen."""
    own = str(folder.resolve())
    return any(
        process.info["name"] in COMPILERS
        and any(own in place for place in (process.info["cwd"] or "", *(process.info["cmdline"] or ())))
        for process in psutil.process_iter(["name", "cwd", "cmdline"])
    )


def _age(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0
