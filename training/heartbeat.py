"""What a rank tells whoever supervises its run: a small file that changes as long as the rank gets on.

The files are `runs/<name>/.ranks/<rank>.json`. Beside each, `<rank>.stack` takes the Python stacks of all of the rank's
threads when STACKS is sent, even while C code runs. Imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from training.records import write_json

STACKS = signal.SIGUSR2
BEAT_SECONDS = 1.0  # the file is written no oftener, on however slow a file system it lies
KNOWN_AFTER = 3  # whole steps, or batches of an evaluation, make known what is usual
REMEMBERED = 20  # of them

Phase = Literal["starting", "training", "evaluating", "saving", "loading", "ending", "ended"]


@dataclass(frozen=True)
class Beat:
    """What a rank's file says. Times are of the machine's clock, for people; only that they change counts."""

    pid: int
    host: str
    started: float
    time: float
    phase: Phase
    step: int  # steps done
    first_step: int  # with which this process began
    usual_seconds: float | None  # the longest time between two beats of the last steps; None: not known yet
    code: int | None = None  # with which the rank ended
    error: str = ""
    namespace: int = 0  # in which `pid` is its number


def pid_namespace() -> int:
    """This process' own, by its number; 0 where that is not known."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


class Heartbeat:
    """This rank's file. Before `open`, and where the disk refuses it, nothing is told, and nothing fails."""

    def __init__(self) -> None:
        self.error = ""  # why the rank will end, in words
        self._started = time.time()
        self._path: Path | None = None
        self._stacks: IO[str] | None = None
        self._phase: Phase = "starting"
        self._step = self._first_step = 0
        self._longest: dict[Phase, deque[float]] = {}  # times between two beats, of each of the last steps
        self._gap: dict[Phase, float] = {}  # the longest of the step under way
        self._last = self._written = time.monotonic()

    def open(self, folder: Path, rank: int) -> None:
        """Begin to tell, in `folder`, and to answer STACKS."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{rank}.json"
        self._stacks = _stack_file(folder, rank).open("w")
        faulthandler.enable(self._stacks)
        faulthandler.register(STACKS, self._stacks)
        self._write()

    def begin(self, step: int) -> None:
        """All is ready for the first step after `step`."""
        self._step = self._first_step = step
        self.enter("training")

    def enter(self, phase: Phase) -> None:
        """From now on the rank does something else."""
        self._count()
        self._phase = phase
        self._write()

    def beat(self, step: int) -> None:
        """Something was done: a micro-batch, or a batch of an evaluation; `step` steps are done."""
        self._count()
        if step != self._step or self._phase != "training":
            self._longest.setdefault(self._phase, deque(maxlen=REMEMBERED)).append(self._gap.pop(self._phase))
            self._step = step
        if self._last - self._written >= BEAT_SECONDS:
            self._write()

    def get_on(self) -> None:
        """A piece of a long read or write is done. Any thread may say so; it counts where the rank waits for that."""
        waits = self._phase in ("starting", "loading", "saving", "ending")
        if waits and time.monotonic() - self._written >= BEAT_SECONDS:
            self._write()

    def _count(self) -> None:
        """The time since the last beat, which may have held an optimizer's step."""
        now = time.monotonic()
        self._gap[self._phase] = max(self._gap.get(self._phase, 0.0), now - self._last)
        self._last = now

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Meanwhile the rank does something else, and then what it did before."""
        before = self._phase
        self.enter(phase)
        yield
        self.enter(before)

    def end(self, code: int) -> None:
        """The rank is about to end with an exit code."""
        self._phase = "ended"
        self._write(code)

    def _write(self, code: int | None = None) -> None:
        self._written = time.monotonic()
        if self._path is None:
            return
        beat = Beat(
            os.getpid(), socket.gethostname(), self._started, time.time(), self._phase, self._step, self._first_step,
            self._usual(), code, self.error, pid_namespace(),
        )  # fmt: skip
        try:
            write_json(self._path, asdict(beat))
        except OSError:  # a full disk holds no new file, and still this one's time
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _usual(self) -> float | None:
        longest = self._longest.get(self._phase, ())
        return max(longest) if len(longest) >= KNOWN_AFTER else None


def read_beat(folder: Path, rank: int) -> tuple[Beat, int] | None:
    """What a rank's file says, and when it was written (nanoseconds); None if there is none that can be read."""
    path = folder / f"{rank}.json"
    try:
        written = path.stat().st_mtime_ns  # before it is read: what comes in between is then new next time
        return Beat(**json.loads(path.read_text(encoding="utf-8"))), written
    except (OSError, ValueError, TypeError):
        return None


def read_stacks(folder: Path, rank: int) -> str:
    """The stacks that the rank wrote so far."""
    try:
        return _stack_file(folder, rank).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.stack"
