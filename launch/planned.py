"""`m6 train --cluster C`: what the planner foretells of a run, kept in its folder to stand beside what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.planner.cluster import load_cluster
from launch.planner.plan import Plan, make_plan
from launch.planner.workload import Fill, resolved
from training.errors import UserError
from training.recipe import Recipe
from training.records import read_json, write_json
from training.run import PLAN

if TYPE_CHECKING:
    from training.data.tasks.base import Row

ROWS = 256  # by which it is judged how full rows are


def write_plan(folder: Path, recipe: Recipe, cluster: str, world: int) -> None:
    """Plan each stage of a run: with shared layers, and delinked. Raises UserError."""
    stages = [recipe, *([recipe.delinked()] if recipe.delink.wanted else [])]
    figures = [foretold(stage, cluster, world) for stage in stages]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, {"cluster": cluster, "world": world, "stages": figures})


def planned_world(folder: Path) -> int | None:
    """For how many ranks a run was planned."""
    return read_json(folder / PLAN, {}).get("world")


def foretold(recipe: Recipe, cluster: str, world: int) -> dict[str, Any]:
    """Watts of all nodes, as a run counts them, and estimates by the keys of metrics.jsonl. Raises UserError."""
    on = load_cluster(cluster)
    if on.devices != world:
        raise UserError(f"--cluster {cluster}: has {on.devices} devices, and this run {world} ranks; plan for as many")
    work = resolved(recipe, on, tokens=1.0)
    fill = fill_of(recipe, world, work.config.micro_batch)
    made = make_plan(replace(work, fill=fill))
    watts = watts_counted(made)
    return {"watts": watts, "filled": fill.held, "metrics": metrics(made, watts)}


def watts_counted(made: Plan) -> float:
    """Of all nodes: of GPUs alone where there are any, whose counters do not see their hosts."""
    machine = made.work.cluster.hardware
    return machine.nodes * made.terms["power.node" if machine.is_cpu else "power.devices"].value


def metrics(made: Plan, watts: float) -> dict[str, dict[str, float]]:
    """Estimates by the keys that a run's own figures have."""
    machine = made.work.cluster.hardware
    seconds, speed = made.estimate("step.seconds"), made.estimate("tokens_per_second")
    device, host = (made.estimate(f"memory.{name}") for name in ("tensors", "host_bytes_per_node"))
    joules = {"value": watts / speed["value"], "low": watts / speed["high"], "high": watts / speed["low"]}
    found = {"step_seconds": seconds, "tokens_per_second": speed, "energy/joules_per_token": joules}
    if machine.is_cpu:  # one memory
        ranks = made.estimate("memory.device_bytes")
        return found | {"memory/host_bytes": {n: machine.devices * ranks[n] + machine.nodes * host[n] for n in host}}
    found["memory/device_bytes"] = device
    return found | {"memory/host_bytes": {name: machine.nodes * value for name, value in host.items()}}


def fill_of(recipe: Recipe, ranks: int, micro_batch: int) -> Fill:
    """How full the first rows of a run are, and how evenly its ranks' shares of them. Raises UserError."""
    from training.data.order import training_order  # with the tasks, whose import takes seconds
    from training.image_folder import open_corpus

    order = training_order(open_corpus(recipe, recipe.model_shape()), recipe)
    shared = ranks * micro_batch
    count = max(ROWS // shared, 1) * shared
    rows = [order.row(position) for position in range(count)]
    widths = [order.width(start, start + shared) for start in range(0, count, shared)]
    return fill_of_rows(rows, recipe, ranks, micro_batch, float(np.mean(widths)))


def fill_of_rows(rows: Sequence[Row], recipe: Recipe, ranks: int, micro_batch: int, width: float) -> Fill:
    """`rows`: of whole micro-batches, in their order; `width`: text positions of their batches."""
    patches = recipe.model_shape().image_patches
    held = np.array(
        [len(row.source) + max(len(row.target), 1) + patches * (row.picture is not None) for row in rows], float
    )  # fmt: skip
    by_rank = held.reshape(-1, ranks, micro_batch).sum(2)
    targets = sum(len(row.target) + len(row.hidden) for row in rows)
    return Fill(
        held=float(held.mean() / (patches + recipe.text_positions)), targets=float(targets / held.sum()),
        width=(patches + width) / (patches + recipe.text_positions),
        uneven=float(by_rank.max(1).mean() / by_rank.mean()),
    )  # fmt: skip
