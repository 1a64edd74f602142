"""Moving rows of tensors: by gathers alone, forward and backward.

Shape suffixes: S source rows, A rows moved, D width, K copies of a source row.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MoveRows(torch.autograd.Function):
    """Gather rows forward, and gather again backward: deterministic on every device, and no scattered adds.

    `index` [A] picks rows of `x` [S, D]; the index S stands for a row of zeros. `inverse` [K, S] says to which
    of the A outputs each input row went (A: to none), K times at the most.
    """

    @staticmethod
    def forward(ctx, x_SD: Tensor, index_A: Tensor, inverse_KS: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_KS)
        return _gather(x_SD, index_A)

    @staticmethod
    def backward(ctx, grad_AD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_KS,) = ctx.saved_tensors
        return _gather_sum(grad_AD, inverse_KS), None, None


class SumRows(torch.autograd.Function):
    """The converse of MoveRows: of `x` [A, D], the sum of the K rows that `index` [K, S] picks for each output row.

    `inverse` [A] says to which output each input row was added (S: to none).
    """

    @staticmethod
    def forward(ctx, x_AD: Tensor, index_KS: Tensor, inverse_A: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_A)
        return _gather_sum(x_AD, index_KS)

    @staticmethod
    def backward(ctx, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_A,) = ctx.saved_tensors
        return _gather(grad_SD, inverse_A), None, None


def inverse_index(index_A: Tensor, rows: int) -> Tensor:
    """[rows]: where in `index_A` each row is, once at the most; len(index_A) where it is not.

    Entries `rows` of `index_A`, which stand for a row of zeros, are passed over.
    """
    inverse = index_A.new_full((rows + 1,), len(index_A))
    inverse[index_A] = torch.arange(len(index_A), device=index_A.device)
    return inverse[:rows]


def _gather_sum(x_AD: Tensor, index_KS: Tensor) -> Tensor:
    padded = _with_zeros(x_AD)
    total_SD = padded.index_select(0, index_KS[0])
    for index_S in index_KS[1:]:
        total_SD += padded.index_select(0, index_S)
    return total_SD


def _gather(x_SD: Tensor, index_A: Tensor) -> Tensor:
    return _with_zeros(x_SD).index_select(0, index_A)


def _with_zeros(x_SD: Tensor) -> Tensor:
    """With one more row, of zeros, to pick: several times cheaper than filling with zeros what was picked."""
    return torch.cat((x_SD, x_SD.new_zeros(1, x_SD.shape[1])))
