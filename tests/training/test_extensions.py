"""A lock that a killed compiler run left does not stop the next run for ever."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.extensions import LOADING_SECONDS, clear_orphaned_locks, clear_stale_locks, prepare_extensions


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


def old_lock(folder: Path) -> Path:
    folder.mkdir()
    (folder / "lock").touch()
    past = time.time() - 2 * LOADING_SECONDS
    os.utime(folder / "lock", (past, past))
    return folder / "lock"


@contextmanager
def compiler(home: Path, cwd: Path, *arguments: str) -> Iterator[None]:
    """A process of a compiler's name, at work until the end of the block."""
    program = home / "ninja"
    program.write_text("#!/bin/sh\necho\nread line\n")
    program.chmod(0o755)
    process = subprocess.Popen([program, *arguments], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()  # it runs
    try:
        yield
    finally:
        process.communicate()


def test_a_compiler_keeps_the_lock_of_its_own_folder_only(tmp_path: Path) -> None:
    home, root = tmp_path / "home", tmp_path / "extensions"
    home.mkdir()
    root.mkdir()
    own, other = old_lock(root / "cpu_adam"), old_lock(root / "async_io")
    with compiler(home, own.parent):
        assert clear_stale_locks(root) == [other]
    assert clear_stale_locks(root) == [own]


def test_a_compiler_that_names_the_folder_keeps_its_lock(tmp_path: Path) -> None:
    home, root = tmp_path / "home", tmp_path / "extensions"
    home.mkdir()
    root.mkdir()
    lock = old_lock(root / "cpu_adam")
    with compiler(home, home, "-o", str(root / "cpu_adam" / "cpu_adam.o")):
        assert clear_stale_locks(root) == []
    assert clear_stale_locks(root) == [lock]


def test_locks_of_killed_processes_go_and_held_ones_stay(tmp_path):
    before, orphan, held = (tmp_path / name / "lock" for name in ("before", "orphan", "held"))
    for lock in (before, orphan, held):
        lock.parent.mkdir()
        lock.touch()
    started = time.time() - 5
    os.utime(before, (started - 5, started - 5))
    with held.open():
        assert clear_orphaned_locks(tmp_path, started) == [orphan]
    assert before.exists() and held.exists() and not orphan.exists()


def test_the_ninja_of_this_environment_comes_before_the_systems(tmp_path, monkeypatch):
    """Two versions would each compile anew what the other has built."""
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\necho 0.1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    prepare_extensions()
    assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")
