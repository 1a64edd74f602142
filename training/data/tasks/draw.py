"""Drawing: words -> the codes of a picture (M6, arXiv 2103.00823: codes are further vocabulary entries)."""

from __future__ import annotations

import numpy as np

from training.data.tasks.base import Random, Row, Task
from training.data.tasks.contrast import picture_words, some_words
from training.errors import UserError

WORDLESS = 0.1  # how often the words are left out, for classifier-free guidance (arXiv 2207.12598)


class Draw(Task):
    name = "draw"

    def items(self) -> np.ndarray:
        if self.corpus.codes is None:
            raise UserError("tasks.draw: needs pictures as codes: name a trained tokenizer's folder by image_tokenizer")
        return self.corpus.picture_rows(self.split)

    def row(self, item: int, limit: int, random: Random) -> Row:
        """Its target has no end mark: a picture has as many codes as any other."""
        assert self.corpus.codes is not None
        view, picture = self.view(item, random), self.corpus.picture(item)
        target = (self.tokenizer.vocab_size + self.corpus.codes[view].astype(np.int64)).tolist()
        if len(target) >= limit:
            raise UserError(f"text_positions={limit}: a drawing takes {len(target)} positions, and words before them")
        words = some_words(picture, random) if self.split == "train" else picture_words(picture)
        wordless = self.split == "train" and random.random() < WORDLESS
        source = self.tokenizer.encode_finely(draw_prompt("" if wordless else words))
        return Row(source[: limit - len(target)], target)


def draw_prompt(words: str) -> str:
    return f"画：{words}"
