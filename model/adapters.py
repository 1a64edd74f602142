"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): beside a weight W, which may be frozen, W + SCALE · A·B.

A Linear's weight [O, I] stands transposed: beside it are A [R, I] and B [O, R], and their product is B·A. Beside
experts' weights [E, I, O] are A [E, I, R] and B [E, R, O]. A is drawn, so that what it makes of normed rows has a
deviation of one, and B begins as zero: an adapted model begins as what it adapts.

Shape suffixes: E experts, I inputs, O outputs, R rank, B rows; of any weight, M matrices of H by W numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

SCALE = 2.0  # the paper's alpha / r

Read = Callable[[int, int], Tensor]  # elements [first, first + count) of a flat tensor, fp32


def names_beside(weight: str) -> tuple[str, str]:
    """Names of A and B beside the parameter `weight`, if there are any."""
    plain = re.sub(r"_[A-Z]+$", "", weight)  # without its shape suffix
    return f"{plain}_lora_a", f"{plain}_lora_b"


def adapted(y_BO: Tensor, x_BI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """What a Linear gave for `x`, with its adapter's share."""
    return y_BO + SCALE * F.linear(F.linear(x_BI, a_RI), b_OR)


def merge(values: Tensor, first: int, shape: Sequence[int], rank: int, a: Read, b: Read) -> None:
    """Add the adapter's share to elements [first, first + n) of a flat weight of `shape`: fp32 `values` [n], in place.

    Of A and B no more is read than the matrices and rows that are touched.
    """
    height, width = shape[-2:]
    left, right = (b, a) if len(shape) == 2 else (a, b)
    last, size = first + values.numel(), height * width
    for matrix in range(first // size, math.ceil(last / size)):
        origin = matrix * size
        start, end = max(first, origin), min(last, origin + size)
        top, bottom = (start - origin) // width, math.ceil((end - origin) / width)
        left_HR = left((matrix * height + top) * rank, (bottom - top) * rank).view(-1, rank)
        right_RW = right(matrix * rank * width, rank * width).view(rank, width)
        skipped = start - origin - top * width
        share = (left_HR @ right_RW).flatten()[skipped : skipped + end - start]
        values[start - first : end - first].add_(share, alpha=SCALE)
