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
import dataclasses
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
from model.config import PRESETS, ModelConfig
from tests.ranks import run_ranks
from training.extensions import prepare_extensions
from training.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent
ROW = 128  # positions of a row
WARM_UP, STEPS = 3, 6
TEXTS = {"language": 1, "poem": 1, "review": 1}


@dataclass(frozen=True)
class Contender:
    library: str  # M6, or a library of benchmarks.mixtral_step
    kind: str  # M6's capacity, or how the peer computes its experts
    offload: bool
    ranks: int

    def __str__(self) -> str:
        return f"{self.library}, {self.kind} | {'cpu' if self.offload else 'device'} | {self.ranks}"


def contenders() -> Iterator[Contender]:
    for ranks in (1, 2):
        for offload in (False, True):
            yield from (Contender("M6", capacity, offload, ranks) for capacity in ("none", "1x"))
            for library in ("ZeRO-3", "AutoEP") if ranks > 1 or offload else ("torch", "ZeRO-3", "AutoEP"):
                yield from (Contender(library, experts, offload, ranks) for experts in ("eager", "grouped_mm"))


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


def model_config(arguments: argparse.Namespace, capacity: str) -> ModelConfig:
    """A preset with gated experts and top-k routing, as Mixtral has, for text alone."""
    shape = PRESETS[arguments.preset].config
    return dataclasses.replace(
        shape, gated_experts=True, routing="top-k", capacity=capacity, image_patches=1, image_channels=1
    )


def measure(contender: Contender, arguments: argparse.Namespace) -> dict[str, Any]:
    """On each rank: seconds and tokens of the middle step, FLOP/s over the peak, and seconds by phase of ours."""
    import torch
    import torch.distributed as dist

    from training.peak import matmul_flops
    from training.start import init_distributed

    warnings.simplefilter("ignore")  # of torch, at DeepSpeed's calls
    torch.set_num_threads(max(1, usable_cores() // contender.ranks))
    init_distributed()
    config = model_config(arguments, contender.kind if contender.library == "M6" else "none")
    rows = Text(arguments, config)
    step = (our_step if contender.library == "M6" else peer_step)(contender, config, arguments)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    peaks = [matmul_flops(torch.device("cpu"), dtype)]
    seconds, flops, by_phase = [], [], []
    for number in range(WARM_UP + STEPS):
        taken, worked, parts = step(rows.take(number), number)
        if number >= WARM_UP:
            seconds.append(taken)
            flops.append(worked)
            by_phase.append(parts)
    peaks.append(matmul_flops(torch.device("cpu"), dtype))
    middle = statistics.median_low(seconds)
    peak = torch.tensor(max(peaks), dtype=torch.float64)
    dist.all_reduce(peak)
    return {
        "seconds": middle,
        "tokens": arguments.tokens / middle,
        "of the peak": flops[seconds.index(middle)] / middle / peak.item(),
        "phases": by_phase[seconds.index(middle)],
    }


class Text:
    """Real text of the corpus as full rows of token ids."""

    def __init__(self, arguments: argparse.Namespace, config: ModelConfig):
        import torch.distributed as dist

        from training.data.corpus import Corpus
        from training.data.order import GlobalOrder
        from training.data.tasks import TASKS

        corpus = Corpus.open(arguments.data)
        self.begin = corpus.tokenizer.bos_id
        self.order = GlobalOrder([TASKS[name](corpus, "train") for name in TEXTS], TEXTS, len(TEXTS), 2 * ROW, seed=1)
        self.rows = arguments.tokens // ROW // dist.get_world_size()
        self.rank = dist.get_rank()
        self.stream, self.position = [], 0

    def take(self, step: int) -> Any:
        """This rank's ids [B, ROW + 1] of a step, from 0 on; the last column is a target only."""
        import torch

        needed = self.rows * (ROW + 1)
        while len(self.stream) < needed:
            row = self.order.row(self.position + self.rank * 2**40)
            self.stream += [self.begin, *row.source, *row.target]
            self.position += 1
        ids, self.stream = self.stream[:needed], self.stream[needed:]
        return torch.tensor(ids).view(self.rows, ROW + 1)


Step = Callable[[Any, int], tuple[float, float, dict[str, float]]]


def peer_step(contender: Contender, config: ModelConfig, arguments: argparse.Namespace) -> Step:
    from benchmarks.mixtral_step import Peer, build

    step = build(Peer(contender.library, contender.kind, contender.offload), config, arguments.bf16, lr=1e-4)

    def run(ids: Any, number: int) -> tuple[float, float, dict[str, float]]:
        start = time.perf_counter()
        step(ids[:, :-1])
        return time.perf_counter() - start, config.training_flops(arguments.tokens, arguments.tokens), {}

    return run


def our_step(contender: Contender, config: ModelConfig, arguments: argparse.Namespace) -> Step:
    """Our step, with its clock of phases: a hundred microseconds a step."""
    from benchmarks.phases import PhaseClock
    from training.ds_config import resolve
    from training.engine import Engine
    from training.recipe import parse_recipe

    rows = arguments.tokens // ROW
    changes = {name: getattr(config, name) for name in ("gated_experts", "routing", "image_patches", "image_channels")}
    recipe = parse_recipe(
        {
            "model": {"preset": arguments.preset, **changes},
            "ds_config": str(ROOT / "ds_configs" / ("cpu-offload.json" if contender.offload else "cpu.json")),
            "ds": {
                "train_micro_batch_size_per_gpu": rows // contender.ranks,
                "bf16": {"enabled": arguments.bf16},
                "m6": {"capacity": contender.kind},
            },
            "global_batch": rows,
            "steps": WARM_UP + STEPS,
            "text_positions": ROW,
            "tasks": TEXTS,
        },
        [],
        "benchmark",
    )
    engine = Engine(resolve(recipe, contender.ranks, 0, Path(tempfile.gettempdir())), seed=1)
    clock = PhaseClock()
    clock.install()

    def run(ids: Any, number: int) -> tuple[float, float, dict[str, float]]:
        clock.restart()
        start = time.perf_counter()
        with clock.phase("data"):
            batch = full_rows(ids, config)
        result = engine.step([batch], lr=1e-4)
        parts = clock.read()
        kept = int(result.routing[:, :, 1].sum())
        flops = config.training_flops(result.tokens, result.targets, kept)
        return time.perf_counter() - start, flops, parts

    return run


def full_rows(ids: Any, config: ModelConfig) -> dict[str, Any]:
    """A batch in which every position is a target and has a target."""
    import torch

    rows = len(ids)
    return {
        "tokens_BT": ids[:, :-1],
        "labels_BT": ids[:, 1:],
        "source_B": torch.zeros(rows, dtype=torch.int64),
        "length_B": torch.full((rows,), ROW),
        "image_BPC": torch.zeros(rows, config.image_patches, config.image_channels),
        "has_image_B": torch.zeros(rows, dtype=torch.bool),
    }


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
