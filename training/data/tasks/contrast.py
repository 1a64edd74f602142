"""Contrast: a picture alone and its words alone, to be found by one another (InfoNCE, as in CLIP, arXiv 2103.00020)."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping

import numpy as np

from training.data.corpus import Corpus
from training.data.rows import Picture
from training.data.tasks.base import Random, Row, Task
from training.data.tokenizer import Tokenizer

LABEL_ALONE, ENGLISH = 0.25, 0.15  # how often a text is the name alone, or the English name; else name and key words
MOST_WORDS = 256  # that a picture or a text is found by, the weightiest: more change nothing that can be measured


class Contrast(Task):
    """Items come in twos: a picture's row number, which stands for its pixels, and its complement, for its words."""

    name = "contrast"
    positions = 48
    sides = 2
    grouped = True

    def __init__(self, corpus: Corpus, split: str):
        super().__init__(corpus, split)
        self.rarity = corpus.rarity or word_rarity(corpus)

    def items(self) -> np.ndarray:
        rows = self.corpus.picture_rows(self.split)
        return np.stack((rows, ~rows), 1).reshape(-1)

    def row(self, item: int, limit: int, random: Random) -> Row:
        if item >= 0:
            picture = self.corpus.picture(item)
            return Row([], [], self.view(item, random), concept(picture), words=_all_words(self.corpus, picture))
        picture = self.corpus.picture(~item)
        text = picture_words(picture) if self.split != "train" else some_words(picture, random)
        # A picture is asked for by all of its words, whichever of them the trunk reads: so more pictures are found.
        asked, weights = rare_words(picture_words(picture), self.tokenizer, self.rarity)
        source = self.tokenizer.encode_finely(text)[: limit - 1]
        return Row(source, [], None, concept(picture), words=asked, weights=weights.tolist())


def word_rarity(corpus: Corpus) -> dict[int, float]:
    """Each piece of the training pictures' words: ln((1 + N) / (1 + pictures with it)) + 1, as usual in TF-IDF."""
    pictures = [corpus.picture(int(row)) for row in corpus.picture_rows("train")]
    seen = Counter(piece for picture in pictures for piece in _all_words(corpus, picture))
    return {piece: math.log((1 + len(pictures)) / (1 + count)) + 1 for piece, count in sorted(seen.items())}


def rare_words(text: str, tokenizer: Tokenizer, rarity: Mapping[int, float]) -> tuple[list[int], np.ndarray]:
    """A text's words, the rarest MOST_WORDS of them, and their weights, of length one.

    Words that have no rarity were never taught, and left out.
    """
    known = (word for word in tokenizer.words(text) if word in rarity)
    words = sorted(known, key=lambda word: -rarity[word])[:MOST_WORDS]
    weights = np.array([rarity[word] for word in words], np.float32)
    return words, weights / max(float(np.linalg.norm(weights)), 1e-6)


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
