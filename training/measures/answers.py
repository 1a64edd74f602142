"""Questions with one right answer: accuracy beside that of always giving the commonest answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Accuracy:
    """Shares of `n` questions of one kind: answered rightly, and by `majority_answer` alone.

    The commonest answer is that of the tested questions themselves, which is the hardest constant to beat.
    `right_N` is 1 for each question answered rightly, for intervals.
    """

    accuracy: float
    majority: float
    majority_answer: str
    n: int
    right_N: np.ndarray


def accuracy(said: Sequence[str], true: Sequence[str]) -> Accuracy:
    """Accuracy of answers to questions of one kind. Raises ValueError if there are none, or not as many of both."""
    if not true or len(said) != len(true):
        raise ValueError(f"{len(said)} answers to {len(true)} questions")
    right_N = np.array([a == b for a, b in zip(said, true, strict=True)], np.float64)
    answer, count = Counter(true).most_common(1)[0]
    return Accuracy(float(right_N.mean()), count / len(true), answer, len(true), right_N)
