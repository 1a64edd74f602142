"""What we spare in DeepSpeed's ZeRO-3: numbers that it keeps twice, and passes over gradients that change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero import stage3
from torch import Tensor

_reduce_scatter = stage3.reduce_scatter_coalesced


def spare_reductions() -> None:
    """Let a group of one rank, such as those of experts that nobody else holds, hand on its gradients as they are.

    DeepSpeed would copy them into one piece and divide them by one.
    """
    stage3.reduce_scatter_coalesced = _reduce_scatter_unless_alone


def _reduce_scatter_unless_alone(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    if dist.get_world_size(group) == 1:
        return [tensor.view(-1) for tensor in tensors]
    return _reduce_scatter(tensors, group)


def keep_once(optimizer: Any) -> None:
    """Let equal numbers share their memory: 4 bytes a parameter for the gradients, and 4 more in fp32.

    DeepSpeed sums gradients in one buffer and copies the sums to another for an offloaded optimizer; and in fp32 the
    weights that layers compute with are copies of the master weights. On a CPU rank to copy a tensor onto itself costs
    nothing; a GPU's gradients still pass through its memory. States on NVMe are read into buffers of their own, and
    stay as they are.
    """
    offset = 0
    for number, group in enumerate(optimizer.fp16_groups):
        size = sum(parameter.partition_numel() for parameter in group)
        if not optimizer._swappable_optimizer_subgroup(number):
            master = optimizer.fp32_partitioned_groups_flat[number]
            gradient = optimizer.grad_partitions_flat_buffer.narrow(0, offset, size)
            if master.grad is not None and _alike(master.grad, gradient):
                master.grad = gradient
            working = optimizer.fp16_partitioned_groups_flat[number]
            if working is not None and _alike(working, master):
                master.data = working.data
        offset += size


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
