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
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from launch import small_jobs
from launch.measure import all_to_all_rate, copy_rate, disk_rates, link_rate, partner, threads
from training import loop  # noqa: F401  (all that a training process imports)
from training.machine import memory_bytes, multiplies_bf16, usable_cores
from training.peak import matmul_flops
from training.start import init_distributed, leave

ROOT = Path(__file__).resolve().parent.parent
MEETINGS = 8  # other machines that one's link is measured with, at the most
CLOCK_LOOKS = 5
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    process_bytes: int  # of a rank that has imported all that training needs, and holds nothing yet
    memory_rate: float  # of a rank's device, all ranks at once
    thread_rate: float  # likewise with one thread of a CPU rank
    matmul_flops: dict[str, float]  # likewise, by precision
    clock: float = 0.0  # seconds ahead of the middle one
    links: dict[int, float] | None = None
    all_to_all: float = 0.0  # of its first rank, all ranks at once
    small_jobs: dict[str, tuple[float, float]] | None = None  # seconds of a step and of its optimizer, by job


def versions() -> dict[str, str]:
    """Of what must agree: the project's own code by a digest."""
    code = hashlib.sha256()
    for path in sorted(path for part in ("launch", "model", "training") for path in (ROOT / part).rglob("*.py")):
        code.update(path.read_bytes())
    named = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    nccl = {"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if torch.cuda.is_available() else {}
    return {"python": platform.python_version(), **named, **nccl, "code": code.hexdigest()[:8]}


def facts(folder: Path, process: int, memory_rate: float, thread_rate: float, flops: dict[str, float]) -> Facts:
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    written, read = disk_rates(folder)
    return Facts(
        versions(), usable_cores(), [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        memory_bytes(), None if locked == resource.RLIM_INFINITY else locked, shutil.disk_usage("/dev/shm").free,
        shutil.disk_usage(folder).free, written, read, process, memory_rate, thread_rate, flops,
    )  # fmt: skip


def links(device: torch.device, ranks: list[int], group: dist.ProcessGroup) -> dict[int, float]:
    """Bytes a second with machines that this one met, by their numbers. `ranks`: one of each machine."""
    here, met = ranks.index(dist.get_rank()), {}
    for meeting in range(min(len(ranks) - 1 + len(ranks) % 2, MEETINGS)):
        other = partner(here, len(ranks), meeting)
        if other is not None:
            met[other] = link_rate(device, ranks[other])
        dist.barrier(group)
    return met


def clock(first_ranks: dist.ProcessGroup) -> float:
    """Seconds that this machine's clock is ahead of the middle one, as told within a barrier's uncertainty."""
    best = []
    for _ in range(CLOCK_LOOKS):
        dist.barrier(first_ranks)
        times: list[Any] = [None] * dist.get_world_size(first_ranks)
        dist.all_gather_object(times, time.time(), first_ranks)
        best.append(times[dist.get_rank(first_ranks)] - statistics.median_low(times))
    return min(best, key=abs)


def _multiplies(kind: torch.dtype, device: torch.device) -> bool:
    return kind == torch.float32 or device.type == "cuda" or multiplies_bf16()


def main() -> None:
    """Measure, gather, write."""
    parser = argparse.ArgumentParser(prog="launch.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that runs and swap files are on")
    parser.add_argument("--small-jobs", action="store_true", help="train, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of torch, at DeepSpeed's calls, once a call
    init_distributed()
    accelerator = get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device(accelerator.current_device_name())
    first = os.environ["LOCAL_RANK"] == "0"
    flags: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, first)
    ranks = [rank for rank, is_first in enumerate(flags) if is_first]
    group = dist.new_group(ranks)
    dist.barrier()  # rates of all ranks at once, as they share what the machine has in training
    process = psutil.Process().memory_info().rss
    rate = copy_rate(device)
    dist.barrier()
    with threads(1):
        thread_rate = copy_rate(device)
    dist.barrier()
    flops = {name: matmul_flops(device, kind) for name, kind in PRECISIONS.items() if _multiplies(kind, device)}
    found = asdict(facts(arguments.folder, process, rate, thread_rate, flops)) if first else None
    dist.barrier()
    if found:  # what is between machines, among one rank of each
        found["links"] = links(device, ranks, group)
        found["clock"] = clock(group)
    dist.barrier()
    exchanged = all_to_all_rate(device)
    jobs = small_jobs.measured(dist.get_rank(), dist.get_world_size()) if arguments.small_jobs else None
    if found:
        found |= {"all_to_all": exchanged, "small_jobs": jobs}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        arguments.to.write_text(json.dumps([gathered[rank] for rank in ranks]), encoding="utf-8")
    leave(0)


if __name__ == "__main__":
    main()
