"""The MoE layer again, in the plainest way: float64, one expert and one token at a time."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from model.config import ModelConfig
from model.moe import MoELayer


def choose(logits: list[float], config: ModelConfig) -> list[tuple[int, float]]:
    """(expert, gate) of each of a token's k choices; of equal logits the lowest number wins."""
    groups = config.k if config.routing == "prototype" else 1
    size = len(logits) // groups
    choices = []
    for group in range(groups):
        own = logits[group * size : (group + 1) * size]
        total = sum(math.exp(logit) for logit in own)
        best = sorted(range(size), key=lambda expert, own=own: -own[expert])
        for expert in best[: 1 if config.routing == "prototype" else config.k]:
            choices.append((group * size + expert, math.exp(own[expert]) / total))
    return choices


def places(tokens: int, config: ModelConfig) -> int | None:
    if config.capacity == "none":
        return None
    k = config.k if config.capacity == "kx" else 1
    return math.ceil(Fraction(config.capacity_factor) * tokens * k / config.experts)


def keep(choices: list[list[int]], valid: list[bool], limit: int | None) -> set[tuple[int, int]]:
    """The (token, choice) that find a place; all first choices come before the second ones."""
    taken: dict[int, int] = {}
    kept = set()
    for choice in range(len(choices[0]) if choices else 0):
        for token, experts in enumerate(choices):
            expert = experts[choice]
            if valid[token] and (limit is None or taken.get(expert, 0) < limit):
                taken[expert] = taken.get(expert, 0) + 1
                kept.add((token, choice))
    return kept


@dataclass
class Result:
    output: Tensor
    inputs: Tensor
    gradients: dict[str, Tensor]
    kept: set[tuple[int, int]]


def run(layer: MoELayer, x_TD: Tensor, valid_T: Tensor, probe_TD: Tensor, limit: int | None) -> Result:
    """Output, and gradients of the output's product with `probe_TD`. `layer` lends its weights only."""
    config = layer.config
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in layer.named_parameters()}
    x_TD = x_TD.detach().double().requires_grad_()
    logits_TE = x_TD @ weights["router.weight"].T
    choices = [[expert for expert, _ in choose(row, config)] for row in logits_TE.tolist()]
    kept = keep(choices, valid_T.tolist(), limit)
    size = config.experts // (config.k if config.routing == "prototype" else 1)
    rows = []
    for token in range(len(x_TD)):
        row = x_TD[token] * 0
        for choice, expert in enumerate(choices[token]):
            if (token, choice) in kept:
                first = expert // size * size
                gate = logits_TE[token, first : first + size].softmax(0)[expert - first]
                row = row + gate * _expert(weights, expert, x_TD[token], config.gated_experts)
        rows.append(row)
    output = torch.stack(rows)
    (output * probe_TD.double()).sum().backward()
    gradients = {name: _or_zero(weight) for name, weight in weights.items()}
    return Result(output.detach(), _or_zero(x_TD), gradients, kept)


def _expert(weights: dict[str, Tensor], number: int, x_D: Tensor, gated: bool) -> Tensor:
    inner = x_D @ weights["experts.w1_EDF"][number] + weights["experts.b1_EF"][number]
    if gated:
        gate, up = inner[: len(inner) // 2], inner[len(inner) // 2 :]
        inner = gate * torch.sigmoid(gate) * up
    else:
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return inner @ weights["experts.w2_EFD"][number] + weights["experts.b2_ED"][number]


def _or_zero(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
