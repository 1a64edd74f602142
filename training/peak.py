"""What this machine's matrix multiplication reaches, as the yardstick of utilisation."""

from __future__ import annotations

import time

import torch

SIZE = {"cpu": 2048, "cuda": 8192}


def matmul_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16, seconds: float = 0.5) -> float:
    """FLOP/s of square matrix products on `device`: the best of those that fit into `seconds`, after one warm-up.

    On CPU with the threads that torch has. Several ranks on one machine measure at the same time, so that they
    share what it has as they do in training.
    """
    n = SIZE[device.type]
    a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
    a @ b
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        best = max(best, 2 * n**3 / _seconds(a, b))
    return best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    wait(a.device)
    start = time.perf_counter()
    a @ b
    wait(a.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until `device` has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
