"""A run's checkpoints without its training: first weights, written through the real saver by one rank."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.config import ImageTokenizerConfig
from model.image_tokens import ImageTokenizer
from model.m6 import M6
from tests.model.samples import randomise_biases
from training.checkpoint import Saver
from training.checkpoint_files import Retention
from training.data.corpus import Corpus
from training.data.views import FixedViews
from training.image_folder import save_image_tokenizer
from training.image_recipe import ImageTokenizerRecipe
from training.recipe import Recipe
from training.states import Part

MODEL: dict[str, Any] = {
    "preset": "m6-tiny", "layers": 3, "hidden": 32, "ffn": 48, "heads": 4, "experts": 8, "k": 2, "text_vocab": 540,
}  # fmt: skip


def make_recipe(corpus: Corpus, **model: Any) -> Recipe:
    return Recipe(model=MODEL | model, data=str(corpus.folder.parent), steps=9, global_batch=8, tasks={"poem": 1})


def first_model(recipe: Recipe, step: int) -> M6:
    """The model that the checkpoint of `step` holds: another for each step."""
    model = M6(recipe.model_shape(), seed=step).eval().requires_grad_(False)
    randomise_biases(model)
    return model


def make_checkpoints(home: Path, recipe: Recipe, corpus: Corpus, *steps: int) -> None:
    with alone(home.parent):
        saver = Saver(home, Retention(9), 2**30)
        for step in steps:
            parts = []
            for name, weight in first_model(recipe, step).named_parameters():
                for kind, values in (("master", weight), ("exp_avg", weight.square())):
                    parts.append(Part(f"{name}.{kind}", 0, weight.numel(), weight.numel(), values.flatten()))
            facts = {
                "recipe": recipe.model_dump(mode="json"),
                "tokenizer": corpus.tokenizer.sha256,
                "data": corpus.fingerprint,
                "adam_step": step,
            }
            saver.save(parts, step, facts)
            outcome = saver.wait()
            assert outcome is not None and not outcome.error, outcome


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A process group of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/.store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        (folder / ".store").unlink(missing_ok=True)


def make_painter(folder: Path, corpus: Corpus) -> None:
    """An image tokenizer with first weights, and the corpus' codes: 16 of 200 a picture of 16 px."""
    shape = ImageTokenizerConfig(side=16, patch=4, widths=(8,), levels=(8, 5, 5))
    model = ImageTokenizer(shape, seed=1)
    views = torch.stack([view for view in FixedViews(corpus, range(len(corpus.pictures)), 16)])
    codes = model.encode(views).view(-1, 4, 16).numpy().astype(np.uint16)
    save_image_tokenizer(folder, model, codes, ImageTokenizerRecipe(model=shape, steps=1, batch=1), corpus, None, {})


def same_values(left: M6, right: M6) -> bool:
    pairs = zip(left.named_parameters(), right.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
