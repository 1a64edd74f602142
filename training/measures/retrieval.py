"""Retrieval between pictures and texts: recall at k both ways, equal captions one positive.

Sizes: I images, T texts, Q queries, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass(frozen=True)
class Recall:
    """One direction: the share of `n` queries whose right candidate is among the first k.

    `chance_r10` is what r10 would be on average if the candidates came in random order.
    `ranks_Q` is each query's rank (from 1), for intervals: `recall.hits_Q(10)`.
    """

    r1: float
    r5: float
    r10: float
    n: int
    chance_r10: float
    ranks_Q: np.ndarray

    def hits_Q(self, k: int) -> np.ndarray:
        """float64: 1 for each query that is answered within k."""
        return (self.ranks_Q <= k).astype(np.float64)


@dataclass(frozen=True)
class Retrieval:
    image_to_text: Recall
    text_to_image: Recall


def retrieval(similarity_IT: np.ndarray, images: Sequence[str], texts: Sequence[str]) -> Retrieval:
    """Recall of a similarity matrix, given the caption of each image and of each text.

    Any candidate with the query's caption is right. A wrong candidate that is as similar as the right one comes
    before it, so that ties never help. Raises ValueError if a caption has no counterpart on the other side, or if
    the shape is another or a similarity is not a number.
    """
    if similarity_IT.shape != (len(images), len(texts)):
        raise ValueError(f"similarities {similarity_IT.shape} of {len(images)} images and {len(texts)} texts")
    if np.isnan(similarity_IT).any():
        raise ValueError("a similarity is not a number")
    equal_IT = np.asarray(images, object)[:, None] == np.asarray(texts, object)[None]
    return Retrieval(_recall(similarity_IT, equal_IT), _recall(similarity_IT.T, equal_IT.T))


def _recall(similarity_QC: np.ndarray, right_QC: np.ndarray) -> Recall:
    if not right_QC.any(1).all():
        raise ValueError(f"query {int(right_QC.any(1).argmin())} has no candidate with its caption")
    best_Q = np.where(right_QC, similarity_QC, -np.inf).max(1)
    ranks_Q = 1 + (~right_QC & (similarity_QC >= best_Q[:, None])).sum(1)
    r1, r5, r10 = (float((ranks_Q <= k).mean()) for k in (1, 5, 10))
    return Recall(r1, r5, r10, len(ranks_Q), _chance(right_QC, 10), ranks_Q)


def _chance(right_QC: np.ndarray, k: int) -> float:
    """Mean probability that k candidates drawn at random have a right one among them."""
    candidates = right_QC.shape[1]
    drawn = min(k, candidates)
    missed = [comb(candidates - int(right), drawn) / comb(candidates, drawn) for right in right_QC.sum(1)]
    return float(1 - np.mean(missed))
