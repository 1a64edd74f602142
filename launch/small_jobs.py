"""Small trainings of whole steps, by which `m6 doctor` finds what a machine without GPUs reaches in training.

Each is dear in one thing that the planner counts: layers that hold next to nothing, many such experts, tokens, wide
products, weights that few tokens meet, experts that ranks share. Rows are made up, and like real ones in what costs
time: no two steps have products of the same sizes, and ranks wait for one another.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from launch.planned import fill_of_rows
from launch.planner.cluster import Cluster, Reached
from launch.planner.fitting import fitted
from launch.planner.hardware import FAMILIES
from launch.planner.plan import make_plan
from launch.planner.workload import Work, resolved
from training.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from training.data.tasks.base import Row

FIRST_TOKEN = 100  # after all that stand for something else than text
ROUNDS, WARM_UP, STEPS = 2, 2, 5  # of all jobs; steps of each
COMMON = {"steps": 1, "text_positions": 96, "tasks": {"caption": 1}}
STATES = "states"
JOBS: dict[str, dict[str, Any]] = {
    "layers": {"model": {"layers": 8, "hidden": 64, "ffn": 128, "heads": 1}, "rows": 2},
    "experts": {"model": {"layers": 2, "hidden": 128, "ffn": 128, "heads": 2, "experts": 64}, "rows": 2},
    "tokens": {"model": {"preset": "m6-tiny", "text_vocab": 16_000}, "rows": 16},
    "products": {"model": {"layers": 1, "hidden": 1024, "ffn": 4096, "heads": 16}, "rows": 8},
    STATES: {"model": {"layers": 2, "hidden": 512, "ffn": 2048, "heads": 8, "experts": 16}, "rows": 2},
    "gathers": {
        "model": {"layers": 3, "hidden": 256, "ffn": 1024, "heads": 4, "experts": 16}, "rows": 2,
        "ds": {"expert_parallel": {"autoep_size": 1}},
    },
}  # fmt: skip
SHARES = ("products", "passes", "weights", "states", "gathers", "layer_seconds", "expert_seconds")
CPU = FAMILIES["CPU"]
EXPECTED = (CPU.matmul, CPU.memory, CPU.weights, CPU.update, CPU.gathers, CPU.layer_seconds, CPU.expert_seconds)
# Standard deviations, of a step's ln(planned / measured) and of the logarithms of what is fitted.
TYPICAL, SPREAD = 0.05, (0.1, 0.8, 0.8, 0.8, 0.5, 1.0, 1.0)


class Step(NamedTuple):
    """Seconds of one."""

    whole: float
    optimizer: float  # of it


def recipe(name: str, world: int) -> Recipe:
    job = JOBS[name]
    model = {"text_vocab": 4096, "image_channels": 1280, **job["model"]}
    ds = {"train_micro_batch_size_per_gpu": job["rows"], **job.get("ds", {})}
    values = COMMON | {"model": model, "global_batch": job["rows"] * world, "ds": ds}
    return parse_recipe(values, [], f"small job {name}")


def measured(rank: int, world: int) -> dict[str, Step]:
    """The middle step of each job, of rounds that are some time apart: a machine has its moods. Collective."""
    rounds = [{name: _steps(recipe(name, world), rank, world) for name in JOBS} for _ in range(ROUNDS)]
    return {name: _middle([step for found in rounds for step in found[name]]) for name in JOBS}


def _middle(steps: Sequence[Step]) -> Step:
    return Step(*(statistics.median(part) for part in zip(*steps, strict=True)))


def _steps(wanted: Recipe, rank: int, world: int) -> list[Step]:
    import torch.distributed as dist

    from training import ds_config
    from training.data.batches import Batcher
    from training.data.tokenizer import Tokenizer
    from training.engine import Engine

    config = ds_config.resolve(wanted, world, 0, Path("swap"))
    engine, collate = Engine(config, wanted.seed), Batcher(Tokenizer, config.model, lambda picture: picture)
    engine.deepspeed.optimizer.step, updates = _timed(engine.deepspeed.optimizer.step)
    steps = []
    for step in range(WARM_UP + STEPS):
        own = rows_of(wanted, step)[rank * config.micro_batch : (rank + 1) * config.micro_batch]
        batches = [collate(own, wanted.text_positions)]
        dist.barrier()
        start = time.perf_counter()
        engine.step(batches, lr=wanted.optimizer.lr)
        steps.append(time.perf_counter() - start)
    engine.close()
    del engine
    gc.collect()
    return [Step(*seconds) for seconds in zip(steps, updates, strict=True)][WARM_UP:]


def rows_of(wanted: Recipe, step: int) -> list[Row]:
    """Of a step of all ranks: texts of any length, half of them targets, every second one with a picture."""
    from training.data.tasks.base import Row

    model, random = wanted.model_shape(), np.random.default_rng((wanted.seed, step))
    picture = random.standard_normal((model.image_patches, model.image_channels), np.float32)
    found = []
    for number in range(wanted.global_batch):
        tokens = random.integers(FIRST_TOKEN, model.text_vocab, random.integers(2, wanted.text_positions)).tolist()
        middle = len(tokens) // 2
        found.append(Row(tokens[:middle], tokens[middle:], picture if number % 2 else None))
    return found


def _timed(work: Callable[..., Any]) -> tuple[Callable[..., Any], list[float]]:
    """The same, and the seconds of each call."""
    seconds: list[float] = []

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = work(*arguments, **options)
        seconds.append(time.perf_counter() - start)
        return result

    return call, seconds


def reached(cluster: Cluster, steps: Mapping[str, Step]) -> Reached:
    """The shares by which the plans of these jobs on this machine, `cluster` but for them, come nearest `steps`."""
    works = {name: _work(name, cluster) for name in steps}
    precision = next(iter(works.values())).usual.layout.precision

    def own(shares: Sequence[float]) -> Reached:
        return Reached(precision=precision, **dict(zip(SHARES, shares, strict=True)))

    def misses(shares: Sequence[float]) -> list[float]:
        on = with_reached(cluster, own(shares))
        plans = {name: _planned(replace(work, cluster=on)) for name, work in works.items()}
        wholes = [math.log(plans[name].whole / step.whole) for name, step in steps.items()]
        return [*wholes, math.log(plans[STATES].optimizer / steps[STATES].optimizer)]

    return own(fitted(misses, EXPECTED, SPREAD, TYPICAL))


def planned(name: str, cluster: Cluster) -> Step:
    """A step of one of these jobs."""
    return _planned(_work(name, cluster))


def _work(name: str, cluster: Cluster) -> Work:
    wanted = recipe(name, cluster.devices)
    rows = [row for step in range(WARM_UP, WARM_UP + STEPS) for row in rows_of(wanted, step)]
    fill = fill_of_rows(rows, wanted, cluster.devices, JOBS[name]["rows"], wanted.text_positions)
    return replace(resolved(wanted, cluster, tokens=1.0), fill=fill)


def _planned(work: Work) -> Step:
    terms = make_plan(work).terms
    return Step(terms["step.seconds"].value, terms["step.optimizer"].value)


def with_reached(cluster: Cluster, shares: Reached) -> Cluster:
    return cluster.model_copy(update={"device": cluster.device.model_copy(update={"reached": shares})})
