"""Many experts at once: rows sorted by expert, each block of rows through its own expert's two matrices.

Shape suffixes: E experts, R rows of all blocks, B rows of one block, D hidden size, F feed-forward size, I columns of
the first matrix: F, or 2 F where a gate stands beside its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# oneDNN compiles a kernel for each GEMM shape it has not seen, at several times the cost of the product itself.
# So 16-bit sizes are rounded up to these many an octave, and to a whole number of the smallest tile.
SIZES_AN_OCTAVE, LEAST_SIZE = 16, 16
# Of torch's grouped products on GPUs: where blocks of rows begin, and bytes that rows are a multiple of.
DEVICE_MULTIPLE, DEVICE_BYTES = 16, 16


def few_sizes(size: int, like: Tensor) -> int:
    """`size` rounded up, where products of tensors such as `like` are quicker if their sizes are few.

    On CPU at most a sixteenth is added, beyond LEAST_SIZE, and 0 stays 0. On GPUs no block is empty: gradients of empty
    ones have been seen to be wrong (pytorch issue 172439).
    """
    if like.device.type != "cpu":
        return max(-(-size // DEVICE_MULTIPLE), 1) * DEVICE_MULTIPLE
    if _multiplied_in_fp32(like):
        return size
    step = max(2 ** (size - 1).bit_length() // 2 // SIZES_AN_OCTAVE, LEAST_SIZE)
    return -(-size // step) * step


def expert_mlp(
    x_RD: Tensor,
    w1_EDI: Tensor,
    b1_EI: Tensor,
    w2_EFD: Tensor,
    b2_ED: Tensor,
    gated: bool,
    sizes: Sequence[int],
) -> Tensor:
    """[R, D]: the first sizes[0] rows through expert 0, the next sizes[1] through expert 1, and so on."""
    widths = (*w1_EDI.shape[1:], *w2_EFD.shape[1:])
    aligned = all(width * x_RD.element_size() % DEVICE_BYTES == 0 for width in widths)
    if x_RD.device.type == "cpu" or not aligned:
        return _ExpertByExpert.apply(x_RD, w1_EDI, b1_EI, w2_EFD, b2_ED, gated, sizes)
    return all_experts_at_once(x_RD, w1_EDI, b1_EI, w2_EFD, b2_ED, gated, sizes)


def all_experts_at_once(
    x_RD: Tensor,
    w1_EDI: Tensor,
    b1_EI: Tensor,
    w2_EFD: Tensor,
    b2_ED: Tensor,
    gated: bool,
    sizes: Sequence[int],
) -> Tensor:
    """`expert_mlp` by torch's grouped products, as GPUs like it."""
    size_E = torch.tensor(sizes, device=x_RD.device)
    end_E = size_E.cumsum(0).int()
    # Biases by a product, whose gradient is a sum in a fixed order.
    own_RE = F.one_hot(torch.repeat_interleave(size_E, output_size=len(x_RD)), len(sizes)).to(x_RD.dtype)
    inner_RI = F.grouped_mm(x_RD, w1_EDI, offs=end_E) + own_RE @ b1_EI
    return F.grouped_mm(activate(inner_RI, gated), w2_EFD, offs=end_E) + own_RE @ b2_ED


class _ExpertByExpert(torch.autograd.Function):
    """`expert_mlp` on CPU: all of one expert's work before the next, so that its rows stay in the cache.

    Blocks are not padded to the largest, and each weight's gradient is written once, where it belongs: indexing weights
    before autograd's eyes would write a gradient of all experts for each of them.
    """

    @staticmethod
    def forward(
        ctx,
        x_RD: Tensor,
        w1_EDI: Tensor,
        b1_EI: Tensor,
        w2_EFD: Tensor,
        b2_ED: Tensor,
        gated: bool,
        sizes: Sequence[int],
    ) -> Tensor:
        inner_RI, y_RD = x_RD.new_empty(len(x_RD), w1_EDI.shape[2]), torch.empty_like(x_RD)
        for expert, rows in _blocks(sizes):
            if not sizes[expert]:
                continue  # the most of them, where a few tokens are decoded
            inner_BI = _multiply(x_RD[rows], w1_EDI[expert], inner_RI[rows]).add_(b1_EI[expert])
            _multiply(activate(inner_BI, gated), w2_EFD[expert], y_RD[rows]).add_(b2_ED[expert])
        # The parameters themselves, not views: ZeRO-3 gives them their values anew before backward.
        ctx.save_for_backward(x_RD, inner_RI, w1_EDI, w2_EFD)
        ctx.gated, ctx.sizes = gated, sizes
        return y_RD

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_RI, w1_EDI, w2_EFD = ctx.saved_tensors
        grad_in_RD, grad_w1, grad_w2 = torch.empty_like(x_RD), torch.empty_like(w1_EDI), torch.empty_like(w2_EFD)
        grad_b1, grad_b2 = x_RD.new_empty(len(w1_EDI), w1_EDI.shape[2]), x_RD.new_empty(len(w2_EFD), w2_EFD.shape[2])
        for expert, rows in _blocks(ctx.sizes):
            grad_BD = grad_RD[rows]
            grad_BF = _multiply(grad_BD, w2_EFD[expert].T, grad_RD.new_empty(len(grad_BD), w2_EFD.shape[1]))
            activated_BF, grad_BI = _activate_backward(grad_BF, inner_RI[rows], ctx.gated)
            _multiply(activated_BF.T, grad_BD, grad_w2[expert])
            torch.sum(grad_BD, 0, out=grad_b2[expert])
            _multiply(x_RD[rows].T, grad_BI, grad_w1[expert])
            torch.sum(grad_BI, 0, out=grad_b1[expert])
            _multiply(grad_BI, w1_EDI[expert].T, grad_in_RD[rows])
        return grad_in_RD, grad_w1, grad_b1, grad_w2, grad_b2, None, None


def _blocks(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each expert's number and rows; of an empty block too, whose gradients are zero."""
    end = 0
    for expert, size in enumerate(sizes):
        yield expert, slice(end, end := end + size)


def activate(inner: Tensor, gated: bool) -> Tensor:
    """GELU, or SwiGLU (arXiv 2002.05202), whose gate comes first: [..., I] -> [..., F]."""
    if not gated:
        return F.gelu(inner)
    gate, up = inner.chunk(2, -1)
    return F.silu(gate) * up


def _activate_backward(grad_BF: Tensor, inner_BI: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """What `activate` gave [B, F], again, and the gradient of what it took [B, I]."""
    if not gated:
        return F.gelu(inner_BI), torch.ops.aten.gelu_backward(grad_BF, inner_BI)
    gate_BF, up_BF = inner_BI.chunk(2, -1)
    silu_BF, grad_BI = F.silu(gate_BF), torch.empty_like(inner_BI)
    grad_gate_BF, grad_up_BF = grad_BI.chunk(2, -1)
    torch.mul(grad_BF, silu_BF, out=grad_up_BF)
    torch.ops.aten.silu_backward.grad_input(grad_BF.mul_(up_BF), gate_BF, grad_input=grad_gate_BF)
    return silu_BF.mul_(up_BF), grad_BI


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into `out`, which is returned."""
    if a.dtype.itemsize < 4 and _multiplied_in_fp32(a):
        return out.copy_(a.float() @ b.float())
    return torch.mm(a, b, out=out)


def _multiplied_in_fp32(factor: Tensor) -> bool:
    """Whether such tensors are multiplied as fp32 on CPU, by MKL, which compiles nothing.

    16-bit ones are where oneDNN has no kernels for them, as with AVX2 alone: torch's own loops take a hundred times as
    long.
    """
    if factor.device.type != "cpu":
        return False
    return factor.dtype.itemsize > 2 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
