"""What is measured of a step, on all ranks together."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from model.routing import MODALITIES
from training.energy import MODELLED, UNAVAILABLE, EnergyMeter, EnergyRates
from training.engine import Engine, StepResult


class Meter:
    """Turns step results into the records of metrics.jsonl. Calls are collective."""

    def __init__(
        self,
        engine: Engine,
        task_names: Sequence[str],
        peak: float,
        counters: dict[str, Any] | None = None,
        watts: float | None = None,
    ):
        """`counters`: an earlier meter's. `watts`: of all nodes by the run's plan, for where no counter can be read."""
        self.engine, self.task_names = engine, task_names
        self.peak = self._sum(peak)  # FLOP/s of all ranks
        self.energy, self.rates, self.watts = EnergyMeter(), EnergyRates(), watts
        self.counted, self.counted_at = 0.0, time.perf_counter()  # joules, as long as counters tell, and when
        self.tokens = (counters or {}).get("tokens", 0)
        self.joules_before = (counters or {}).get("joules", 0.0)
        self.modelled_before = (counters or {}).get("modelled", False)  # whether any of them is no counter's
        self.window: torch.Tensor | None = None  # routing counts since the last evaluation
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what was done since the last step (evaluation, saving) out of the next step's time."""
        self.last, self.last_joules = time.perf_counter(), self._joules()[0]

    def counters(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        joules, source = self._joules()
        return {"tokens": self.tokens, "joules": self._total(joules), "modelled": self._is_modelled(source)}

    def go_back(self, counters: dict[str, Any]) -> None:
        """Go on from a checkpoint's counters; the energy that was spent since stays spent."""
        self.tokens, self.window = counters["tokens"], None
        self.restart_clock()

    def record(self, result: StepResult, tasks: Sequence[str], position: int, lr: float) -> dict[str, Any]:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.tokens += result.tokens
        kept = int(result.routing[:, :, 1].sum()) if result.routing.shape[-1] else None
        config = self.engine.config
        flops = config.model.training_flops(result.tokens, result.said, kept, config.trained)
        self.window = result.routing if self.window is None else self.window + result.routing
        return {
            "position": position,
            "tokens": self.tokens,
            "loss": result.loss,
            **self._task_losses(result, tasks),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "step_seconds": seconds,
            "tokens_per_second": result.tokens / seconds,
            "flops_utilization": flops / seconds / self.peak,
            **load(result.routing),
            **self._memory(),
            **self._energy(seconds, result.tokens),
        }

    def routing(self) -> dict[str, Any] | None:
        """Assignments wanted and kept, [layer][modality][expert], since the last call; None for a dense model."""
        window, self.window = self.window, None
        if window is None or not window.shape[-1]:
            return None
        return {"wanted": window[:, :, 0].tolist(), "kept": window[:, :, 1].tolist()}

    def _task_losses(self, result: StepResult, tasks: Sequence[str]) -> dict[str, float]:
        sums = torch.zeros(len(self.task_names), 2, dtype=torch.float64, device=self.engine.device)
        for index, name in enumerate(self.task_names):
            own = torch.tensor([task == name for task in tasks])
            sums[index, 0] = result.rows_loss[own].sum()
            sums[index, 1] = result.rows_targets[own].sum()
        dist.all_reduce(sums)
        return {f"loss/{name}": (s[0] / s[1]).item() for name, s in zip(self.task_names, sums, strict=True) if s[1]}

    def _memory(self) -> dict[str, int]:
        """Peak device bytes of the fullest rank, and resident host bytes of all ranks."""
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        fullest = torch.tensor(float(device), device=self.engine.device)
        dist.all_reduce(fullest, op=dist.ReduceOp.MAX)
        return {"memory/device_bytes": int(fullest.item()), "memory/host_bytes": host_bytes()}

    def _energy(self, seconds: float, tokens: int) -> dict[str, Any]:
        """After a step: the total since the run began, and rates of steps alone."""
        (now, source), before = self._joules(), self.last_joules
        self.last_joules = now
        passed = None if now is None or before is None else now - before
        total = self._total(now)
        return {
            "energy/joules": total,
            **self.rates.step(passed, seconds, tokens),
            "energy/source": MODELLED if source != UNAVAILABLE and self._is_modelled(source) else source,
        }

    def _total(self, joules: float | None) -> float | None:
        return None if joules is None or self.joules_before is None else self.joules_before + joules

    def _is_modelled(self, source: str) -> bool:
        return self.modelled_before or source == MODELLED

    def _joules(self) -> tuple[float | None, str]:
        """Joules of all nodes since construction, and how they are known: one meter a node counts. Collective."""
        own = self.energy.joules() if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 0.0
        total = self._sum(math.nan if own is None else own)
        if not math.isnan(total):
            self.counted, self.counted_at = total, time.perf_counter()
            return total, self.energy.source
        if self.watts is None:
            return None, UNAVAILABLE
        return self.counted + self.watts * (time.perf_counter() - self.counted_at), MODELLED

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.item()


def host_bytes() -> int:
    """Resident host memory of all ranks together. Collective."""
    total = torch.tensor(psutil.Process().memory_info().rss, device=get_accelerator().current_device_name())
    dist.all_reduce(total)
    return int(total.item())


def load(routing: torch.Tensor) -> dict[str, float]:
    """Load variation and drop rate from routing counts [L, M, 2, E], over all and by modality.

    moe/load_cv: standard deviation over mean of the assignments that experts were asked for, the mean over layers
    (the measure of M6-T, arXiv 2105.15082).
    """
    if not routing.shape[-1]:
        return {}
    found = _load(routing.sum(1), "")
    for index, modality in enumerate(MODALITIES):
        found |= _load(routing[:, index], f"/{modality}")
    return found


def _load(counts_L2E: torch.Tensor, suffix: str) -> dict[str, float]:
    wanted_LE, kept_LE = counts_L2E.double().unbind(1)
    if not wanted_LE.sum():
        return {}
    variation_L = wanted_LE.std(1, correction=0) / wanted_LE.mean(1).clamp(min=1e-9)
    return {
        f"moe/load_cv{suffix}": variation_L.mean().item(),
        f"moe/drop_rate{suffix}": (1 - kept_LE.sum() / wanted_LE.sum()).item(),
    }
