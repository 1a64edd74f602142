"""Experts spread over real ranks: the same layer, and each rank with its own share in memory."""

import dataclasses
import json
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.experts import ExpertParallel
from model.m6 import M6
from model.moe import MoELayer
from tests.model.samples import TINY, gradients, randomise_biases, sample_batch
from tests.ranks import run_ranks

# The ranks' sums of gradients are added in another order than one process adds its tokens'.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# Valid tokens of each rank: even, uneven, one rank with none, and all but one with none.
LOADS = ((9, 9, 9, 9), (14, 3, 7, 1), (5, 0, 11, 8), (0, 0, 6, 0), (0, 0, 0, 0))
CONFIGS = (
    TINY,
    dataclasses.replace(TINY, capacity="1x"),
    dataclasses.replace(TINY, routing="top-k", k=3, capacity="kx", gated_experts=True),
)


def tokens_of(rank: int, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's inputs [16, D], which are valid, and what its outputs are multiplied by."""
    generator = torch.Generator().manual_seed(rank)
    x_TD, probe_TD = torch.randn(2, 16, TINY.hidden, generator=generator)
    valid_T = torch.zeros(16, dtype=torch.bool)
    valid_T[torch.randperm(16, generator=generator)[:valid]] = True
    return x_TD, valid_T, probe_TD


def build_layer(config: ModelConfig, parallel: ExpertParallel) -> MoELayer:
    layer = MoELayer(config, parallel, 5)
    whole = MoELayer(config, ExpertParallel(), 5)
    randomise_biases(whole)
    mine = layer.experts.numbers
    for name, parameter in layer.experts.named_parameters():
        parameter.data.copy_(whole.experts.get_parameter(name)[mine.start : mine.stop])
    return layer


def run_layer(layer: MoELayer, x_TD: Tensor, valid_T: Tensor, probe_TD: Tensor) -> dict[str, Tensor]:
    layer.zero_grad(set_to_none=True)  # so that results own their gradients
    x_TD = x_TD.clone().requires_grad_()
    y_TD, _, counts = layer(x_TD, valid_T, torch.zeros_like(valid_T))
    (y_TD * probe_TD).sum().backward()
    return {"output": y_TD.detach(), "inputs": x_TD.grad, "counts": counts, **gradients(layer)}


def form_groups(size: int) -> ExpertParallel:
    """Neighbours share a set of experts; those that hold the same ones form the other groups."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sets = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    holders = [dist.new_group(list(range(place, world, size))) for place in range(size)]
    return ExpertParallel(size, rank % size, sets[rank // size], holders[rank % size])


def layers_on_rank(size: int) -> list[dict[str, Tensor]]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, parallel, results = dist.get_rank(), form_groups(size), []
    for config in CONFIGS:
        layer = build_layer(config, parallel)
        for load in LOADS:
            result = run_layer(layer, *tokens_of(rank, load[rank]))
            for name, value in result.items():
                if name.startswith("experts."):
                    dist.all_reduce(value, group=parallel.data_group)
                elif name.startswith("router."):
                    dist.all_reduce(value)
            results.append(result)
    return results


def layers_on_four_ranks() -> dict[int, list[dict[str, Tensor]]]:
    return {size: layers_on_rank(size) for size in (1, 2, 4)}


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[int, list[dict[str, Tensor]]]]:
    return run_ranks(4, layers_on_four_ranks)


@cache
def in_one_process(config: ModelConfig, load: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Each rank's tokens through the whole layer, one rank at a time, because capacity counts by rank."""
    layer = build_layer(config, ExpertParallel())
    return [run_layer(layer, *tokens_of(rank, valid)) for rank, valid in enumerate(load)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("number", range(len(CONFIGS) * len(LOADS)))
def test_ranks_equal_one_process(four_ranks, size: int, number: int):
    config, load = CONFIGS[number // len(LOADS)], LOADS[number % len(LOADS)]
    expected = in_one_process(config, load)
    for rank, answers in enumerate(four_ranks):
        mine = ExpertParallel(size, rank % size).local_experts(config.experts)
        for name, value in answers[size][number].items():
            if name in ("output", "inputs", "counts"):
                torch.testing.assert_close(value, expected[rank][name], **TOLERANCE)
                continue
            total = sum(result[name] for result in expected)
            total = total[mine.start : mine.stop] if name.startswith("experts.") else total
            torch.testing.assert_close(value, total, **TOLERANCE)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("load", range(len(LOADS)))
def test_ranks_are_as_one_batch(four_ranks, size: int, load: int):
    """Without capacity, the ranks' tokens behind each other give the same outputs and gradients."""
    inputs = [torch.cat(parts) for parts in zip(*(tokens_of(r, LOADS[load][r]) for r in range(4)), strict=True)]
    expected = run_layer(build_layer(TINY, ExpertParallel()), *inputs)
    answers = [answer[size][load] for answer in four_ranks]
    for name in ("output", "inputs"):
        torch.testing.assert_close(torch.cat([answer[name] for answer in answers]), expected[name], **TOLERANCE)
    for name in (name for name in expected if name.startswith("experts.")):
        shards = torch.cat([answer[name] for answer in answers[:size]])
        torch.testing.assert_close(shards, expected[name], **TOLERANCE)
    torch.testing.assert_close(answers[0]["router.weight"], expected["router.weight"], **TOLERANCE)


SHARED = dataclasses.replace(TINY, share_layers=True, layers=3, capacity="1x", balance_loss=0.1, z_loss=0.01)


def rows_of(rank: int) -> dict[str, Tensor]:
    batch = sample_batch(SHARED, rows=3, seed=rank)
    if rank == 1:  # no target, hardly a token
        batch |= {
            "length_B": torch.tensor([2, 0, 0]),
            "source_B": torch.tensor([2, 0, 0]),
            "has_image_B": torch.zeros(3, dtype=torch.bool),
            "labels_BT": torch.full_like(batch["labels_BT"], -100),
        }
    return batch


def run_model(model: M6, rank: int) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(rows_of(rank))
    (out["loss_B"].sum() + out["auxiliary"]).backward()
    return {name: value.detach().clone() for name, value in (out | gradients(model)).items()}


def models_on_rank() -> list[dict[str, Tensor]]:
    dist.init_process_group("gloo")
    model, results = M6(SHARED, 0, form_groups(2)), []
    for recompute in (False, True):
        model.recompute = recompute
        results.append(run_model(model, dist.get_rank()))
    return results


def test_the_model_on_two_ranks_equals_one_process_also_when_recomputing():
    whole = M6(SHARED)
    expected = [run_model(whole, rank) for rank in range(2)]
    for rank, (plain, recomputed) in enumerate(run_ranks(2, models_on_rank)):
        assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
        for name in ("loss_B", "auxiliary", "counts", "tokens"):
            torch.testing.assert_close(plain[name], expected[rank][name], **TOLERANCE)
        for name in (name for name in plain if ".experts." in name):
            share = (expected[0][name] + expected[1][name]).chunk(2)[rank]
            torch.testing.assert_close(plain[name], share, **TOLERANCE)
        torch.testing.assert_close(plain["vocabulary.weight"], expected[rank]["vocabulary.weight"], **TOLERANCE)


def peak_while_building(config: ModelConfig, parallel: ExpertParallel, trace: Path) -> int:
    """Bytes of tensors at the peak of building a model, from torch's own record of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = M6(config, 0, parallel)
    assert len(model.layers) == config.layers  # alive until here
    record.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return max(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_rank_allocates_only_its_own_experts(size: int, tmp_path: Path):
    """The peak while building is to the byte what stays, and one expert's matrix that is being drawn."""
    config = dataclasses.replace(TINY, hidden=64, ffn=256, experts=64)
    counts = config.parameter_counts()
    stays = 4 * (counts.total - counts.experts + counts.experts // size)
    assert counts.experts > 0.98 * counts.total
    peak = peak_while_building(config, ExpertParallel(size, size - 1), tmp_path / "trace.json")
    assert stays <= peak <= stays + 4 * config.hidden * config.ffn
