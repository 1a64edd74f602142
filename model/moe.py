"""The expert-parallel feed-forward layer: route, dispatch, compute, combine.

Shape suffixes: T tokens of this rank, D hidden size, K assignments of a token, A kept assignments of this rank,
R rows received from all ranks, B rows of the experts' blocks (R and filler), E experts (of the layer, or of this rank
where said), P ranks that share one set of experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import routing
from model.config import ModelConfig
from model.experts import ExpertParallel, LocalExperts
from model.grouped import few_sizes
from model.rows import MoveRows, SumRows, inverse_index


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
        y_TD = self._run_experts(x_TD, gate_TK, assignments)
        counts = routing.routing_counts(expert_TK, valid_T, image_T, assignments, config.experts)
        return y_TD, self._auxiliary_loss(logits_TE, expert_TK, valid_T), counts

    def extend(self, x_TD: Tensor) -> Tensor:
        """Output [T, D] of tokens all valid, where nothing is dropped or counted: in decoding."""
        gate_TK, expert_TK, _ = self.router(x_TD)
        valid_T = torch.ones_like(x_TD[:, 0], dtype=torch.bool)
        return self._run_experts(x_TD, gate_TK, routing.assign(expert_TK, valid_T, self.config.experts, None))

    def _auxiliary_loss(self, logits_TE: Tensor, expert_TK: Tensor, valid_T: Tensor) -> Tensor:
        loss = logits_TE.new_zeros(())
        if self.config.balance_loss:
            loss = loss + self.config.balance_loss * routing.balance_loss(logits_TE, expert_TK, valid_T, self.config)
        if self.config.z_loss:
            loss = loss + self.config.z_loss * routing.z_loss(logits_TE, valid_T, self.config)
        return loss

    def _run_experts(self, x_TD: Tensor, gate_TK: Tensor, assignments: routing.Assignments) -> Tensor:
        """The sum of each token's expert outputs, weighted by their gates [T, D]; zero where all were dropped."""
        slot_A, place_KT = assignments.slot_A, assignments.place_KT
        token_A = slot_A % len(x_TD)
        rows_AD = MoveRows.apply(x_TD, token_A, place_KT)
        counts_PE = assignments.counts_E.view(self.parallel.size, -1)
        if self.parallel.size == 1:
            rows_AD = self._compute(rows_AD, counts_PE)
        else:
            received_PE = self._exchange_counts(counts_PE)
            sent, received = torch.stack((counts_PE.sum(1), received_PE.sum(1))).tolist()
            rows_RD = AllToAll.apply(rows_AD, self.parallel.group, sent, received)
            rows_RD = self._compute(rows_RD, received_PE)
            rows_AD = AllToAll.apply(rows_RD, self.parallel.group, received, sent)
        gate_A = gate_TK.T.reshape(-1)[slot_A]
        return SumRows.apply(rows_AD * gate_A[:, None], place_KT, token_A).to(x_TD.dtype)

    def _exchange_counts(self, counts_PE: Tensor) -> Tensor:
        received_PE = torch.empty_like(counts_PE)
        dist.all_to_all_single(received_PE, counts_PE.contiguous(), group=self.parallel.group)
        return received_PE

    def _compute(self, rows_RD: Tensor, counts_PE: Tensor) -> Tensor:
        """Run this rank's experts on rows that arrive ordered by source rank, then expert."""
        counts_E = counts_PE.sum(0).tolist()
        sizes = [few_sizes(count, rows_RD) for count in counts_E]
        if len(counts_PE) == 1 and sizes == counts_E:
            return self.experts(rows_RD, sizes)
        place_R = block_places(counts_PE, sizes)
        row_B = inverse_index(place_R, sum(sizes))
        rows_BD = self.experts(MoveRows.apply(rows_RD, row_B, place_R[None]), sizes)
        return MoveRows.apply(rows_BD, place_R, row_B[None])


def block_places(counts_PE: Tensor, sizes: Sequence[int]) -> Tensor:
    """Where each received row goes, [R], if every expert has its block, as long as `sizes` says, in their order."""
    size_E = torch.tensor(sizes, device=counts_PE.device)
    cell_PE = counts_PE.cumsum(0) - counts_PE + size_E.cumsum(0) - size_E
    flat_count, flat_cell = counts_PE.reshape(-1), cell_PE.reshape(-1)
    start = flat_count.cumsum(0) - flat_count
    offset_R = torch.repeat_interleave(flat_cell - start, flat_count)
    return offset_R + torch.arange(len(offset_R), device=offset_R.device)


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
