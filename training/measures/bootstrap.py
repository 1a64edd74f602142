"""How sure a measure is: bootstrap over families (Efron and Tibshirani 1993, chapters 13 and 16).

Queries of one concept family are not independent, so whole families are drawn. Sizes: N queries, F families,
R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
COVERED = (2.5, 97.5)  # percentiles of a 95 % interval
CELLS = 2_000_000  # counts of drawn families that are held at a time


@dataclass(frozen=True)
class Interval:
    """A measure with its 95 % percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """How much better the first of two systems is, with its 95 % percentile interval.

    `not_better` is the share of resamples in which the first does not exceed the second.
    """

    difference: float
    low: float
    high: float
    not_better: float


def bootstrap(
    values_N: np.ndarray,
    families: Sequence[str],
    weights_N: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean of `values_N`, or the sum of values over the sum of weights (bits over characters).

    Raises ValueError if lengths differ, there is nothing, or a weight is not positive.
    """
    (values_F,), weights_F = _by_family([values_N], families, weights_N)
    (drawn_R,) = _resampled([values_F], weights_F, seed, resamples)
    low, high = np.percentile(drawn_R, COVERED)
    return Interval(float(values_F.sum() / weights_F.sum()), float(low), float(high))


def paired_bootstrap(
    first_N: np.ndarray,
    second_N: np.ndarray,
    families: Sequence[str],
    weights_N: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Paired:
    """First minus second, both measured on the same queries, of which larger values are better.

    Values and errors as of `bootstrap`; give what is better when smaller (bits) with its sign turned.
    """
    (first_F, second_F), weights_F = _by_family([first_N, second_N], families, weights_N)
    first_R, second_R = _resampled([first_F, second_F], weights_F, seed, resamples)
    low, high = np.percentile(first_R - second_R, COVERED)
    difference = (first_F.sum() - second_F.sum()) / weights_F.sum()
    return Paired(float(difference), float(low), float(high), float((first_R <= second_R).mean()))


def _by_family(
    systems: list[np.ndarray], families: Sequence[str], weights_N: np.ndarray | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Each system's values, and the weights, summed over each family."""
    weights_N = np.ones(len(families)) if weights_N is None else np.asarray(weights_N)
    lengths = {len(families), len(weights_N), *map(len, systems)}
    if lengths == {0} or len(lengths) > 1:
        raise ValueError(f"{[len(system) for system in systems]} values of {len(families)} queries")
    if not (weights_N > 0).all():
        raise ValueError("a weight is not positive")
    _, family_N = np.unique(np.asarray(families, str), return_inverse=True)
    return [np.bincount(family_N, system) for system in systems], np.bincount(family_N, weights_N)


def _resampled(systems: list[np.ndarray], weights_F: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """[systems, R] measures of R draws of F families, the same draws for each system."""
    sums_FS = np.stack([*systems, weights_F], 1)
    random, families = np.random.default_rng(seed), len(weights_F)
    at_once = max(1, CELLS // families)
    drawn = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        picked = random.integers(families, size=(rows, families)) + families * np.arange(rows)[:, None]
        times_RF = np.bincount(picked.ravel(), minlength=rows * families).reshape(rows, families)
        drawn.append(times_RF @ sums_FS)
    sums_RS = np.concatenate(drawn)
    return (sums_RS[:, :-1] / sums_RS[:, -1:]).T
