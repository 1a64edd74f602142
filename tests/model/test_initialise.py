"""Initial weights are a function of the seed and of names alone."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.experts import ExpertParallel, LocalExperts
from model.initialise import Linear, fill_normal
from model.m6 import M6
from tests.model.samples import TINY
from tests.ranks import run_ranks
from training.start import init_distributed


@pytest.mark.parametrize("size", [2, 4, 8])
def test_experts_are_the_same_at_every_expert_parallel_size(size: int):
    whole = M6(TINY, seed=3)
    parts = [M6(TINY, 3, ExpertParallel(size, rank)).state_dict() for rank in range(size)]
    for name, expected in whole.state_dict().items():
        shards = [part[name] for part in parts]
        if ".experts." in name:
            torch.testing.assert_close(torch.cat(shards), expected, rtol=0, atol=0)
        else:
            assert all(torch.equal(shard, expected) for shard in shards)


def test_all_weights_differ_by_name_and_by_seed():
    first, second = M6(TINY, seed=0).state_dict(), M6(TINY, seed=1).state_dict()
    drawn = [name for name, value in first.items() if value.unique().numel() > 1]
    heads = [tuple(value.flatten()[:4].tolist()) for state in (first, second) for value in map(state.get, drawn)]
    experts = first["layers.0.moe.experts.w1_EDF"][:, 0, :4].tolist()
    assert len(set(heads)) == len(heads) and len({tuple(row) for row in experts}) == TINY.experts
    constant = set(first) - set(drawn)
    assert all(name.endswith(("bias", "b1_EF", "b2_ED", "norm.weight")) for name in constant)


def test_weights_depend_on_no_order_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    alone = Linear(8, 8, 0.1, 0, "b").weight
    Linear(8, 8, 0.1, 0, "a")
    torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(Linear(8, 8, 0.1, 0, "b").weight, alone)
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_weights_are_the_rounded_fp32_ones():
    exact = M6(TINY, seed=2).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = M6(TINY, seed=2).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(rounded[name], value.bfloat16()) for name, value in exact.items())


def test_weights_have_the_asked_deviation():
    weight = torch.empty(500, 400)
    fill_normal(weight, 0.02, 0, "weight")
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(weight.mean().item()) < 2e-4


def test_the_meta_device_draws_nothing():
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in M6(TINY).parameters())


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="experts=8 is not divisible by expert parallelism 3"):
        LocalExperts(TINY, ExpertParallel(3), 0)


def weights_under_zero_init() -> dict[str, Tensor]:
    import deepspeed

    init_distributed()
    bf16 = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=bf16):
        model = M6(dataclasses.replace(TINY, share_layers=True), seed=3)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.data.clone() for name, parameter in model.named_parameters()}


def test_zero_init_only_rounds_the_weights():
    plain = dict(M6(dataclasses.replace(TINY, share_layers=True), seed=3).named_parameters())
    for weights in run_ranks(2, weights_under_zero_init):
        assert weights.keys() == plain.keys()
        assert all(torch.equal(weights[name], value.bfloat16()) for name, value in plain.items())
