"""How much of the machine a training step uses, and what a parameter costs in host memory.

    python -m benchmarks.utilisation [--preset m6-tiny] [--ranks 2] [--steps 12] [key=value …]

Trains through `m6 train`, as a person would, and reads the run's own metrics: active-parameter FLOPs over the
matrix-product peak that was measured in the same run, on all ranks at once, and the growth of the ranks' resident
memory from before the model was built, over the parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "launch" / "recipes" / "quickstart.yaml"
WARM_UP = 3  # steps in which memory is first touched and kernels are compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="m6-tiny")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(report(train(arguments, Path(folder))))


def train(arguments: argparse.Namespace, folder: Path) -> Path:
    """Run the steps in `folder`; the run's folder."""
    command = [
        *(
            sys.executable,
            "-P",
            "-c",
            "from launch.cli import main; main()",
            "train",
            "--recipe",
            str(RECIPE),
        ),
        *("--name", "bench", "--ranks", str(arguments.ranks), "--data", str(arguments.data.resolve())),
        *(f"model.preset={arguments.preset}", f"steps={arguments.steps}", "tracking.log_every=1"),
        *("tracking.wandb=disabled", "evaluation.every=1000000", "evaluation.rows=1", "evaluation.samples=0"),
        *("save_every=1000000", *arguments.overrides),
    ]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    return folder / "runs" / "bench"


def report(run: Path) -> str:
    facts = json.loads((run / "run.json").read_text())["facts"]
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss" in line and line["step"] > WARM_UP]

    def middle(key: str) -> float:
        return statistics.median(step[key] for step in steps)

    grown = max(step["memory/host_bytes"] for step in steps) - facts["host_bytes/before_model"]
    rows = {
        "precision": facts["precision"],
        "ranks, expert parallel": f"{facts['ranks']}, {facts['expert_parallel']}",
        "parameters, optimizer on": f"{facts['parameters_on']}, {facts['optimizer_on']}",
        "matmul peak, all ranks": f"{facts['matmul_peak_flops/rank'] * facts['ranks'] / 1e9:.1f} GFLOP/s",
        "step": f"{middle('step_seconds'):.2f} s",
        "tokens a second": f"{middle('tokens_per_second'):.0f}",
        "of the peak, active FLOPs": f"{middle('flops_utilization'):.1%}",
        "drop rate": f"{middle('moe/drop_rate'):.1%}",
        "host bytes a parameter": f"{grown / facts['parameters/total']:.1f}",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


if __name__ == "__main__":
    main()
