"""Constants that measurements tell, held near what was known before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

ROUNDS, STEP, ENOUGH = 10, 1e-3, 2e-3


def fitted(
    ratios: Callable[[Sequence[float]], Sequence[float]],
    before: Sequence[float],
    spread: Sequence[float],
    typical: float,
    most: float = np.inf,
) -> list[float]:
    """The constants by which `ratios` of them, ln(predicted / measured), are the smallest, and they near `before`.

    `typical` and `spread`: standard deviations of the ratios, and of the constants' logarithms. Least squares, from
    `typical` on of absolute values, so that no outlier decides. No constant is more than `most`.
    """
    prior, widths = np.log(before), np.array(spread)
    found = prior.copy()

    def misses(logs: np.ndarray) -> np.ndarray:
        return np.array([*np.array(ratios(np.exp(logs).tolist())) / typical, *(logs - prior) / widths])

    for _ in range(ROUNDS):
        here = misses(found)
        slopes = np.stack([(misses(found + STEP * unit) - here) / STEP for unit in np.eye(len(prior))], axis=1)
        weights = 1 / np.sqrt(np.maximum(1, abs(here)))
        move = np.linalg.lstsq(weights[:, None] * slopes, -weights * here, rcond=None)[0]
        earlier, found = found, np.minimum(found + np.clip(move, -0.3, 0.3), np.log(most))
        if abs(found - earlier).max() < ENOUGH:
            break
    return np.exp(found).tolist()
