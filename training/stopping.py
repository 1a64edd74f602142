"""Leaving on request: a signal to any rank, on which all ranks agree."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from training.start import PATIENCE

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_REQUEST_SECONDS = 2.0  # a terminal and a launcher may both pass on the same one


Action = signal.Handlers | Callable[[int, FrameType | None], None]


class StopRequested(Exception):
    """The run is to leave as soon as its state is safe."""


class StopRequest:
    """Listens from its construction on, in the main thread.

    A request raises StopRequested at once before `begin`, and on all ranks together at their next `check` after it.
    A second Ctrl-C ends the process; batch systems repeat their signals, and mean nothing by it.
    """

    def __init__(self) -> None:
        self._heard_at: float | None = None
        self._group: dist.ProcessGroup | None = None
        answer(self._hear)

    def begin(self) -> None:
        """From now on there is state to be saved. Collective."""
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)  # on every device: the word is a host's

    def check(self) -> None:
        """Raise StopRequested if any rank was asked. Collective."""
        asked = torch.tensor(self.heard, dtype=torch.uint8)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        if asked:
            raise StopRequested

    @property
    def heard(self) -> bool:
        """Whether this rank was asked."""
        return self._heard_at is not None

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._heard_at is None:
            self._heard_at = now
            if self._group is None:
                raise StopRequested
        elif number == signal.SIGINT and now - self._heard_at > ONE_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def answer(action: Action) -> None:
    """What this process does from now on when it is asked to leave."""
    for number in REQUESTS:
        signal.signal(number, action)
