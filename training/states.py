"""A rank's share of the training state, as parts of flat global tensors that no longer depend on the layout.

Every parameter's fp32 master and Adam moments are one flat tensor each, of which a rank holds its ZeRO partition, a
1-D slice; the experts of one layer form one tensor over all expert-parallel ranks. The parts lie in memory, on the
device, in the swap files of NVMe offload, or in the codes of 8-bit states (`training/compact_adam.py`), which are read
and written as the fp32 values that they stand for. So is a frozen weight, of which there is nothing but what layers
compute with.

DeepSpeed's public accessors (`safe_get_local_fp32_param` and its like) read and write a whole sub-group of parameters
from NVMe for each one asked for; so this goes by sub-groups, and reads swap files as the files they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils import groups
from torch import Tensor

from training.compact_adam import CompactAdamW
from training.granular import tiers_of
from training.placement import CPU, KINDS, NVME, OPTIMIZER, PARAMETERS, TIERS

if TYPE_CHECKING:
    from training.engine import Engine

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
ELEMENT = 4  # bytes: every state is fp32, or read as such

Decoding = Callable[[int, int], Tensor]  # the values of elements [first, first + count) of a part


@dataclass(frozen=True)
class FileRange:
    """Where a part lies in a swap file, in bytes."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class Part:
    """Elements [offset, offset + numel) of the flat global tensor `key`, which has `length` of them."""

    key: str
    offset: int
    numel: int
    length: int
    source: Tensor | FileRange | Decoding

    @property
    def bytes(self) -> int:
        return self.numel * ELEMENT


@dataclass(frozen=True)
class Share:
    """A parameter's ZeRO partition on this rank: `numel` real elements (no padding) from `offset` of `length`."""

    name: str
    numel: int
    offset: int
    length: int


@dataclass(frozen=True)
class Partition(Share):
    """That of a trained parameter, at `start` of its sub-group."""

    group: int
    start: int


def parts(engine: Engine) -> list[Part]:
    """All of this rank's state as it lies, sub-group by sub-group, then what is frozen; nothing is read or copied."""
    trained = [part for group in partitions_by_group(engine).values() for part in _parts(engine, group)]
    return trained + [_part(share, MASTER, _frozen_source(p, share.numel)) for p, share in _shares(engine, frozen=True)]


def resident(engine: Engine, kinds: tuple[str, ...]) -> Iterator[list[tuple[Part, Tensor]]]:
    """The parts of `kinds` with their values in memory, one sub-group after the other; what is written there stays.

    One sub-group at a time, since with NVMe offload memory need not hold more, and then one frozen weight at a time.
    Working copies follow their masters.
    """
    optimizer = engine.deepspeed.optimizer
    if MASTER in kinds:
        optimizer._partition_all_parameters()  # what is gathered now would not follow
    for number, group in partitions_by_group(engine).items():
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        views = [(p, kind, _values(engine, p, kind)) for p in group for kind in kinds]
        yield [(_part(p, kind, view), view) for p, kind, view in views]
        if isinstance(adam := optimizer.optimizer, CompactAdamW):
            for p, kind, view in views:
                adam.write(optimizer.fp32_partitioned_groups_flat[number], p, kind, view)
        if MASTER in kinds:
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)
    if MASTER in kinds:
        for parameter, share in _shares(engine, frozen=True):
            values = _frozen_values(parameter, share.numel)
            yield [(_part(share, MASTER, values), values)]
            _set_frozen(parameter, values)


def partitions_by_group(engine: Engine) -> dict[int, list[Partition]]:
    found: dict[int, list[Partition]] = {}
    for partition in _partitions(engine):
        found.setdefault(partition.group, []).append(partition)
    return dict(sorted(found.items()))


def _partitions(engine: Engine) -> Iterator[Partition]:
    optimizer = engine.deepspeed.optimizer
    for parameter, share in _shares(engine, frozen=False):
        group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        yield Partition(**vars(share), group=group, start=int(start))


def _shares(engine: Engine, frozen: bool) -> Iterator[tuple[Any, Share]]:
    """The parameters of which this rank has a share; of those that are frozen, or of those that are trained."""
    parameter: Any  # under ZeRO-3, with attributes that torch does not know
    for name, parameter in engine.model.named_parameters():
        share = parameter.ds_tensor.ds_numel
        first = parameter.ds_zero_partition_rank * share
        real = min(share, parameter.ds_numel - first)  # the last partition is padded, and may be padding only
        if real > 0 and parameter.requires_grad != frozen:
            size, rank = _expert_parallel(parameter)
            yield parameter, Share(name, real, rank * parameter.ds_numel + first, size * parameter.ds_numel)


def _expert_parallel(parameter: Any) -> tuple[int, int]:
    """How many ranks share the layer's experts, and this rank's number among them."""
    if getattr(parameter, "ds_zero_placement_family", None) != "autoep_expert":
        return 1, 0
    name = parameter.ds_zero_partition_group_name
    return groups._get_expert_parallel_world_size(name), groups._get_expert_parallel_rank(name)


def _parts(engine: Engine, group: list[Partition]) -> list[Part]:
    optimizer, number = engine.deepspeed.optimizer, group[0].group
    if isinstance(adam := optimizer.optimizer, CompactAdamW):
        flat = optimizer.fp32_partitioned_groups_flat[number]
        return [_part(p, kind, partial(adam.read, flat, p, kind)) for p in group for kind in (MASTER, *MOMENTS)]
    flats = _flat_states(engine, number)
    if not optimizer._swappable_optimizer_subgroup(number):
        return [_part(p, kind, _view(flat, p)) for p in group for kind, flat in flats.items()]
    info = optimizer.optimizer_swapper.swap_params_info[flats[MASTER].ds_id]
    files = {id(context.compute_tensor): Path(context.swap_path) for context in info.tensors}
    return [
        _part(p, kind, FileRange(files[id(flat)], p.start * ELEMENT, p.numel * ELEMENT))
        for p in group
        for kind, flat in flats.items()
    ]


def _flat_states(engine: Engine, number: int) -> dict[str, Any]:
    """The sub-group's flat states by kind: empty tensors while they lie on NVMe."""
    optimizer = engine.deepspeed.optimizer
    flat = optimizer.fp32_partitioned_groups_flat[number]
    state = optimizer.optimizer.state.get(flat, {})
    return {MASTER: flat} | {kind: state[kind] for kind in MOMENTS if kind in state}


def _values(engine: Engine, partition: Partition, kind: str) -> Tensor:
    optimizer = engine.deepspeed.optimizer
    if isinstance(adam := optimizer.optimizer, CompactAdamW):
        return adam.read(optimizer.fp32_partitioned_groups_flat[partition.group], partition, kind, 0, partition.numel)
    return _view(_flat_states(engine, partition.group)[kind], partition)


def _view(flat: Tensor, partition: Partition) -> Tensor:
    return flat.detach().narrow(0, partition.start, partition.numel)


def _part(share: Share, kind: str, source: Tensor | FileRange | Decoding) -> Part:
    return Part(f"{share.name}.{kind}", share.offset, share.numel, share.length, source)


def _on_disk(parameter: Any) -> bool:
    return parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme


def _frozen_source(parameter: Any, numel: int) -> Tensor | FileRange | Decoding:
    """Where a frozen weight's first `numel` values are to be had, in the precision that layers compute with."""
    exact, size = parameter.dtype == torch.float32, parameter.element_size()
    if _on_disk(parameter):
        path = Path(parameter.nvme_swapper.get_path(parameter, must_exist=True))
        return FileRange(path, 0, numel * size) if exact else partial(_read_rounded, path, parameter.dtype)
    values = parameter.ds_tensor.detach().narrow(0, 0, numel)
    return values if exact else lambda first, count: values[first : first + count].float()


def _read_rounded(path: Path, dtype: torch.dtype, first: int, count: int) -> Tensor:
    """Values of a swap file in 16 bits."""
    with path.open("rb", buffering=0) as file:
        file.seek(first * dtype.itemsize)
        values = bytearray(file.read(count * dtype.itemsize))
    if len(values) < count * dtype.itemsize:
        raise OSError(f"{path}: ends {count * dtype.itemsize - len(values)} bytes too early")
    return torch.frombuffer(values, dtype=dtype).float()


def _frozen_values(parameter: Any, numel: int) -> Tensor:
    """Room for a frozen weight's fp32 values, which may be where they live."""
    if _on_disk(parameter) or parameter.dtype != torch.float32:
        return torch.empty(numel)
    return parameter.ds_tensor.detach().narrow(0, 0, numel)


def _set_frozen(parameter: Any, values: Tensor) -> None:
    """Let a frozen weight's share begin with these values, unless they are where it lives."""
    numel = parameter.ds_tensor.ds_numel
    if _on_disk(parameter):
        swapper = parameter.nvme_swapper
        swapper.get_buffer(parameter, numel)[: values.numel()].copy_(values)
        swapper.swap_out_and_release([parameter])
    elif values.data_ptr() != parameter.ds_tensor.data_ptr():
        parameter.ds_tensor[: values.numel()].copy_(values)


def swap_damage(engine: Engine) -> str:
    """What is wrong with this rank's swap files of NVMe offload; "" if they are as they should be, or there are none.

    DeepSpeed asserts that a read went well, in Python or, ending the process without a word of ours, in C++.
    """
    for path, size in _swap_files(engine):
        found = path.stat().st_size if path.exists() else None
        if found is None or found < size:
            return f"{path}: {'missing' if found is None else f'{found:,} bytes of {size:,}'}"
    return ""


def _swap_files(engine: Engine) -> Iterator[tuple[Path, int]]:
    """Path and size in bytes, of optimizer states and of parameters."""
    optimizer = engine.deepspeed.optimizer
    swapper: Any = optimizer.optimizer_swapper if optimizer.swap_optimizer else None
    for info in swapper.swap_params_info.values() if swapper else ():
        for path in info.get_swap_paths():
            yield Path(path), swapper._io_aligned_numel(info.numel()) * swapper.swap_element_size
    parameter: Any
    for parameter in engine.model.parameters():
        swapper = parameter.nvme_swapper
        if swapper and parameter.ds_id in swapper.id_to_path:
            numel = swapper._io_aligned_numel(parameter.ds_tensor.ds_numel)
            yield Path(swapper.id_to_path[parameter.ds_id]), numel * swapper.swap_element_size


def bytes_by_tier(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes that this rank's weights and optimizer states take, by tier and kind; what is shared counts once.

    Measured on the tensors, and on the swap files. Where the device is the CPU, its memory's tiers are told by name.
    """
    optimizer = engine.deepspeed.optimizer
    found = {tier: dict.fromkeys(KINDS, 0) for tier in TIERS}
    parameter: Any
    for parameter in engine.model.parameters():
        tier = NVME if _on_disk(parameter) else tiers_of(parameter)[PARAMETERS].replace(NVME, CPU)
        found[tier][PARAMETERS] += parameter.ds_tensor.ds_numel * parameter.element_size()
    for number in range(len(optimizer.fp16_groups)):
        states = optimizer.tier(number, OPTIMIZER)
        held = [optimizer.gradient_sums[number], optimizer.fp32_partitioned_groups_flat[number].grad]
        flat = optimizer.fp16_partitioned_groups_flat[number]
        if optimizer._swappable_optimizer_subgroup(number):
            info = optimizer.optimizer_swapper.swap_params_info[optimizer.fp32_partitioned_groups_flat[number].ds_id]
            paths = info.get_swap_paths() + info.get_swap_gradient_paths()
            found[NVME][OPTIMIZER] += sum(Path(path).stat().st_size for path in paths)
            states = CPU
        else:
            master = optimizer.fp32_partitioned_groups_flat[number]
            state = optimizer.optimizer.state.get(master, {})
            held += [master, *(value for key, value in state.items() if key != "step")]
        apart = {tensor.data_ptr(): tensor for tensor in held if tensor is not None and tensor.numel()}
        if flat is not None:
            apart.pop(flat.data_ptr(), None)  # masters that are the weights
        found[states.replace(NVME, CPU)][OPTIMIZER] += sum(t.numel() * t.element_size() for t in apart.values())
    return found


def lengths(engine: Engine) -> dict[str, int]:
    """How many values each parameter has, over all ranks."""
    parameter: Any
    found = {}
    for name, parameter in engine.model.named_parameters():
        found[name] = _expert_parallel(parameter)[0] * parameter.ds_numel
    return found


def clear_moments(engine: Engine) -> None:
    """As they are before the first step."""
    for group in resident(engine, MOMENTS):
        for _, view in group:
            view.zero_()


def adam_step(engine: Engine) -> int:
    """Steps that Adam has taken; no state exists before the first."""
    return max((int(state["step"]) for state in _adam_states(engine)), default=0)


def set_adam_step(engine: Engine, step: int) -> None:
    """Let Adam's bias correction go on from `step`."""
    for state in _adam_states(engine):
        state["step"] = torch.full_like(state["step"], step) if isinstance(state["step"], Tensor) else step
    adam = engine.deepspeed.optimizer.optimizer
    if not hasattr(adam, "ds_opt_adam"):
        return
    # DeepSpeed's CPU Adam keeps beta^t as a running product; only the same multiplications give the same bits.
    group, one = adam.param_groups[0], torch.zeros(1)
    fixed = (0.0, *group["betas"], group["eps"], 0.0, True)
    for past in range(1, step + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, past, *fixed, one, one.clone(), one.clone(), one.clone())


def _adam_states(engine: Engine) -> list[dict[str, Any]]:
    return [state for state in engine.deepspeed.optimizer.optimizer.state.values() if "step" in state]
