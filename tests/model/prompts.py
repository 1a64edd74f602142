"""Models and batches to decode from."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.m6 import M6
from tests.model.samples import DENSE, TINY, randomise_biases, sample_batch

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # fp32, sums in another order
CONFIGS = {
    "dense": DENSE,
    "prototypes": dataclasses.replace(TINY, capacity="1x", capacity_factor=0.5),
    "top-k": dataclasses.replace(TINY, routing="top-k", gated_experts=True),
    "shared": dataclasses.replace(TINY, share_layers=True, layers=3),
    "text alone": dataclasses.replace(TINY, image_patches=0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
ROOM = 5


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> M6:
    model = M6(config).eval()
    randomise_biases(model)
    return model.to(dtype)


def prompts(config: ModelConfig, rows: int = 5, text: int = 9, seed: int = 0) -> dict[str, Tensor]:
    batch = sample_batch(config, rows, text, seed)
    del batch["labels_BT"]
    return batch
