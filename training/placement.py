"""Granular offload (M6-10T, arXiv 2110.03888): which layer's weights and optimizer states live on which tier.

M6-10T leaves as many layers on the device as fit, where offload of all layers would leave the device's memory empty
and its links full. Here every layer, and what is outside the layers, has a tier of its own for each kind of state.
Imports no torch, so that a plan and a check are instant.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.config import ModelConfig
from model.parts import ADAPTERS, WHOLE
from training.errors import UserError

DEVICE, CPU, NVME = TIERS = ("device", "cpu", "nvme")  # the warmest first
OUTSIDE = "outside"  # the embeddings, the image's input, the last norm, the bags
AUTO = "auto"
PARAMETERS, OPTIMIZER = KINDS = ("parameters", "optimizer")
IN_LAYERS = ("attention", "norms", "routers", "experts", ADAPTERS)  # parts of the model, if not as a whole


@dataclass(frozen=True)
class Sizes:
    """Bytes of each state of one weight."""

    weight: int  # that layers compute with
    master: int = 4
    gradient: int = 4  # its sum over micro-batches and ranks
    moments: int = 8

    @staticmethod
    def of(bf16: bool, sums: str, compact: bool) -> Sizes:
        """With gradient sums in fp32 or bf16, kept apart from gradients of another type; `compact`: 8-bit states."""
        if compact:
            return Sizes(weight=2, master=3, gradient=2 if sums == "bf16" else 6, moments=2)
        return Sizes(weight=2 if bf16 else 4, gradient=4 if sums == "fp32" else 6)

    def optimizer(self, weights: str, states: str) -> Counter[str]:
        """By tier, of the optimizer's states on tier `states`, where the weights are on tier `weights`."""
        # Where both are in one memory, a weight in its master's precision is the master (`training/zero.py`), and a
        # bf16 one is two bytes of a 24-bit master's three.
        shared = self.weight if self.weight == self.master or self.master == 3 else 0
        master = self.master - (shared if weights == states != NVME else 0)
        found = Counter({states: master + self.gradient + self.moments})
        if states == NVME:
            found[CPU] += self.gradient  # gradients are summed in memory, and the sums then written
        return found


@dataclass(frozen=True)
class Tiers:
    """The tier of what is outside the layers, and of each layer."""

    outside: str
    layers: tuple[str, ...]

    @staticmethod
    def all_on(tier: str, layers: int) -> Tiers:
        return Tiers(tier, (tier,) * layers)

    @property
    def coldest(self) -> str:
        return max(self, key=TIERS.index)

    def __iter__(self) -> Iterator[str]:
        """Of what is outside, then of the layers in order."""
        yield self.outside
        yield from self.layers

    def of(self, parameter: str) -> str:
        """The tier of a weight, by its name in the model."""
        found = re.match(r"layers\.(\d+)\.", parameter)
        return self.layers[int(found[1])] if found else self.outside

    def put(self, unit: int, tier: str) -> Tiers:
        """With a layer, or what is outside (-1), on another tier."""
        if unit < 0:
            return replace(self, outside=tier)
        return replace(self, layers=(*self.layers[:unit], tier, *self.layers[unit + 1 :]))

    def __str__(self) -> str:
        """In words: `cpu`, or `device: layers 0-5; cpu: outside, layers 6-23`."""
        used = [tier for tier in TIERS if tier in set(self)]
        if len(used) == 1:
            return used[0]
        return "; ".join(f"{tier}: {', '.join(self._units(tier))}" for tier in used)

    def _units(self, tier: str) -> Iterator[str]:
        if self.outside == tier:
            yield OUTSIDE
        numbers = [number for number, own in enumerate(self.layers) if own == tier]
        if numbers:
            yield f"layers {_ranges(numbers)}"


@dataclass(frozen=True)
class Elements:
    """Weights that one rank holds a share of: how many of what is outside the layers, and of each layer."""

    outside: int
    layers: tuple[int, ...]
    trained: tuple[int, ...] = ()  # how many of them, in the same order, are not frozen; (): all

    @staticmethod
    def of(model: ModelConfig, parallel: int, world: int, trained: Collection[str] = WHOLE) -> Elements:
        """Of `model` on `world` ranks, `parallel` of which share one set of experts; shards' padding is left out.

        `trained`: the parts of the model that are.
        """
        counts, physical = model.parameter_counts(), 1 if model.share_layers else model.layers
        _, beside_expert, beside_bags = model.adapter_parameters
        outside = {part: getattr(counts, part) for part in ("embeddings", "image", "bags")}
        outside |= {"norms": 2 * model.hidden, ADAPTERS: beside_bags}
        beside_experts = model.experts * beside_expert * physical
        experts = {"experts": counts.experts, ADAPTERS: beside_experts} if model.experts else {}
        common = {part: getattr(counts, part) - outside.get(part, 0) - experts.get(part, 0) for part in IN_LAYERS}

        def shares(parts: Collection[str]) -> list[int]:
            first, *others = (sum(own[part] for part in own.keys() & parts) for own in (outside, common, experts))
            layer = sum(math.ceil(count / physical / world) for count in others)
            return [math.ceil(first / world), *[layer] * physical]

        whole = shares(WHOLE)
        return Elements(whole[0], tuple(whole[1:]), () if set(trained) >= WHOLE else tuple(shares(trained)))

    def __iter__(self) -> Iterator[int]:
        yield self.outside
        yield from self.layers

    @property
    def learning(self) -> tuple[int, ...]:
        """How many are trained, of what is outside and of each layer."""
        return self.trained or tuple(self)


@dataclass(frozen=True)
class Placement:
    """Where the states of a run live."""

    parameters: Tiers  # the weights that layers compute with
    optimizer: Tiers  # masters, sums of gradients, moments

    def of(self, kind: str) -> Tiers:
        return {PARAMETERS: self.parameters, OPTIMIZER: self.optimizer}[kind]

    def put(self, kind: str, unit: int, tier: str) -> Placement:
        """With one layer's states of a kind, or those of what is outside (-1), on another tier."""
        return replace(self, **{kind: self.of(kind).put(unit, tier)})

    def bytes(self, elements: Elements, sizes: Sizes) -> dict[str, dict[str, int]]:
        """Resident bytes of a rank by tier and kind."""
        found = {tier: dict.fromkeys(KINDS, 0) for tier in TIERS}
        for count, own, weights, states in zip(
            elements, elements.learning, self.parameters, self.optimizer, strict=True
        ):
            found[weights][PARAMETERS] += count * sizes.weight
            for tier, size in sizes.optimizer(weights, states).items():
                found[tier][OPTIMIZER] += own * size
        return found

    def device_bytes(self, elements: Elements, sizes: Sizes) -> int:
        return sum(self.bytes(elements, sizes)[DEVICE].values())


def resolve(
    block: Mapping[str, Any], rest: Mapping[str, str], model: ModelConfig, elements: Elements, sizes: Sizes
) -> Placement:
    """The placement that a ds_config's block `m6.offload` describes. Raises UserError.

    `block`: layers by kind and tier, and `device_bytes`, the budget of `auto`. `rest`: by kind, the tier of layers that
    the block does not name.
    """
    physical, budget = len(elements.layers), block.get("device_bytes")
    named = {kind: _named(block.get(kind, {}), f"m6.offload.{kind}", model.layers) for kind in KINDS}
    placement = Placement(*(Tiers.all_on(rest[kind], physical) for kind in KINDS))
    for kind, units in named.items():
        for unit in units.keys() & range(-1, physical):  # all of shared layers are placed as the first
            placement = placement.put(kind, unit, units[unit])
    automatic = [kind for kind in KINDS if block.get(kind, {}).get(DEVICE) == AUTO]
    if not automatic:
        if budget is not None:
            raise UserError("m6.offload.device_bytes: it is the budget of auto, which is not said: take it out")
        return placement
    if budget is None:
        raise UserError("m6.offload: auto needs device_bytes, the bytes of a rank's device that states may take")
    order = (*range(physical), -1)  # what is outside comes last: it may be larger than any layer
    free = [(kind, unit) for kind in automatic for unit in order if unit not in named[kind]]
    return _filled(placement, free, budget, elements, sizes)


def _filled(
    placement: Placement, free: list[tuple[str, int]], budget: float, elements: Elements, sizes: Sizes
) -> Placement:
    """With as many of the `free` layers brought back to the device, in their order, as `budget` bytes hold.

    Weights come first: they cross the link at each use, and their states, six to eight times as large, once a step.
    """
    free = [(kind, unit) for kind, unit in free if list(placement.of(kind))[unit + 1] != DEVICE]
    if not any(unit >= 0 for _, unit in free):
        raise UserError("m6.offload: auto finds no layer that is not on the device: say where the rest is to be")
    needed = []
    for kind, unit in free:
        tried = placement.put(kind, unit, DEVICE)
        needed += [tried.device_bytes(elements, sizes)] if unit >= 0 else []
        if tried.device_bytes(elements, sizes) <= budget:
            placement = tried
    if min(needed) > budget:
        raise UserError(f"m6.offload.device_bytes={budget:,} holds no layer: {min(needed):,} are needed for one")
    return placement


def _named(block: Mapping[str, Any], key: str, layers: int) -> dict[int, str]:
    """Tier by layer (what is outside: -1), of those that the block names."""
    found: dict[int, str] = {}
    for tier, said in block.items():
        if said == AUTO and tier == DEVICE:
            continue
        for unit in _units(said, f"{key}.{tier}", layers):
            if found.setdefault(unit, tier) != tier:
                name = f"layer {unit}" if unit >= 0 else OUTSIDE
                raise UserError(f"{key}: {name} is on {found[unit]} and on {tier}: leave one out")
    return found


def _units(said: Any, key: str, layers: int) -> Iterator[int]:
    """Of `0-5, 8, outside`."""
    for word in str(said).split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word.strip())
        if word.strip() == OUTSIDE:
            yield -1
            continue
        if not match:
            raise UserError(f"{key}={said!r}: must be layers such as 0-5,8 or {OUTSIDE}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < layers:
            why = "the first must be the lower" if last < first else f"the model has the layers 0 to {layers - 1}"
            raise UserError(f"{key}={said!r}: {why}")
        yield from range(first, last + 1)


def _ranges(numbers: list[int]) -> str:
    """`0-5,8`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
