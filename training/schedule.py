"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math
from typing import Protocol

from training.recipe import Optimizer, Schedule


class Paced(Protocol):
    """What of a recipe, of whatever kind, the rate depends on."""

    @property
    def steps(self) -> int: ...

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def schedule(self) -> Schedule: ...


def learning_rate(recipe: Paced, step: int) -> float:
    """Of step `step` (from 0): linear warm-up, then decay to `final` of the peak at the last step."""
    peak, schedule = recipe.optimizer.lr, recipe.schedule
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.decay == "constant":
        return peak
    done = (step - schedule.warmup) / max(recipe.steps - 1 - schedule.warmup, 1)
    left = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * min(done, 1))) / 2
    return peak * (schedule.final + (1 - schedule.final) * max(left, 0))
