"""Where requests wait for the model: those of one task go through it together, and tasks take turns at each token.

Every task has a lane, a thread that gathers what waits and computes. Whoever computes holds the baton, so that all
cores serve one batch; at each token it is passed on to the lane that has waited longest. So a long drawing keeps nobody
waiting for more than a token of it, and a request that nobody waits for any more is given up as soon.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from launch.serving.limits import Limits
from launch.serving.metrics import Metrics

CLOSING = 10.0  # s that lanes have to end once they are asked to


class Busy(Exception):
    """So much waits that no more is taken."""


class GivenUp(Exception):
    """Nobody waits for this work any more."""


class Baton:
    """One holder at a time; whoever has waited longest is the next."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()  # it stays held, by another
            else:
                self._held = False

    def pass_on(self) -> None:
        """Let everybody who waits have a turn."""
        if self._waiting:
            self.__exit__()
            self.__enter__()


class Job:
    """One request. `rows`: of a batch that it fills; jobs of unlike `key` do not go together."""

    def __init__(self, asked: Any, rows: int, key: Hashable, tell: Callable[[Any], None] | None):
        """`tell` is called in the loop's thread with each piece of the answer, where it comes in pieces."""
        self.asked, self.rows, self.key, self._tell = asked, rows, key, tell
        self.since = time.monotonic()
        self.gone = False  # nobody waits for it any more
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self._loop.create_future()

    def left(self, seconds: float) -> float:
        """Of so many since it came, not under 0."""
        return max(0.0, self.since + seconds - time.monotonic())

    def tell(self, piece: Any) -> None:
        if self._tell:
            self._loop.call_soon_threadsafe(self._tell, piece)

    def settle(self, answer: Any = None, error: BaseException | None = None) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._settle, answer, error)

    def _settle(self, answer: Any, error: BaseException | None) -> None:
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(answer)
        else:
            self.answer.set_exception(error)
            self.answer.exception()  # somebody may have left: it is not news then


class Desk:
    """All lanes, and how much may wait for them."""

    def __init__(self, limits: Limits, metrics: Metrics):
        self.limits, self.metrics = limits, metrics
        self.baton = Baton()
        self.changed = threading.Condition()  # of what waits in any lane, and of `closed`
        self.waiting = 0  # rows
        self.expected = 0  # rows whose pictures are still being looked at
        self.closed = False
        self._lanes: dict[str, Lane] = {}

    def open(self, *lanes: Lane) -> None:
        for lane in lanes:
            self._lanes[lane.task] = lane
            lane.start()

    def submit(
        self, task: str, asked: Any, rows: int = 1, key: Hashable = None, tell: Callable[[Any], None] | None = None
    ) -> Job:
        """Let it wait its turn. Raises Busy."""
        with self.changed:
            self._check_room(rows)
            job = Job(asked, rows, key, tell)
            self._lanes[task].jobs.append(job)
            self.waiting += rows
            self.changed.notify_all()
        return job

    @contextmanager
    def expecting(self, rows: int) -> Iterator[None]:
        """So many are about to be submitted: their place is theirs, and the work before is not in vain. Raises Busy."""
        with self.changed:
            self._check_room(rows)
            self.expected += rows
        try:
            yield
        finally:
            with self.changed:
                self.expected -= rows

    @property
    def full(self) -> bool:
        return self.waiting + self.expected >= self.limits.queue

    def _check_room(self, rows: int) -> None:
        if self.closed or self.waiting + self.expected + rows > self.limits.queue:
            raise Busy

    def between(self) -> None:
        """What a model calls between tokens. Raises GivenUp."""
        lane = threading.current_thread()
        if isinstance(lane, Lane):
            if lane.batch and all(job.gone for job in lane.batch):
                raise GivenUp
            self.baton.pass_on()

    def close(self) -> None:
        """End all lanes; what they are at is given up."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for lane in self._lanes.values():
            for job in lane.batch:
                job.gone = True
            lane.join(CLOSING)


class Lane(threading.Thread):
    """The jobs of one task, in the order that they came."""

    def __init__(self, desk: Desk, task: str, work: Callable[[list[Any]], Sequence[Any]], rows: int):
        """`work` answers what is asked, `rows` of it at once, all of one key."""
        super().__init__(name=f"lane of {task}", daemon=True)
        self.desk, self.task, self.work, self.rows = desk, task, work, rows
        self.jobs: deque[Job] = deque()  # under `desk.changed`
        self.batch: list[Job] = []  # what is being computed

    def run(self) -> None:
        while self._wait():
            with self.desk.baton:
                if jobs := self._take(self.rows):
                    self._answer(jobs)
                    self.batch = []

    def _wait(self) -> bool:
        """Until there is something to do, and some moments more for others to come; False: it is over."""
        desk = self.desk
        with desk.changed:
            desk.changed.wait_for(lambda: self.jobs or desk.closed)
            if self.jobs:
                left = self.jobs[0].since + desk.limits.company - time.monotonic()
                desk.changed.wait_for(lambda: desk.closed or sum(job.rows for job in self.jobs) >= self.rows, left)
            return not desk.closed

    def _take(self, room: int) -> list[Job]:
        """The first that waits and others like it, `room` rows at the most (or the first alone), off the queue."""
        taken: list[Job] = []
        with self.desk.changed:
            for job in [*self.jobs]:
                fits = not taken or (job.key == taken[0].key and sum(one.rows for one in taken) + job.rows <= room)
                if job.gone or fits:
                    self.jobs.remove(job)
                    self.desk.waiting -= job.rows
                    if not job.gone:
                        taken.append(job)
        if taken:
            self.desk.metrics.batch(self.task, sum(job.rows for job in taken))
        return taken

    def _answer(self, jobs: list[Job]) -> None:
        self.batch = jobs
        try:
            answers = self.work([job.asked for job in jobs])
        except GivenUp:
            return
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].settle(error=error)
                return
            for job in jobs:  # one of them must not fail the others
                self._answer([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.settle(answer)
