"""A training job as the cost model sees it, whichever program runs it: a shape, a layout over devices, a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# `selective`: attention's scores (Megatron); `alternate`: every second layer (torchtitan's "selective").
Recompute = Literal["none", "selective", "alternate", "full"]


@dataclass(frozen=True)
class Shape:
    """A transformer by its matrices. `common`: parameters of a layer that every token meets, outside of experts."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    seq: float  # positions of a row
    vocab: int
    common: float
    outside: float  # parameters of no layer: embeddings, head
    head: float  # of those, the ones that a token is multiplied by
    experts: int = 0  # of a layer of experts
    expert: float = 0.0  # parameters of one
    expert_layers: int = 0
    rows: float = 0.0  # experts that a token passes through in such a layer
    head_width: float = 0.0  # of its queries and values, the mean; 0: the heads share out the hidden size
    fused_attention: bool = True  # scores stay on the chip, and masked blocks are left out
    score_bytes: float = 5.0  # of 16 bits: what attention that is not fused keeps of a score, dropout's mask among it
    uneven: float = 1.0  # how many times more positions the fullest device has, for which all others wait
    padded: float = 1.0  # how many times longer rows are in attention than `seq`: it alone sees what is empty, too
    targets: float = 1.0  # predictions a position, each of which passes the head
    shared: bool = False  # one layer's weights serve all

    @property
    def attended(self) -> float:
        """Width of all heads together."""
        return self.heads * self.head_width or float(self.hidden)

    @property
    def all_experts(self) -> float:
        """Parameters of experts, counted by use where layers share theirs."""
        return self.expert_layers * self.experts * self.expert

    @property
    def total(self) -> float:
        """Parameters that there are."""
        return (self.layers * self.common + self.all_experts) / (self.layers if self.shared else 1) + self.outside

    @property
    def width(self) -> float:
        """Of what a dense layer stores between its two products, in hidden sizes."""
        return 0.0 if self.experts else self.ffn / self.hidden

    @property
    def matrices(self) -> float:
        """Parameters that a token is multiplied by in the layers."""
        return self.layers * self.common + self.expert_layers * self.rows * self.expert


@dataclass(frozen=True)
class Shares:
    """Of a kind of state, by the tier that it lives on."""

    device: float = 1.0
    cpu: float = 0.0
    nvme: float = 0.0

    @staticmethod
    def all_on(tier: str) -> Shares:
        return Shares(float(tier == "device"), float(tier == "cpu"), float(tier == "nvme"))


@dataclass(frozen=True)
class Layout:
    """How a job lies over devices: tensor, pipeline, data and expert parallelism, ZeRO, offload, recomputation."""

    devices: int
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1  # devices that share the positions of a row
    ep: int = 1
    zero: int = 0
    chunks: int = 1  # of layers that a device holds in an interleaved pipeline
    balanced: bool = False  # stages count embedding and head as layers
    micro_batch: int = 1  # rows
    micro_batches: int = 1  # of a device, in a step
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    overlapped: bool = False  # tensor-parallel and gradient traffic runs beside the products (Megatron from 2023 on)
    gradients_overlapped: bool = False  # their reduction alone does (torch's DistributedDataParallel)
    experts_overlapped: bool = False  # so does the all-to-all, beside another micro-batch's products
    scattered_sends: bool = True  # a pipeline stage's tensor-parallel devices send a share each, not all the same
    einsum_dispatch: bool = False  # rows reach their experts by products with one-hot masks (GShard, DeepSpeed-MoE)
    routed_once: bool = False  # a token crosses to a node once, however many of its experts are there (DeepEP)
    precision: str = "bf16"
    parameters: Shares = Shares()
    optimizer: Shares = Shares()
    activations: Shares = Shares()
    weight_bytes: int = 2
    gradient_bytes: int = 4  # of the sums
    state_bytes: int = 12  # masters and moments
    kept: float = 0.0  # gathered parameters that ZeRO-3 keeps at the most
    bucket: float = 0.0  # gradients that it scatters at once
    contiguous: bool = True  # they have a buffer of that size

    @property
    def rows(self) -> int:
        """Of a step, over all devices."""
        return self.dp * self.micro_batch * self.micro_batches


@dataclass(frozen=True)
class Job:
    shape: Shape
    layout: Layout

    @property
    def tokens(self) -> float:
        """Positions of a step."""
        return self.layout.rows * self.shape.seq

    @property
    def micro_tokens(self) -> float:
        """Positions of a micro-batch on one model-parallel group, of those that share its rows."""
        return self.layout.micro_batch * self.shape.seq / self.layout.cp
