"""Granular offload under ZeRO-3: sub-groups of weights on tiers of their own, where DeepSpeed 0.19.8 has one for all.

DeepSpeed is set up for the coldest tier in use (`training/ds_config.py`); what is to be warmer is laid out in host
memory or on the device instead. Weights of one parameter group share their tiers, and so does a sub-group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from training.placement import CPU, DEVICE, NVME, OPTIMIZER, PARAMETERS, Placement

_SUMS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
_TIERS = "m6_tiers"


def tiers_of(parameter: Any) -> dict[str, str]:
    """Where a parameter's weights are to live, and its optimizer states, if it is trained."""
    return getattr(parameter, _TIERS)


def parameter_groups(model: nn.Module, placement: Placement, weight_decay: float) -> list[dict[str, Any]]:
    """A group for each pair of tiers, with weight decay and without, which only matrices have; what is frozen has none.

    ZeRO-3 shows a partitioned weight as empty, so its kept shape decides.
    """
    groups: dict[tuple[str, str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        matrix = len(shape) >= 2 and not name.rsplit(".", 1)[-1].startswith("b")
        tiers = placement.parameters.of(name), placement.optimizer.of(name)
        setattr(parameter, _TIERS, dict(zip((PARAMETERS, OPTIMIZER), tiers, strict=True)))
        if parameter.requires_grad:
            groups.setdefault((*tiers, matrix), []).append(parameter)
    return [
        # DeepSpeed tells groups by their names.
        {"params": groups[key], "weight_decay": weight_decay if key[-1] else 0.0, "name": str(key)}
        for key in sorted(groups, key=lambda key: not key[-1])
    ]


@contextmanager
def granular() -> Iterator[None]:
    """Within it, DeepSpeed makes its ZeRO-3 optimizers of our class."""
    stage3.DeepSpeedZeroOptimizer_Stage3 = GranularZero3
    try:
        yield
    finally:
        stage3.DeepSpeedZeroOptimizer_Stage3 = DeepSpeedZeroOptimizer_Stage3


class GranularZero3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 that keeps each sub-group's weights and states where its parameters' tags say."""

    gradient_sums: list[Tensor]  # by sub-group, flat
    grad_partitions_flat_buffer: Any  # DeepSpeed's: those in host memory, or all

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._place_frozen()
        self._lay_out_gradient_sums()
        if any(self._on_device(number) for number in range(len(self.fp16_groups))) and self.offload_optimizer:
            self._make_device_optimizer()

    def tier(self, number: int, kind: str) -> str:
        """Of a sub-group's weights or optimizer states."""
        return tiers_of(self.fp16_groups[number][0])[kind]

    def _on_device(self, number: int) -> bool:
        return self.tier(number, OPTIMIZER) == DEVICE

    def _create_param_groups_fp16_flat_cpu_memory(self) -> None:
        tiers = [tiers_of(group["params"][0])[PARAMETERS] for group in self.trainable_param_groups]
        if len(set(tiers)) == 1:
            super()._create_param_groups_fp16_flat_cpu_memory()
            return
        for group, tier in zip(self.trainable_param_groups, tiers, strict=True):
            numel = 0 if tier == NVME else sum(parameter.partition_numel() for parameter in group["params"])
            device = get_accelerator().current_device_name() if tier == DEVICE else "cpu"
            flat = torch.empty(max(numel, 1), dtype=self.dtype, device=device)
            self.param_groups_fp16_flat_cpu_memory.append(
                flat if tier == DEVICE else get_accelerator().pin_memory(flat)
            )

    def _place_frozen(self) -> None:
        """DeepSpeed leaves frozen weights where they were made, on the coldest tier: bring up what is to be warmer."""
        coldest = NVME if self.params_in_nvme_and_cpu else CPU if self.offload_param else DEVICE
        for parameter in self.module.parameters():
            tier = tiers_of(parameter)[PARAMETERS]
            if parameter.requires_grad or tier == coldest:
                continue
            device = get_accelerator().current_device_name() if tier == DEVICE else "cpu"
            place = torch.empty(parameter.partition_numel(), dtype=self.dtype, device=device)
            pinned = tier == CPU and self.offload_param_pin_memory
            self._move_to_flat_buffer([parameter], get_accelerator().pin_memory(place) if pinned else place)

    def _swappable_optimizer_subgroup(self, number: int) -> bool:
        return self.tier(number, OPTIMIZER) == NVME and super()._swappable_optimizer_subgroup(number)

    def _create_fp32_partitions(self) -> None:
        super()._create_fp32_partitions()
        for number, master in enumerate(self.fp32_partitioned_groups_flat):
            if self.offload_optimizer and self._on_device(number):
                master.data = master.data.to(get_accelerator().current_device_name())
                self.subgroup_to_device[number] = get_accelerator().device_name()

    def _lay_out_gradient_sums(self) -> None:
        """DeepSpeed has the sums of all gradients in one buffer on one tier: those of the device get one there."""
        sizes = self.fp16_partitioned_groups_flat_numel
        here = [self.offload_optimizer and self._on_device(number) for number in range(len(sizes))]
        if not any(here):
            self.gradient_sums = list(self.grad_partitions_flat_buffer.split(sizes))
            return
        left = self._shortened_sums(sum(size for size, own in zip(sizes, here, strict=True) if not own))
        self.gradient_sums = []
        for number, size in enumerate(sizes):
            if here[number]:
                sums = left.new_zeros(size, device=get_accelerator().current_device_name())
                master = self.fp32_partitioned_groups_flat[number]
                if sums.dtype == master.dtype:
                    master.grad = sums
            else:
                sums, left = left.split([size, left.numel() - size])
            self.gradient_sums.append(sums)
            group = self.fp16_groups[number]
            parts = sums.split([parameter.partition_numel() for parameter in group])
            getattr(self, _SUMS).update({p.ds_id: part for p, part in zip(group, parts, strict=True)})

    def _shortened_sums(self, numel: int) -> Tensor:
        """The buffer on the host, made anew for so many gradients, the old one gone before."""
        dtype = self.grad_partitions_flat_buffer.dtype
        get_accelerator().unpin_memory(self.grad_partitions_flat_buffer)
        getattr(self, _SUMS).clear()
        del self.grad_partitions_flat_buffer
        buffer = torch.zeros(numel, dtype=dtype)
        pinned = self.offload_optimizer_pin_memory
        self.grad_partitions_flat_buffer = get_accelerator().pin_memory(buffer) if pinned else buffer
        return self.grad_partitions_flat_buffer

    def _make_device_optimizer(self) -> None:
        """AdamW for masters on the device; the optimizer of those in host memory runs on the CPU alone."""
        self._device_optimizer = torch.optim.AdamW([nn.Parameter(torch.empty(0))])
        for group in self.optimizer.param_groups:
            for key, value in self._device_optimizer.defaults.items():
                group.setdefault(key, value)
        # The same settings, which the schedule changes, and the same states, which checkpoints read.
        self._device_optimizer.param_groups = self.optimizer.param_groups
        self._device_optimizer.state = self.optimizer.state

    def _optimizer_step(self, number: int) -> None:
        if not (self.offload_optimizer and self._on_device(number)):
            super()._optimizer_step(number)
            return
        group = self.optimizer.param_groups[self.sub_group_to_group_id[number]]
        group["params"] = [self.fp32_partitioned_groups_flat[number]]
        self._device_optimizer.step()
        group["params"] = []
