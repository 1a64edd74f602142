"""Routers, capacity and counts against plain loops over tokens."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import routing
from model.config import ModelConfig
from tests.model import reference
from tests.model.samples import TINY

quick = settings(deadline=None, derandomize=True, max_examples=60)
CONFIGS = st.builds(
    lambda size, k, kind: dataclasses.replace(TINY, experts=size * k, hidden=size * k, heads=1, k=k, routing=kind),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(["prototype", "top-k"]),
)


def route(config: ModelConfig, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The router, with weights that hand the inputs on as logits."""
    router = routing.Router(config, 0)
    router.weight.data = torch.eye(config.experts)
    return router(logits_TE)


def draw_logits(seed: int, tokens: int, experts: int, levels: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, (tokens, experts), generator=generator).float()
    return torch.randn(tokens, experts, generator=generator)


@quick
@given(CONFIGS, st.integers(0, 12), st.integers(0, 99))
def test_choices_and_gates_are_those_of_a_loop(config: ModelConfig, tokens: int, seed: int):
    logits_TE = draw_logits(seed, tokens, config.experts)
    gate_TK, expert_TK, same_TE = route(config, logits_TE)
    expected = [reference.choose(row, config) for row in logits_TE.tolist()]
    assert torch.equal(same_TE, logits_TE) and gate_TK.shape == (tokens, config.k)
    assert expert_TK.tolist() == [[expert for expert, _ in row] for row in expected]
    for gates, row in zip(gate_TK.tolist(), expected, strict=True):
        assert gates == pytest.approx([gate for _, gate in row], rel=1e-5)


@quick
@given(CONFIGS, st.integers(1, 12), st.integers(0, 99))
def test_of_equal_logits_a_prototype_takes_the_first_and_top_k_any(config: ModelConfig, tokens: int, seed: int):
    logits_TE = draw_logits(seed, tokens, config.experts, levels=2)
    gate_TK, expert_TK, _ = route(config, logits_TE)
    expected = [reference.choose(row, config) for row in logits_TE.tolist()]
    for gates, experts, row in zip(gate_TK.tolist(), expert_TK.tolist(), expected, strict=True):
        assert gates == pytest.approx([gate for _, gate in row], rel=1e-5)
        assert len(set(experts)) == config.k
        if config.routing == "prototype":
            assert experts == [expert for expert, _ in row]


def test_no_gate_is_renormalised():
    one_of_each, two_of_all = (
        dataclasses.replace(TINY, experts=4, hidden=4, k=2, routing=kind) for kind in ("prototype", "top-k")
    )
    logits_TE = torch.tensor([[math.log(3), 0.0, 0.0, math.log(4)]])
    gate_TK, expert_TK, _ = route(one_of_each, logits_TE)
    assert expert_TK.tolist() == [[0, 3]] and gate_TK[0].tolist() == pytest.approx([3 / 4, 4 / 5])
    gate_TK, expert_TK, _ = route(two_of_all, logits_TE)
    assert expert_TK.tolist() == [[3, 0]] and gate_TK[0].tolist() == pytest.approx([4 / 9, 3 / 9])


def test_the_router_computes_in_fp32():
    router = routing.Router(TINY, 0).bfloat16()
    x_TD = torch.randn(6, TINY.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate_TK, _, logits_TE = router(x_TD)
    assert gate_TK.dtype == logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE, x_TD.float() @ router.weight.float().T)


@quick
@given(CONFIGS, st.integers(0, 5000), st.sampled_from([1.0, 1.25, 2.0]), st.sampled_from(["1x", "kx"]))
def test_places_are_the_share_rounded_up(config: ModelConfig, tokens: int, factor: float, capacity: str):
    share = Fraction(factor) * tokens / config.experts * (config.k if capacity == "kx" else 1)
    config = dataclasses.replace(config, capacity_factor=factor)
    assert routing.places_per_expert(tokens, config, capacity) == math.ceil(share)


def test_places_are_not_one_too_many_for_a_share_that_is_no_binary_fraction():
    config = dataclasses.replace(TINY, experts=15, k=3)
    assert routing.places_per_expert(12, config, "kx") == 3
    assert routing.places_per_expert(12, config, "none") is None


@quick
@given(
    CONFIGS,
    st.lists(st.booleans(), max_size=16),
    st.integers(0, 99),
    st.one_of(st.none(), st.integers(0, 5)),
)
def test_places_go_by_position_and_padding_takes_none(config, valid: list[bool], seed: int, places: int | None):
    _, expert_TK, _ = route(config, draw_logits(seed, len(valid), config.experts, levels=3))
    choices = expert_TK.tolist()
    found = routing.assign(expert_TK, torch.tensor(valid, dtype=torch.bool), config.experts, places)
    kept = reference.keep(choices, valid, places)
    queue = [
        (expert, choice, token)
        for expert in range(config.experts)
        for choice in range(config.k)
        for token in range(len(valid))
        if (token, choice) in kept and choices[token][choice] == expert
    ]
    assert found.slot_A.tolist() == [choice * len(valid) + token for _, choice, token in queue]
    assert found.counts_E.tolist() == [sum(e == expert for e, _, _ in queue) for expert in range(config.experts)]
    place = {(choice, token): number for number, (_, choice, token) in enumerate(queue)}
    assert found.place_KT.tolist() == [
        [place.get((choice, token), len(queue)) for token in range(len(valid))] for choice in range(config.k)
    ]


def test_second_choices_queue_behind_all_first_choices():
    expert_TK = torch.tensor([[0, 1], [1, 0], [1, 0]])
    found = routing.assign(expert_TK, torch.ones(3, dtype=torch.bool), 2, places=2)
    # Expert 0: token 0's first choice, then token 1's second; expert 1: the first choices of tokens 1 and 2.
    assert found.slot_A.tolist() == [0, 4, 1, 2]
    assert found.counts_E.tolist() == [2, 2]


@quick
@given(CONFIGS, st.lists(st.tuples(st.booleans(), st.booleans()), max_size=16), st.integers(0, 99), st.integers(0, 4))
def test_counts_tell_wanted_and_kept_by_modality(config, flags: list[tuple[bool, bool]], seed: int, places: int):
    valid, image = [flag[0] for flag in flags], [flag[1] for flag in flags]
    valid_T, image_T = torch.tensor(valid, dtype=torch.bool), torch.tensor(image, dtype=torch.bool)
    _, expert_TK, _ = route(config, draw_logits(seed, len(flags), config.experts, levels=3))
    found = routing.assign(expert_TK, valid_T, config.experts, places)
    counts = routing.routing_counts(expert_TK, valid_T, image_T, found, config.experts)
    expected = torch.zeros(2, 2, config.experts, dtype=torch.int64)
    kept = reference.keep(expert_TK.tolist(), valid, places)
    for token, experts in enumerate(expert_TK.tolist()):
        for choice, expert in enumerate(experts):
            modality = 0 if image[token] else 1
            expected[modality, 0, expert] += valid[token]
            expected[modality, 1, expert] += (token, choice) in kept
    assert torch.equal(counts, expected)


def auxiliary(config: ModelConfig, logits_TE: Tensor, valid_T: Tensor) -> tuple[Tensor, Tensor]:
    _, expert_TK, _ = route(config, logits_TE)
    balance = routing.balance_loss(logits_TE, expert_TK, valid_T, config)
    return balance, routing.z_loss(logits_TE, valid_T, config)


@quick
@given(CONFIGS, st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 99))
def test_auxiliary_losses_are_their_formulas_and_ignore_padding(config: ModelConfig, valid: list[bool], seed: int):
    logits_TE = draw_logits(seed, len(valid), config.experts)
    balance, z = auxiliary(config, logits_TE, torch.tensor(valid))
    groups = config.k if config.routing == "prototype" else 1
    size, tokens = config.experts // groups, sum(valid)
    rows = [row for row, is_valid in zip(logits_TE.tolist(), valid, strict=True) if is_valid]
    expected_z = expected_balance = 0.0
    for first in range(0, config.experts, size):
        own = [row[first : first + size] for row in rows]
        totals = [sum(map(math.exp, row)) for row in own]
        expected_z += sum(math.log(total) ** 2 for total in totals) / groups
        for expert in range(size):
            chosen = sum(first + expert in [e for e, _ in reference.choose(row, config)] for row in rows)
            mean = sum(math.exp(row[expert]) / total for row, total in zip(own, totals, strict=True)) / max(tokens, 1)
            share = chosen * groups / config.k  # of this group's choices, summed over tokens
            expected_balance += size * share * mean / groups
    assert z.item() == pytest.approx(expected_z, rel=1e-4, abs=1e-5)
    assert balance.item() == pytest.approx(expected_balance, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["prototype", "top-k"])
def test_an_even_load_costs_one_a_token_and_a_crowded_expert_is_pushed_down(kind):
    config = dataclasses.replace(TINY, experts=4, hidden=4, k=2, routing=kind)
    even_TE = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]).repeat(3, 1)
    valid_T = torch.ones(6, dtype=torch.bool)
    assert auxiliary(config, even_TE, valid_T)[0].item() == pytest.approx(6)
    crowded_TE = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).repeat(6, 1).requires_grad_()
    loss, _ = auxiliary(config, crowded_TE, valid_T)
    loss.backward()
    assert loss.item() > 6.5
    assert (crowded_TE.grad[:, [0, 2]] > 0).all() and (crowded_TE.grad[:, [1, 3]] < 0).all()
