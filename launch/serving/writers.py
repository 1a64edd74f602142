"""The lane of texts: a new one joins those that are being written after any token, and each is told as it comes."""

from __future__ import annotations

from collections.abc import Sequence

from launch.serving.desk import Desk, Job, Lane
from training.trained import M6
from training.writing import Text, Writing

TASK = "write"


class WritingLane(Lane):
    def __init__(self, desk: Desk, m: M6, rows: int):
        super().__init__(desk, TASK, lambda _: [], rows)
        self.m, self.writing = m, Writing(m)
        self._going: dict[Text, Job] = {}

    def run(self) -> None:
        while self._going or self._wait():
            with self.desk.baton:
                if self.desk.closed:
                    return
                self._let_go([text for text, job in self._going.items() if job.gone])
                self._take_in()
                try:
                    self._go_on()
                except Exception as error:
                    self._fail(error)

    def _take_in(self) -> None:
        room = self.rows - len(self._going)
        jobs = self._take(room) if room > 0 and self.jobs else []
        if not jobs:
            return
        try:
            texts = self.writing.begin([job.asked for job in jobs])
        except Exception as error:
            for job in jobs:
                job.settle(error=error)
            return
        self._going |= zip(texts, jobs, strict=True)

    def _go_on(self) -> None:
        """One token more of each text."""
        for text, piece in self.writing.go_on():
            job = self._going[text]
            if piece:
                job.tell(piece)
            if not text.going:
                self.desk.metrics.wrote(text.tokens)
                job.settle((str(text), text.tokens))
                del self._going[text]

    def _let_go(self, texts: Sequence[Text]) -> None:
        if texts:
            self.writing.give_up(texts)
            for text in texts:
                self.desk.metrics.wrote(text.tokens)
                del self._going[text]

    def _fail(self, error: Exception) -> None:
        for job in self._going.values():
            job.settle(error=error)
        self._going, self.writing = {}, Writing(self.m)
