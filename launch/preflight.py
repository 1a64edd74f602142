"""What each machine of a hostfile has, and how fast they reach each other: the program on every rank.

DeepSpeed's launcher starts it, as it starts training; rank 0 writes what was found, in JSON, to the given file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from launch.measure import all_to_all_rate, copy_rate, disk_rates, link_rate
from training.machine import memory_bytes, usable_cores
from training.peak import matmul_flops
from training.start import init_distributed

ROOT = Path(__file__).resolve().parent.parent
SHIFTS = 8  # partners that a machine's links are measured with, at the most
CLOCK_LOOKS = 5


@dataclass(frozen=True)
class Facts:
    """Of one machine. Bytes, bytes a second, seconds."""

    versions: dict[str, str]
    cores: int
    devices: list[str]  # names of GPUs
    memory_bytes: int
    lockable_bytes: int | None  # of page-locked memory; None: no limit
    shared_bytes: int  # of /dev/shm, free
    disk_bytes: int  # free
    disk_write: float
    disk_read: float
    memory_rate: float
    matmul_flops: float  # of its first rank, in bf16
    clock: float = 0.0  # seconds ahead of the middle one
    links: dict[str, float] | None = None  # to and from others at once, by shift
    all_to_all: float = 0.0  # of its first rank, all ranks at once


def versions() -> dict[str, str]:
    """Of what must agree: the project's own code by a digest."""
    code = hashlib.sha256()
    for path in sorted(ROOT.glob("*/**/*.py")):
        if path.relative_to(ROOT).parts[0] in ("model", "training", "launch"):
            code.update(path.read_bytes())
    named = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    nccl = {"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if torch.cuda.is_available() else {}
    return {"python": platform.python_version(), **named, **nccl, "code": code.hexdigest()[:8]}


def facts(device: torch.device, folder: Path) -> Facts:
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    written, read = disk_rates(folder)
    return Facts(
        versions(), usable_cores(), [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        memory_bytes(), None if locked == resource.RLIM_INFINITY else locked, shutil.disk_usage("/dev/shm").free,
        shutil.disk_usage(folder).free, written, read, copy_rate(device), matmul_flops(device),
    )  # fmt: skip


def clock(first_ranks: dist.ProcessGroup) -> float:
    """Seconds that this machine's clock is ahead of the middle one, as told within a barrier's uncertainty."""
    best = []
    for _ in range(CLOCK_LOOKS):
        dist.barrier(first_ranks)
        times: list[Any] = [None] * dist.get_world_size(first_ranks)
        dist.all_gather_object(times, time.time(), first_ranks)
        best.append(times[dist.get_rank(first_ranks)] - statistics.median_low(times))
    return min(best, key=abs)


def main() -> None:
    """Measure, gather, write."""
    parser = argparse.ArgumentParser(prog="launch.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that runs and swap files are on")
    arguments = parser.parse_args()
    init_distributed()
    accelerator = get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device(accelerator.current_device_name())
    first = os.environ["LOCAL_RANK"] == "0"
    flags: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, first)
    ranks = [rank for rank, is_first in enumerate(flags) if is_first]
    group = dist.new_group(ranks)
    found = asdict(facts(device, arguments.folder)) if first else None
    dist.barrier()
    if found:  # what is between machines, among one rank of each
        shifts = range(1, min(len(ranks) - 1, SHIFTS) + 1)
        found["links"] = {str(shift): link_rate(device, shift, group) for shift in shifts}
        found["clock"] = clock(group)
    dist.barrier()
    rate = all_to_all_rate(device)
    if found:
        found["all_to_all"] = rate
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        arguments.to.write_text(json.dumps([gathered[rank] for rank in ranks]), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
