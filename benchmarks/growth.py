"""How a step's time grows, phase by phase: with experts at constant active size, with layers, tokens and ranks.

    python -m benchmarks.growth [--axes experts layers tokens ranks] [--rounds 2]

Our step on full rows of real text, dropless, states on the CPU, other sizes those of m6-tiny with two layers, in
fp32. Each point is started anew in each round; figures are the least over rounds of the
middle step's, rank 0's. What may grow with experts is what touches every weight: reading weights and writing their
gradients in the experts' products, copies, the optimizer. Its bandwidth is that of the least traffic which these need
(BYTES a parameter) over the time that they grow by, against a plain copy on all ranks at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

from launch.run import KEEP_FREED_MEMORY
from tests.ranks import run_ranks
from training.extensions import prepare_extensions
from training.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent
BASE = {"experts": 16, "layers": 2, "tokens": 4096, "ranks": 2}
POINTS = {
    "experts": (8, 16, 32, 64, 128, 256),
    "layers": (1, 2, 4, 8),
    "tokens": (1024, 2048, 4096, 8192, 16384),
    "ranks": (1, 2, 4),
}
WARM_UP, STEPS = 5, 3  # memory that is touched for the first time costs the first steps seconds
# Of one fp32 parameter in a step: weights read forward and backward, gradient written; gradient copied and read for its
# norm; gradient scaled by clipping, read again, and master and two moments read and written.
BYTES = {"experts": 12, "copies": 12, "optimizer": 36}
MAY_GROW = ("experts", "reduce", "host copies", "gather", "optimizer", "router")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    arguments = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY  # as ranks of `m6 train` have it
    prepare_extensions()
    for axis in arguments.axes:
        found: dict[int, dict[str, float]] = {}
        for _ in range(arguments.rounds):
            for value in POINTS[axis]:
                print(f"{axis} {value}", file=sys.stderr, flush=True)
                sizes = BASE | {axis: value}
                one = run_ranks(sizes["ranks"], measure, sizes, arguments.data, timeout=3600)[0]
                if value not in found or one["step"] < found[value]["step"]:
                    found[value] = one
        print(table(axis, found), flush=True)
        if axis == "experts":
            print(growth(found), flush=True)


def measure(sizes: dict[str, int], data: Path) -> dict[str, float]:
    """Seconds of the middle step and of its phases, parameters, and a plain copy's bytes a second on all ranks."""
    import torch

    from benchmarks.offload import plain_copy
    from benchmarks.steps import OurStep, Text, text_model
    from training.start import init_distributed

    warnings.simplefilter("ignore")  # of torch, at DeepSpeed's calls
    torch.set_num_threads(max(1, usable_cores() // sizes["ranks"]))
    init_distributed()
    config = text_model("m6-tiny", experts=sizes["experts"], layers=sizes["layers"], capacity="none")
    text, step = Text(data, sizes["tokens"]), OurStep(config, "cpu", sizes["tokens"], Path(tempfile.gettempdir()))
    steps = [step(text.take()) for _ in range(WARM_UP + STEPS)][WARM_UP:]
    middle = sorted(steps, key=lambda one: one.seconds)[STEPS // 2]
    parameters = float(config.parameter_counts().total)
    return {"step": middle.seconds, **middle.phases, "parameters": parameters, **plain_copy(torch)}


def table(axis: str, found: dict[int, dict[str, float]]) -> str:
    last = found[max(found)]
    names = sorted(last.keys() - {"step", "parameters", "plain copy"}, key=lambda name: -last[name])
    names = ["step", *(name for name in names if last[name] >= 0.001)]
    lines = [f"\n| {axis} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for value, one in found.items():
        lines.append(f"| {value} | {' | '.join(f'{one.get(name, 0):.3f}' for name in names)} |")
    return "\n".join(lines)


def growth(found: dict[int, dict[str, float]]) -> str:
    """From the fewest experts to the most."""
    first, last = found[min(found)], found[max(found)]
    added = sum(last[name] - first[name] for name in MAY_GROW)
    rest = [sum(s for name, s in one.items() if name not in (*MAY_GROW, "step", "parameters", "plain copy"))
            for one in (first, last)]  # fmt: skip
    moved = (last["parameters"] - first["parameters"]) * sum(BYTES.values())
    return (
        f"\n{moved / 1e9:.1f} GB more to move in {added:.2f} s more: {moved / added / 1e9:.1f} GB/s, "
        f"{moved / added / last['plain copy']:.2f} of a plain copy ({last['plain copy'] / 1e9:.1f} GB/s); "
        f"the rest grows by {rest[1] / rest[0] - 1:.0%}"
    )


if __name__ == "__main__":
    main()
