"""Whether the planner foretells small jobs on this very machine: planned from what `m6 doctor` measured, then run.

python -m benchmarks.plan_here [--data data] [--only NAME …] [key=value …]. A quarter of an hour, on a machine that
does nothing else: each job is run just after the machine was measured, since what a machine gives varies. None of these
jobs has chosen any constant: those are fitted to the doctor's own small jobs (`launch/small_jobs.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.utilisation import RECIPE, ROOT, WARM_UP
from launch.plan import Request
from launch.planner.plan import make_plan

STEPS, SAVED = 10, 8  # a save takes both cores beside the next steps, which therefore are not timed
M6 = [sys.executable, "-P", "-c", "from launch.cli import main; main()"]
COMMON = ["tracking.log_every=1", "tracking.wandb=disabled", "evaluation.every=1000000", "evaluation.rows=1"]
COMMON += ["evaluation.samples=0", f"steps={STEPS}", f"save_every={SAVED}"]


class Small(NamedTuple):
    ranks: int
    overrides: tuple[str, ...]


def rows(ranks: int, micro: int, accumulation: int = 1) -> tuple[str, ...]:
    return f"global_batch={ranks * micro * accumulation}", f"ds.train_micro_batch_size_per_gpu={micro}"


JOBS = {
    "m6-tiny, CPU offload, 2 ranks of 16 rows": Small(2, rows(2, 16)),
    "m6-tiny, 2 ranks of 8 rows": Small(2, (f"ds_config={ROOT}/ds_configs/cpu.json", *rows(2, 8))),
    "m6-tiny, 1 rank of 32 rows": Small(1, rows(1, 32)),
    "dense, 8 layers of 512, 2 ranks of 8 rows": Small(
        2, ("model.experts=0", "model.layers=8", "model.hidden=512", "model.ffn=2048", *rows(2, 8))
    ),
    "m6-tiny, 2 ranks of 2 x 24 rows": Small(2, rows(2, 24, 2)),
    "m6-tiny, 64 experts, kx, 2 ranks of 16 rows": Small(
        2, ("model.experts=64", "ds.m6.capacity=kx", *rows(2, 16))
    ),
    "8 layers of 512, 16 experts, 2 ranks of 8 rows": Small(
        2, ("model.layers=8", "model.hidden=512", "model.ffn=2048", "model.heads=8", *rows(2, 8))
    ),
    "6 layers of 384, ep 1, 2 ranks of 12 rows": Small(
        2, ("model.layers=6", "model.hidden=384", "model.ffn=1536", "model.heads=6",
            "ds.expert_parallel.autoep_size=1", *rows(2, 12)),
    ),
    "m6-tiny, NVMe, 2 ranks of 16 rows": Small(2, (f"ds_config={ROOT}/ds_configs/nvme.json", *rows(2, 16))),
    "m6-tiny, recomputed, 1 rank of 48 rows": Small(1, ("ds.m6.recompute=true", *rows(1, 48))),
}  # fmt: skip


def add(job: Small, overrides: Sequence[str]) -> Small:
    return job._replace(overrides=(*job.overrides, *overrides))


def measured(job: Small, data: Path) -> dict[str, float]:
    """Of a run by `m6 train` that saves once on its way: seconds of a step, bytes of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--recipe", str(RECIPE), "--name", "small", "--ranks", str(job.ranks), "--data", str(data)]
        with open(Path(folder, "log"), "w") as log:
            subprocess.run([*M6, *words, *COMMON, *job.overrides], cwd=folder, check=True, stdout=log)
        run = Path(folder, "runs", "small")
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if "loss" in line and line["step"] > WARM_UP]
    return {
        "seconds": statistics.median(line["step_seconds"] for line in steps if line["step"] <= SAVED),
        "bytes": max(line["memory/host_bytes"] for line in steps),
    }


def planned(job: Small, cluster: str, data: Path) -> tuple[float, float]:
    """Seconds and bytes, foretold."""
    overrides = [*COMMON, *job.overrides, f"data={data}"]
    request = Request(str(RECIPE), cluster, None, None, overrides, delinked=False, filled=None)
    plan = make_plan(request.work())
    host = plan.terms["memory.host_bytes_per_node"].value
    return plan.terms["step.seconds"].value, job.ranks * plan.terms["memory.device_bytes"].value + host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="*", default=list(JOBS))
    parser.add_argument("--keep", type=Path, help="folder for what was measured; taken from there if it is there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all jobs' recipes")
    arguments = parser.parse_args()
    jobs = {name: add(JOBS[name], arguments.overrides) for name in arguments.only}
    data = arguments.data.absolute()
    folder = arguments.keep or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    print("| job | step, s | planned | off | memory, GB | planned | off |\n|---|---|---|---|---|---|---|", flush=True)
    for name, job in jobs.items():
        cluster = str(folder / f"{name}.yaml")
        was = kept(job, cluster, folder / f"{name}.json", data)
        print(row(name, was, planned(job, cluster, data)), flush=True)


def kept(job: Small, cluster: str, result: Path, data: Path) -> dict[str, float]:
    """What was measured of a job, and the machine just before it, if that is not there already."""
    if not Path(cluster).exists():
        words = ["doctor", "--write-cluster", cluster, "--ranks", str(job.ranks)]
        subprocess.run([*M6, *words], check=True, stdout=subprocess.DEVNULL)
    if not result.exists():
        result.write_text(json.dumps(measured(job, data)))
    return json.loads(result.read_text())


def row(name: str, was: dict[str, float], told: tuple[float, float]) -> str:
    seconds, size = told
    cells = [f"{was['seconds']:.3f} | {seconds:.3f} | {seconds / was['seconds'] - 1:+.0%}"]
    cells += [f"{was['bytes'] / 1e9:.2f} | {size / 1e9:.2f} | {size / was['bytes'] - 1:+.0%}"]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
