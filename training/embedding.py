"""What pictures and texts are found by, as numbers: cosines of two kinds of vectors, and of words.

Words of a picture are the pieces that it calls for by its bag, and those that it is asked for by (`model/bags.py`);
words of a text are its own, the rarer the weightier. Only the MOST_WORDS weightiest are kept: the rest changes nothing
that can be measured.

Shape suffixes: N pictures or texts, M others, K usual ones, D width of the vectors, W words, V text pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.contrast import embed
from training.data.tasks.contrast import MOST_WORDS, rare_words
from training.data.tokenizer import Tokenizer

# What the four cosines weigh: of trunks, of bags, and of a text's words with those that a picture calls for, and with
# those that it is asked for by. Chosen on validation families, and the last three on such of the training split's too
# (docs/LOG.md, 38, 39).
TRUNK, BAG, CALLED, ASKED = 0.06, 0.09, 0.24, 0.61


@dataclass(frozen=True)
class Embeddings:
    """Of N pictures or texts: two kinds of vectors, side by side, and words with their weights; -1 is no word.

    All are scaled so that their products add up to a weighted mean of cosines.
    """

    vectors_ND: np.ndarray  # float32
    words_NW: np.ndarray  # int32
    weights_NW: np.ndarray  # float32

    @classmethod
    def of(cls, trunk_ND: Tensor, bag_NS: Tensor | None) -> Embeddings:
        """Of a model's `summaries`, without words."""
        trunk_ND = embed(trunk_ND)
        if bag_NS is not None:
            trunk_ND = torch.cat((trunk_ND * TRUNK**0.5, embed(bag_NS) * BAG**0.5), 1)
        return cls(trunk_ND.cpu().numpy(), *_no_words(len(trunk_ND), 0))

    def calling(self, called_NV: Tensor, asked_NV: Tensor) -> Embeddings:
        """The same vectors, with the words that pictures call for, and are asked for by."""
        both_NV = (CALLED * called_NV + ASKED * asked_NV) / (CALLED + ASKED) ** 0.5
        weights_NW, words_NW = both_NV.topk(min(MOST_WORDS, both_NV.shape[1]))
        return Embeddings(self.vectors_ND, words_NW.int().cpu().numpy(), weights_NW.cpu().numpy())

    def saying(self, texts: Sequence[str], tokenizer: Tokenizer, rarity: Mapping[int, float]) -> Embeddings:
        """The same vectors, with these texts' words."""
        found = [rare_words(text, tokenizer, rarity) for text in texts]
        words_NW, weights_NW = _no_words(len(texts), max((len(words) for words, _ in found), default=0))
        for number, (words, weights) in enumerate(found):
            words_NW[number, : len(words)], weights_NW[number, : len(words)] = words, weights * (CALLED + ASKED) ** 0.5
        return Embeddings(self.vectors_ND, words_NW, weights_NW)

    def __len__(self) -> int:
        return len(self.vectors_ND)

    def __getitem__(self, chosen: slice | Sequence[int]) -> Embeddings:
        return Embeddings(*(array[chosen] for array in self.arrays()))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.vectors_ND, self.words_NW, self.weights_NW

    @classmethod
    def joined(cls, parts: Sequence[Embeddings]) -> Embeddings:
        if not parts:
            return cls(np.zeros((0, 0), np.float32), *_no_words(0, 0))
        width = max(part.words_NW.shape[1] for part in parts)
        words_NW, weights_NW = _no_words(sum(map(len, parts)), width)
        start = 0
        for part in parts:
            rows, own = slice(start, start + len(part)), part.words_NW.shape[1]
            words_NW[rows, :own], weights_NW[rows, :own] = part.words_NW, part.weights_NW
            start += len(part)
        return cls(np.concatenate([part.vectors_ND for part in parts]), words_NW, weights_NW)

    def similarity(self, others: Embeddings) -> np.ndarray:
        """float32 [N, M], from -1 to 1."""
        if not len(self) or not len(others):
            return np.zeros((len(self), len(others)), np.float32)
        similarity_NM = self.vectors_ND @ others.vectors_ND.T
        known_NW = self.words_NW >= 0
        if not known_NW.any() or not (others.words_NW >= 0).any():
            return similarity_NM
        spread_V = np.zeros(max(self.words_NW.max(), others.words_NW.max()) + 1, np.float32)
        weights_NW = np.where(known_NW, self.weights_NW, 0)
        for other, (words_W, weights_W) in enumerate(zip(others.words_NW, others.weights_NW, strict=True)):
            own_W = words_W >= 0
            spread_V[words_W[own_W]] = weights_W[own_W]
            similarity_NM[:, other] += (weights_NW * spread_V[self.words_NW]).sum(1)
            spread_V[words_W[own_W]] = 0
        return similarity_NM


def standard_scores(similarity_NM: np.ndarray, usual_KM: np.ndarray) -> np.ndarray:
    """By how many standard deviations pictures are nearer to each text than usual ones are, float32 [N, M].

    Else some texts are near to all pictures. To the same end Bogolin et al. (2022, arXiv 2112.12777) compare with a
    bank of training queries.
    """
    return (similarity_NM - usual_KM.mean(0)) / np.maximum(usual_KM.std(0), 1e-6)


def _no_words(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((count, width), -1, np.int32), np.zeros((count, width), np.float32)
