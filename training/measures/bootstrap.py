"""How sure a measure is: bootstrap over families (Efron and Tibshirani 1993, chapters 13 and 16).

Queries of one concept family are not independent, so whole families are drawn. Sizes: N queries, F families,
R resamples, S sums of which a score is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
COVERED = (2.5, 97.5)  # percentiles of a 95 % interval
CELLS = 2_000_000  # counts of drawn families that are held at a time

Score = Callable[[np.ndarray], np.ndarray]  # [..., S] sums -> [...]


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
    return bootstrap_score(_ratio, _weighted(values_N, families, weights_N), families, seed, resamples)


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
    first_NS, second_NS = (_weighted(values_N, families, weights_N) for values_N in (first_N, second_N))
    return paired_bootstrap_score(_ratio, first_NS, second_NS, families, seed, resamples)


def bootstrap_score(
    score: Score, statistics_NS: np.ndarray, families: Sequence[str], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """A score of sums, such as a corpus' chrF, which is no mean of its sentences'.

    `statistics_NS`: what each query adds to the S sums. Raises ValueError if lengths differ, or there is nothing.
    """
    (sums_FS,) = _by_family([statistics_NS], families)
    low, high = np.percentile(score(_resampled(sums_FS, seed, resamples)), COVERED)
    return Interval(float(score(sums_FS.sum(0))), float(low), float(high))


def paired_bootstrap_score(
    score: Score,
    first_NS: np.ndarray,
    second_NS: np.ndarray,
    families: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Paired:
    """First minus second of two systems' scores of sums on the same queries, as `bootstrap_score` has them."""
    both = _by_family([first_NS, second_NS], families)
    first_R, second_R = (score(_resampled(sums_FS, seed, resamples)) for sums_FS in both)  # one seed: the same draws
    low, high = np.percentile(first_R - second_R, COVERED)
    difference = score(both[0].sum(0)) - score(both[1].sum(0))
    return Paired(float(difference), float(low), float(high), float((first_R <= second_R).mean()))


def _ratio(sums_S: np.ndarray) -> np.ndarray:
    return sums_S[..., 0] / sums_S[..., 1]


def _weighted(values_N: np.ndarray, families: Sequence[str], weights_N: np.ndarray | None) -> np.ndarray:
    """[N, 2]: each query's value and its weight."""
    weights_N = np.ones(len(families)) if weights_N is None else np.asarray(weights_N)
    if len({len(values_N), len(weights_N), len(families)}) > 1:
        raise ValueError(f"{len(values_N)} values, {len(weights_N)} weights of {len(families)} queries")
    if not (weights_N > 0).all():
        raise ValueError("a weight is not positive")
    return np.stack((values_N, weights_N), 1)


def _by_family(systems: list[np.ndarray], families: Sequence[str]) -> list[np.ndarray]:
    """Each system's statistics [F, S], summed over each family."""
    lengths = {len(families), *map(len, systems)}
    if lengths == {0} or len(lengths) > 1:
        raise ValueError(f"{[len(system) for system in systems]} values of {len(families)} queries")
    _, family_N = np.unique(np.asarray(families, str), return_inverse=True)
    return [np.stack([np.bincount(family_N, column) for column in system.T], 1) for system in systems]


def _resampled(sums_FS: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """[R, S] sums of R draws of F families."""
    random, families = np.random.default_rng(seed), len(sums_FS)
    at_once = max(1, CELLS // families)
    drawn = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        picked = random.integers(families, size=(rows, families)) + families * np.arange(rows)[:, None]
        times_RF = np.bincount(picked.ravel(), minlength=rows * families).reshape(rows, families)
        drawn.append(times_RF @ sums_FS)
    return np.concatenate(drawn)
