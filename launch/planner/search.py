"""The cheapest settings of a ds_config that fit, and why the others lost. The batch stays the recipe's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.planner.plan import Plan, make_plan
from launch.planner.workload import Work, typed
from training.ds_config import MOST_ROWS, OPTIMIZER_STATES, TIERS
from training.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """One choice of settings, by their keys in the ds_config; its plan, or why there is none."""

    settings: dict[str, Any]
    plan: Plan | None = None
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def cost(self) -> float:
        assert self.plan
        return self.plan.terms["cost"].value

    @property
    def seconds(self) -> float:
        assert self.plan
        return self.plan.terms["step.seconds"].value

    def times(self, best: Candidate) -> float:
        """The cost, in that of the best; of machines that cost nothing, the time."""
        return self.cost / best.cost if best.cost else self.seconds / best.seconds

    def lost(self, best: Candidate) -> str:
        """Why it is not the best, in words."""
        if not self.plan:
            return self.refused
        if not self.plan.fits:
            return self.plan.limits[0].partition(" are needed")[0] + ", too much"
        return f"{self.times(best):.2f} times the cost" if self is not best else "the cheapest that fits"


@dataclass(frozen=True)
class Found:
    best: Candidate | None
    candidates: list[Candidate]  # those that fit first, the cheapest first


def search(work: Work) -> Found:
    """Try tiers of weights and of the optimizer, recomputation and micro-batches."""
    tried = [_candidate(work, settings) for settings in _settings(work)]
    fitting = sorted((c for c in tried if c.fits), key=lambda c: (c.cost, c.seconds))
    return Found(fitting[0] if fitting else None, fitting + [c for c in tried if not c.fits])


def overrides(settings: dict[str, Any], key: str) -> list[str]:
    """The settings as they are typed, where `key` is the recipe's that changes the ds_config."""
    return [typed(f"{key}.{name}", value) for name, value in settings.items()]


def _settings(work: Work) -> Iterator[dict[str, Any]]:
    share, block = work.recipe.global_batch // work.cluster.devices, work.recipe.block
    micros = [rows for rows in range(block, max(MOST_ROWS, block) + 1, block) if share % rows == 0]
    for weights, states, again, micro in itertools.product(TIERS, TIERS, (False, True), micros):
        if TIERS.index(weights) > TIERS.index(states):
            continue  # states are the larger and the rarer used: they go first
        for kind in OPTIMIZER_STATES if states == "cpu" else OPTIMIZER_STATES[:1]:
            yield {
                "zero_optimization.offload_param.device": weights,
                "zero_optimization.offload_optimizer.device": states,
                "m6.optimizer_states": kind,
                "m6.recompute": again,
                "train_micro_batch_size_per_gpu": micro,
                "data_types.grad_accum_dtype": "auto",
                "m6.offload": None,  # a policy by layers would override the tiers that are tried
            }


def _candidate(work: Work, settings: dict[str, Any]) -> Candidate:
    try:
        return Candidate(settings, make_plan(work.changed(overrides(settings, "ds"))))
    except UserError as error:
        return Candidate(settings, refused=str(error))
