"""The expert layer against a dense reference that takes one expert and one token at a time, in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.experts import ExpertParallel
from model.moe import MoELayer, block_places
from model.rows import MoveRows, SumRows
from tests.model import reference
from tests.model.samples import TINY, randomise_biases

TOKENS = 21
# The layer's fp32 against float64: a few ulp of sums over `hidden` and `ffn` terms of size about one.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def build(config: ModelConfig) -> MoELayer:
    layer = MoELayer(config, ExpertParallel(), 5)
    randomise_biases(layer)
    return layer


def scenario(name: str, layer: MoELayer) -> tuple[Tensor, Tensor]:
    """Inputs [T, D] and which are valid."""
    generator = torch.Generator().manual_seed(0)
    tokens = 1 if name == "one token" else TOKENS
    x_TD = torch.randn(tokens, layer.config.hidden, generator=generator)
    valid_T = torch.ones(tokens, dtype=torch.bool)
    if name == "padding":
        valid_T = torch.rand(tokens, generator=generator) < 0.7
    if name == "nothing valid":
        valid_T[:] = False
    if name == "one expert":
        x_TD = x_TD.abs()
        layer.router.weight.data[:: layer.config.experts // layer.config.k] += 2.0
    return x_TD, valid_T


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("capacity", ["1x", "kx", "none"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("routing", ["prototype", "top-k"])
@pytest.mark.parametrize("name", ["all valid", "padding", "nothing valid", "one token", "one expert"])
def test_outputs_and_gradients_equal_the_dense_reference(name, routing, k, capacity, gated):
    config = dataclasses.replace(TINY, hidden=16, ffn=20, routing=routing, k=k, capacity=capacity, gated_experts=gated)
    layer = build(config)
    x_TD, valid_T = scenario(name, layer)
    probe_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(1))
    expected = reference.run(layer, x_TD, valid_T, probe_TD, reference.places(int(valid_T.sum()), config))
    x_TD.requires_grad_()
    y_TD, auxiliary, counts = layer(x_TD, valid_T, torch.zeros_like(valid_T))
    (y_TD * probe_TD).sum().backward()
    torch.testing.assert_close(y_TD.double(), expected.output, **TOLERANCE)
    torch.testing.assert_close(x_TD.grad.double(), expected.inputs, **TOLERANCE)
    for parameter_name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), expected.gradients[parameter_name], **TOLERANCE)
    assert auxiliary == 0
    assert counts[:, 0].sum() == k * valid_T.sum() and counts[:, 1].sum() == len(expected.kept)
    if name == "one expert" and capacity != "none":
        assert len(expected.kept) < k * TOKENS


@pytest.mark.parametrize("routing", ["prototype", "top-k"])
def test_evaluation_drops_nothing(routing):
    config = dataclasses.replace(TINY, routing=routing, capacity="1x")
    layer = build(config)
    x_TD, valid_T = scenario("one expert", layer)
    dropless = build(dataclasses.replace(config, capacity="none"))
    dropless.load_state_dict(layer.state_dict())
    training, _, _ = layer(x_TD, valid_T, ~valid_T)
    evaluated, _, counts = layer.eval()(x_TD, valid_T, ~valid_T)
    assert not torch.allclose(training, evaluated)
    assert torch.equal(counts[:, 0], counts[:, 1])
    assert torch.equal(evaluated, dropless(x_TD, valid_T, ~valid_T)[0])


def test_a_dropped_token_and_padding_come_out_as_zeros():
    layer = build(dataclasses.replace(TINY, k=1, capacity="1x"))
    x_TD, valid_T = scenario("one expert", layer)
    valid_T[0] = False
    y_TD, _, _ = layer(x_TD, valid_T, ~valid_T)
    places = reference.places(TOKENS - 1, layer.config)
    assert y_TD.any(-1).tolist() == [False] + [True] * places + [False] * (TOKENS - 1 - places)


def test_auxiliary_losses_are_weighted_and_added():
    x_TD, valid_T = scenario("padding", build(TINY))
    losses = []
    for balance, z in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.05)):
        layer = build(dataclasses.replace(TINY, balance_loss=balance, z_loss=z))
        losses.append(layer(x_TD, valid_T, ~valid_T)[1])
    torch.testing.assert_close(losses[2], 0.3 * losses[0] + 0.05 * losses[1])


def test_16_bit_tokens_come_out_in_16_bits():
    layer = build(TINY).bfloat16()
    x_TD, valid_T = scenario("padding", layer)
    y_TD, _, _ = layer(x_TD.bfloat16(), valid_T, ~valid_T)
    expected = reference.run(layer, x_TD.bfloat16(), valid_T, torch.zeros_like(x_TD), None)
    assert y_TD.dtype == torch.bfloat16
    torch.testing.assert_close(y_TD.double(), expected.output, rtol=0.02, atol=0.2)


def test_the_layer_is_the_same_to_the_bit_when_run_again():
    layer = build(dataclasses.replace(TINY, capacity="1x"))
    x_TD, valid_T = scenario("padding", layer)
    results = []
    for _ in range(2):
        layer.zero_grad()
        y_TD, _, _ = layer(x_TD, valid_T, ~valid_T)
        y_TD.square().sum().backward()
        results.append([y_TD, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("kept", [0, 1, 5, 8])
def test_move_rows_has_the_gradient_of_what_it_does(kept):
    """4 rows, each wanted twice; `kept` of the 8 wishes are granted, in a mixed order."""
    generator = torch.Generator().manual_seed(kept)
    x_SD = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    slot_A = torch.randperm(8, generator=generator)[:kept]
    place_S = torch.full((8,), kept)
    place_S[slot_A] = torch.arange(kept)
    index_A, inverse_KS = slot_A % 4, place_S.view(2, 4)
    assert torch.equal(MoveRows.apply(x_SD, index_A, inverse_KS), x_SD[index_A])
    assert torch.autograd.gradcheck(lambda x: MoveRows.apply(x, index_A, inverse_KS), x_SD)
    # And back: the number of kept rows stands for a row of zeros.
    y_AD = torch.randn(kept, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    back_SD = MoveRows.apply(y_AD, place_S, slot_A[None])
    expected = torch.stack([y_AD[p] if p < kept else torch.zeros(3, dtype=torch.float64) for p in place_S])
    assert torch.equal(back_SD, expected)
    if kept:
        assert torch.autograd.gradcheck(lambda y: MoveRows.apply(y, place_S, slot_A[None]), y_AD)
    # And added up: both wishes of a row together.
    assert torch.equal(SumRows.apply(y_AD, inverse_KS, index_A), expected[:4] + expected[4:])
    assert torch.autograd.gradcheck(lambda y: SumRows.apply(y, inverse_KS, index_A), y_AD)


@pytest.mark.parametrize(
    "counts",
    [[[0, 0]], [[3, 0, 40]], [[1, 2], [0, 5], [4, 0]], [[0, 0], [33, 1]]],
)
def test_rows_from_all_ranks_get_places_of_their_own(counts: list[list[int]]):
    sizes = [max(sum(column), 1) + 2 * expert for expert, column in enumerate(zip(*counts, strict=True))]
    place_R = block_places(torch.tensor(counts), sizes)
    expected, taken = [], [0] * len(sizes)
    for row in counts:  # rows arrive ordered by rank, then expert; an expert's places fill up in that order
        for expert, count in enumerate(row):
            expected += [sum(sizes[:expert]) + taken[expert] + i for i in range(count)]
            taken[expert] += count
    assert place_R.tolist() == expected
