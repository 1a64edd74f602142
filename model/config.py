"""Model shapes: the settings, the named presets and what they count to.

Imports no torch, so that planning and recipe checks start in an instant.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from model.parts import ADAPTERS, WHOLE

MOST_IMAGE_CODES = 2**16  # they are stored in 16 bits
MOST_SCORES = 2**25  # of attention, of all rows and heads of a batch: a CPU keeps as many numbers a layer in training
MOST_CAPACITY = 1_000_000  # places for an even share: far more than any number of tokens fills

Routing = Literal["prototype", "top-k"]
Capacity = Literal["1x", "kx", "none"]
ImageInput = Literal["features", "pixels"]

SEGMENTS = 3  # image, source text, target text


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one M6 transformer (M6, arXiv 2103.00823; M6-T, 2105.15082; M6-10T, 2110.03888).

    A sequence is `[image patches][source text][target]`. `experts == 0` means a dense feed-forward layer.
    Raises ValueError, in one line, for a shape that cannot be built.
    """

    layers: int
    hidden: int
    ffn: int  # width of one expert (or of the dense feed-forward layer)
    heads: int
    experts: int = 0
    routing: Routing = "prototype"
    k: int = 1  # prototypes (k top-1), or the k of top-k
    capacity: Capacity = "1x"  # compute constant in k (1x), growing with k (kx), or nothing dropped (none)
    capacity_factor: float = 1.25
    gated_experts: bool = False
    balance_loss: float = 0.0  # M6-T finds that it hurts: off by default
    z_loss: float = 0.0
    share_layers: bool = False  # M6-10T's Pseudo stage: one physical layer called `layers` times
    text_vocab: int = 21_128
    image_codes: int = 1_024
    max_positions: int = 512
    image_input: ImageInput = "features"
    image_patches: int = 16
    image_channels: int = 2_048  # of one patch: CNN channels, or 3 * p * p pixels
    bag_width: int = 0  # of the sums that search goes by beside the trunk (`model/bags.py`); 0: the trunk alone
    init_std: float = 0.02
    adapter_rank: int = 0  # of low-rank adapters of attention, feed-forward layers and bags; 0: none

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "k", "text_vocab", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("experts", "image_codes", "image_patches", "image_channels", "bag_width", "adapter_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("balance_loss", "z_loss", "init_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number from 0")
        for name, allowed in (("routing", Routing), ("capacity", Capacity), ("image_input", ImageInput)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(allowed))}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not divisible by heads={self.heads}")
        if self.experts and self.k > self.experts:
            raise ValueError(f"k={self.k} is more than experts={self.experts}")
        if self.experts and self.routing == "prototype" and self.experts % self.k:
            raise ValueError(f"experts={self.experts} is not divisible into k={self.k} prototypes")
        if not 0 < self.capacity_factor <= MOST_CAPACITY:
            raise ValueError(f"capacity_factor={self.capacity_factor}: must be over 0 and at most {MOST_CAPACITY:,}")
        if self.adapter_rank >= min(self.hidden, self.ffn):
            raise ValueError(f"adapter_rank={self.adapter_rank}: must be less than hidden and ffn, or it is not low")
        if self.init_std > 1:
            raise ValueError(f"init_std={self.init_std}: must be at most 1")

    @property
    def vocab(self) -> int:
        """Entries of the one vocabulary: text pieces, then image codes."""
        return self.text_vocab + self.image_codes

    @property
    def experts_used(self) -> int:
        """Experts that the capacity mode lets a token use, on average and at the most."""
        return 1 if not self.experts or self.capacity == "1x" else self.k

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert (or of the dense feed-forward layer): two matrices with bias, three if gated."""
        inputs = 2 if self.gated_experts else 1
        return (inputs + 1) * self.hidden * self.ffn + inputs * self.ffn + self.hidden

    @property
    def adapter_parameters(self) -> tuple[int, int, int]:
        """Of the adapters of one layer's attention, of one expert (or dense feed-forward layer), and of the bags."""
        inputs, bags = 2 if self.gated_experts else 1, bool(self.bag_width)
        attention, expert = 6 * self.hidden, 2 * self.hidden + (inputs + 1) * self.ffn
        maps_and_tables = 2 * bags * (self.image_channels + self.text_vocab + 2 * self.bag_width)
        return attention * self.adapter_rank, expert * self.adapter_rank, maps_and_tables * self.adapter_rank

    def parameter_counts(self) -> ParameterCounts:
        """Exact counts by component, equal to the built model's."""
        h, physical = self.hidden, 1 if self.share_layers else self.layers
        attention = 4 * h * h + 4 * h
        norms = 4 * h
        router = h * self.experts
        experts = max(self.experts, 1) * self.expert_parameters
        embeddings = (self.vocab + self.max_positions + SEGMENTS) * h
        image = self.image_channels * h + h + self.image_patches * h + 2 * h
        beside_attention, beside_expert, beside_bags = self.adapter_parameters
        layer_active = attention + norms + router + beside_attention
        layer_active += self.experts_used * (self.expert_parameters + beside_expert)
        return ParameterCounts(
            embeddings=embeddings,
            image=image,
            attention=physical * attention,
            norms=physical * norms + 2 * h,
            routers=physical * router,
            experts=physical * experts,
            bags=2 * (self.image_channels + 1 + self.text_vocab) * self.bag_width,
            adapters=physical * (beside_attention + max(self.experts, 1) * beside_expert) + beside_bags,
            active=embeddings + image + 2 * h + self.layers * layer_active,
        )

    def training_flops(
        self, tokens: int, targets: int, assignments: int | None = None, trained: Collection[str] = WHOLE
    ) -> int:
        """FLOPs of forward + backward through the active matrices: 2 + 4 a parameter and position, 2 + 2 if frozen.

        `tokens`: positions through the trunk; `targets`: positions through the vocabulary head; `assignments`:
        rows through experts over all layers, as counted, or None for as many as the capacity mode lets through;
        `trained`: the parts of the model that are. Attention scores and recomputation are not counted.
        """
        if assignments is None:
            assignments = tokens * self.layers * self.experts_used
        inputs, positions = 2 if self.gated_experts else 1, tokens * self.layers
        beside_attention, beside_expert, _ = self.adapter_parameters
        matrices = {
            "attention": positions * 4 * self.hidden * self.hidden,
            "routers": positions * self.hidden * self.experts,
            "experts": assignments * (inputs + 1) * self.hidden * self.ffn,
            ADAPTERS: positions * beside_attention + assignments * beside_expert,
            "embeddings": targets * self.vocab * self.hidden,
        }
        return sum(count * (6 if part in trained else 4) for part, count in matrices.items())


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by component.

    `active` is what one token passes through: shared layers are counted by call, bags not at all.
    """

    embeddings: int
    image: int
    attention: int
    norms: int
    routers: int
    experts: int
    bags: int
    adapters: int
    active: int

    @property
    def total(self) -> int:
        return self.of(WHOLE)

    def of(self, parts: Collection[str]) -> int:
        """Of some parts of the model (`model/parts.py`) together."""
        return sum(getattr(self, part) for part in parts)


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """The shape of one image tokenizer (`model/image_tokens.py`): square pictures <-> a square grid of codes.

    A picture is cut into patches of `patch` px, the finest grid; each further width halves the grid. So a code stands
    for `cell` = patch * 2 ** (widths - 1) px a side, and a picture is (side / cell) ** 2 codes.
    Raises ValueError, in one line, for a shape that cannot be built.
    """

    side: int = 64  # px of the pictures that it is trained on; it codes others of whole cells, too
    patch: int = 2
    widths: tuple[int, ...] = (32, 64, 128)  # channels, from the finest grid to that of the codes
    blocks: int = 1  # residual blocks a grid
    levels: tuple[int, ...] = (8, 5, 5, 5)  # of each quantised channel (FSQ, arXiv 2309.15505, table 1)

    def __post_init__(self) -> None:
        for name in ("side", "patch", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths={list(self.widths)}: must be channels of one grid or more, each from 1")
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels={list(self.levels)}: must be levels of one channel or more, each from 2")
        if self.codes > MOST_IMAGE_CODES:
            raise ValueError(f"levels={list(self.levels)}: {self.codes:,} codes are more than {MOST_IMAGE_CODES:,}")
        if self.side % self.cell:
            raise ValueError(f"side={self.side} is not divisible into cells of {self.cell} px")

    @property
    def cell(self) -> int:
        """px a side that one code stands for."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Codes a side of a picture of `side` px."""
        return self.side // self.cell

    @property
    def codes(self) -> int:
        """Entries of the codebook."""
        return math.prod(self.levels)


@dataclass(frozen=True)
class Preset:
    config: ModelConfig
    published: float | None = None  # total parameters as published
    source: str = ""


_M6T: dict[str, Any] = {"hidden": 1024, "heads": 16}

PRESETS: dict[str, Preset] = {
    "m6-tiny": Preset(
        ModelConfig(layers=4, hidden=256, ffn=1024, heads=4, experts=16, k=2, text_vocab=16_000, image_channels=1_280)
    ),
    "m6-small": Preset(
        ModelConfig(layers=8, hidden=512, ffn=2048, heads=8, experts=32, k=2, text_vocab=16_000, image_channels=1_280)
    ),
    "m6-base": Preset(ModelConfig(layers=24, ffn=4096, **_M6T), 327e6, "arXiv 2103.00823"),
    "m6-10b": Preset(ModelConfig(layers=50, hidden=4096, ffn=16384, heads=128), 10e9, "arXiv 2103.00823"),
    "m6-t-1.4b": Preset(ModelConfig(layers=5, ffn=4096, experts=32, **_M6T), 1.4e9, "arXiv 2105.15082"),
    "m6-t-10b": Preset(ModelConfig(layers=10, ffn=4096, experts=128, **_M6T), 10.8e9, "arXiv 2105.15082"),
    "m6-t-100b": Preset(ModelConfig(layers=24, ffn=4096, experts=512, **_M6T), 103.2e9, "arXiv 2105.15082"),
    "m6-1t": Preset(
        # M6-T cuts the initial weights' deviation tenfold for stability at this size.
        ModelConfig(layers=24, ffn=21248, experts=960, init_std=0.002, **_M6T),
        1002.7e9,
        "arXiv 2105.15082",
    ),
    "m6-10t": Preset(
        ModelConfig(layers=48, ffn=9984, experts=10_240, k=80, init_std=0.002, **_M6T),
        10.05e12,
        "arXiv 2110.03888",
    ),
}
