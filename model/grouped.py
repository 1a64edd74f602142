"""Many experts at once: rows sorted by expert, each block of rows through its own expert's two matrices.

Shape suffixes: E experts, R rows of all blocks, B rows of one block, D hidden size, F feed-forward size, I columns of
the first matrix: F, or 2 F where a gate stands beside its input; of either matrix, I inputs, O outputs, r the rank of
an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.adapters import SCALE

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
    if multiplied_in_fp32(like):
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
    adapters: Sequence[Tensor] = (),
) -> Tensor:
    """[R, D]: the first sizes[0] rows through expert 0, the next sizes[1] through expert 1, and so on.

    `adapters`: A and B beside the first matrix, then beside the second (`model/adapters.py`), or none.
    """
    widths = (*w1_EDI.shape[1:], *w2_EFD.shape[1:], *(width for matrix in adapters for width in matrix.shape[1:]))
    aligned = all(width * x_RD.element_size() % DEVICE_BYTES == 0 for width in widths)
    if x_RD.device.type == "cpu" or not aligned:
        return _ExpertByExpert.apply(x_RD, w1_EDI, b1_EI, w2_EFD, b2_ED, gated, sizes, *adapters)
    return all_experts_at_once(x_RD, w1_EDI, b1_EI, w2_EFD, b2_ED, gated, sizes, adapters)


def all_experts_at_once(
    x_RD: Tensor,
    w1_EDI: Tensor,
    b1_EI: Tensor,
    w2_EFD: Tensor,
    b2_ED: Tensor,
    gated: bool,
    sizes: Sequence[int],
    adapters: Sequence[Tensor] = (),
) -> Tensor:
    """`expert_mlp` by torch's grouped products, as GPUs like it."""
    size_E = torch.tensor(sizes, device=x_RD.device)
    end_E = size_E.cumsum(0).int()
    # Biases by a product, whose gradient is a sum in a fixed order.
    own_RE = F.one_hot(torch.repeat_interleave(size_E, output_size=len(x_RD)), len(sizes)).to(x_RD.dtype)

    def through(rows: Tensor, weight: Tensor, bias: Tensor, adapter: Sequence[Tensor]) -> Tensor:
        outer = F.grouped_mm(rows, weight, offs=end_E) + own_RE @ bias
        for a, b in zip(adapter[::2], adapter[1::2], strict=True):
            outer = outer + SCALE * F.grouped_mm(F.grouped_mm(rows, a, offs=end_E), b, offs=end_E)
        return outer

    inner_RI = through(x_RD, w1_EDI, b1_EI, adapters[:2])
    return through(activate(inner_RI, gated), w2_EFD, b2_ED, adapters[2:])


class _ExpertByExpert(torch.autograd.Function):
    """`expert_mlp` on CPU: all of one expert's work before the next, so that its rows stay in the cache.

    Blocks are not padded to the largest, and each weight's gradient is written once, where it belongs, and a frozen
    one's not at all: indexing weights before autograd's eyes would write a gradient of all experts for each of them.
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
        *adapters: Tensor,
    ) -> Tensor:
        first, second = _Matrices(w1_EDI, adapters[:2]), _Matrices(w2_EFD, adapters[2:])
        inner_RI, y_RD = x_RD.new_empty(len(x_RD), w1_EDI.shape[2]), torch.empty_like(x_RD)
        for expert, rows in _blocks(sizes):
            if not sizes[expert]:
                continue  # the most of them, where a few tokens are decoded
            inner_BI = first.times(expert, x_RD[rows], inner_RI[rows]).add_(b1_EI[expert])
            second.times(expert, activate(inner_BI, gated), y_RD[rows]).add_(b2_ED[expert])
        # The parameters themselves, not views: ZeRO-3 gives them their values anew before backward.
        ctx.save_for_backward(x_RD, inner_RI, w1_EDI, w2_EFD, *adapters)
        ctx.gated, ctx.sizes = gated, sizes
        return y_RD

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_RI, w1_EDI, w2_EFD, *adapters = ctx.saved_tensors
        _, w1, b1, w2, b2, _, _, *beside = ctx.needs_input_grad
        first = _Matrices(w1_EDI, adapters[:2], (w1, *beside[:2]))
        second = _Matrices(w2_EFD, adapters[2:], (w2, *beside[2:]))
        grad_in_RD = torch.empty_like(x_RD)
        grad_b1 = x_RD.new_empty(len(w1_EDI), w1_EDI.shape[2]) if b1 else None
        grad_b2 = x_RD.new_empty(len(w2_EFD), w2_EFD.shape[2]) if b2 else None
        for expert, rows in _blocks(ctx.sizes):
            grad_BD, inner_BI = grad_RD[rows], inner_RI[rows]
            grad_BF = second.back(expert, grad_BD, grad_RD.new_empty(len(grad_BD), w2_EFD.shape[1]))
            activated_BF, grad_BI = _activate_backward(grad_BF, inner_BI, ctx.gated)
            second.learn(expert, activated_BF, grad_BD)
            first.learn(expert, x_RD[rows], grad_BI)
            for grad_bias, grad in ((grad_b2, grad_BD), (grad_b1, grad_BI)):
                if grad_bias is not None:
                    torch.sum(grad, 0, out=grad_bias[expert])
            first.back(expert, grad_BI, grad_in_RD[rows])
        (grad_w1, *beside_w1), (grad_w2, *beside_w2) = first.gradients, second.gradients
        return grad_in_RD, grad_w1, grad_b1, grad_w2, grad_b2, None, None, *beside_w1, *beside_w2


class _Matrices:
    """A matrix of each expert, [E, I, O], and beside it A [E, I, r] and B [E, r, O] of its adapter, if it has one."""

    def __init__(self, w_EIO: Tensor, adapter: Sequence[Tensor], learning: Sequence[bool] = ()):
        """`learning`: which of the two or three get `gradients`."""
        self.w_EIO, self.adapter = w_EIO, adapter
        own = (w_EIO, *adapter)
        self.gradients = [torch.empty_like(one) if wanted else None for one, wanted in zip(own, learning, strict=False)]

    def times(self, expert: int, x_BI: Tensor, out_BO: Tensor) -> Tensor:
        """Rows through one expert's matrix, into `out_BO`, which is returned."""
        _multiply(x_BI, self.w_EIO[expert], out_BO)
        if self.adapter:
            a_EIr, b_ErO = self.adapter
            _multiply_add(_product(x_BI, a_EIr[expert]), b_ErO[expert], out_BO)
        return out_BO

    def back(self, expert: int, grad_BO: Tensor, out_BI: Tensor) -> Tensor:
        """The gradient of the rows that went through, into `out_BI`, which is returned."""
        _multiply(grad_BO, self.w_EIO[expert].T, out_BI)
        if self.adapter:
            a_EIr, b_ErO = self.adapter
            _multiply_add(_product(grad_BO, b_ErO[expert].T), a_EIr[expert].T, out_BI)
        return out_BI

    def learn(self, expert: int, x_BI: Tensor, grad_BO: Tensor) -> None:
        """Write the gradients of one expert's weights, given its rows and the gradient of what came of them."""
        grad_w, *grad_adapter = self.gradients
        if grad_w is not None:
            _multiply(x_BI.T, grad_BO, grad_w[expert])
        if self.adapter:
            a_EIr, b_ErO = self.adapter
            grad_a, grad_b = grad_adapter
            if grad_a is not None:
                _multiply(x_BI.T, _product(grad_BO, b_ErO[expert].T).mul_(SCALE), grad_a[expert])
            if grad_b is not None:
                _multiply(_product(x_BI, a_EIr[expert]).mul_(SCALE).T, grad_BO, grad_b[expert])


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
    if a.dtype.itemsize < 4 and multiplied_in_fp32(a):
        return out.copy_(a.float() @ b.float())
    return torch.mm(a, b, out=out)


def _multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Add SCALE times a @ b to `out`."""
    if a.dtype.itemsize < 4 and multiplied_in_fp32(a):
        out.add_(a.float() @ b.float(), alpha=SCALE)
    else:
        out.addmm_(a, b, alpha=SCALE)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _multiply(a, b, a.new_empty(len(a), b.shape[1]))


def multiplied_in_fp32(factor: Tensor) -> bool:
    """Whether such tensors are multiplied as fp32 on CPU, by MKL, which compiles nothing.

    16-bit ones are where oneDNN has no kernels for them, as with AVX2 alone: torch's own loops take a hundred times as
    long.
    """
    if factor.device.type != "cpu":
        return False
    return factor.dtype.itemsize > 2 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
