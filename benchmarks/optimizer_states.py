"""What 8-bit optimizer states (`m6.optimizer_states`) save, and whether the model pays for it.

    python -m benchmarks.optimizer_states memory [--rounds 3]
    python -m benchmarks.optimizer_states quality [--seeds 1 2 3] [--steps 120]
    python -m benchmarks.optimizer_states speed [--rounds 20]

The first two train in bf16 on real data, with parameters and optimizer offloaded to the CPU.

- memory: one rank on full rows of text; host bytes that a parameter more takes, between models of few and of many
  layers, by the rank's resident memory and by its tensors; and the time of the optimizer's phase, median over steps of
  all rounds, which alternate between the two kinds of states.
- quality: one rank, pre-training's mixture; the loss on fixed validation rows after training with fp32 states, with
  8-bit states, and with the latter's weights cut to 16 bits after every step, rounded to the nearest or at random.
  The same seed means the same first weights and the same rows.
- speed: one core; the update alone, of 2^26 parameters in pieces of 2^18, against DeepSpeed's CPU Adam with the copy of
  its masters to bf16, in turns.
"""

from __future__ import annotations

import argparse
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
from training.ds_config import COMPACT, OPTIMIZER_STATES
from training.extensions import prepare_extensions

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (2, 10)
TOKENS = 512
WARM_UP, STEPS = 3, 8
RETURN_FREED_MEMORY = f"glibc.malloc.mmap_threshold={2**16}"
# What a GPU would hold is host memory too on a CPU: weights that are kept for their next use, and gradients until a
# bucket is full. By default both are bounded by a number of elements that these models do not reach.
BRIEF = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 2**20}
NEAREST, RANDOM = "16-bit weights, nearest", "16-bit weights, at random"
RECIPE: dict[str, Any] = {
    "model": {
        "preset": "m6-tiny", "layers": 2, "hidden": 128, "ffn": 512, "heads": 4, "experts": 8, "text_vocab": 16_000,
    },
    "global_batch": 32,
    "text_positions": 64,
    "tasks": {"caption": 3, "image_denoise": 1, "denoise": 1, "language": 1, "poem": 1, "review": 1},
    "optimizer": {"lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.01, "clip": 1.0},
    "schedule": {"warmup": 20, "decay": "cosine", "final": 0.1},
    "evaluation": {"rows": 96},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "quality", "speed"))
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--rounds", type=int, default=3, help="of memory and speed")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3), help="of quality")
    parser.add_argument("--steps", type=int, default=120, help="of quality")
    arguments = parser.parse_args()
    # Ranks of `m6 train` keep what is freed for its next use; here what is resident is to be what is in use.
    os.environ["GLIBC_TUNABLES"] = RETURN_FREED_MEMORY if arguments.what == "memory" else KEEP_FREED_MEMORY
    prepare_extensions()
    print({"memory": memory, "quality": quality, "speed": speed}[arguments.what](arguments))


def memory(arguments: argparse.Namespace) -> str:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for layers in LAYERS:
            for states in OPTIMIZER_STATES:
                one = run_ranks(1, measure_memory, states, layers, arguments.data, timeout=3600)[0]
                print(states, layers, one, file=sys.stderr, flush=True)
                found.setdefault((states, layers), []).append(one)
    lines = ["| states | resident, B | tensors, B | optimizer's phase, ns a parameter |", "|---|---|---|---|"]
    for states in OPTIMIZER_STATES:
        small, large = (found[states, layers] for layers in LAYERS)
        times = [seconds for one in large for seconds in one["seconds"]]
        phase = statistics.median(times) / large[0]["parameters"] * 1e9
        lines.append(
            f"| {states} | {_slope(small, large, 'resident')} | {_slope(small, large, 'tensors')} | {phase:.2f} |"
        )
    return "\n".join(lines)


def _slope(small: list[dict[str, Any]], large: list[dict[str, Any]], key: str) -> str:
    more = statistics.median(one[key] for one in large) - statistics.median(one[key] for one in small)
    return f"{more / (large[0]['parameters'] - small[0]['parameters']):.2f}"


def measure_memory(states: str, layers: int, data: Path) -> dict[str, Any]:
    """Bytes that the rank has grown by and that its states' tensors hold, and seconds of the optimizer's phase."""
    from benchmarks.steps import OurStep, Text, text_model
    from training.meter import host_bytes
    from training.start import init_distributed
    from training.states import bytes_by_tier

    warnings.simplefilter("ignore")  # of torch, at DeepSpeed's calls
    init_distributed()
    config = text_model("m6-tiny", layers=layers, experts=16, capacity="1x")
    text, before = Text(data, TOKENS), host_bytes()
    with tempfile.TemporaryDirectory() as swap:
        step = OurStep(config, "cpu", TOKENS, Path(swap), bf16=True, states=states, zero=BRIEF)
    seconds = [step(text.take()).phases["optimizer"] for _ in range(WARM_UP + STEPS)][WARM_UP:]
    return {
        "resident": host_bytes() - before,
        "tensors": sum(bytes_by_tier(step.engine)["cpu"].values()),
        "parameters": config.parameter_counts().total,
        "seconds": seconds,
    }


def quality(arguments: argparse.Namespace) -> str:
    kinds = (*OPTIMIZER_STATES, NEAREST, RANDOM)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for kind in kinds:
        for seed in arguments.seeds:
            losses = run_ranks(1, measure_quality, kind, seed, arguments.steps, arguments.data, timeout=3600)[0]
            print(seed, kind, losses, file=sys.stderr, flush=True)
            found[kind].append(losses)
    lines = [f"| states | {' | '.join(found['fp32'][0])} |", "|---" * (1 + len(found["fp32"][0])) + "|"]
    for kind, runs in found.items():
        cells = [_cell([run[task] for run in runs], [run[task] for run in found["fp32"]]) for task in runs[0]]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(losses: list[float], base: list[float]) -> str:
    """Mean over seeds and its spread; and the mean difference to the base, seed by seed, with that one's spread."""
    told = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    differences = [one - other for one, other in zip(losses, base, strict=True)]
    return (
        told
        if losses == base
        else f"{told} ({statistics.mean(differences):+.4f} ± {statistics.stdev(differences):.4f})"
    )


def measure_quality(kind: str, seed: int, steps: int, data: Path) -> dict[str, float]:
    """Nats a target on the validation rows, by task and their mean, after `steps` steps."""
    from tests.training.engine_ranks import CPU, Rank, settings
    from training.data.corpus import Corpus
    from training.evaluate import Validation
    from training.schedule import learning_rate

    states = kind if kind in OPTIMIZER_STATES else COMPACT
    ds = settings(CPU, 1, bf16=True, optimizer_states=states) | {"train_micro_batch_size_per_gpu": 16}
    with tempfile.TemporaryDirectory() as swap:
        rank = Rank(data, Path(swap), ds, RECIPE | {"seed": seed, "steps": steps})
    for step in range(steps):
        rank.engine.step(rank.batches.step(step), learning_rate(rank.recipe, step))
        if kind in (NEAREST, RANDOM):
            _cut_weights(rank.engine.deepspeed.optimizer.optimizer.state, at_random=kind == RANDOM)
    found = Validation(Corpus.open(data), rank.recipe, rank.collate).losses(rank.engine)
    losses = {key.rsplit("/", 1)[1]: loss for key, loss in found.items()}
    return losses | {"mean": statistics.mean(losses.values())}


def _cut_weights(states: dict[Any, dict[str, Any]], at_random: bool) -> None:
    """Leave the weights nothing below their bf16 working copies, which are the nearest as they are."""
    import torch

    for flat, state in states.items():
        if at_random:
            working = flat.detach().view(torch.int16)
            bits = (working.int() << 8) + state["low"] + torch.randint(256, working.shape, dtype=torch.int32)
            working.copy_(bits >> 8)
        state["low"].zero_()


def speed(arguments: argparse.Namespace) -> str:
    found = run_ranks(1, measure_speed, arguments.rounds, timeout=3600)[0]
    lines = ["| update | median, ns a parameter | least |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {name} | {statistics.median(ns):.2f} | {min(ns):.2f} |" for name, ns in found.items()]
    )


def measure_speed(rounds: int) -> dict[str, list[float]]:
    """Nanoseconds a parameter of each round."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from training.compact_adam import CompactAdamW
    from training.states import Partition

    torch.set_num_threads(1)
    count, size = 2**8, 2**18
    rule = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}
    masters = [torch.nn.Parameter(torch.randn(size)) for _ in range(count)]
    flats = [master.detach().bfloat16() for master in masters]
    for master, flat in zip(masters, flats, strict=True):
        master.grad = torch.randn(size)
        flat.grad = master.grad.bfloat16()
    working = [flat.clone() for flat in flats]
    plain = DeepSpeedCPUAdam(masters, **rule)
    parts = {number: [Partition(f"w{number}", size, 0, size, group=number, start=0)] for number in range(count)}
    compact = CompactAdamW([{**rule, "params": flats}], flats, parts, seed=1)

    def plain_step() -> None:
        plain.step()
        for copy, master in zip(working, masters, strict=True):
            copy.copy_(master.detach())

    found: dict[str, list[float]] = {"fp32": [], COMPACT: []}
    for _ in range(rounds):
        for name, work in (("fp32", plain_step), (COMPACT, compact.step)):
            started = time.perf_counter()
            work()
            found[name].append((time.perf_counter() - started) / (count * size) * 1e9)
    return found


if __name__ == "__main__":
    main()
