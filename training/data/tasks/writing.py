"""Writing: plain language modelling, poems by title, reviews by polarity and topic (M6, arXiv 2103.00823)."""

from __future__ import annotations

import numpy as np

from training.data.rows import Text
from training.data.tasks.base import Random, Row, Task
from training.data.tasks.denoise import window


class Language(Task):
    """Language modelling: no source; a window of a text."""

    name = "language"

    def items(self) -> np.ndarray:
        return self.corpus.text_rows(self.split)

    def row(self, item: int, limit: int, random: Random) -> Row:
        tokens = self.tokenizer.encode(self.corpus.text(item).text)
        return self.fit([], window(tokens, limit, random), limit)


class Poem(Task):
    name = "poem"

    def items(self) -> np.ndarray:
        return self.corpus.text_rows(self.split, "poem")

    def row(self, item: int, limit: int, random: Random) -> Row:
        text = self.corpus.text(item)
        return self.fit(self.tokenizer.encode(poem_prompt(text)), self.tokenizer.encode(text.text), limit)


class Review(Task):
    name = "review"

    def items(self) -> np.ndarray:
        return self.corpus.text_rows(self.split, "review")

    def row(self, item: int, limit: int, random: Random) -> Row:
        text = self.corpus.text(item)
        return self.fit(self.tokenizer.encode(review_prompt(text)), self.tokenizer.encode(text.text), limit)


def poem_prompt(text: Text) -> str:
    return f"写一首{text.form}。题目：{text.title}。作者：{text.author}。"


def review_prompt(text: Text) -> str:
    return f"写一条{text.polarity}。话题：{text.topic}。"
