"""How well the planner does on published rows that its constants were not fitted to: python -m benchmarks.planner_folds

The three constants of each family of devices are fitted anew: to all rows (`fitted`; these are the constants of
launch/planner/hardware.py), to all but the row that is predicted (`row out`), and to all but that row's group
(`group out`). Errors are shares of what was measured, of rows whose prediction the constants change. The form of the
model stays as it is, which was chosen with all rows in view: of rows never seen expect more than `row out`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launch.planner import published
from launch.planner.fitting import fitted
from launch.planner.hardware import FAMILIES, OTHER_FAMILY
from launch.planner.published import Inexpressible, Row
from launch.planner.validation import Prediction, predict, read_rows, score

TABLE = Path(__file__).parent / "calibration.csv"
NAMES = ("matmul", "memory", "network")
# What too few rows tell is held near the constants of an unknown device, or of the generation before. Standard
# deviations: of a row's ln(predicted / measured), and of the constants' logarithms, as V100, A100 and H100 differ.
TYPICAL, SPREAD = 0.08, (0.2, 0.5, 0.15)
BEFORE = {"B200": "H100"}


@contextmanager
def constants(family: str, values: Sequence[float]) -> Iterator[None]:
    """The planner with other constants of a family."""
    kept = FAMILIES[family]
    FAMILIES[family] = replace(kept, **dict(zip(NAMES, values, strict=True)))
    try:
        yield
    finally:
        FAMILIES[family] = kept


def fit(family: str, rows: Sequence[Row]) -> list[float]:
    """The constants that rows of a family tell, to two digits."""
    near = FAMILIES[BEFORE[family]] if family in BEFORE else OTHER_FAMILY

    def ratios(values: Sequence[float]) -> list[float]:
        with constants(family, values):
            return [math.log(1 + (predict(row).error or 0)) for row in rows]

    prior = [getattr(near, name) for name in NAMES]
    return [round(value, 2) for value in fitted(ratios, prior, SPREAD, TYPICAL, most=1.0)]


def told_by(family: str, rows: Sequence[Row]) -> list[Row]:
    """Rows whose predictions the family's constants change."""
    here = [row for row in rows if _family(row) == family and predict(row).error is not None]
    with constants(family, [0.1] * len(NAMES)):
        slow = [predict(row).predicted for row in here]
    return [row for row, other in zip(here, slow, strict=True) if other != predict(row).predicted]


def _family(row: Row) -> str:
    try:
        own = published.machine(row).family
    except Inexpressible:
        return ""
    return next((name for name, family in FAMILIES.items() if family is own), "")


def _group(row: Row) -> str:
    return row["id"].partition("-")[0]


def held_out(family: str, rows: Sequence[Row], by_group: bool) -> list[Prediction]:
    """Each row as predicted by constants that were fitted without it, or without its group."""
    found = []
    for _, fold in itertools.groupby(rows, key=_group if by_group else lambda row: row["id"]):
        out = list(fold)
        with constants(family, fit(family, [row for row in rows if row not in out])):
            found.extend(predict(row) for row in out)
    return found


def main() -> None:
    table = read_rows(TABLE)
    columns: list[list[Prediction]] = [[], [], []]
    print("| family | rows | matmul | memory | network |\n|---|---|---|---|---|")
    for family in FAMILIES:
        if not (rows := told_by(family, table)):
            continue
        fitted = fit(family, rows)
        print(f"| {family} | {len(rows)} | {' | '.join(f'{value:.2f}' for value in fitted)} |")
        with constants(family, fitted):
            columns[0] += [predict(row) for row in rows]
        columns[1] += held_out(family, rows, by_group=False)
        columns[2] += held_out(family, rows, by_group=True)
    print("\n| group | rows | fitted | row out | group out | largest, row out | skill, row out |")
    print("|---|---|---|---|---|---|---|")
    for name, *scores in zip(score(columns[0]), *(score(column).values() for column in columns), strict=True):
        means = " | ".join(f"{found.mean_abs_error:.1%}" for found in scores)
        out = scores[1]
        skill = "-" if out.skill is None else f"{out.skill:.2f}"
        print(f"| {name} | {out.rows} | {means} | {out.max_abs_error:.1%} | {skill} |")


if __name__ == "__main__":
    main()
