"""The whole training step against a Mixtral of the same size: tokens a second, fraction of the peak, and phases.

    python -m benchmarks.train_step [--preset m6-tiny] [--tokens 4096] [--bf16] [--rounds 3] [--contenders M6 AutoEP]

Contenders are equal in layers, sizes, number and form of experts (gated), vocabulary, rows and tokens: real text of the
corpus, packed into full rows, every position a target, new in each step. Ours is measured dropless, as the peers are,
and with the capacity that it has by default. Each is started anew in each round, one after the other, on one rank with
all cores or on two with half of them each; the figures are medians over rounds of the middle step. The fraction of the
peak is of active FLOPs, over that of matrix products on all ranks at once in the same processes.

Then our step by phase, in seconds of the middle step of rank 0, which add up. Needs `pip install -r
benchmarks/requirements.txt`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.run import KEEP_FREED_MEMORY
from tests.ranks import run_ranks
from training.extensions import prepare_extensions
from training.machine import multiplies_bf16, usable_cores

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, STEPS = 3, 6


@dataclass(frozen=True)
class Contender:
    library: str  # M6, or a library of benchmarks.mixtral_step
    kind: str  # M6's capacity, or how the peer computes its experts
    states: str  # where they live: device or cpu
    ranks: int

    def __str__(self) -> str:
        return f"{self.library}, {self.kind} | {self.states} | {self.ranks}"


def contenders() -> Iterator[Contender]:
    for ranks in (1, 2):
        for states in ("device", "cpu"):
            yield from (Contender("M6", capacity, states, ranks) for capacity in ("none", "1x"))
            for library in ("ZeRO-3", "AutoEP") if ranks > 1 or states == "cpu" else ("torch", "ZeRO-3", "AutoEP"):
                yield from (Contender(library, experts, states, ranks) for experts in ("eager", "grouped_mm"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="m6-tiny")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, on all ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--contenders", nargs="+", metavar="WORD", help="only those whose name has one of these words")
    arguments = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY  # as ranks of `m6 train` have it
    prepare_extensions()
    chosen = [c for c in contenders() if any(word in str(c) for word in arguments.contenders or [""])]
    found: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in chosen}
    for round_ in range(arguments.rounds):
        for contender in chosen:
            print(f"round {round_ + 1}: {contender}", file=sys.stderr, flush=True)
            found[contender].append(run_ranks(contender.ranks, measure, contender, arguments, timeout=3600)[0])
    print(table(found))
    for contender, rounds in found.items():
        if contender.library == "M6":
            print(f"\n{contender}: {phases(rounds)}")


def measure(contender: Contender, arguments: argparse.Namespace) -> dict[str, Any]:
    """On each rank: seconds and tokens of the middle step, FLOP/s over the peak, and seconds by phase of ours."""
    import torch
    import torch.distributed as dist

    from benchmarks.steps import Text
    from training.peak import matmul_flops
    from training.start import init_distributed

    warnings.simplefilter("ignore")  # of torch, at DeepSpeed's calls
    torch.set_num_threads(max(1, usable_cores() // contender.ranks))
    init_distributed()
    text = Text(arguments.data, arguments.tokens)
    step = our_step(contender, arguments) if contender.library == "M6" else peer_step(contender, arguments)
    dtype = torch.bfloat16 if arguments.bf16 and multiplies_bf16() else torch.float32
    peaks = [matmul_flops(torch.device("cpu"), dtype)]
    steps = [step(text.take()) for _ in range(WARM_UP + STEPS)][WARM_UP:]
    peaks.append(matmul_flops(torch.device("cpu"), dtype))
    middle = sorted(steps, key=lambda one: one.seconds)[STEPS // 2]
    peak = torch.tensor(max(peaks), dtype=torch.float64)
    dist.all_reduce(peak)
    return {
        "seconds": middle.seconds,
        "tokens": arguments.tokens / middle.seconds,
        "of the peak": middle.flops / middle.seconds / peak.item(),
        "phases": middle.phases,
    }


def our_step(contender: Contender, arguments: argparse.Namespace) -> Callable[[Any], Any]:
    from benchmarks.steps import OurStep, text_model

    config = text_model(arguments.preset, capacity=contender.kind)
    return OurStep(config, contender.states, arguments.tokens, Path(tempfile.gettempdir()), arguments.bf16)


def peer_step(contender: Contender, arguments: argparse.Namespace) -> Callable[[Any], Any]:
    from benchmarks.mixtral_step import Peer, build
    from benchmarks.steps import Measured, text_model

    config = text_model(arguments.preset, capacity="none")
    step = build(Peer(contender.library, contender.kind, contender.states == "cpu"), config, arguments.bf16, lr=1e-4)

    def run(ids: Any) -> Measured:
        start = time.perf_counter()
        step(ids[:, :-1])
        return Measured(time.perf_counter() - start, config.training_flops(arguments.tokens, arguments.tokens), {})

    return run


def table(found: dict[Contender, list[dict[str, Any]]]) -> str:
    lines = ["| | states on | ranks | step, s | tokens/s | of the peak |", "|---|---|---|---|---|---|"]
    for contender, rounds in sorted(found.items(), key=lambda item: -middle(item[1], "tokens")):
        figures = f"{middle(rounds, 'seconds'):.2f} | {middle(rounds, 'tokens'):.0f}"
        lines.append(f"| {contender} | {figures} | {middle(rounds, 'of the peak'):.1%} |")
    return "\n".join(lines)


def middle(rounds: list[dict[str, Any]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


def phases(rounds: list[dict[str, Any]]) -> str:
    """Of the middle round: the phases, largest first, and what they add up to."""
    chosen = sorted(rounds, key=lambda one: one["seconds"])[len(rounds) // 2]
    parts = sorted(chosen["phases"].items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts)
    return f"{listed}; {sum(chosen['phases'].values()):.3f} of {chosen['seconds']:.3f} s"


if __name__ == "__main__":
    main()
