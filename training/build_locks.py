"""Locks that a killed process left on PyTorch's extension builds: the next load would wait for them for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

COMPILERS = {"ninja", "c++", "g++", "cc1plus", "nvcc", "cudafe++"}
LOADING_SECONDS = 30.0  # an operator that is built already is locked for a few seconds while it is loaded


def extension_root() -> Path:
    """The folder above all builds: torch's default, or TORCH_EXTENSIONS_DIR."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def clear_stale_locks(root: Path | None = None, now: float | None = None) -> list[Path]:
    """Remove locks that nobody can be holding: older than a load takes, with no compiler at work. Returns them."""
    root, now = root or extension_root(), now or time.time()
    old = [lock for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")) if _age(lock, now) > LOADING_SECONDS]
    if not old or any(process.info["name"] in COMPILERS for process in psutil.process_iter(["name"])):
        return []
    for lock in old:
        lock.unlink(missing_ok=True)
    return old


def _age(lock: Path, now: float) -> float:
    try:
        return now - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0
