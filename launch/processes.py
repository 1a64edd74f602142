"""Processes that we start and must end as a whole family: the ranks' launcher, and compilers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from training.errors import UserError

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STOPPED = tuple(128 + number for number in HEARD)  # the exit codes of a program that a signal stopped
ONE_REQUEST_SECONDS = 2.0  # in which a Ctrl-C that comes again is still the same
FIND_SECONDS = 0.2  # between two looks for ranks that have not started yet


@contextlib.contextmanager
def hearing(act: Callable[[list[int]], None]) -> Iterator[list[int]]:
    """Meanwhile, a signal that should end us calls `act` with all received so far instead; yields those."""
    received: list[int] = []
    interrupted = -ONE_REQUEST_SECONDS

    def hear(number: int, _frame: object) -> None:
        nonlocal interrupted
        if number == signal.SIGINT:
            before, interrupted = interrupted, time.monotonic()
            if interrupted - before < ONE_REQUEST_SECONDS:
                return  # a wrapper that heard it too has passed it on
        received.append(number)
        act(received)

    heard = [number for number in HEARD if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    previous = {number: signal.signal(number, hear) for number in heard}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def insists(received: Sequence[int]) -> bool:
    """Whether somebody wants the end at once: by a second Ctrl-C. Batch systems repeat their signals anyway."""
    return received.count(signal.SIGINT) > 1


def forwarding(process: subprocess.Popen, to_root: bool) -> contextlib.AbstractContextManager[list[int]]:
    """Meanwhile, a signal that should end us ends the process' family instead; yields the signals received.

    It asks (SIGTERM): all of the family with `to_root`, else only what the process itself has started. A second Ctrl-C
    kills. `process` should have a session of its own: a terminal's Ctrl-C would otherwise hit all at once.
    """
    return hearing(lambda received: stop(process, to_root, kill=insists(received)))


def stop(process: subprocess.Popen, to_root: bool, kill: bool) -> None:
    """End what the process started, and with `to_root` or `kill` itself; itself too if it has started nothing."""
    try:
        root = psutil.Process(process.pid)
        family = root.children(recursive=to_root or kill)
    except psutil.NoSuchProcess:
        return
    if to_root or kill or not family:
        family.append(root)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill() if kill else member.terminate()


class Ranks:
    """The ranks that a launcher starts on this machine, its children, watched past it.

    The launcher itself looks once a second, gives a rank half a minute to end, and passes on an exit code alone.
    """

    def __init__(self, launcher: subprocess.Popen, numbers: Sequence[int]):
        """`launcher` must lead a process group that its ranks share; `numbers`: theirs in the whole run."""
        self.launcher, self.numbers = launcher, numbers
        self.pids: dict[int, int] = {}
        self._watched: dict[int, int] = {}  # rank: a handle of its process, readable the moment that it ends
        self._gone: list[int] = []  # before they could be watched

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind:
            self.kill()  # nobody would look after them
        for handle in self._watched.values():
            os.close(handle)

    def wait(self, seconds: float) -> dict[int, int | None]:
        """Wait at most so long for a rank to end; the exit codes of those that have, each told once.

        A code is negative for a signal, and None where it cannot be told.
        """
        if len(self.pids) < len(self.numbers):
            self._find()
            seconds = min(seconds, FIND_SECONDS)
        if not self._watched:
            time.sleep(seconds)
        ready = select.select(list(self._watched.values()), [], [], seconds)[0] if self._watched else []
        ended: dict[int, int | None] = {rank: None for rank in self._gone}
        self._gone = []
        for rank, handle in list(self._watched.items()):
            if handle in ready:
                ended[rank] = _exit_code(self.pids[rank])
                os.close(self._watched.pop(rank))
        return ended

    def kill(self, seconds: float = 600.0) -> None:
        """End all of them and the launcher at once, and wait until they have: freeing much memory takes its time."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()
        deadline = time.monotonic() + seconds
        while self._watched and time.monotonic() < deadline:
            self.wait(FIND_SECONDS)

    def running(self) -> dict[int, int]:
        """Ranks that have not ended, and their process ids."""
        return {rank: self.pids[rank] for rank in self._watched}

    def _find(self) -> None:
        """A launcher's child is a rank once its environment says so."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.launcher.pid).children():
                with contextlib.suppress(psutil.Error, KeyError):
                    rank = int(child.environ()["RANK"])
                    if rank not in self.pids:
                        self.pids[rank] = child.pid
                        self._watch(rank)

    def _watch(self, rank: int) -> None:
        try:
            self._watched[rank] = os.pidfd_open(self.pids[rank])
        except ProcessLookupError:
            self._gone.append(rank)
        except OSError as error:
            reason = f"pidfd_open: {error.strerror}"
            raise UserError(
                f"the ranks cannot be watched ({reason}); it needs Linux 5.3, and a container's leave"
            ) from None


def first_rank_to_fail(ranks: Ranks) -> int | None:
    """Wait until a rank fails, and return its number; None if none does before the launcher ends."""
    while ranks.launcher.poll() is None:
        for rank, code in ranks.wait(0.5).items():
            if code:
                return rank
    return None


def is_stopped(pid: int) -> bool:
    """Whether a signal such as SIGSTOP holds the process up."""
    fields = _status(pid)
    return bool(fields) and fields[0] == "T"


def _exit_code(pid: int) -> int | None:
    """Of a process that has just ended; unknown once it was waited for."""
    fields = _status(pid)
    return os.waitstatus_to_exitcode(int(fields[49])) if fields else None  # field 52 of proc_pid_stat(5)


def _status(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from the third on; [] if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
