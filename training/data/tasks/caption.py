"""Captioning: picture -> name, key words, or English name (M6, arXiv 2103.00823: image to text)."""

from __future__ import annotations

import numpy as np

from training.data.rows import Picture
from training.data.tasks.base import Random, Row, Task

# OFA (arXiv 2202.03052) asks its Chinese captions the first question; the others follow its manner.
ASK_NAME = "图片描述了什么内容?"
ASK_TAGS = "图片有哪些关键词?"
ASK_ENGLISH = "what does the image describe?"


class Caption(Task):
    name = "caption"
    positions = 48

    def items(self) -> np.ndarray:
        return self.corpus.picture_rows(self.split)

    def row(self, item: int, limit: int, random: Random) -> Row:
        picture = self.corpus.picture(item)
        question, answer = self.question(picture, random)
        encode = self.tokenizer.encode
        return self.fit(encode(question), encode(answer), limit, self.view(item, random))

    @staticmethod
    def question(picture: Picture, random: Random) -> tuple[str, str]:
        """The Chinese name half of the time, else its key words or the English name, where there are any."""
        others = []
        if picture.tags:
            others.append((ASK_TAGS, " ".join(picture.tags)))
        if picture.en:
            others.append((ASK_ENGLISH, picture.en))
        choice = random.integers(2 * max(len(others), 1))
        return others[choice] if choice < len(others) else (ASK_NAME, picture.zh)


def full_text(picture: Picture) -> str:
    """Everything that is said of a picture, in one line."""
    return "；".join(part for part in (picture.zh, " ".join(picture.tags), picture.en) if part)
