"""What offload costs: step time by where states live, bytes moved, bandwidth against a plain one, and memory.

    python -m benchmarks.offload [--preset m6-tiny] [--tokens 4096] [--rounds 3]

Two ranks train on full rows of real text with their states on the device, on the CPU and on NVMe, each started anew in
each round; figures are medians over rounds of the middle step. On a CPU machine the device is host memory too.

- NVMe: bytes that the kernel counts for the ranks in a step, seconds that they stand at the disk, and how long the same
  bytes take with plain direct reads and writes of the same files, by the same ranks at once, in the same run. "Of
  direct I/O" is the second over the first. "Hidden" is the part of the plain time that does not show in the step,
  against states on the CPU.
- Host copies: what the phase moves (each gradient copied once, and read for its norm) a second, against a plain copy.
- Memory: how the ranks' resident memory grows with parameters, between the preset and one of four times its experts.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from launch.run import KEEP_FREED_MEMORY
from tests.ranks import run_ranks
from training.extensions import prepare_extensions

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("device", "cpu", "nvme")
WARM_UP, STEPS = 3, 5
REQUEST = 2**23  # bytes of one plain read or write
COPY_BYTES = 2**28
RATES = ("copies", "plain copy")
GROWN = 4  # times the experts, for memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="m6-tiny")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, on both ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=TIERS)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    arguments = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY  # as ranks of `m6 train` have it
    prepare_extensions()
    (ROOT / "runs").mkdir(exist_ok=True)  # which git ignores, should this be killed
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as swap:

        def run(tier: str, grown: int = 1) -> dict[str, float]:
            print(f"{tier}, {grown}x experts", file=sys.stderr, flush=True)
            ranks = run_ranks(2, measure, tier, grown, arguments, Path(swap).resolve(), timeout=3600)
            slower = {key: min if key in RATES else max for key in ranks[0]}
            return {key: slower[key](rank[key] for rank in ranks) for key in ranks[0]}

        found: dict[str, list[dict[str, float]]] = {tier: [] for tier in arguments.tiers}
        for _ in range(arguments.rounds):
            for tier in found:
                found[tier].append(run(tier))
        print(table({tier: medians(rounds) for tier, rounds in found.items()}))
        print(memory({tier: (medians(found[tier]), run(tier, GROWN)) for tier in found}))


def measure(tier: str, grown: int, arguments: argparse.Namespace, swap: Path) -> dict[str, float]:
    """Of the middle step on this rank; bytes and bandwidths of both."""
    import psutil
    import torch
    import torch.distributed as dist

    from benchmarks.steps import OurStep, Text, text_model
    from training.meter import host_bytes
    from training.start import init_distributed

    warnings.simplefilter("ignore")  # of torch, at DeepSpeed's calls
    init_distributed()
    experts = text_model(arguments.preset).experts * grown
    config = text_model(arguments.preset, experts=experts, capacity="1x")
    text, before, process = Text(arguments.data, arguments.tokens), host_bytes(), psutil.Process()
    step = OurStep(config, tier, arguments.tokens, swap)
    taken = []
    for _ in range(WARM_UP + STEPS):
        ids, start = text.take(), process.io_counters()
        done, end = step(ids), process.io_counters()
        taken.append((done, end.read_bytes - start.read_bytes, end.write_bytes - start.write_bytes))
    memory = host_bytes() - before
    middle, read, written = sorted(taken[WARM_UP:], key=lambda one: one[0].seconds)[STEPS // 2]
    disk = sum(seconds for phase, seconds in middle.phases.items() if phase.startswith("disk"))
    own = config.parameter_counts().total / dist.get_world_size()
    found = {
        "seconds": middle.seconds,
        "disk": disk,
        "read": 2.0 * read,
        "written": 2.0 * written,
        "copies": 2 * 12 * own / middle.phases["host copies"],  # read, written, and read again, 4 bytes each
        "memory": float(memory),
        "parameters": float(config.parameter_counts().total),
    }
    dist.barrier()
    return found | plain_copy(torch) | (plain_disk(swap, read, written) if tier == "nvme" else {})


def plain_copy(torch: Any) -> dict[str, float]:
    """Bytes a second read and written by copies on all ranks at once."""
    import torch.distributed as dist

    source = torch.ones(COPY_BYTES // 4)
    target = source.clone()
    best = min(_timed(lambda: target.copy_(source)) for _ in range(3))
    return {"plain copy": dist.get_world_size() * 2 * COPY_BYTES / best}


def plain_disk(swap: Path, read: int, written: int) -> dict[str, float]:
    """Seconds for this rank's bytes of a step, read from its own swap files and written beside them, past the cache."""
    import torch.distributed as dist

    rank = f"rank{dist.get_rank()}"
    files = sorted(path for path in swap.rglob("*.swp") if rank in str(path) or f"_{dist.get_rank()}_" in path.name)
    beside = swap / f"plain-{rank}"
    buffer = mmap.mmap(-1, REQUEST)
    buffer.write(os.urandom(2**16) * (REQUEST // 2**16))
    _write(beside, written, buffer)  # so that it has its place on the disk, as swap files have theirs
    dist.barrier()
    reading = _timed(lambda: _read(files or [beside], read, buffer))
    dist.barrier()
    writing = _timed(lambda: _write(beside, written, buffer))
    dist.barrier()
    beside.unlink()
    return {"plain read": reading, "plain write": writing}


def _read(files: list[Path], size: int, buffer: mmap.mmap) -> None:
    left = size
    while left > 0:
        for path in files:
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            while left > 0 and (got := os.readv(file, [buffer])):
                left -= got
            os.close(file)


def _write(path: Path, size: int, buffer: mmap.mmap) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    for place in range(0, max(size - REQUEST, 0) + 1, REQUEST):
        os.pwritev(file, [buffer], place)
    os.close(file)


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def table(tiers: dict[str, dict[str, float]]) -> str:
    lines = [
        "| states on | step, s | of the first's | host copies, GB/s | plain copy, GB/s |",
        "|---|---|---|---|---|",
    ]
    base = next(iter(tiers.values()))["seconds"]
    for tier, one in tiers.items():
        ratio = one["seconds"] / base
        # Elsewhere the phase moves more than what is counted.
        copies = f"{one['copies'] / 1e9:.1f}" if tier == "cpu" else ""
        copies += f" | {one['plain copy'] / 1e9:.1f}"
        lines.append(f"| {tier} | {one['seconds']:.2f} | {ratio:.2f} | {copies} |")
    if not {"cpu", "nvme"} <= tiers.keys():
        return "\n".join(lines)
    nvme, plain = tiers["nvme"], tiers["nvme"]["plain read"] + tiers["nvme"]["plain write"]
    hidden = 1 - (nvme["seconds"] - tiers["cpu"]["seconds"]) / plain
    lines += [
        f"\nNVMe, a step of both ranks: {nvme['read'] / 1e9:.2f} GB read, {nvme['written'] / 1e9:.2f} GB written, "
        f"{nvme['disk']:.2f} s at the disk; plain direct I/O {plain:.2f} s "
        f"({nvme['read'] / nvme['plain read'] / 1e9:.1f} GB/s read, "
        f"{nvme['written'] / nvme['plain write'] / 1e9:.1f} GB/s written)",
        f"of direct I/O: {plain / nvme['disk']:.2f}; hidden: {hidden:.2f}\n",
    ]
    return "\n".join(lines)


def memory(tiers: dict[str, tuple[dict[str, float], dict[str, float]]]) -> str:
    lines = ["| states on | host bytes a parameter more | parameters a GB |", "|---|---|---|"]
    for tier, (small, large) in tiers.items():
        slope = (large["memory"] - small["memory"]) / (large["parameters"] - small["parameters"])
        lines.append(f"| {tier} | {slope:.1f} | {1e3 / slope:.0f} M |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
