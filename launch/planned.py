"""`m6 train --cluster C`: what the planner foretells of a run, kept in its folder to stand beside what came."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.planner.cluster import load_cluster
from launch.planner.plan import Plan, make_plan
from launch.planner.workload import resolved
from training.errors import UserError
from training.recipe import Recipe
from training.records import read_json, write_json
from training.run import PLAN

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
    filled = filled_share(recipe)
    made = make_plan(replace(resolved(recipe, on, tokens=1.0), filled=filled))
    watts = watts_counted(made)
    return {"watts": watts, "filled": filled, "metrics": metrics(made, watts)}


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


def filled_share(recipe: Recipe) -> float:
    """Share of a step's positions that hold something, by the first rows of the run. Raises UserError."""
    from training.data.order import training_order  # with the tasks, whose import takes seconds
    from training.image_folder import open_corpus

    model = recipe.model_shape()
    order = training_order(open_corpus(recipe, model), recipe)
    rows = [order.row(position) for position in range(min(ROWS, recipe.global_batch))]
    held = sum(
        len(row.source) + max(len(row.target), 1) + model.image_patches * (row.picture is not None) for row in rows
    )
    return held / (len(rows) * (model.image_patches + recipe.text_positions))
