"""The recipe of an image tokenizer: its shape, its losses, how long it trains. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from model.config import ImageTokenizerConfig
from training.recipe import Count, Optimizer, Schedule, Section, Weight, parse_settings, read_mapping

Scale = Annotated[float, Field(gt=0, le=2)]


class Views(Section):
    """Random views of the training pictures, drawn as a pure function of (seed, position)."""

    scale: tuple[Scale, Scale] = (0.75, 1.05)  # of the long side, as a share of the square's
    shift: float = Field(0.06, ge=0, lt=0.5)  # to each side at the most, as a share of the square's
    mirror: float = Field(0.5, ge=0, le=1)  # share of the pictures that may be mirrored that are

    @model_validator(mode="after")
    def _ordered(self) -> Views:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: must be the least, then the most")
        return self


class Loss(Section):
    """Weights of the parts of the loss, on pixels in [-1, 1]."""

    l1: Weight = 1.0
    l2: Weight = 1.0
    perceptual: Weight = 0.1  # 0: the feature network is not run


class ImageTokenizerRecipe(Section):
    model: ImageTokenizerConfig
    data: str = "data"
    seed: int = Field(1, ge=0, lt=2**63)
    steps: Count
    batch: Count  # pictures a step
    views: Views = Views()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    split: Literal["validation", "test"] = "validation"  # measured when trained; test is for final figures
    log_every: int = Field(20, ge=1)  # steps
    workers: int = Field(0, ge=0)  # processes that read pictures; 0: the training process itself


def load_image_recipe(path: str | Path, overrides: list[str] | None = None) -> ImageTokenizerRecipe:
    """Read a YAML recipe, apply `key.sub=value` overrides, check it. Raises UserError in one line."""
    return parse_settings(ImageTokenizerRecipe, read_mapping(path), overrides or [], str(path))
