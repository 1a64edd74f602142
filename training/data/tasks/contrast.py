"""Contrast: a picture alone and its words alone, to be found by one another (InfoNCE, as in CLIP, arXiv 2103.00020)."""

from __future__ import annotations

import math
import zlib
from collections import Counter

import numpy as np

from training.data.corpus import Corpus
from training.data.rows import Picture
from training.data.tasks.base import Random, Row, Task

LABEL_ALONE, ENGLISH = 0.25, 0.15  # how often a text is the name alone, or the English name; else name and key words


class Contrast(Task):
    """Items come in twos: a picture's row number, which stands for its pixels, and its complement, for its words."""

    name = "contrast"
    positions = 48
    sides = 2
    grouped = True

    def items(self) -> np.ndarray:
        rows = self.corpus.picture_rows(self.split)
        return np.stack((rows, ~rows), 1).reshape(-1)

    def row(self, item: int, limit: int, random: Random) -> Row:
        if item >= 0:
            picture = self.corpus.picture(item)
            return Row([], [], self.view(item, random), concept(picture), words=_all_words(self.corpus, picture))
        picture = self.corpus.picture(~item)
        text = picture_words(picture) if self.split != "train" else some_words(picture, random)
        return Row(self.tokenizer.encode_finely(text)[: limit - 1], [], None, concept(picture))


def word_rarity(corpus: Corpus) -> dict[int, float]:
    """Each piece of the training pictures' words: ln((1 + N) / (1 + pictures with it)) + 1, as usual in TF-IDF."""
    pictures = [corpus.picture(int(row)) for row in corpus.picture_rows("train")]
    seen = Counter(piece for picture in pictures for piece in _all_words(corpus, picture))
    return {piece: math.log((1 + len(pictures)) / (1 + count)) + 1 for piece, count in sorted(seen.items())}


def _all_words(corpus: Corpus, picture: Picture) -> list[int]:
    return corpus.tokenizer.words(f"{picture_words(picture)} {picture.en}")


def concept(picture: Picture) -> int:
    """Equal for pictures of one name, such as an emoji's in two styles."""
    return zlib.crc32(picture.zh.encode())


def picture_words(picture: Picture) -> str:
    """The Chinese words by which a picture is to be found: its name and key words."""
    return " ".join((picture.zh, *picture.tags))


def some_words(picture: Picture, random: Random) -> str:
    """The name and some of the key words in any order, or the name alone, or the English name."""
    choice = random.random()
    if choice < ENGLISH and picture.en:
        return picture.en
    if choice < ENGLISH + LABEL_ALONE:
        return picture.zh
    tags = random.permutation(picture.tags)[: random.integers(1, len(picture.tags) + 1)] if picture.tags else ()
    return " ".join((picture.zh, *tags))
