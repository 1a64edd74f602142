"""Products of many experts at once: rows sorted by expert, each block of rows times its own expert's matrix.

Shape suffixes: E experts, R rows of all blocks, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# oneDNN compiles a kernel for each GEMM shape it has not seen, at several times the cost of the product itself.
# So 16-bit sizes are rounded up to these many an octave, and to a whole number of the smallest tile.
SIZES_AN_OCTAVE, LEAST_SIZE = 8, 32
# What torch's grouped product on GPUs wants blocks of rows to begin at.
DEVICE_MULTIPLE = 16


def few_sizes(size: int, like: Tensor) -> int:
    """`size` rounded up, where products of tensors such as `like` are quicker if their sizes are few; 0 stays 0.

    At most an eighth is added, beyond LEAST_SIZE.
    """
    if like.device.type != "cpu":
        return -(-size // DEVICE_MULTIPLE) * DEVICE_MULTIPLE
    if like.dtype.itemsize > 2:  # those products are MKL's, which compiles nothing
        return size
    step = max(2 ** (size - 1).bit_length() // 2 // SIZES_AN_OCTAVE, LEAST_SIZE)
    return -(-size // step) * step


def grouped_linear(x_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, sizes: Sequence[int]) -> Tensor:
    """[R, O]: the first sizes[0] rows through expert 0, the next sizes[1] through expert 1, and so on."""
    if x_RI.device.type == "cpu":
        return _Blockwise.apply(x_RI, weight_EIO, bias_EO, sizes)
    size_E = torch.tensor(sizes, device=x_RI.device)
    expert_R = torch.repeat_interleave(size_E, output_size=len(x_RI))
    # The bias by a product, whose gradient is a sum in a fixed order.
    bias_RO = F.one_hot(expert_R, len(sizes)).to(bias_EO.dtype) @ bias_EO
    return F.grouped_mm(x_RI, weight_EIO, offs=size_E.cumsum(0).int()) + bias_RO


class _Blockwise(torch.autograd.Function):
    """One product a block, written where it belongs: no padding to the largest block, and no gradient added up.

    The weights are indexed in here, not by autograd, which would write a gradient of their full size for each expert.
    """

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EIO)
        ctx.sizes = sizes
        y_RO = x_RI.new_empty(len(x_RI), weight_EIO.shape[2])
        for expert, rows in _blocks(sizes):
            torch.addmm(bias_EO[expert], x_RI[rows], weight_EIO[expert], out=y_RO[rows])
        return y_RO

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_RI, weight_EIO = ctx.saved_tensors
        grad_RI, grad_EIO = torch.empty_like(x_RI), torch.empty_like(weight_EIO)
        grad_EO = grad_RO.new_zeros(len(weight_EIO), grad_RO.shape[1])
        for expert, rows in _blocks(ctx.sizes):
            torch.mm(grad_RO[rows], weight_EIO[expert].T, out=grad_RI[rows])
            torch.mm(x_RI[rows].T, grad_RO[rows], out=grad_EIO[expert])
            torch.sum(grad_RO[rows], 0, out=grad_EO[expert])
        return grad_RI, grad_EIO, grad_EO, None


def _blocks(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each expert's number and rows; an empty block too, whose gradient is zero."""
    end = 0
    for expert, size in enumerate(sizes):
        yield expert, slice(end, end := end + size)
