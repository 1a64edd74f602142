"""Processes that we start and must end as a whole family: the ranks' launcher, and compilers."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = tuple(128 + number for number in FORWARDED)  # the exit codes of a program that a signal stopped


@contextlib.contextmanager
def forwarding(process: subprocess.Popen, to_root: bool) -> Iterator[list[int]]:
    """Meanwhile, a signal that should end us ends the process' family instead; yields the signals received.

    The first one asks (SIGTERM), and only with `to_root` the process itself too; a second one kills.
    `process` should have a session of its own: a terminal's Ctrl-C would otherwise hit all of them at once.
    """
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        stop(process, to_root, kill=len(received) > 1)

    heard = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    previous = {number: signal.signal(number, forward) for number in heard}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop(process: subprocess.Popen, to_root: bool, kill: bool) -> None:
    """End what the process started, and with `to_root` or `kill` itself; itself too if it has started nothing."""
    try:
        root = psutil.Process(process.pid)
        family = root.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    if to_root or kill or not family:
        family.append(root)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill() if kill else member.terminate()


def first_rank_to_fail(launcher: subprocess.Popen, ranks: int) -> int | None:
    """Wait until one of the launcher's ranks fails, and return its number; None if none does, or cannot be told.

    The launcher itself passes on an exit code alone, and looks once a second: a rank's end soon ends others.
    """
    while len(pids := _rank_pids(launcher.pid)) < ranks:
        if launcher.poll() is not None:
            return None
        time.sleep(0.2)
    with contextlib.ExitStack() as stack:
        watched = {}
        for rank, pid in sorted(pids.items()):
            try:
                handle = os.pidfd_open(pid)  # readable the moment that the process ends
            except OSError:  # it is gone, or the system offers none
                return None
            stack.callback(os.close, handle)
            watched[handle] = rank
        while watched:
            for handle in select.select(list(watched), [], [])[0]:
                rank = watched.pop(handle)
                if _failed(pids[rank]):
                    return rank
    return None


def _rank_pids(launcher: int) -> dict[int, int]:
    found: dict[int, int] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.Error, KeyError):
                # A rank is listed before what it starts, which inherits its number.
                found.setdefault(int(child.environ()["RANK"]), child.pid)
    return found


def _failed(pid: int) -> bool:
    """Whether a process that has just ended did so with another code than 0; unknown once it was waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return False
    return fields[49] != "0"  # field 52 of proc_pid_stat(5), counted from the third
