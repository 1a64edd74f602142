"""Routers, capacity, and what is measured of them.

Shape suffixes: T tokens, D hidden size, E experts, Z prototypes, K assignments of a token (K = Z, or top-k's k),
A assignments that are kept, M modalities (image, text).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import Capacity, ModelConfig
from model.initialise import fill_normal

MODALITIES = ("image", "text")


@dataclass
class Assignments:
    """Where the tokens go. Sorted by expert; within an expert in the order in which tokens took their places."""

    slot_A: Tensor  # int64: k * T + t of each kept assignment
    place_KT: Tensor  # int64: each assignment's index in A, or A where it was dropped
    counts_E: Tensor  # int64: kept assignments of each expert


class Router(nn.Module):
    """Gate of one MoE layer, computed in fp32: 16-bit logits tie so often that rounding would choose the expert.

    `prototype` is k top-1 routing (M6-T, arXiv 2105.15082): the E experts are split into Z prototypes, each has
    its own softmax and picks its top-1; nothing is renormalised across prototypes. `top-k` takes the k largest of
    one softmax over all experts, not renormalised either, so that the two differ in routing alone.
    """

    def __init__(self, config: ModelConfig, *key: object):
        super().__init__()
        self.routing, self.k, self.experts = config.routing, config.k, config.experts
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden))
        fill_normal(self.weight, config.init_std, *key, "router")

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [T, K] fp32, expert numbers [T, K] int64, logits [T, E] fp32."""
        logits_TE = nn.functional.linear(x_TD.float(), self.weight.float())
        if self.routing == "top-k":
            gate_TK, expert_TK = logits_TE.softmax(-1).topk(self.k, dim=-1)
            return gate_TK, expert_TK, logits_TE
        probability_TZe = logits_TE.unflatten(-1, (self.k, -1)).softmax(-1)
        gate_TK, index_TK = probability_TZe.max(-1)
        first_K = torch.arange(0, self.experts, self.experts // self.k, device=x_TD.device)
        return gate_TK, index_TK + first_K, logits_TE


def places_per_expert(tokens: int, config: ModelConfig, capacity: Capacity) -> int | None:
    """Places C in one expert for the valid tokens of one rank's micro-batch; None where nothing is dropped.

    `1x`: ceil(gamma T / E), whatever k is, so that compute is constant in k; `kx`: ceil(gamma k T / E)
    (both settings of M6-T, arXiv 2105.15082).
    """
    if capacity == "none":
        return None
    assignments = tokens * (config.k if capacity == "kx" else 1)
    # Divided last: a quotient that is rounded first can come out a place too large.
    return math.ceil(config.capacity_factor * assignments / config.experts)


def assign(expert_TK: Tensor, valid_T: Tensor, experts: int, places: int | None) -> Assignments:
    """Give each valid token its places, first come first served; second choices queue behind all first choices.

    Padding takes no place and is not counted.
    """
    tokens, k = expert_TK.shape
    # Padding gets the number after the last expert, so that it sorts to the end.
    expert_S = expert_TK.masked_fill(~valid_T[:, None], experts).T.reshape(-1)
    sorted_S, order_S = expert_S.sort(stable=True)
    wanted_E = torch.bincount(expert_S, minlength=experts + 1)
    start_E = wanted_E.cumsum(0) - wanted_E
    kept_S = sorted_S < experts
    if places is not None:
        kept_S &= torch.arange(len(sorted_S), device=sorted_S.device) - start_E[sorted_S] < places
    slot_A = order_S[kept_S]
    place_S = torch.full_like(order_S, len(slot_A))
    place_S[slot_A] = torch.arange(len(slot_A), device=slot_A.device)
    counts_E = wanted_E[:experts] if places is None else wanted_E[:experts].clamp(max=places)
    return Assignments(slot_A, place_S.view(k, tokens), counts_E)


def routing_counts(
    expert_TK: Tensor, valid_T: Tensor, image_T: Tensor, assignments: Assignments, experts: int
) -> Tensor:
    """Assignments by modality and expert, [M, 2, E] int64: those wanted, and of them those kept."""
    modality_T = torch.where(image_T, 0, 1)
    cell_TK = modality_T[:, None] * experts + expert_TK
    kept_TK = (assignments.place_KT < len(assignments.slot_A)).T
    cells = [cell_TK[valid_T], cell_TK[kept_TK]]
    wanted, kept = (torch.bincount(c.reshape(-1), minlength=2 * experts).view(2, experts) for c in cells)
    return torch.stack((wanted, kept), dim=1)


def balance_loss(logits_TE: Tensor, expert_TK: Tensor, valid_T: Tensor, config: ModelConfig) -> Tensor:
    """Load-balance loss, summed over valid tokens: experts · Σ share_e · mean probability_e, mean over prototypes.

    The form of Switch (arXiv 2101.03961), 1 a token where the load is even; times the number of valid tokens,
    because it is added to a summed loss.
    """
    groups = config.k if config.routing == "prototype" else 1
    probability_TGe = logits_TE.unflatten(-1, (groups, -1)).softmax(-1)
    tokens = valid_T.sum().clamp(min=1)
    mean_E = (probability_TGe * valid_T[:, None, None]).sum(0).reshape(-1) / tokens
    share_E = torch.bincount(expert_TK[valid_T].reshape(-1), minlength=config.experts) / (tokens * config.k)
    return config.experts / groups * (share_E * mean_E).sum() * tokens


def z_loss(logits_TE: Tensor, valid_T: Tensor, config: ModelConfig) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906): squared log-partition, summed over valid tokens."""
    groups = config.k if config.routing == "prototype" else 1
    log_z_TG = logits_TE.unflatten(-1, (groups, -1)).logsumexp(-1)
    return (log_z_TG.square().mean(-1) * valid_T).sum()
