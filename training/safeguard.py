"""What is known of a run's bad steps: those that were skipped, and those that a loss spike made it give up.

A step whose loss or gradient is not finite is skipped by the engine, on all ranks together. After a loss spike the run
goes back to its last checkpoint and passes over the positions that it had seen since, the spike's included: training
on the same data from another state does not spike (PaLM, arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from training.engine import Engine, StepResult
from training.recipe import Spike

NAMED = 4  # things that were not finite, and ranks of each, that are told by name


@dataclass
class Safeguard:
    """A run's bad steps so far. Equal on all ranks, since it goes by what they agree on."""

    skipped: int = 0  # steps
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # of the last good steps, for their median
    rollbacks: int = 0
    passed_over: int = 0  # steps' worth of positions

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries; `Safeguard(**state)` goes on from it."""
        return asdict(self)

    def place(self, step: int) -> int:
        """Which step of the global order the run's step `step` trains on (both from 0)."""
        return step + self.passed_over

    def skip(self) -> None:
        """Count a skipped step."""
        self.skipped += 1
        self.skipped_in_a_row += 1

    def spikes(self, step: int, loss: float, rule: Spike) -> bool:
        """Whether the loss of step `step` (from 1) is so far over the usual that the rule sends the run back."""
        if not rule.factor or step <= rule.after or not self.losses:
            return False
        return loss > rule.factor * self.usual_loss()

    def usual_loss(self) -> float:
        return statistics.median(self.losses)

    def accept(self, loss: float, rule: Spike) -> None:
        """Remember the loss of a good step."""
        self.skipped_in_a_row = 0
        self.losses = [*self.losses, loss][-rule.window :]

    def back_to(self, saved: dict[str, Any], steps: int) -> Safeguard:
        """What is known after going back `steps` steps, to a checkpoint with the state `saved`."""
        return Safeguard(**saved | {"rollbacks": self.rollbacks + 1, "passed_over": self.passed_over + steps})


def not_finite(engine: Engine, result: StepResult) -> str:
    """What was not finite in the step that the engine has just skipped, and on which ranks. Collective."""
    if math.isfinite(result.loss):
        own = [f"the gradient of {name}" for name in _bad_gradients(engine)]
    else:
        own = [] if result.rows_loss.isfinite().all() else ["the loss"]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    ranks: dict[str, list[str]] = {}
    for rank, names in enumerate(gathered):
        for name in names:
            ranks.setdefault(name, []).append(str(rank))
    told = [f"{name} on rank {_few(found)}" for name, found in ranks.items()]
    return _few(told) or "the gradient's norm"


def _bad_gradients(engine: Engine) -> list[str]:
    """Names of the parameters whose gradient on this rank, which DeepSpeed has not overwritten yet, is not finite."""
    optimizer = engine.deepspeed.optimizer
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    found = []
    for group, sums in zip(optimizer.fp16_groups, optimizer.gradient_sums, strict=True):
        gradients = sums.split([p.partition_numel() for p in group])
        found += [names[id(p)] for p, gradient in zip(group, gradients, strict=True) if not gradient.isfinite().all()]
    return found


def _few(texts: list[str]) -> str:
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return ", ".join(texts[:NAMED]) + more
