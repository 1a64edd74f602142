"""Presets count what they build, and shapes that cannot be built are refused."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import PRESETS, ModelConfig
from model.m6 import M6
from model.parts import ADAPTERS, WHOLE, part_of
from tests.model.samples import TINY


def built_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in M6(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_to_what_is_built(name: str):
    config = PRESETS[name].config
    assert config.parameter_counts().total == built_parameters(config)


@pytest.mark.parametrize(
    "change", [{"gated_experts": True}, {"share_layers": True}, {"bag_width": 5}, {"adapter_rank": 3}]
)
@pytest.mark.parametrize("experts", [0, 8])
def test_options_count_to_what_is_built(change: dict, experts: int):
    config = dataclasses.replace(TINY, experts=experts, **change)
    assert config.parameter_counts().total == built_parameters(config)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.published])
def test_presets_are_of_the_published_size(name: str):
    preset = PRESETS[name]
    # The published totals are rounded: "10 B" for 50 · 12 · 4096² = 10.07 B and its vocabulary.
    tolerance = 0.02 if name == "m6-10b" else 0.01
    assert preset.config.parameter_counts().total == pytest.approx(preset.published, rel=tolerance)


def test_active_parameters_of_a_dense_model_are_all_of_them():
    counts = PRESETS["m6-base"].config.parameter_counts()
    assert counts.active == counts.total


def test_active_parameters_follow_the_capacity():
    once, k_times = (
        dataclasses.replace(TINY, capacity=capacity).parameter_counts().active for capacity in ("1x", "kx")
    )
    assert k_times - once == TINY.layers * (TINY.k - 1) * TINY.expert_parameters


def test_sharing_layers_divides_parameters_and_keeps_the_active_ones():
    own = TINY.parameter_counts()
    shared = dataclasses.replace(TINY, share_layers=True).parameter_counts()
    assert (shared.experts, shared.active) == (own.experts // TINY.layers, own.active)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": 0}, "layers=0: must be at least 1"),
        ({"k": 0}, "k=0: must be at least 1"),
        ({"experts": -1}, "experts=-1: must not be negative"),
        ({"image_codes": -1}, "image_codes=-1: must not be negative"),
        ({"routing": "random"}, "routing='random': must be one of prototype, top-k"),
        ({"capacity": "2x"}, "capacity='2x': must be one of 1x, kx, none"),
        ({"image_input": "audio"}, "image_input='audio': must be one of features, pixels"),
        ({"heads": 5}, "hidden=32 is not divisible by heads=5"),
        ({"k": 9}, "k=9 is more than experts=8"),
        ({"k": 3}, "experts=8 is not divisible into k=3 prototypes"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: must be over 0 and at most 1,000,000"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan: must be over 0 and at most 1,000,000"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused_in_one_line(change: dict, says: str):
    with pytest.raises(ValueError) as refusal:
        dataclasses.replace(TINY, **change)
    assert str(refusal.value) == says


def test_top_k_needs_no_equal_prototypes():
    assert dataclasses.replace(TINY, routing="top-k", k=3).k == 3


def test_the_config_imports_no_torch():
    program = "import sys, model.config; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ({"experts": 0, "k": 1}, WHOLE),
        ({"experts": 0, "k": 1, "gated_experts": True}, WHOLE),
        # One expert a prototype: each gets all the tokens, so that its buffer has no empty place.
        ({"experts": 2, "k": 2}, WHOLE),
        ({"experts": 2, "k": 2, "gated_experts": True}, WHOLE),
        ({"experts": 2, "k": 2, "routing": "top-k", "share_layers": True}, WHOLE),
        # The embeddings too, or the first layer would have no gradient of its input.
        ({"experts": 0, "k": 1, "adapter_rank": 3}, {"embeddings", ADAPTERS}),
        ({"experts": 2, "k": 2}, {"embeddings", "routers"}),
    ],
)
def test_training_flops_are_those_that_torch_counts(change: dict, trained: set[str]):
    """Exactly so where nothing is padded. Scores of attention, which torch counts, are in no figure of ours."""
    config = dataclasses.replace(TINY, **change)
    model = M6(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
    rows, text = 8, 20
    targets = 64  # a full block of the head
    labels_BT = torch.full((rows, text), -100)
    labels_BT[:, 12:] = 3
    batch = {
        "tokens_BT": torch.ones(rows, text, dtype=torch.int64),
        "source_B": torch.full((rows,), 12),
        "length_B": torch.full((rows,), text),
        "image_BPC": torch.randn(rows, config.image_patches, config.image_channels),
        "has_image_B": torch.ones(rows, dtype=torch.bool),
        "labels_BT": labels_BT,
    }
    tokens = rows * (text + config.image_patches)
    assert tokens % 32 == 0 and int((labels_BT >= 0).sum()) == targets
    with FlopCounterMode(display=False) as counter:
        model(batch)["loss_B"].sum().backward()
    # The projection of pictures is no part of the trunk; it has no gradient of its input.
    projection = 2 * rows * config.image_patches * config.image_channels * config.hidden
    projection *= 2 if "image" in trained else 1
    scores = 3 * config.layers * 2 * 2 * tokens * (text + config.image_patches) * config.hidden
    assert counter.get_total_flops() - projection - scores == config.training_flops(tokens, targets, trained=trained)
