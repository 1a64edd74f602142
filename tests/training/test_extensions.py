"""A lock that a killed compiler run left does not stop the next run for ever."""

import os
import time
from pathlib import Path

from training.extensions import LOADING_SECONDS, clear_stale_locks


def test_an_old_lock_goes_and_a_fresh_one_stays(tmp_path: Path) -> None:
    old, fresh = tmp_path / "async_io" / "lock", tmp_path / "cpu_adam" / "lock"
    for lock in (old, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    past = time.time() - 2 * LOADING_SECONDS
    os.utime(old, (past, past))
    assert clear_stale_locks(tmp_path) == [old]
    assert fresh.exists() and not old.exists()
    assert clear_stale_locks(tmp_path) == []
