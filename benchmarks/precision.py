"""What each precision takes: seconds a step, joules a token, and the loss that the same steps reach.

    python -m benchmarks.precision [--rounds 3] [--steps 24] [--ranks 2] [--cluster C] [--data data] [key=value …]

Trains the quick start's model by `m6 train` in each precision, turn by turn, so that a machine that slows down slows
all of them. Joules are those of the run's own meter: of counters where they can be read; else, with `--cluster`,
modelled by that file's watts, which then says no more than the seconds do; else unavailable.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.utilisation import RECIPE, ROOT, WARM_UP
from training.records import read_lines

CHOICES = {
    "fp32": ("ds.bf16.enabled=false",),
    "bf16": ("ds.bf16.enabled=true",),
    "bf16, 8-bit optimizer states": (
        "ds.bf16.enabled=true", "ds.m6.optimizer_states=8-bit", "ds.zero_optimization.offload_optimizer.device=cpu",
    ),
}  # fmt: skip
QUIET = ("tracking.wandb=disabled", "tracking.log_every=1", "evaluation.every=1000000", "evaluation.samples=0")
QUIET += ("evaluation.rows=8", "save_every=1000000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cluster", help="a cluster file, or its name: energy is modelled by it where none is counted")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in CHOICES}
    for number in range(arguments.rounds):
        for name, settings in CHOICES.items():
            print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            runs[name].append(trained(arguments, settings))
    print(report(runs))


def trained(arguments: argparse.Namespace, settings: tuple[str, ...]) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-P", "-c", "from launch.cli import main; main()", "train"]
        options = ["--recipe", str(RECIPE), "--name", "run", "--ranks", str(arguments.ranks)]
        options += ["--data", str(arguments.data.resolve())]
        if arguments.cluster:
            file = Path(arguments.cluster)
            options += ["--cluster", str(file.resolve()) if file.is_file() else arguments.cluster]
        words = [f"steps={arguments.steps}", *QUIET, *settings, *arguments.overrides]
        subprocess.run([*program, *options, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return read_lines(Path(folder, "runs", "run", "metrics.jsonl"))


def report(runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """A row a precision: medians over rounds; seconds beside those of the first, round by round."""
    seconds = {name: [step_seconds(lines) for lines in rounds] for name, rounds in runs.items()}
    first = next(iter(seconds.values()))
    rows = ["| precision | seconds a step | of fp32's | J a token | energy is | validation loss at the end |"]
    rows.append("|---|---|---|---|---|---|")
    for name, rounds in runs.items():
        ratio = statistics.median(own / other for own, other in zip(seconds[name], first, strict=True))
        joules = [joules_per_token(lines) for lines in rounds]
        each = f"{statistics.median(known):.4g}" if (known := [value for value in joules if value is not None]) else "–"
        loss = statistics.median(validation_loss(lines) for lines in rounds)
        source = [line for line in rounds[-1] if "loss" in line][-1]["energy/source"]
        cells = [name, f"{statistics.median(seconds[name]):.3f}", f"{ratio:.2f}", each, source]
        rows.append(f"| {' | '.join(cells)} | {loss:.4f} |")
    return "\n".join(rows)


def step_seconds(lines: list[dict[str, Any]]) -> float:
    return statistics.median(line["step_seconds"] for line in lines if "loss" in line and line["step"] > WARM_UP)


def joules_per_token(lines: list[dict[str, Any]]) -> float | None:
    """Of the steps after the first ones; None where it is not known."""
    steps = [line for line in lines if "loss" in line and line["step"] >= WARM_UP]
    first, last = steps[0], steps[-1]
    if first["energy/joules"] is None or last["energy/joules"] is None:
        return None
    return (last["energy/joules"] - first["energy/joules"]) / (last["tokens"] - first["tokens"])


def validation_loss(lines: list[dict[str, Any]]) -> float:
    """Mean over the tasks, of the last evaluation."""
    last = [line for line in lines if any(key.startswith("loss/validation/") for key in line)][-1]
    return statistics.fmean(value for key, value in last.items() if key.startswith("loss/validation/"))


if __name__ == "__main__":
    main()
