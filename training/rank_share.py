"""What one rank of a job needs, by arithmetic alone; and what some layers of it tell of all. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from model.config import ModelConfig
from training.ds_config import DSConfig
from training.machine import memory_bytes
from training.placement import CPU, DEVICE, NVME


def needed(config: DSConfig) -> dict[str, int]:
    """The least bytes that a rank needs by tier: its states, and weights and gradients of the layer in hand."""
    held = config.placement.bytes(config.elements, config.sizes)
    found = {tier: sum(kinds.values()) for tier, kinds in held.items()}
    found[DEVICE] += 2 * config.sizes.weight * _layer_here(config.model, config.expert_parallel)
    return found


def _layer_here(model: ModelConfig, parallel: int) -> int:
    """Parameters of a layer that are whole on a rank while it is computed."""
    counts, physical = model.parameter_counts(), 1 if model.share_layers else model.layers
    experts = counts.experts // parallel if model.experts else counts.experts
    return (counts.attention + counts.routers + experts) // physical


@dataclass(frozen=True)
class Room:
    """Bytes that are free here. Without a GPU the device's memory is the host's."""

    gpu: int | None
    host: int
    disk: int

    @classmethod
    def here(cls, gpu: int | None, folders: set[Path]) -> Room:
        """`gpu`: free bytes of the GPU; `folders`: of swap files."""
        disk = min((_free_disk(folder) for folder in folders), default=0)
        return cls(gpu, min(psutil.virtual_memory().available, memory_bytes()), disk)

    def shortage(self, share: Mapping[str, int]) -> str:
        """What a share needs beyond what is free, in words; "" if it fits."""
        wants = [("disk", share[NVME], self.disk)]
        if self.gpu is None:
            wants.append(("memory", share[DEVICE] + share[CPU], self.host))
        else:
            wants += [("GPU memory", share[DEVICE], self.gpu), ("memory", share[CPU], self.host)]
        short = [
            f"{need / 1e9:.3g} GB of {kind}, of which {free / 1e9:.3g} GB are free"
            for kind, need, free in wants
            if need > free
        ]
        return " and ".join(short)


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def extrapolate(fewer: Any, more: Any, layers: tuple[int, int], whole: int) -> Any:
    """Numbers, also within mappings, that are linear in the layers: at `whole` of them, from two of them.

    None falls with the layers: where a measured one seems to, that is noise.
    """
    if isinstance(more, Mapping):
        return {key: extrapolate(fewer[key], value, layers, whole) for key, value in more.items()}
    if more is None or isinstance(more, str):
        return more
    value = more + max(more - fewer, 0) * (whole - layers[1]) / (layers[1] - layers[0])
    return value if isinstance(more, float) else round(value)
