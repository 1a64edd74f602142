"""`m6 doctor --hostfile H`: whether a cluster's machines are alike, as fast as one another, and as the plan needs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from launch.environment import environment_files, passed_on
from launch.everywhere import OnAll
from launch.nodes import SSH_PORT, Nodes, Place
from launch.planner.cluster import Cluster, load_cluster
from launch.planner.hardware import HOST_SHARE
from launch.processes import forwarding
from launch.run import check_gpus, count_gpus, gpu_numbers, launcher_command, rank_environment
from training.errors import UserError
from training.run import FOLDER

SLOW = 0.7  # of the middle machine's rate
LESS = 0.9  # of the middle machine's size
CLOCK_SECONDS = 1.0
MOST_SECONDS = 1200.0  # that measuring may take
NEED_SHARED, NEED_LOCKABLE = 10**9, 2**36  # bytes, of a machine with GPUs: NCCL's, page-locked buffers' for offload
RATES = {
    "disk_write": "disk write", "disk_read": "disk read", "memory_rate": "memory", "products": "matrix products",
    "link": "link", "all_to_all": "all-to-all",
}  # fmt: skip
Machine = Mapping[str, Any]  # what launch/preflight.py tells of one


def examine_cluster(place: Place, plan: str | None, as_json: bool) -> int:
    """Examine all machines of the hostfile and print the findings; 1 if a machine is to be seen to, else 0.

    `plan`: the cluster file that a plan was made with. Raises UserError.
    """
    wanted = load_cluster(plan) if plan else None
    nodes = place.nodes(1)
    assert place.hostfile
    if place.node_rank is None:
        chosen = [*(["--cluster", plan] if plan else []), *(["--json"] if as_json else [])]
        own = ["doctor", "--master-port", str(nodes.port), *chosen]
        return OnAll(place.hostfile, nodes.names, own, fine=[1]).run(passed_on(os.environ), marked=False)
    os.environ.update(environment_files(os.environ))
    found = measure(nodes)
    if found is None:
        return 0  # the first machine tells
    told = [*alike(found), *even(found), *(enough(found, wanted) if wanted else [])]
    if as_json:
        print(json.dumps({"ok": not told, "findings": told, "machines": found}, indent=1))
    else:
        _print(found, told)
    return 1 if told else 0


def measure(nodes: Nodes, small_jobs: bool = False) -> dict[str, Machine] | None:
    """What the program on all ranks finds, by machine; None where another machine has that. Raises UserError."""
    gpus = count_gpus()
    check_gpus(nodes, gpus)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=FOLDER) as folder:
        target = Path(folder, "found.json")
        program = ["launch.preflight", "--to", str(target), "--folder", folder]
        program += ["--small-jobs"] if small_jobs else []
        environment = rank_environment(os.environ, len(nodes.ranks), on_gpu=gpus > 0)
        command = launcher_command(program, nodes, gpu_numbers(gpus))
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        with process, forwarding(process, to_root=True) as received:
            try:
                process.wait(MOST_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                print(f"m6: not done after {MOST_SECONDS:.0f} s: ended", file=sys.stderr)
        if received:
            sys.exit(128 + received[0])
        if process.returncode:
            silent = ", ".join(nodes.silent())
            why = f"{silent} not reached at port {SSH_PORT}" if silent else "see what was said above"
            raise UserError(f"{nodes.names[nodes.here]}: the machines could not be measured: {why}")
        if nodes.here:
            return None
        machines = json.loads(target.read_text(encoding="utf-8"))
    for machine in machines:
        machine["link"] = max(machine["links"].values(), default=None)  # what slows it may be the other's
        machine["products"] = next(iter(machine["matmul_flops"].values()))  # of the narrowest precision
    return dict(zip(nodes.names, machines, strict=True))


def alike(found: Mapping[str, Machine]) -> Iterator[str]:
    """Machines with other versions, sizes or clocks than most."""
    for part in sorted({part for machine in found.values() for part in machine["versions"]}):
        yield from _differs(part, {name: str(machine["versions"].get(part)) for name, machine in found.items()})
    yield from _differs("GPUs", {name: ", ".join(machine["devices"]) or "none" for name, machine in found.items()})
    for name, machine in found.items():
        for key, what in (("memory_bytes", "memory"), ("cores", "cores")):
            middle = statistics.median(other[key] for other in found.values())
            if machine[key] < LESS * middle:
                size = decimal if key == "memory_bytes" else str
                yield f"{name}: {what} {size(machine[key])}, the middle one has {size(round(middle))}"
        if abs(machine["clock"]) > CLOCK_SECONDS:
            yield f"{name}: its clock is {machine['clock']:+.1f} s off the others': set it by NTP"
        if machine["devices"] and machine["shared_bytes"] < NEED_SHARED:
            yield f"{name}: {decimal(machine['shared_bytes'])} of shared memory: in a container, --shm-size=1g"
        if machine["devices"] and (machine["lockable_bytes"] or NEED_LOCKABLE) < NEED_LOCKABLE:
            locked = decimal(machine["lockable_bytes"])
            yield f"{name}: may lock {locked} of memory, offload needs more: ulimit -l unlimited"


def _differs(what: str, values: Mapping[str, str]) -> Iterator[str]:
    [(most, count)] = Counter(values.values()).most_common(1)
    others = [name for name, value in values.items() if value != most]
    rest = f"{', '.join(name for name in values if name not in others)} has" if count == 1 else "most have"
    yield from (f"{name}: {what} {values[name]}, {rest} {most}" for name in others)


def even(found: Mapping[str, Machine]) -> Iterator[str]:
    """Machines that are slower than the others."""
    for key, what in RATES.items():
        rates = {name: machine[key] for name, machine in found.items() if machine[key]}
        if rates:
            middle = statistics.median_high(rates.values())
            for name, rate in rates.items():
                if rate < SLOW * middle:
                    share = f"{rate / middle:.0%} of the middle one's {_rate(key, middle)}"
                    yield f"{name}: {what} {_rate(key, rate)}, {share}"


def enough(found: Mapping[str, Machine], wanted: Cluster) -> Iterator[str]:
    """Machines that have less than the plan was made with."""
    plan, ranks = wanted.hardware, wanted.devices_per_node
    needs = {
        "disk_write": HOST_SHARE * plan.disk_write, "disk_read": HOST_SHARE * plan.disk_read,
        "memory_bytes": LESS * plan.host_bytes, "products": plan.family.matmul * plan.peak("bf16"),
    }  # fmt: skip
    if len(found) > 1:
        needs["link"] = plan.family.network * plan.network / ranks
    for name, machine in found.items():
        count = len(machine["devices"])
        if count and count != ranks:
            yield f"{name}: {count} GPUs, the plan has {ranks}"
        for key, need in needs.items():
            if machine[key] < need:
                has, needs_it = (_size(key, value) for value in (machine[key], need))
                yield f"{name}: {RATES.get(key, 'memory')} {has}, the plan needs {needs_it}"


def _size(key: str, value: float) -> str:
    return decimal(round(value)) if key == "memory_bytes" else _rate(key, value)


def _rate(key: str, value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if key == "products" else f"{decimal(round(value))}/s"


def _print(found: Mapping[str, Machine], told: list[str]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("machine", "cores", "GPUs", "memory", "disk free", "clock", *RATES.values()):
        table.add_column(heading, justify="left" if heading == "machine" else "right")
    for name, machine in found.items():
        rates = [_rate(key, machine[key]) if machine[key] else "–" for key in RATES]
        table.add_row(
            name, str(machine["cores"]), str(len(machine["devices"]) or "–"), decimal(machine["memory_bytes"]),
            decimal(machine["disk_bytes"]), f"{machine['clock']:+.3f} s", *rates,
        )  # fmt: skip
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    versions = next(iter(found.values()))["versions"]
    console.print(f"versions: {', '.join(f'{part} {version}' for part, version in versions.items())}", highlight=False)
    for line in told:
        console.print(f"✗ {line}", highlight=False, soft_wrap=True)
    console.print("" if told else "The machines are alike, and none is slow.", highlight=False)
