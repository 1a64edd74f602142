"""Captions against several references a picture: exact match, chrF, and CIDEr-D on characters.

Chinese is compared character by character, so that no word segmenter has a say; spaces do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

import numpy as np
from sacrebleu.metrics import CHRF

LONGEST = 4  # characters of an n-gram of CIDEr
SIGMA = 6.0  # of the Gaussian penalty on lengths, in characters
SCALE = 10.0

Vector = dict[str, float]


@dataclass(frozen=True)
class CaptionScores:
    """Of `n` pictures: exact 0 to 1, chrF 0 to 100 of the corpus, CIDEr-D 0 to 10; and each picture's own.

    A corpus' chrF is not the mean of its pictures': `chrf_NS` is what each adds to the counts that `chrf_of` scores.
    """

    exact: float
    chrf: float
    cider: float
    n: int
    exact_N: np.ndarray
    chrf_NS: np.ndarray
    cider_N: np.ndarray


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores of one caption a picture, the first reference of which is its label: exact match is with that alone.

    Raises ValueError if there is no picture, a reference is missing or empty, or there are not as many captions.
    """
    if not said or len(said) != len(references) or not all(of and all(of) for of in references):
        raise ValueError(f"{len(said)} captions of {len(references)} pictures, each of which needs references")
    exact_N = np.array([caption == label for caption, (label, *_) in zip(said, references, strict=True)], float)
    chrf_NS = _chrf_counts(said, references)
    cider_N = cider_d(said, references)
    return CaptionScores(
        float(exact_N.mean()),
        float(chrf_of(chrf_NS.sum(0))),
        float(cider_N.mean()),
        len(said),
        exact_N,
        chrf_NS,
        cider_N,
    )


def chrf_of(counts_S: np.ndarray) -> np.ndarray:
    """chrF2 of character n-grams up to 6 (Popovic 2015), from 0 to 100, as sacrebleu has it.

    [..., 18] counts -> [...]: of each order the n-grams of the captions, of the references, and those in both. An order
    that one of the sides lacks does not count.
    """
    said, true, both = np.moveaxis(counts_S.reshape(*counts_S.shape[:-1], CHRF.CHAR_ORDER, 3), -1, 0)
    known = (said > 0) & (true > 0)
    orders = np.maximum(known.sum(-1), 1)
    precision, recall = ((both / np.maximum(of, 1) * known).sum(-1) / orders for of in (said, true))
    weighted = CHRF.BETA**2 * precision + recall
    return 100 * (1 + CHRF.BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1)


def _chrf_counts(said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """float64 [pictures, 18]: of each caption, beside the reference that is closest to it."""
    most = max(map(len, references))
    # None where a picture has fewer references than others, which sacrebleu takes though its types do not say so.
    streams: list[list[Any]] = [[of[i] if i < len(of) else None for of in references] for i in range(most)]
    return np.array(CHRF()._extract_corpus_statistics(list(said), streams), float)


def cider_d(said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """float64 [pictures] CIDEr-D (Vedantam et al. 2015) on character n-grams of 1 to 4, from 0 to 10.

    The D variant: a caption's counts are clipped to the reference's, and lengths that differ are punished. Weights
    are of counts, as in the authors' code. How rare an n-gram is, is told by the references given: it is the share
    of pictures with the n-gram in any reference, so scores of different sets of pictures cannot be compared. A
    perfect caption of fewer than four characters gets 2.5 for each, for want of longer n-grams.
    """
    rarity = _rarity(references)
    return np.array([_cider(c, of, rarity, log(len(said))) for c, of in zip(said, references, strict=True)])


def _cider(caption: str, references: Sequence[str], rarity: Vector, unseen: float) -> float:
    similarities = [
        _similarity(_weights(caption, n, rarity, unseen), _weights(reference, n, rarity, unseen))
        * exp(-((len(_plain(caption)) - len(_plain(reference))) ** 2) / (2 * SIGMA**2))
        for reference in references
        for n in range(1, LONGEST + 1)
    ]
    return SCALE * sum(similarities) / len(similarities)


def _similarity(caption: Vector, reference: Vector) -> float:
    """Cosine with the caption's weights clipped to the reference's; 0 if either has no weight."""
    norms = sqrt(sum(w * w for w in caption.values())) * sqrt(sum(w * w for w in reference.values()))
    shared = caption.keys() & reference.keys()
    return sum(min(caption[g], reference[g]) * reference[g] for g in shared) / norms if norms else 0.0


def _weights(text: str, n: int, rarity: Vector, unseen: float) -> Vector:
    return {gram: count * rarity.get(gram, unseen) for gram, count in Counter(_grams(text, n)).items()}


def _rarity(references: Sequence[Sequence[str]]) -> Vector:
    """log (pictures / pictures with the n-gram), of each n-gram of the references."""
    lengths = range(1, LONGEST + 1)
    seen = Counter(gram for of in references for gram in {g for text in of for n in lengths for g in _grams(text, n)})
    return {gram: log(len(references) / count) for gram, count in seen.items()}


def _grams(text: str, n: int) -> Iterable[str]:
    plain = _plain(text)
    return (plain[i : i + n] for i in range(len(plain) - n + 1))


def _plain(text: str) -> str:
    return "".join(text.split())
