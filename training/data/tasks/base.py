"""What a pre-training task is: a pool of items, and how an item becomes source, target and loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from training.data.corpus import Corpus

Random = np.random.Generator


class View(NamedTuple):
    """One of a picture's stored views."""

    row: int
    augmentation: int


@dataclass(frozen=True)
class Row:
    """One row of a batch: what is read, what is to be said, and the picture, if there is one.

    `target` ends with the end mark unless it was cut; the loss is its cross entropy, and that of the `hidden` tokens.
    A row with a `concept` says nothing: it is summed up at one more position, and told from the other rows of its group
    (`model/contrast.py`).
    """

    source: list[int]
    target: list[int]
    picture: Any = None  # a View of the corpus' pictures; None without one
    concept: int | None = None  # from 0; equal for rows that mean the same
    hidden: dict[int, int] = field(default_factory=dict)  # place in the source: the token that is masked there
    words: Sequence[int] = ()  # pieces of its picture's words, or of those that its text is found by
    weights: Sequence[float] = ()  # of a text's words, together of length 1


class Task(ABC):
    """A task over one split of a corpus.

    `row` must be a pure function of its arguments: with the global order (`training/data/order.py`) that makes
    the whole data state one integer. `name` is the recipe's key; `positions` the text positions that a row needs
    at the most, where that is less than the recipe's limit. Items are drawn `sides` at a time, as they stand in the
    pool; `grouped` tasks' rows stand together in the recipe's contrastive groups.
    """

    name: ClassVar[str]
    positions: ClassVar[int | None] = None
    sides: ClassVar[int] = 1
    grouped: ClassVar[bool] = False

    def __init__(self, corpus: Corpus, split: str):
        self.corpus, self.split = corpus, split
        self.tokenizer = corpus.tokenizer
        self.pool = self.items()

    @abstractmethod
    def items(self) -> np.ndarray:
        """Row numbers [n] int64 of the corpus that the task draws from."""

    @abstractmethod
    def row(self, item: int, limit: int, random: Random) -> Row:
        """The row of one item, within `limit` text positions."""

    def limit(self, text_positions: int) -> int:
        return min(text_positions, self.positions or text_positions)

    def view(self, item: int, random: Random) -> View:
        """A stored view of a picture: one of the fixed augmentations in training, the plain one elsewhere."""
        views = self.corpus.features.shape[1] if self.split == "train" else 1
        return View(item, int(random.integers(views)))

    def fit(self, source: list[int], target: list[int], limit: int, picture: View | None = None) -> Row:
        """Add the end mark and cut to `limit` positions, of which the source keeps half at the most if need be."""
        target = [*target, self.tokenizer.eos_id]
        source = source[: max(limit - len(target), limit // 2)]
        return Row(source, target[: limit - len(source)], picture)
