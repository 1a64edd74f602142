"""Small models and batches for the tests of the model."""

import dataclasses

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.m6 import IGNORE

TINY = ModelConfig(
    layers=2,
    hidden=32,
    ffn=48,
    heads=4,
    experts=8,
    k=2,
    capacity="none",
    text_vocab=120,
    image_codes=8,
    max_positions=24,
    image_patches=4,
    image_channels=12,
    init_std=0.3,  # large, so that every path weighs enough to be seen
)
DENSE = dataclasses.replace(TINY, experts=0, k=1)


def randomise_biases(module: nn.Module) -> None:
    """Biases start at zero, which would hide that one is missing or misplaced."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, 0, 0.3, generator=generator)


def sample_batch(config: ModelConfig, rows: int = 5, text: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Rows of every kind in turn: with picture and source, picture alone, source alone, neither, all source."""
    generator = torch.Generator().manual_seed(seed)
    length_B = torch.randint(text // 2, text + 1, (rows,), generator=generator)
    kind_B = torch.arange(rows) % 5
    source_B = torch.where((kind_B == 1) | (kind_B == 3), 0, length_B // 2)
    source_B = torch.where(kind_B == 4, length_B, source_B)
    tokens_BT = torch.randint(1, config.vocab, (rows, text), generator=generator)
    place_T = torch.arange(text)
    target_BT = (place_T >= source_B[:, None]) & (place_T < length_B[:, None])
    labels_BT = torch.randint(0, config.vocab, (rows, text), generator=generator)
    return {
        "tokens_BT": tokens_BT,
        "source_B": source_B,
        "length_B": length_B,
        "image_BPC": torch.randn(rows, config.image_patches, config.image_channels, generator=generator),
        "has_image_B": (kind_B == 0) | (kind_B == 1),
        "labels_BT": torch.where(target_BT, labels_BT, IGNORE),
    }


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
