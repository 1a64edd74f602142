"""The planner's constants, fitted to published rows."""

from pathlib import Path

import pytest

from benchmarks.planner_folds import NAMES, TABLE, constants, fit, held_out, told_by
from launch.planner.hardware import FAMILIES
from launch.planner.published import Row
from launch.planner.validation import predict, read_rows


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(TABLE)


def test_the_planners_constants_are_those_that_the_rows_tell(rows: list[Row]) -> None:
    page = Path("docs/planner.md").read_text(encoding="utf-8")
    for name in ("V100", "A100", "H100", "B200"):
        told, family = told_by(name, rows), FAMILIES[name]
        fitted = fit(name, told)
        assert fitted == [getattr(family, constant) for constant in NAMES], name
        assert f"| {name} | {' | '.join(map(str, fitted))} | {family.fitted_by} |" in page
        groups = {row["id"].partition("-")[0] for row in told}
        assert groups == {part.partition("-")[0] for part in family.fitted_by.split(", ")}


def test_a_row_left_out_has_no_say_in_its_prediction(rows: list[Row]) -> None:
    told = [row for row in rows if row["id"].startswith("BSV")]
    other = [dict(row) | ({"value": "999"} if row["id"] == "BSV-1" else {}) for row in told]
    found, changed = ({row.id: row.predicted for row in held_out("V100", some, False)} for some in (told, other))
    assert found["BSV-1"] == changed["BSV-1"]
    assert found["BSV-2"] != changed["BSV-2"]
    groups = held_out("V100", told, by_group=True)
    with constants("V100", fit("V100", [])):
        assert [row.predicted for row in groups] == [predict(row).predicted for row in told]


def test_constants_are_put_back(rows: list[Row]) -> None:
    kept = FAMILIES["V100"]
    with pytest.raises(RuntimeError), constants("V100", [0.1, 0.1, 0.1]):
        assert FAMILIES["V100"].matmul == 0.1
        raise RuntimeError
    assert FAMILIES["V100"] is kept
