"""The experts that live on this rank.

Shape suffixes: E experts of this rank, R rows of all of them, D hidden size, F feed-forward size. Adapters are A and B
of `model/adapters.py`, with a rank between the sizes of the weight that they are beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.config import ModelConfig
from model.grouped import expert_mlp
from model.initialise import fill_normal


@dataclass(frozen=True)
class ExpertParallel:
    """This rank's part in expert parallelism. The default holds all experts and needs no process group."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None  # the ranks that share one set of experts (all-to-all)
    data_group: ProcessGroup | None = None  # the ranks that hold the same experts (ZeRO partitions)

    def local_experts(self, experts: int) -> range:
        """Numbers of the experts that live here. Raises ValueError if they do not divide."""
        if experts % self.size:
            raise ValueError(f"experts={experts} is not divisible by expert parallelism {self.size}")
        share = experts // self.size
        return range(self.rank * share, (self.rank + 1) * share)


class LocalExperts(nn.Module):
    """E of a layer's experts: two matrices with bias and GELU (M6-T), or gated (SwiGLU) as an option."""

    def __init__(self, config: ModelConfig, parallel: ExpertParallel, *key: object):
        super().__init__()
        self.numbers = parallel.local_experts(config.experts)
        self.gated = config.gated_experts
        e, d, f = len(self.numbers), config.hidden, config.ffn * (2 if self.gated else 1)
        self.w1_EDF = nn.Parameter(torch.empty(e, d, f))
        self.b1_EF = nn.Parameter(torch.zeros(e, f))
        self.w2_EFD = nn.Parameter(torch.empty(e, config.ffn, d))
        self.b2_ED = nn.Parameter(torch.zeros(e, d))
        self.adapted = config.adapter_rank > 0
        if self.adapted:
            self.w1_lora_a = nn.Parameter(torch.empty(e, d, config.adapter_rank))
            self.w1_lora_b = nn.Parameter(torch.zeros(e, config.adapter_rank, f))
            self.w2_lora_a = nn.Parameter(torch.empty(e, config.ffn, config.adapter_rank))
            self.w2_lora_b = nn.Parameter(torch.zeros(e, config.adapter_rank, d))
        if not self.w1_EDF.is_meta:  # where half a million experts would be visited for nothing
            self._fill(config.init_std, *key)
        if parallel.data_group is not None:
            self._mark(parallel)

    def _fill(self, std: float, *key: object) -> None:
        for i, number in enumerate(self.numbers):
            fill_normal(self.w1_EDF.data[i], std, *key, number, "w1")
            fill_normal(self.w2_EFD.data[i], std, *key, number, "w2")
            if self.adapted:
                for name, a in (("w1", self.w1_lora_a.data[i]), ("w2", self.w2_lora_a.data[i])):
                    fill_normal(a, len(a) ** -0.5, *key, number, name, "adapter")

    def _mark(self, parallel: ExpertParallel) -> None:
        """Tell ZeRO-3 to partition these over the ranks that hold the same experts.

        Here and no later: zero.Init partitions a module the moment its constructor returns, and partitions made
        over other groups on other ranks would wait for each other for ever.
        """
        name = f"ep_size_{parallel.size}"
        parameter: Any  # gets attributes that torch does not know
        for parameter in self.parameters():
            parameter.allreduce = False
            parameter.group_name = parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_process_group = parallel.data_group

    def forward(self, x_RD: Tensor, sizes: Sequence[int]) -> Tensor:
        """[R, D] -> [R, D]: rows sorted by expert, `sizes[e]` of them for this rank's expert e."""
        adapters = self.adapted and (self.w1_lora_a, self.w1_lora_b, self.w2_lora_a, self.w2_lora_b)
        weights = self.w1_EDF, self.b1_EF, self.w2_EFD, self.b2_ED
        return expert_mlp(x_RD, *weights, self.gated, sizes, adapters or ())
