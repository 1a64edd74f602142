"""Experts' products on CPU: against one expert at a time by autograd, and against torch's grouped products."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model import grouped
from model.adapters import SCALE

EXPERTS, HIDDEN, FFN, RANK = 4, 16, 24, 8
SIZES = {"even": [8, 8, 8, 8], "ragged": [1, 13, 0, 6], "one": [0, 0, 21, 0], "none": [0, 0, 0, 0]}


def weights(gated: bool, dtype: torch.dtype, adapted: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inner = 2 * FFN if gated else FFN
    shapes = [(EXPERTS, HIDDEN, inner), (EXPERTS, inner), (EXPERTS, FFN, HIDDEN), (EXPERTS, HIDDEN)]
    if adapted:
        shapes += [(EXPERTS, HIDDEN, RANK), (EXPERTS, RANK, inner), (EXPERTS, FFN, RANK), (EXPERTS, RANK, HIDDEN)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[4:] = [matrix / 3 for matrix in drawn[4:]]  # so that a product says as much as the weight beside it
    return [matrix.to(dtype).requires_grad_() for matrix in drawn]


def rows(sizes: list[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(sizes), HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def one_at_a_time(
    x_RD: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gated: bool,
    sizes: list[int],
    adapters: Sequence[Tensor] = (),
) -> Tensor:
    """The reference: autograd through plain products, with those of the adapters in the weights beside them."""
    if adapters:
        a1, up1, a2, up2 = adapters
        w1, w2 = w1 + SCALE * a1 @ up1, w2 + SCALE * a2 @ up2
    outputs = []
    for expert, x_BD in enumerate(x_RD.split(sizes)):
        inner = x_BD @ w1[expert] + b1[expert]
        inner = F.silu(inner[:, :FFN]) * inner[:, FFN:] if gated else F.gelu(inner)
        outputs.append(inner @ w2[expert] + b2[expert])
    return torch.cat(outputs)


def run(function, gated: bool, sizes: list[int], dtype: torch.dtype, adapted: bool = False) -> list[Tensor]:
    """Output and gradients of the input and the four weights, or eight with adapters, in fp64."""
    x_RD, parameters = rows(sizes, dtype), weights(gated, dtype, adapted)
    y_RD = function(x_RD, *parameters[:4], gated, sizes, parameters[4:])
    probe = torch.randn(y_RD.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    y_RD.backward(probe)
    return [tensor.double() for tensor in (y_RD.detach(), x_RD.grad, *(weight.grad for weight in parameters))]


def agree(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    """To `bound` of the largest element."""
    for one, other in zip(found, expected, strict=True):
        size = other.abs().max().item() if other.numel() else 0
        torch.testing.assert_close(one, other, rtol=0, atol=bound * max(size, 1))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
def test_expert_by_expert_is_one_at_a_time(gated, sizes, dtype, bound, adapted):
    found = run(grouped.expert_mlp, gated, sizes, dtype, adapted)
    agree(found, run(one_at_a_time, gated, sizes, torch.float64, adapted), bound)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sizes", [[16, 16, 16, 16], [16, 48, 32, 16]], ids=["even", "ragged"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapted"])
def test_all_experts_at_once_is_one_at_a_time(gated, sizes, dtype, bound, adapted):
    """What a GPU runs."""
    found = run(grouped.all_experts_at_once, gated, sizes, dtype, adapted)
    agree(found, run(one_at_a_time, gated, sizes, torch.float64, adapted), bound)


@pytest.mark.parametrize("as_fp32", [False, True])
def test_16_bit_factors_may_be_multiplied_either_way(as_fp32, monkeypatch):
    monkeypatch.setattr(grouped, "multiplied_in_fp32", lambda factor: as_fp32)
    found = run(grouped.expert_mlp, True, SIZES["ragged"], torch.bfloat16, adapted=True)
    agree(found, run(one_at_a_time, True, SIZES["ragged"], torch.float64, adapted=True), 0.03)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_sizes_are_few_and_little_is_added(size):
    like = torch.empty(0, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "multiplied_in_fp32", lambda factor: False)
        rounded = grouped.few_sizes(size, like)
        assert grouped.few_sizes(rounded, like) == rounded
    assert size <= rounded < size + max(size / 16, 16)


@pytest.mark.parametrize(("size", "rounded"), [(0, 16), (1, 16), (16, 16), (17, 32)])
def test_blocks_on_a_gpu_are_never_empty(size, rounded):
    assert grouped.few_sizes(size, torch.empty(0, dtype=torch.bfloat16, device="meta")) == rounded


def test_16_bit_sizes_are_at_most_sixteen_an_octave(monkeypatch):
    monkeypatch.setattr(grouped, "multiplied_in_fp32", lambda factor: False)
    like = torch.empty(0, dtype=torch.bfloat16)
    for size in (256, 4096):
        sizes = {grouped.few_sizes(n, like) for n in range(size + 1, 2 * size + 1)}
        assert len(sizes) == 16 and max(sizes) == 2 * size
