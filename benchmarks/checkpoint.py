"""What a save costs: how long training stands still, and how fast state gets to the disk.

    python -m benchmarks.checkpoint [--preset m6-tiny] [--rounds 5]

Two ranks, interleaved in one run. For state in memory: the stall of a save, over the time to copy the same state in
memory. For state on NVMe: the bytes a second of a save until all is on the disk, over those of a plain copy of the swap
files that is flushed too, both with nothing cached. A save is then read back from the disk, which is told apart. On all
ranks at once; medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.run import KEEP_FREED_MEMORY
from tests.data_sample import build_sample
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.extensions import prepare_extensions

TIERS = {"device": "cpu.json", "CPU": "cpu-offload.json", "NVMe": "nvme.json"}
DS = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": False}}
BUFFER = 2**30  # bytes a rank, the recipe's default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="m6-tiny")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    prepare_extensions()
    os.environ["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY  # as ranks of `m6 train` have it
    print("| state on | MB a rank | memory copy | stall | stall / copy | file copy | save | copy / save | read back |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        build_sample(data)
        for name, tier in TIERS.items():
            changes = {"ds_config": f"ds_configs/{tier}", "model": {"preset": arguments.preset, "text_vocab": 540}}
            places = data, Path(folder) / "swap", Path(folder) / name
            rounds = run_ranks(2, measure, *places, changes, arguments.rounds, timeout=3600)
            print(row(name, rounds), flush=True)


def row(name: str, rounds: list[list[dict[str, float]]]) -> str:
    """One line: medians over rounds of what the slower rank took."""

    def median(key: str) -> float:
        return statistics.median(max(pair) for pair in zip(*([r[key] for r in own] for own in rounds), strict=True))

    size = rounds[0][0]["bytes"] / 1e6
    memory, stall, copy, save = median("memory"), median("stall"), median("copy"), median("save")
    disk = [f"{copy:.3f} s", f"{save:.3f} s", f"{copy / save:.2f}", f"{median('verify'):.3f} s"]
    in_memory = (
        [f"{memory:.3f} s", f"{stall:.3f} s", f"{stall / memory:.2f}"] if memory else ["–", f"{stall:.3f} s", "–"]
    )
    return f"| {' | '.join([name, f'{size:.0f}', *in_memory, *disk])} |"


def measure(data: Path, swap: Path, folder: Path, changes: dict[str, Any], rounds: int) -> Any:
    """Seconds of each round on this rank."""
    from training import checkpoint, checkpoint_files, states

    rank = ranks.Rank(data, swap, DS, changes)
    rank.train(0, 1)
    saver = checkpoint.Saver(folder, checkpoint_files.Retention(1), BUFFER)
    found = []
    for number in range(rounds + 1):
        parts = states.parts(rank.engine)
        timed = {"bytes": float(sum(part.bytes for part in parts)), "memory": copy_in_memory(parts)}
        timed["copy"] = copy_files(parts, folder)
        forget(parts)
        saver.save(parts, number, {"adam_step": 1})
        outcome = saver.wait()
        assert outcome is not None and not outcome.error, outcome
        times = {"stall": outcome.stall_seconds, "save": outcome.write_seconds, "verify": outcome.verify_seconds}
        found.append(timed | times)
    return found[1:]  # the first touches new memory


def copy_in_memory(parts: list[Any]) -> float:
    """Seconds to copy all parts into memory of their own; 0 where they do not lie in memory."""
    import torch.distributed as dist
    from torch import Tensor

    dist.barrier()
    started = time.perf_counter()
    if not all(isinstance(part.source, Tensor) for part in parts):
        return 0.0
    copies = [part.source.clone() for part in parts]
    seconds = time.perf_counter() - started
    del copies
    return seconds


def copy_files(parts: list[Any], folder: Path) -> float:
    """Seconds to copy as many bytes from file to file, and flush them: the swap files, or else a file made for it."""
    import torch.distributed as dist
    from torch import Tensor

    files = {part.source.path for part in parts if not isinstance(part.source, Tensor)}
    made = folder.parent / f"source-{dist.get_rank()}"
    if not files:
        if not made.exists():
            made.write_bytes(os.urandom(sum(part.bytes for part in parts)))
        files = {made}
    target = folder.parent / f"copy-{dist.get_rank()}"
    forget(parts)
    dist.barrier()
    started = time.perf_counter()
    with target.open("wb") as copied:
        for file in sorted(files):
            with file.open("rb") as source:
                shutil.copyfileobj(source, copied, 16 * 2**20)
        copied.flush()
        os.fsync(copied.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    dist.barrier()
    return seconds


def forget(parts: list[Any]) -> None:
    """Let memory hold nothing of the swap files, as when training has just written them past it. Collective."""
    import torch.distributed as dist
    from torch import Tensor

    for path in {part.source.path for part in parts if not isinstance(part.source, Tensor)}:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


if __name__ == "__main__":
    main()
