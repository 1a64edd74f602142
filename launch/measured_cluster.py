"""`m6 doctor --write-cluster F`: this machine as a cluster file, measured, so that a plan can be made for it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from launch.cluster_doctor import measure
from launch.nodes import Place
from launch.planner.cluster import Cluster
from launch.run import CPU_RANKS, count_gpus
from launch.small_jobs import Step, planned, reached
from training.errors import UserError
from training.files import replace
from training.recipe import parse_settings

WATTS_OF_A_CORE, WATTS_BESIDE = 8.0, 100.0  # assumed: no counter says it everywhere
WORLD_GRAMS = 475  # of CO2e a kWh: CodeCarbon's figure for the world
NOTE = """# This machine, measured on {date} by m6 doctor with {ranks} ranks at once: what was reached, no data sheet.
# Assumed: watts, price, PUE and grid; set them if energy and cost are to mean anything.
"""


def write_cluster(place: Place, target: Path) -> None:
    """Measure this machine's CPU and write `target`. Raises UserError."""
    if target.exists():
        raise UserError(f"--write-cluster {target}: exists; choose another name, or remove it")
    if not target.parent.is_dir():
        raise UserError(f"--write-cluster {target}: {target.parent} is no folder")
    if count_gpus():
        raise UserError(
            "--write-cluster: GPUs are planned by their data sheets: copy a file of launch/clusters and change it"
        )
    nodes = place.nodes(CPU_RANKS)
    with Console(stderr=True).status("measuring, and training six small jobs: about a minute …"):
        found = measure(nodes, small_jobs=True)
    assert found
    [machine] = found.values()
    values = described(machine, len(nodes.ranks))
    cluster = parse_settings(Cluster, values, [], str(target))
    steps = {name: Step(*seconds) for name, seconds in machine["small_jobs"].items()}
    values["device"]["reached"] = rounded(reached(cluster, steps).model_dump())
    show(parse_settings(Cluster, values, [], str(target)), steps)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    replace(target, NOTE.format(date=datetime.datetime.now().date(), ranks=len(nodes.ranks)) + text, durable=False)
    print(f"{target}: use it by m6 plan --cluster {target} --model RECIPE")


def show(cluster: Cluster, steps: Mapping[str, Step]) -> None:
    """The small jobs beside their plans: how well the planner describes this machine at the best."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("small job", "a step, s", "planned", "off", "its optimizer, s", "planned"):
        table.add_column(heading, justify="left" if heading == "small job" else "right")
    for name, real in steps.items():
        plan = planned(name, cluster)
        own = f"{real.whole:.3f}", f"{plan.whole:.3f}", f"{plan.whole / real.whole - 1:+.0%}"
        table.add_row(name, *own, f"{real.optimizer:.3f}", f"{plan.optimizer:.3f}")
    Console().print(table)


def rounded(shares: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in shares.items()}


def described(machine: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The cluster file of a measured machine: a rank is a device, whose memory is a share of the host's.

    Its rate is that of one thread: most of what a step reads and writes besides products is too small for more.
    """
    watts = WATTS_OF_A_CORE * machine["cores"] / ranks
    exchange = machine["all_to_all"] or machine["memory_rate"]
    return {
        "nodes": 1,
        "devices_per_node": ranks,
        "device": {
            "kind": "cpu",
            "name": f"CPU, {machine['cores'] / ranks:g} cores a rank",
            "memory_bytes": float(machine["memory_bytes"] // ranks),
            "memory_bytes_per_second": machine["thread_rate"],
            "peak_flops": machine["matmul_flops"],
            "process_bytes": machine["process_bytes"],
        },
        "links": {
            "inside_node": exchange,
            "between_nodes": exchange,
            "host_to_device": machine["memory_rate"],
        },
        "host": {
            "memory_bytes": float(machine["memory_bytes"]),
            "memory_bytes_per_second": machine["memory_rate"] * ranks,
        },
        "disks": {
            "bytes": float(machine["disk_bytes"]),
            "read_bytes_per_second": machine["disk_read"],
            "write_bytes_per_second": machine["disk_write"],
        },
        "power": {"device_watts": watts, "node_watts": watts * ranks + WATTS_BESIDE},
        "price": {"per_device_hour": 0, "currency": "USD", "date": datetime.datetime.now().year},
        "pue": 1.0,
        "grid_g_co2e_per_kwh": WORLD_GRAMS,
    }
