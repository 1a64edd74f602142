"""Other implementations of a mixture of gated (SwiGLU) experts, to measure the project's own layer against.

    start_process_group()
    layer = build("Mixtral, grouped_mm", Shape(hidden=512, ffn=1024, experts=16, k=2, tokens=4096), dtype, device)

Each is a trainable module [T, D] -> [T, D] with experts of three matrices and no bias. Those from transformers and
those that DeepSpeed makes of them need `pip install -r benchmarks/requirements.txt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from training.start import init_distributed

INIT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of its input. `k` experts of width `ffn` compute for each token."""

    hidden: int
    ffn: int
    experts: int
    k: int
    tokens: int


def start_process_group() -> None:
    """Form a group of this process alone, over which DeepSpeed's layers spread their experts; takes no port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    init_distributed()


def build(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The peer `name`, one of PEERS. All weights are drawn anew: transformers leaves some without values."""
    layer = PEERS[name](shape).to(device=device, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=INIT_STD)
    return layer


class GatedLayer(nn.Module):
    """A dense gated feed-forward layer, [..., D] -> [..., D]."""

    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.w1 = nn.Linear(hidden, ffn, bias=False)
        self.w3 = nn.Linear(hidden, ffn, bias=False)
        self.w2 = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class OneSequence(nn.Module):
    """Gives [T, D] as a batch of one sequence to a layer that wants [B, S, D]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD[None])[0]


class OutputAlone(nn.Module):
    """Drops the auxiliary loss and the counts that DeepSpeed's MoE returns besides its output."""

    def __init__(self, layer: MoE):
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD)[0]


def dense(shape: Shape) -> nn.Module:
    """As many FLOPs a token as the active experts."""
    return GatedLayer(shape.hidden, shape.k * shape.ffn)


def mixtral(shape: Shape, implementation: str) -> nn.Module:
    return OneSequence(_mixtral_block(shape, implementation))


def _mixtral_block(shape: Shape, implementation: str) -> nn.Module:
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
        experts_implementation=implementation,
    )
    return MixtralSparseMoeBlock(config)


def deepspeed_moe(shape: Shape) -> nn.Module:
    """DeepSpeed's own layer, which drops tokens beyond capacity; with k=2 it samples the second expert."""
    expert = GatedLayer(shape.hidden, shape.ffn)
    layer = MoE(shape.hidden, expert, shape.experts, k=shape.k, capacity_factor=1.25, min_capacity=4)
    layer.set_deepspeed_parallelism()
    return OutputAlone(layer)


def auto_ep(shape: Shape, grouped_mm: bool) -> nn.Module:
    """A Mixtral block as DeepSpeed converts it.

    Found by a pattern, whose defaults are Mixtral's names and gates. The preset for Mixtral gives the same layer,
    but goes on to a whole model's output recorders: DeepSpeed 0.19.8 fails at those of transformers 5.23.
    """
    model = nn.ModuleDict({"moe": _mixtral_block(shape, "eager")})
    conversion = AutoEP(model, AutoEPConfig(moe_layer_pattern="moe", top_k=shape.k, use_grouped_mm=grouped_mm))
    conversion.replace_moe_layers(conversion.ep_parser(), ep_size=1, ep_rank=0)
    model["moe"].set_deepspeed_parallelism()
    return OneSequence(model["moe"])


PEERS: dict[str, Callable[[Shape], nn.Module]] = {
    "dense": dense,
    "Mixtral, eager": partial(mixtral, implementation="eager"),
    "Mixtral, grouped_mm": partial(mixtral, implementation="grouped_mm"),
    "DeepSpeed MoE": deepspeed_moe,
    "AutoEP, loop": partial(auto_ep, grouped_mm=False),
    "AutoEP, grouped_mm": partial(auto_ep, grouped_mm=True),
}
