"""What a run shows on the terminal while it trains, and numbers as a person reads them."""

import statistics
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from training.records import Record

UNITS = {"flops": "FLOP/s", "bytes": "B"}  # of facts whose key has the word


class TimeLeft:
    """Seconds to the end: steps at a robust mean of recent ones, and the evaluations to come at theirs."""

    def __init__(self, steps: int, evaluate_every: int):
        self._steps, self._every = steps, evaluate_every
        self._seconds: deque[float] = deque(maxlen=100)
        self._evaluations: deque[float] = deque(maxlen=5)
        self._last: float | None = None
        self._evaluated = False

    def evaluated(self) -> None:
        """An evaluation was run since the last step."""
        self._evaluated = True

    def step(self, now: float, step_seconds: float) -> None:
        """A step of `step_seconds` ended at `now`, on a clock of the caller's."""
        if self._last is not None:
            passed = now - self._last
            self._seconds.append(step_seconds if self._evaluated else passed)
            if self._evaluated:
                self._evaluations.append(max(0.0, passed - step_seconds))
        self._last, self._evaluated = now, False

    def seconds(self, step: int) -> float | None:
        """Seconds left after `step`; None before two steps were seen."""
        if not self._seconds:
            return None
        ordered = sorted(self._seconds)
        quarter = len(ordered) // 4
        left = statistics.fmean(ordered[quarter : len(ordered) - quarter]) * (self._steps - step)
        if self._evaluations:
            left += statistics.fmean(self._evaluations) * (self._steps // self._every - step // self._every)
        return left


class Screen:
    """One live line on a terminal; elsewhere (a log file, a CI job) a plain line a logged step."""

    def __init__(self, steps: int, start_step: int):
        self._steps = steps
        self._console = Console()
        self._live: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
            )
            self._live = Progress(*columns, console=self._console, refresh_per_second=4)
            self._live.add_task("", total=steps, completed=start_step, numbers="")

    def facts(self, facts: Record) -> None:
        width = max(map(len, facts), default=0)
        for key, value in facts.items():
            self.say(f"{key:<{width}}  {fact(key, value)}")
        if self._live:
            self._live.start()

    def step(self, step: int, record: Record, left: float | None) -> None:
        if self._live:
            task = self._live.task_ids[0]
            self._live.update(task, completed=step, numbers=numbers(record, left))

    def doing(self, what: str) -> None:
        """What is done between steps, in the place of the last step's figures."""
        if self._live:
            self._live.update(self._live.task_ids[0], numbers=what)

    def log(self, step: int, summary: Record, left: float | None) -> None:
        if not self._live:
            self.say(f"step {step}/{self._steps}  {numbers(summary, left)}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        if self._live:
            self._live.stop()


def fact(key: str, value: Any) -> str:
    """A fact's value as a person reads it: 1234 -> 1,234; a rate or a size with its unit, 93.1 GFLOP/s, 1.2 GB."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    unit = next((unit for word, unit in UNITS.items() if word in key), "")
    return scaled(value, unit) if unit else f"{value:,}"


def scaled(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: 1_234_567 B -> 1.23 MB."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def numbers(record: Record, left: float | None) -> str:
    """The line's figures: loss, speed, assignments dropped for want of capacity, time left."""
    parts = [f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
    if record.get("moe/drop_rate") is not None:
        parts.append(f"{record['moe/drop_rate']:.1%} dropped")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: 42 s, 12 min 30 s, 3 h 05 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
