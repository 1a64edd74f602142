"""One rank's work of a job of many, done alone: what it holds, computes and moves.

The parameters and states are exactly that rank's and the steps are whole ones, in which the other ranks are copies of
this one (`training/absent.py`). Rows are full, and routing is balanced, since absent ranks cannot say where they route.

python -m training.rehearse --world 512 --rank 0 --swap swap < recipe.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from model.parts import part_of
from model.routing import Router
from training import absent, ds_config, rank_memory
from training.data.batches import Batch, Batcher
from training.data.tasks.base import Row
from training.data.tokenizer import SPECIAL_IDS, Tokenizer
from training.ds_config import DSConfig
from training.energy import EnergyMeter
from training.engine import Engine, StepResult
from training.errors import MISTAKE, UserError
from training.extensions import prepare_extensions
from training.peak import wait
from training.placement import CPU, DEVICE, NVME
from training.recipe import Recipe
from training.schedule import learning_rate
from training.traffic import Traffic, counted

TIMED_STEPS, TIMED_SECONDS = 3, 10.0  # at the most; but one step however long
Tell = Callable[[str], None]


class BalancedRouter(Router):
    """Sends tokens to experts in turn, whatever the gates say; what does not divide goes to the first experts.

    So every rank routes alike, and knows what an absent one would send. Gates and their gradients are computed as ever.
    """

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_TK, _, logits_TE = super().forward(x_TD)
        turn_T = torch.arange(len(x_TD), device=x_TD.device)
        choice_K = torch.arange(self.k, device=x_TD.device)
        if self.routing == "top-k":
            return gate_TK, (turn_T[:, None] * self.k + choice_K) % self.experts, logits_TE
        each = self.experts // self.k
        return gate_TK, turn_T[:, None] % each + choice_K * each, logits_TE


def balance(engine: Engine) -> None:
    """Let the engine's model route in turn."""
    for module in engine.model.modules():
        if isinstance(module, Router):
            module.__class__ = BalancedRouter


def full_batches(recipe: Recipe, config: DSConfig, rank: int) -> list[Batch]:
    """A step's micro-batches of rows that are as long as they may be, each with a picture, all text a target."""
    model, random = config.model, np.random.default_rng((recipe.seed, rank))
    picture = random.standard_normal((model.image_patches, model.image_channels), np.float32)

    def row() -> Row:
        tokens = random.integers(min(SPECIAL_IDS, model.text_vocab - 1), model.text_vocab, recipe.text_positions)
        return Row([], tokens.tolist(), picture)

    collate = Batcher(Tokenizer, model, lambda picture: picture, recipe.block)
    micro_batches = [[row() for _ in range(config.micro_batch)] for _ in range(config.accumulation)]
    return [collate(rows, recipe.text_positions) for rows in micro_batches]


class Rehearsal:
    """A rank's engine, and what is measured of its steps. Collective where the ranks are real."""

    def __init__(self, recipe: Recipe, config: DSConfig, rank: int, tell: Tell):
        self.config, self.tell = config, tell
        self.before = psutil.Process().memory_info().rss
        tell("building the model and its states")
        self.engine = Engine(config, recipe.seed)
        balance(self.engine)
        self.batches = full_batches(recipe, config, rank)
        self.lr = learning_rate(recipe, 0)

    def measure(self, traffic: Traffic) -> dict[str, Any]:
        """A step that settles everything, one that shows the memory, and those that are timed."""
        self.tell("first step: the optimizer's states are made")
        self._step()
        self.tell("second step: its memory is measured")
        beside = rank_memory.step_peak(self._step, self.engine.device)
        self.tell("third step: its time is measured")
        meter = EnergyMeter()
        seconds, steps = self._timed(traffic)
        joules = meter.joules()
        return {
            "layers": self.config.model.layers,
            "parameters": self._parameters(),
            "memory": self._memory(beside),
            "step": {"seconds": seconds, "tokens": self._tokens()},
            "collectives": traffic.by_kind(self._groups()),
            "energy": {"joules": None if joules is None else joules / steps, "source": meter.source},
        }

    def _step(self) -> StepResult:
        result = self.engine.step(self.batches, self.lr)
        assert not result.skipped, "a rehearsed step has a loss or a gradient that is not finite"
        return result

    def _timed(self, traffic: Traffic) -> tuple[float, int]:
        """Seconds of the quickest step, without collectives, and the number of steps; `traffic` is the last one's."""
        best, steps, end = math.inf, 0, time.perf_counter() + TIMED_SECONDS
        while not steps or (steps < TIMED_STEPS and time.perf_counter() + best < end):
            traffic.clear()
            wait(self.engine.device)
            start = time.perf_counter()
            self._step()
            wait(self.engine.device)
            best, steps = min(best, time.perf_counter() - start - traffic.seconds), steps + 1
        return best, steps

    def _memory(self, beside: int) -> dict[str, Any]:
        held = rank_memory.held(self.engine)
        size = {tier: sum(kinds.values()) for tier, kinds in held.items()}
        return {
            "device_bytes": size[DEVICE] + beside,
            "host_bytes": size[CPU],
            "nvme_bytes": size[NVME],
            "held": held,
            "step_bytes": beside,
            "process": {"before_bytes": self.before, "peak_bytes": peak_rss()},
        }

    def _parameters(self) -> dict[str, int]:
        """This rank's share, padding left out, by component of the model."""
        counts: Counter[str] = Counter()
        parameter: Any
        for name, parameter in self.engine.model.named_parameters():
            share = parameter.ds_tensor.ds_numel
            first = parameter.ds_zero_partition_rank * share
            counts[part_of(name)] += max(min(share, parameter.ds_numel - first), 0)
        return {"total": counts.total(), **counts}

    def _tokens(self) -> int:
        return sum(
            int((b["length_B"] + self.config.model.image_patches * b["has_image_B"]).sum()) for b in self.batches
        )

    def close(self) -> None:
        self.engine.close()

    def _groups(self) -> dict[dist.ProcessGroup, str]:
        parallel = self.engine.parallel
        named = {
            parallel.group: "expert parallel",
            parallel.data_group: "expert data parallel",
            dist.group.WORLD: "world",
        }
        return {group: name for group, name in named.items() if group is not None}


def peak_rss() -> int:
    """The most host memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rehearse(recipe: Recipe, rank: int, world: int, swap: Path, tell: Tell) -> dict[str, Any]:
    """What `Rehearsal.measure` finds, alone in a process of its own. Raises UserError.

    `swap`: the folder for `nvme_path: auto`.
    """
    config = ds_config.resolve(recipe, world, torch.cuda.device_count(), swap)
    absent.join(rank, world)
    get_accelerator().set_device(0)
    try:
        with counted(absent.AbsentPeers) as traffic:
            return Rehearsal(recipe, config, rank, tell).measure(traffic)
    finally:
        for folder in config.swap_folders:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Read a recipe; tell in lines of JSON, in words what is being done and in the end what was found."""
    parser = argparse.ArgumentParser(prog="training.rehearse", description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--swap", type=Path, required=True, help="the folder for nvme_path: auto")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of torch, at DeepSpeed's calls, once a call
    recipe = Recipe.model_validate_json(sys.stdin.read())
    prepare_extensions()
    with _own_output() as output:
        try:
            tell = partial(print, file=output, flush=True)
            own = arguments.rank, arguments.world, arguments.swap
            tell(json.dumps(rehearse(recipe, *own, lambda text: tell(json.dumps(text)))))
        except UserError as error:
            print(f"m6: {error}", file=sys.stderr, flush=True)
            sys.exit(MISTAKE)


def _own_output() -> TextIO:
    """Standard output for us alone: what DeepSpeed prints there goes nowhere, or to those who ask."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno() if os.environ.get("M6_DEBUG") else os.open(os.devnull, os.O_WRONLY), 1)
    return output


if __name__ == "__main__":
    main()
