"""Pictures of a corpus as tensors: random views to train on, and the fixed views that are stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.data.corpus import Corpus
from training.data.features import AUGMENTATIONS, Augmentation, as_array, placed
from training.data.order import random_at, shuffled
from training.errors import UserError
from training.image_recipe import ImageTokenizerRecipe


class RandomViews(Dataset[Tensor]):
    """One position after the other, what a recipe trains on: float32 [3, side, side] in [-1, 1].

    The picture and its view are a pure function of (seed, position); each epoch has an order of its own. Raises
    UserError if the corpus has no pictures to train on.
    """

    def __init__(self, corpus: Corpus, recipe: ImageTokenizerRecipe):
        self.corpus, self.recipe = corpus, recipe
        self.rows = corpus.picture_rows("train")
        if not len(self.rows):
            raise UserError(f"{corpus.folder}: there is no picture to train on; run `m6 data fetch`")

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch

    def __getitem__(self, position: int) -> Tensor:
        epoch, draw = divmod(position, len(self.rows))
        row = self.rows[shuffled(draw, len(self.rows), (self.recipe.seed, "image tokenizer", epoch))]
        picture = self.corpus.picture(int(row))
        view = self.view(position)
        return torch.from_numpy(as_array(placed(picture.pil(), view, picture.mirrorable, self.recipe.model.side)))

    def view(self, position: int) -> Augmentation:
        views, random = self.recipe.views, random_at(self.recipe.seed, position)
        right, down = random.uniform(-views.shift, views.shift, 2)
        return Augmentation(random.uniform(*views.scale), right, down, bool(random.random() < views.mirror))


class FixedViews(Dataset[Tensor]):
    """The K views that `Corpus.features` describes, of some pictures: row by row, view by view."""

    def __init__(self, corpus: Corpus, rows: Sequence[int] | np.ndarray, side: int, views: int = len(AUGMENTATIONS)):
        self.corpus, self.rows, self.side, self.views = corpus, rows, side, views

    def __len__(self) -> int:
        return len(self.rows) * self.views

    def __getitem__(self, index: int) -> Tensor:
        place, view = divmod(index, self.views)
        return torch.from_numpy(self.corpus.pixels(int(self.rows[place]), view, self.side))
