"""Initial weights as a function of (seed, name) alone.

A weight never depends on the rank that holds it, on the order of construction or on the device, so that every
expert-parallel size, world size and offload tier starts from the same model.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters import SCALE, adapted


def fill_normal(tensor: Tensor, std: float, *key: object) -> None:
    """Fill `tensor` in place from N(0, std²), keyed by `key` (seed, layer, expert, name …)."""
    if tensor.is_meta:
        return
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
    # Drawn in fp32 on the CPU whatever the tensor's own type and device: those must not change the model.
    # `empty_like`, because DeepSpeed's zero.Init overrides `torch.empty` and its like.
    with torch.no_grad():
        tensor.copy_(torch.empty_like(tensor, dtype=torch.float32, device="cpu").normal_(0, std, generator=generator))


class Linear(nn.Linear):
    """nn.Linear that draws its weight from its key; the bias starts at zero. It may have an adapter."""

    def __init__(self, inputs: int, outputs: int, std: float, *key: object, adapter_rank: int = 0):
        super().__init__(inputs, outputs)
        fill_normal(self.weight, std, *key)
        if not self.bias.is_meta:
            nn.init.zeros_(self.bias)
        self.adapted = adapter_rank > 0
        if self.adapted:
            self.weight_lora_a = nn.Parameter(torch.empty(adapter_rank, inputs))
            self.weight_lora_b = nn.Parameter(torch.zeros(outputs, adapter_rank))
            fill_normal(self.weight_lora_a, inputs**-0.5, *key, "adapter")

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return adapted(y, x, self.weight_lora_a, self.weight_lora_b) if self.adapted else y

    def reset_parameters(self) -> None:
        """Nothing: the constructor fills the weight, once."""


class Table(nn.Module):
    """A learnt table [rows, width], added where the caller says."""

    def __init__(self, rows: int, width: int, std: float, *key: object):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        fill_normal(self.weight, std, *key)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Vocabulary(nn.Module):
    """A tied table of entries: ids -> embeddings, hidden states -> logits. It may have an adapter."""

    def __init__(self, entries: int, width: int, std: float, *key: object, adapter_rank: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(entries, width))
        fill_normal(self.weight, std, *key)
        self.adapted = adapter_rank > 0
        if self.adapted:
            self.weight_lora_a = nn.Parameter(torch.empty(adapter_rank, width))
            self.weight_lora_b = nn.Parameter(torch.zeros(entries, adapter_rank))
            fill_normal(self.weight_lora_a, width**-0.5, *key, "adapter")

    def forward(self, x: Tensor, entries: range | None = None) -> Tensor:
        """Integers [...] -> [..., D]; floats [..., D] -> logits [..., V] of all entries or of some.

        Both ways go through the module's call, because ZeRO-3 gathers a weight when its module is called.
        """
        if not x.is_floating_point():
            y = F.embedding(x, self.weight)
            return y + SCALE * F.embedding(x, self.weight_lora_b) @ self.weight_lora_a if self.adapted else y
        own = slice(None) if entries is None else slice(entries.start, entries.stop)
        y = F.linear(x, self.weight[own])
        return adapted(y, x, self.weight_lora_a, self.weight_lora_b[own]) if self.adapted else y
