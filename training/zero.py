"""What we spare in DeepSpeed's ZeRO-3: numbers that it keeps twice, and passes over gradients that change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.placement import OPTIMIZER, PARAMETERS

NORM_PIECE = 2**16  # numbers whose fp64 form stays in a core's cache
_PRIVATE = "_DeepSpeedZeroOptimizer_Stage3__"


def spare_passes(optimizer: Any) -> None:
    """Let gradients be read and written no oftener than their numbers need.

    A group of one rank, such as those of experts that nobody else holds, averages its gradients into the buffer that
    sums them, where DeepSpeed would copy, scale and copy them again. On a CPU a gradient's norm is summed in fp64 piece
    by piece, in the cache, and not over an fp64 copy of the whole.
    """
    name = f"{_PRIVATE}avg_scatter_grads"
    setattr(optimizer, name, partial(_average_alone, optimizer, getattr(optimizer, name)))
    optimizer._constant_buffered_norm2 = norm
    optimizer.unscale_and_clip_grads = partial(_clip_if_needed, optimizer, optimizer.unscale_and_clip_grads)


def _average_alone(optimizer: Any, average: Any, parameters: Sequence[Any], communication: torch.dtype) -> list[Tensor]:
    alone = dist.get_world_size(optimizer._get_param_partition_group(parameters[0])) == 1
    if not alone or optimizer.gradient_predivide_factor != 1 or communication != optimizer.dtype:
        return average(parameters, communication)
    sums = getattr(optimizer, f"{_PRIVATE}param_id_to_grad_partition")
    scale = 1 / optimizer._gradient_averaging_world_size(parameters, 1)
    averaged = []
    for parameter in parameters:
        gradient = parameter.grad.view(-1)
        home = sums[parameter.ds_id][: gradient.numel()]
        first = optimizer.micro_step_id == 0 and home.device == gradient.device
        averaged.append(torch.mul(gradient, scale, out=home if first else gradient))
    return averaged


def norm(gradient: Tensor) -> Tensor:
    """The Euclidean norm of a contiguous tensor of any shape, summed in fp64."""
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float64)
    squares = [torch.dot(piece, piece) for piece in map(Tensor.double, gradient.view(-1).split(NORM_PIECE))]
    return torch.stack(squares).sum().sqrt()


def _clip_if_needed(optimizer: Any, clip: Any, sub_group: int, total_norm: Tensor) -> None:
    if optimizer.loss_scale != 1 or total_norm + 1e-6 > optimizer.clip_grad > 0:
        clip(sub_group, total_norm)


def keep_once(optimizer: Any) -> None:
    """Let equal numbers of one tier share their memory: 4 bytes a parameter for the gradients, and 4 more in fp32.

    DeepSpeed sums gradients in one buffer and copies the sums to another for an offloaded optimizer; and in fp32 the
    weights that layers compute with are copies of the master weights. On a CPU rank to copy a tensor onto itself costs
    nothing; a GPU's gradients still pass through its memory. States on NVMe are read into buffers of their own, and
    stay as they are.
    """
    for number, gradient in enumerate(optimizer.gradient_sums):
        if not optimizer._swappable_optimizer_subgroup(number):
            master = optimizer.fp32_partitioned_groups_flat[number]
            if master.grad is not None and _alike(master.grad, gradient):
                master.grad = gradient
            working = optimizer.fp16_partitioned_groups_flat[number]
            one_tier = optimizer.tier(number, PARAMETERS) == optimizer.tier(number, OPTIMIZER)
            if working is not None and one_tier and _alike(working, master):
                master.data = working.data


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
