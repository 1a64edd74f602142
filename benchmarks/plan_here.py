"""Whether the planner foretells small jobs on this very machine: planned from what `m6 doctor` measured, then run.

python -m benchmarks.plan_here [--data data] [--only NAME …] [--fit]. A quarter of an hour, on a machine that does
nothing else: each job is run just after the machine was measured, since what a machine gives varies. The
jobs marked "fitted" chose the CPU's constants in `launch/planner/hardware.py`; the others were foretold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.utilisation import RECIPE, ROOT, WARM_UP
from launch.planner.cluster import load_cluster
from launch.planner.hardware import FAMILIES, Family
from launch.planner.plan import make_plan
from launch.planner.workload import load_work
from training.recipe import load_recipe

STEPS = 10
M6 = [sys.executable, "-P", "-c", "from launch.cli import main; main()"]
COMMON = ["tracking.log_every=1", "tracking.wandb=disabled", "evaluation.every=1000000", "evaluation.rows=1"]
COMMON += ["evaluation.samples=0", f"steps={STEPS}", f"save_every={WARM_UP}"]


class Small(NamedTuple):
    ranks: int
    overrides: tuple[str, ...]
    fitted: bool = False


def rows(ranks: int, micro: int, accumulation: int = 1) -> tuple[str, ...]:
    return f"global_batch={ranks * micro * accumulation}", f"ds.train_micro_batch_size_per_gpu={micro}"


JOBS = {
    "m6-tiny, CPU offload, 2 ranks of 16 rows": Small(2, rows(2, 16), True),
    "m6-tiny, 2 ranks of 8 rows": Small(2, (f"ds_config={ROOT}/ds_configs/cpu.json", *rows(2, 8)), True),
    "m6-tiny, 1 rank of 32 rows": Small(1, rows(1, 32)),
    "dense, 8 layers of 512, 2 ranks of 8 rows": Small(
        2, ("model.experts=0", "model.layers=8", "model.hidden=512", "model.ffn=2048", *rows(2, 8)), True
    ),
    "m6-tiny, 2 ranks of 2 x 24 rows": Small(2, rows(2, 24, 2)),
    "m6-tiny, 64 experts, kx, 2 ranks of 16 rows": Small(
        2, ("model.experts=64", "ds.m6.capacity=kx", *rows(2, 16)), True
    ),
    "8 layers of 512, 16 experts, 2 ranks of 8 rows": Small(
        2, ("model.layers=8", "model.hidden=512", "model.ffn=2048", "model.heads=8", *rows(2, 8))
    ),
    "6 layers of 384, ep 1, 2 ranks of 12 rows": Small(
        2, ("model.layers=6", "model.hidden=384", "model.ffn=1536", "model.heads=6",
            "ds.expert_parallel.autoep_size=1", *rows(2, 12)),
    ),
    "m6-tiny, NVMe, 2 ranks of 16 rows": Small(2, (f"ds_config={ROOT}/ds_configs/nvme.json", *rows(2, 16))),
    "m6-tiny, recomputed, 1 rank of 48 rows": Small(1, ("ds.m6.recompute=true", *rows(1, 48)), True),
}  # fmt: skip


def measured(job: Small, data: Path) -> dict[str, float]:
    """Of a run by `m6 train` that saves once on its way: seconds of a step, bytes of all ranks, how full rows are."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--recipe", str(RECIPE), "--name", "small", "--ranks", str(job.ranks), "--data", str(data)]
        with open(Path(folder, "log"), "w") as log:
            subprocess.run([*M6, *words, *COMMON, *job.overrides], cwd=folder, check=True, stdout=log)
        run = Path(folder, "runs", "small")
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if "loss" in line and line["step"] > WARM_UP + 1]
        facts = json.loads((run / "run.json").read_text())["facts"]
        config = load_recipe(run / "recipe.yaml", [])
    positions = config.global_batch * (config.model_shape().image_patches + config.text_positions)
    return {
        "seconds": statistics.median(line["step_seconds"] for line in steps),
        "bytes": max(line["memory/host_bytes"] for line in steps),
        "before": facts["host_bytes/before_model"],
        "filled": (steps[-1]["tokens"] - steps[0]["tokens"]) / (len(steps) - 1) / positions,
    }


def planned(job: Small, cluster: str, filled: float) -> tuple[float, float]:
    """Seconds and bytes, foretold."""
    overrides = [*COMMON, *job.overrides]
    plan = make_plan(load_work(str(RECIPE), load_cluster(cluster), None, None, overrides, False, filled))
    host = plan.terms["memory.host_bytes_per_node"].value
    return plan.terms["step.seconds"].value, job.ranks * plan.terms["memory.device_bytes"].value + host


def fitted(jobs: dict[str, Small], clusters: dict[str, str], was: dict[str, dict[str, float]]) -> Family:
    """The CPU's constants by which the largest error of the jobs' step times is the least: a search on a grid."""

    def worst(family: Family) -> float:
        FAMILIES["CPU"] = family
        told = {name: planned(job, clusters[name], was[name]["filled"])[0] for name, job in jobs.items()}
        return max(abs(math.log(seconds / was[name]["seconds"])) for name, seconds in told.items())

    own = FAMILIES["CPU"]
    grid = itertools.product(*([round(low * 1.15**step, 3) for step in range(12)] for low in (0.2, 0.08, 0.05)))
    tried = (replace(own, matmul=matmul, memory=memory, update=update) for matmul, memory, update in grid)
    best = min(tried, key=worst)
    FAMILIES["CPU"] = own
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="*", default=list(JOBS))
    parser.add_argument("--keep", type=Path, help="folder for what was measured; taken from there if it is there")
    parser.add_argument("--fit", action="store_true", help="print the constants that fit the marked jobs best")
    arguments = parser.parse_args()
    if arguments.fit and not any(JOBS[name].fitted for name in arguments.only):
        parser.error("--fit: none of these jobs is marked")
    folder = arguments.keep or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    clusters, was = {}, {}
    for name in arguments.only:
        print(name, file=sys.stderr, flush=True)
        clusters[name] = str(folder / f"{name}.yaml")
        was[name] = kept(JOBS[name], clusters[name], folder / f"{name}.json", arguments.data.absolute())
    print(table({name: JOBS[name] for name in arguments.only}, clusters, was))
    if arguments.fit:
        print(fitted({name: JOBS[name] for name in arguments.only if JOBS[name].fitted}, clusters, was))


def kept(job: Small, cluster: str, result: Path, data: Path) -> dict[str, float]:
    """What was measured of a job, and the machine just before it, if that is not there already."""
    if not Path(cluster).exists():
        words = ["doctor", "--write-cluster", cluster, "--ranks", str(job.ranks)]
        subprocess.run([*M6, *words], check=True, stdout=subprocess.DEVNULL)
    if not result.exists():
        result.write_text(json.dumps(measured(job, data)))
    return json.loads(result.read_text())


def table(jobs: dict[str, Small], clusters: dict[str, str], was: dict[str, dict[str, float]]) -> str:
    rows = ["| job | step, s | planned | off | memory, GB | planned | off |\n|---|---|---|---|---|---|---|"]
    for name, job in jobs.items():
        told, real = planned(job, clusters[name], was[name]["filled"]), was[name]
        cells = [f"{real['seconds']:.3f} | {told[0]:.3f} | {told[0] / real['seconds'] - 1:+.0%}"]
        cells += [f"{real['bytes'] / 1e9:.2f} | {told[1] / 1e9:.2f} | {told[1] / real['bytes'] - 1:+.0%}"]
        rows.append(f"| {name}{' (fitted)' if job.fitted else ''} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
