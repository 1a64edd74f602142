"""How far the losses of one recipe differ between places for its states and divisions of its work.

    python -m benchmarks.parity [--bf16]

Twenty steps with clipping active at each, on the tests' sample corpus and with the tests' own harness
(`tests/training/engine_ranks.py`); prints the largest relative difference of a step's loss to CPU offload on two
ranks with ep 2. The tests hold the fp32 figures to a bound; bf16 rounds at each of these differences.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.data_sample import build_sample
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.extensions import prepare_extensions

TIMEOUT = 3600.0  # seconds a layout: a CPU without bf16 units computes in it at a hundredth of its fp32 speed

LAYOUTS = {
    "CPU offload, 2 ranks, ep 2, again": (2, ranks.CPU, 2),
    "NVMe offload, max_in_cpu 0": (2, ranks.NVME, 2),
    "no offload": (2, ranks.NONE, 2),
    "optimizer alone on CPU": (2, {"offload_optimizer": {"device": "cpu"}}, 2),
    "ep 1": (2, ranks.CPU, 1),
    "1 rank": (1, ranks.CPU, 1),
    "4 ranks, ep 2": (4, ranks.CPU, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--capacity", default="1x")
    arguments = parser.parse_args()
    prepare_extensions()
    with tempfile.TemporaryDirectory() as folder:
        data, swap = Path(folder) / "data", Path(folder) / "swap"
        data.mkdir()
        build_sample(data)

        def losses(world: int, tiers: dict, parallel: int) -> list[float]:
            ds = ranks.settings(tiers, parallel, bf16=arguments.bf16, capacity=arguments.capacity)
            return [loss for loss, _ in run_ranks(world, ranks.train, data, swap, ds, timeout=TIMEOUT)[0]]

        base = losses(2, ranks.CPU, 2)
        print(f"loss {base[0]:.3f} -> {base[-1]:.3f}, {'bf16' if arguments.bf16 else 'fp32'}, {arguments.capacity}")
        for name, layout in LAYOUTS.items():
            differences = [abs(a - b) / a for a, b in zip(base, losses(*layout), strict=True)]
            print(f"| {name} | {max(differences):.1e} |", flush=True)


if __name__ == "__main__":
    main()
