"""Our expert layer against its peers and against a dense layer of equal active FLOPs: forward and backward.

    python -m benchmarks.moe_layer [--dtype bf16] [--rounds 7] [--shapes base many] [--device cuda]

One process with all cores. In each round every contender takes the same new input, one after the other; times are
medians over rounds, and ratios medians of the ratios within a round. New inputs matter: on CPU a product of a new shape
may have to be compiled, which equal inputs hide. Experts are gated in all, so that sizes are equal; ours have biases
too.

The floor of a shape is its dropless FLOPs at the peak of matrix products (in bf16, where the processor has none, the
peak of fp32, as which our experts are multiplied there), plus its weights once and their gradients once at the
bandwidth of a copy, both measured in the same rounds. Needs `pip install -r benchmarks/requirements.txt`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from launch.run import KEEP_FREED_MEMORY
from tests.ranks import run_ranks
from training.machine import multiplies_bf16, usable_cores

SHAPES = {  # hidden, ffn, experts, k, tokens
    "base": (256, 1024, 16, 2, 4096),
    "wide": (512, 2048, 32, 2, 4096),
    "few-big": (1024, 4096, 8, 1, 2048),
    "many": (256, 512, 128, 4, 4096),
}
OURS = {
    f"M6 {routing}, {capacity}": (routing, capacity)
    for routing in ("prototype", "top-k")
    for capacity in ("none", "kx", "1x")
}
DENSE = "dense"
COPY_BYTES = 2**28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before those that count")
    parser.add_argument("--contenders", nargs="+", help="leave out all others but the dense layer")
    arguments = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = KEEP_FREED_MEMORY  # as ranks of `m6 train` have it
    for name in arguments.shapes:
        (seconds,) = run_ranks(1, measure, SHAPES[name], arguments, timeout=7200)
        print(table(name, arguments, seconds), flush=True)


def measure(sizes: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contender in each round; "peak" is FLOP/s and "copy" bytes a second."""
    import torch

    from benchmarks import peers
    from training.peak import matmul_flops

    shape = peers.Shape(*sizes)
    device = torch.device(arguments.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    yardstick = torch.float32 if device.type == "cpu" and not multiplies_bf16() else dtype
    torch.set_num_threads(usable_cores())
    torch.manual_seed(0)
    peers.start_process_group()
    wanted = [name for name in (*OURS, *peers.PEERS) if name in (arguments.contenders or [name]) or name == DENSE]
    build = {**dict.fromkeys(OURS, _ours), **dict.fromkeys(peers.PEERS, _peer)}
    layers = {name: build[name](name, shape, dtype, device) for name in wanted}
    seconds: dict[str, list[float]] = {name: [] for name in (*layers, "peak", "copy")}
    for round_ in range(arguments.warm_up + arguments.rounds):
        x_TD = torch.randn(shape.tokens, shape.hidden).to(device, dtype)
        found = {name: _seconds(*layer, x_TD) for name, layer in layers.items()}
        found |= {"peak": matmul_flops(device, yardstick, seconds=0.2), "copy": _copy_bandwidth(device)}
        if round_ >= arguments.warm_up:
            for name, value in found.items():
                seconds[name].append(value)
    return seconds


def _peer(name: str, shape: Any, dtype: Any, device: Any) -> tuple[Callable[[Any], Any], list[Any]]:
    """What maps [T, D] to [T, D], and its weights."""
    from benchmarks import peers

    layer = peers.build(name, shape, dtype, device)
    return layer, list(layer.parameters())


def _ours(name: str, shape: Any, dtype: Any, device: Any) -> tuple[Callable[[Any], Any], list[Any]]:
    import torch

    from model.config import ModelConfig
    from model.experts import ExpertParallel
    from model.moe import MoELayer

    routing, capacity = OURS[name]
    config = ModelConfig(
        layers=1, hidden=shape.hidden, ffn=shape.ffn, heads=1, experts=shape.experts, k=shape.k, routing=routing,
        capacity=capacity, gated_experts=True,
    )  # fmt: skip
    layer = MoELayer(config, ExpertParallel(), 0).to(device, dtype)
    valid_T = torch.ones(shape.tokens, dtype=torch.bool, device=device)
    return lambda x_TD: layer(x_TD, valid_T, ~valid_T)[0], list(layer.parameters())


def _seconds(layer: Callable[[Any], Any], weights: list[Any], x_TD: Any) -> float:
    """Forward and backward, to the input and to all weights."""
    from training.peak import wait

    x_TD = x_TD.clone().requires_grad_()
    for weight in weights:
        weight.grad = None
    wait(x_TD.device)
    start = time.perf_counter()
    y_TD = layer(x_TD)
    y_TD.backward(x_TD.detach())
    wait(x_TD.device)
    return time.perf_counter() - start


def _copy_bandwidth(device: Any) -> float:
    """Bytes read and written a second by a plain copy, far larger than any cache."""
    import torch

    from training.peak import wait

    source = torch.ones(COPY_BYTES // 4, device=device)
    target = source.clone()
    wait(device)
    start = time.perf_counter()
    target.copy_(source)
    wait(device)
    return 2 * COPY_BYTES / (time.perf_counter() - start)


def table(name: str, arguments: argparse.Namespace, seconds: dict[str, list[float]]) -> str:
    hidden, ffn, experts, k, tokens = SHAPES[name]
    peak, copy = statistics.median(seconds.pop("peak")), statistics.median(seconds.pop("copy"))
    flops = 3 * 2 * 3 * tokens * k * hidden * ffn
    traffic = 2 * 3 * experts * hidden * ffn * (4 if arguments.dtype == "fp32" else 2)
    floor = flops / peak + traffic / copy
    dense = seconds[DENSE]
    lines = [
        f"\n**{name}** {SHAPES[name]}, {arguments.dtype}, {arguments.device}: peak {peak / 1e9:.0f} GFLOP/s, copy "
        f"{copy / 1e9:.1f} GB/s, floor {1e3 * floor:.1f} ms ({1e3 * flops / peak:.1f} of products)\n",
        "| | ms | of dense | of the floor |\n|---|---|---|---|",
    ]
    for contender, own in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
        middle = statistics.median(own)
        ratio = statistics.median(a / b for a, b in zip(own, dense, strict=True))
        of_floor = "" if "1x" in contender else f"{middle / floor:.2f}"  # which does less work
        lines.append(f"| {contender} | {1e3 * middle:.1f} | {ratio:.2f} | {of_floor} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
