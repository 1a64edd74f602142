"""What a rank holds: its states, what else stays between steps, and the most that a step needs beside it."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy

from training import states
from training.engine import Engine
from training.placement import CPU, DEVICE

OTHER = "other"


def held(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes that stay between steps, by tier and kind: the states, and all other tensors that there are.

    Where the device is the CPU, what is no state counts as the device's, but for the buffers of swapping.
    """
    gc.collect()
    found = states.bytes_by_tier(engine)
    known = {tier: sum(found[tier].values()) for tier in (DEVICE, CPU)}
    if engine.device.type == "cpu":  # one memory for both tiers
        known = {DEVICE: known[DEVICE] + known[CPU], CPU: 0}
    swapping = {_place(tensor) for tensor in _swap_buffers(engine)}
    live: Counter[str] = Counter()
    for place, tensor in {_place(tensor): tensor for tensor in _tensors()}.items():
        on_device = tensor.device.type == engine.device.type and place not in swapping
        live[DEVICE if on_device else CPU] += tensor.untyped_storage().nbytes()
    for tier, size in known.items():
        found[tier][OTHER] = live[tier] - size
    return found


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors() -> Iterator[Tensor]:
    """All that Python knows of and that lie in memory."""
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            yield thing


def _swap_buffers(engine: Engine) -> Iterator[Tensor]:
    """Page-locked memory through which DeepSpeed reads and writes what lies on NVMe."""
    optimizer, parameter = engine.deepspeed.optimizer, next(engine.model.parameters())
    swapper: Any = getattr(parameter, "nvme_swapper", None)
    if optimizer.swap_optimizer:
        yield from optimizer.optimizer_swapper.swap_buffer_manager.all_buffers
    if swapper:
        yield swapper.buffers


def step_peak(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `step` has at the most beyond what there is before it, on `device`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # The newer profiler writes lines of its own to the terminal.
    defaults = torch._C._profiler._ExperimentalConfig()
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, defaults))
    try:
        step()
    finally:
        threads = _disable_profiler_legacy()
    return max(map(_peak, threads), default=0)


def _peak(events: Iterable[Any]) -> int:
    changes = (event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc")
    return max(itertools.accumulate(changes), default=0)
