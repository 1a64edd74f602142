"""Drawing: words -> the codes of a picture (M6, arXiv 2103.00823: codes are further vocabulary entries)."""

from __future__ import annotations

import numpy as np

from training.data.rows import Picture
from training.data.tasks.base import Random, Row, Task, View
from training.data.tasks.contrast import picture_words, some_words
from training.data.tokenizer import Tokenizer
from training.errors import UserError

WORDLESS = 0.1  # how often the words are left out, for classifier-free guidance (arXiv 2207.12598)


class Draw(Task):
    name = "draw"

    def items(self) -> np.ndarray:
        if self.corpus.codes is None:
            raise UserError(
                f"tasks.{self.name}: needs pictures as codes: name a trained tokenizer's folder by image_tokenizer"
            )
        return self.corpus.picture_rows(self.split)

    def row(self, item: int, limit: int, random: Random) -> Row:
        """Its target has no end mark: a picture has as many codes as any other."""
        target = self.codes(self.view(item, random), limit)
        source = self.prompt(self.corpus.picture(item), random)
        return Row(filled_up(source, limit - len(target), self.tokenizer), target)

    def codes(self, view: View, limit: int) -> list[int]:
        """A view's codes as entries of the vocabulary. Raises UserError if they and a word are beyond the limit."""
        assert self.corpus.codes is not None
        found = (self.tokenizer.vocab_size + self.corpus.codes[view].astype(np.int64)).tolist()
        if len(found) >= limit:
            raise UserError(f"text_positions={limit}: a drawing takes {len(found)} positions, and words")
        return found

    def prompt(self, picture: Picture, random: Random) -> list[int]:
        words = some_words(picture, random) if self.split == "train" else picture_words(picture)
        wordless = self.split == "train" and random.random() < WORDLESS
        return self.tokenizer.encode_finely(draw_prompt("" if wordless else words))


def filled_up(prompt: list[int], room: int, tokenizer: Tokenizer) -> list[int]:
    """The prompt with empty tokens before it, or cut, so that each code has one position whatever the words are."""
    return [tokenizer.pad_id] * (room - len(prompt)) + prompt[:room]


def draw_prompt(words: str) -> str:
    return f"画：{words}"
