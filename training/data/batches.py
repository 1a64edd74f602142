"""Rows of the global order -> batches of tensors, built ahead of the step that needs them.

Shape suffixes: B rows, T text positions, P image patches, C channels of a patch, W pieces of a row's words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.bags import ABSENT
from model.config import ModelConfig
from model.m6 import IGNORE
from model.vision import patchify
from training.data.corpus import Corpus
from training.data.order import GlobalOrder
from training.data.tasks import Row, View
from training.data.tokenizer import Tokenizer
from training.errors import UserError

Batch = dict[str, Tensor]

WIDTH_MULTIPLE = 8  # text positions of a batch, and words of a row, are rounded up to this: few shapes


class Batcher:
    """Rows -> the tensors that `model.m6.M6` takes. Each `block` rows with a concept, as they come, are a group.

    `look` gives the patches [P, C] of what stands for a row's picture.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | type[Tokenizer],
        model: ModelConfig,
        look: Callable[[Any], np.ndarray],
        block: int = 1,
    ):
        self.tokenizer, self.model, self.look, self.block = tokenizer, model, look, block

    def __call__(self, rows: Sequence[Row], width: int, size: int | None = None) -> Batch:
        """A batch of `size` rows, `width` text positions each (rounded up); rows that lack are empty ones."""
        tokenizer, model = self.tokenizer, self.model
        size, width = size or len(rows), min(_rounded(width), model.max_positions)
        tokens_BT = np.full((size, width), tokenizer.pad_id, np.int64)
        labels_BT = np.full((size, width), IGNORE, np.int64)
        source_B, length_B, has_image_B = (
            np.zeros(size, np.int64),
            np.zeros(size, np.int64),
            np.zeros(size, bool),
        )
        image_BPC = np.zeros((size, model.image_patches, model.image_channels), np.float32)
        words_BW = np.full((size, _rounded(max((len(row.words) for row in rows), default=0))), ABSENT, np.int64)
        weights_BW = np.zeros(words_BW.shape, np.float32)
        group_B, concept_B = self._groups(rows, size)
        for i, row in enumerate(rows):
            start = tokenizer.bos_id if row.concept is None else tokenizer.embed_id
            text = [*row.source, start, *row.target[:-1]]
            source_B[i], length_B[i] = len(row.source), len(text)
            tokens_BT[i, : len(text)] = text
            labels_BT[i, len(row.source) : len(row.source) + len(row.target)] = row.target
            labels_BT[i, list(row.hidden)] = list(row.hidden.values())
            words_BW[i, : len(row.words)] = row.words
            weights_BW[i, : len(row.weights)] = row.weights
            if row.picture is not None:
                has_image_B[i], image_BPC[i] = True, self.look(row.picture)
        arrays = {
            "tokens_BT": tokens_BT, "labels_BT": labels_BT, "source_B": source_B, "length_B": length_B,
            "image_BPC": image_BPC, "has_image_B": has_image_B, "group_B": group_B, "concept_B": concept_B,
            "words_BW": words_BW, "weights_BW": weights_BW,
        }  # fmt: skip
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _groups(self, rows: Sequence[Row], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Contrastive group and concept of each row, [size] int64; -1 without one."""
        concept_B = np.full(size, -1, np.int64)
        concept_B[: len(rows)] = [-1 if row.concept is None else row.concept for row in rows]
        own_B = concept_B >= 0
        return np.where(own_B, (own_B.cumsum() - 1) // self.block, -1), concept_B


class Collator(Batcher):
    """Of rows whose pictures are views of the corpus' own."""

    def __init__(self, corpus: Corpus, model: ModelConfig, block: int = 1):
        _check(corpus, model)
        super().__init__(corpus.tokenizer, model, self._view, block)
        self.corpus = corpus

    def _view(self, view: View) -> np.ndarray:
        if self.model.image_input == "features":
            return self.corpus.features[view.row, view.augmentation]
        return pixel_patches(self.corpus.pixels(view.row, view.augmentation, picture_side(self.model)), self.model)


def _rounded(width: int) -> int:
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def picture_side(model: ModelConfig) -> int:
    """Pixels of a side of the square that is cut into patches."""
    return round((model.image_channels // 3 * model.image_patches) ** 0.5)


def pixel_patches(pixels: np.ndarray, model: ModelConfig) -> np.ndarray:
    """[3, side, side] -> [P, C]."""
    return patchify(torch.from_numpy(pixels)[None], model.image_patches)[0].numpy()


def _check(corpus: Corpus, model: ModelConfig) -> None:
    """Refuse, in one line, a model that cannot take this corpus."""
    if model.text_vocab != corpus.tokenizer.vocab_size:
        raise UserError(
            f"model.text_vocab={model.text_vocab}: the corpus' tokenizer has {corpus.tokenizer.vocab_size} pieces; "
            f"set model.text_vocab={corpus.tokenizer.vocab_size}"
        )
    if model.image_input == "features":
        stored = corpus.features.shape[2:]
        if stored != (model.image_patches, model.image_channels):
            raise UserError(
                f"model.image_patches={model.image_patches}, image_channels={model.image_channels}: the corpus' "
                f"features have {stored[0]} patches of {stored[1]} channels; set them so"
            )
        return
    side, patches = (model.image_channels // 3) ** 0.5, model.image_patches**0.5
    if model.image_channels % 3 or not (side >= 1 and side.is_integer()) or not (patches >= 1 and patches.is_integer()):
        raise UserError(
            f"model.image_patches={model.image_patches}, image_channels={model.image_channels}: pixel patches are "
            "3·p·p channels each, in a square grid"
        )


class StepBatches:
    """This rank's micro-batches of each step, from any step on, one step ahead of the one in hand.

    Micro-step j of a step holds positions [j·m·W, (j+1)·m·W) of it over all W ranks, rank r the r-th block of m:
    so the sets of rows that share a micro-batch are the same on any number of ranks. All ranks' batches of a
    micro-step have one shape, but for the rows' words.
    """

    def __init__(self, order: GlobalOrder, collate: Collator, micro_batch: int, rank: int, world: int):
        self.order, self.collate = order, collate
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self._pool = ThreadPoolExecutor(1, "batches")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of step `step` (from 0)."""
        start = step * self.order.batch
        shared = self.micro_batch * self.world
        return [self._micro_batch(start + offset, shared) for offset in range(0, self.order.batch, shared)]

    def tasks(self, step: int) -> list[str]:
        """The task of each of this rank's rows of a step, in the order of its micro-batches."""
        start, shared = step * self.order.batch, self.micro_batch * self.world
        own = range(self.rank * self.micro_batch, (self.rank + 1) * self.micro_batch)
        return [
            self.order.task_at(start + offset + place).name
            for offset in range(0, self.order.batch, shared)
            for place in own
        ]

    def _micro_batch(self, start: int, shared: int) -> Batch:
        own = start + self.rank * self.micro_batch
        rows = [self.order.row(position) for position in range(own, own + self.micro_batch)]
        return self.collate(rows, self.order.width(start, start + shared))

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`; those of the next one are begun, for when they are asked for."""
        due = self._ahead.pop(step, None) or self._pool.submit(self.step, step)
        ready = due.result()
        self._ahead = {step + 1: self._pool.submit(self.step, step + 1)}
        return ready
