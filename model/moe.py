"""The expert-parallel feed-forward layer: route, dispatch, compute, combine.

Shape suffixes: T tokens of this rank, D hidden size, K assignments of a token, A kept assignments of this rank,
R rows received from all ranks, E experts (of the layer, or of this rank where said), C places in an expert's
buffer, P ranks that share one set of experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import routing
from model.config import ModelConfig
from model.experts import ExpertParallel, LocalExperts

# Expert buffers are rounded up to this many places: on CPU each new GEMM shape is compiled anew (oneDNN).
PLACES_MULTIPLE = 32


class MoELayer(nn.Module):
    """Experts behind a router (M6-T, arXiv 2105.15082), spread over the ranks of `parallel`."""

    def __init__(self, config: ModelConfig, parallel: ExpertParallel, *key: object):
        super().__init__()
        self.config, self.parallel = config, parallel
        self.num_experts = config.experts
        self.router = routing.Router(config, *key)
        self.experts = LocalExperts(config, parallel, *key)

    def forward(self, x_TD: Tensor, valid_T: Tensor, image_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [T, D] (zero for padding and for tokens dropped everywhere), auxiliary loss (a scalar, summed
        over tokens), and routing counts [2, 2, E] (see `routing.routing_counts`).

        Capacity holds in training only: evaluation and decoding drop nothing, or decoding with a cache could
        not agree with decoding without.
        """
        config = self.config
        gate_TK, expert_TK, logits_TE = self.router(x_TD)
        capacity = config.capacity if self.training else "none"
        places = None if capacity == "none" else routing.places_per_expert(int(valid_T.sum()), config, capacity)
        assignments = routing.assign(expert_TK, valid_T, config.experts, places)
        rows_KTD = self._run_experts(x_TD, assignments)
        y_TD = (rows_KTD * gate_TK.T[:, :, None]).sum(0).to(x_TD.dtype)
        counts = routing.routing_counts(expert_TK, valid_T, image_T, assignments, config.experts)
        return y_TD, self._auxiliary_loss(logits_TE, expert_TK, valid_T), counts

    def _auxiliary_loss(self, logits_TE: Tensor, expert_TK: Tensor, valid_T: Tensor) -> Tensor:
        loss = logits_TE.new_zeros(())
        if self.config.balance_loss:
            loss = loss + self.config.balance_loss * routing.balance_loss(logits_TE, expert_TK, valid_T, self.config)
        if self.config.z_loss:
            loss = loss + self.config.z_loss * routing.z_loss(logits_TE, valid_T, self.config)
        return loss

    def _run_experts(self, x_TD: Tensor, assignments: routing.Assignments) -> Tensor:
        """Each assignment's expert output, [K, T, D]; zero where the assignment was dropped."""
        k, tokens = assignments.place_KT.shape
        slot_A, place_KT = assignments.slot_A, assignments.place_KT
        rows_AD = MoveRows.apply(x_TD, slot_A % tokens, place_KT)
        counts_PE = assignments.counts_E.view(self.parallel.size, -1)
        if self.parallel.size == 1:
            rows_AD = self._compute(rows_AD, counts_PE)
        else:
            received_PE = self._exchange_counts(counts_PE)
            sent, received = torch.stack((counts_PE.sum(1), received_PE.sum(1))).tolist()
            rows_RD = AllToAll.apply(rows_AD, self.parallel.group, sent, received)
            rows_RD = self._compute(rows_RD, received_PE)
            rows_AD = AllToAll.apply(rows_RD, self.parallel.group, received, sent)
        return MoveRows.apply(rows_AD, place_KT.reshape(-1), slot_A[None]).view(k, tokens, -1)

    def _exchange_counts(self, counts_PE: Tensor) -> Tensor:
        received_PE = torch.empty_like(counts_PE)
        dist.all_to_all_single(received_PE, counts_PE.contiguous(), group=self.parallel.group)
        return received_PE

    def _compute(self, rows_RD: Tensor, counts_PE: Tensor) -> Tensor:
        """Run this rank's experts on rows that arrive ordered by source rank, then expert."""
        place_R, places = expert_places(counts_PE)
        experts = counts_PE.shape[1]
        row_EC = torch.full((experts * places,), len(place_R), device=place_R.device)
        row_EC[place_R] = torch.arange(len(place_R), device=place_R.device)
        buffer_ECD = MoveRows.apply(rows_RD, row_EC, place_R[None]).view(experts, places, -1)
        return MoveRows.apply(self.experts(buffer_ECD).flatten(0, 1), place_R, row_EC[None])


def expert_places(counts_PE: Tensor) -> tuple[Tensor, int]:
    """Where each received row goes in the buffers [E, C], as e * C + c, and C."""
    total_E = counts_PE.sum(0)
    fullest = int(total_E.max())
    places = max(-(-fullest // PLACES_MULTIPLE), 1) * PLACES_MULTIPLE
    cell_PE = counts_PE.cumsum(0) - counts_PE + torch.arange(counts_PE.shape[1], device=total_E.device) * places
    flat_count, flat_cell = counts_PE.reshape(-1), cell_PE.reshape(-1)
    start = flat_count.cumsum(0) - flat_count
    offset_R = torch.repeat_interleave(flat_cell - start, flat_count)
    return offset_R + torch.arange(len(offset_R), device=offset_R.device), places


class MoveRows(torch.autograd.Function):
    """Gather rows forward, and gather again backward: deterministic on every device, and no scattered adds.

    `index` [A] picks rows of `x` [S, D]; the index S stands for a row of zeros. `inverse` [K, S] says to which
    of the A outputs each input row went (A: to none), K times at the most.
    """

    @staticmethod
    def forward(ctx, x_SD: Tensor, index_A: Tensor, inverse_KS: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_KS)
        return _gather_or_zero(x_SD, index_A)

    @staticmethod
    def backward(ctx, grad_AD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_KS,) = ctx.saved_tensors
        grad_SD = _gather_or_zero(grad_AD, inverse_KS[0])
        for inverse_S in inverse_KS[1:]:
            grad_SD += _gather_or_zero(grad_AD, inverse_S)
        return grad_SD, None, None


def _gather_or_zero(x_SD: Tensor, index_A: Tensor) -> Tensor:
    if not len(x_SD):
        return x_SD.new_zeros(len(index_A), x_SD.shape[1])
    rows_AD = x_SD.index_select(0, index_A.clamp(max=len(x_SD) - 1))
    return rows_AD.masked_fill_((index_A == len(x_SD))[:, None], 0)


class AllToAll(torch.autograd.Function):
    """Exchange rows between the ranks of `group`; backward sends the gradients home."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup | None, sent: list[int], received: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _exchange(rows, group, sent, received)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.group, ctx.received, ctx.sent), None, None, None


def _exchange(rows: Tensor, group: dist.ProcessGroup | None, sent: list[int], received: list[int]) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
