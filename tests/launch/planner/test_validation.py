"""The planner against published measurements: the table that docs/planner.md shows, and rows of any kind."""

import csv
import json
import math
from pathlib import Path

import pytest

from launch.planner.headline import text
from launch.planner.validation import Prediction, constants, predict, read_rows, score
from training.errors import UserError

TABLE = Path("benchmarks/calibration.csv")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [dict(row) for row in read_rows(TABLE)]


def test_the_published_table_is_what_comes_out(rows: list[dict[str, str]]) -> None:
    page = Path("docs/planner.md").read_text(encoding="utf-8")
    for name, group in score([predict(row) for row in rows]).items():
        errors = [group.mean_abs_error, group.max_abs_error, group.bias]
        shown = ["-" if error is None else f"{error:.1%}" for error in errors]
        skill = "-" if group.skill is None else f"{group.skill:.2f}"
        assert f"| {name} | {group.rows} | {group.expressible} | {' | '.join(shown)} | {skill} |" in page


def test_the_headline_plans_are_what_comes_out() -> None:
    assert Path("docs/plans.md").read_text(encoding="utf-8") == text() + "\n"


def test_goals_that_are_met(rows: list[dict[str, str]]) -> None:
    """Those that are not, docs/planner.md names."""
    groups = score([predict(row) for row in rows])
    within = {"MLM21": 0.1, "MLM20": 0.1, "KOR": 0.1, "MCH100": 0.1, "TT": 0.1, "BSA": 0.1, "KORMEM": 0.1, "MLP": 0.1}
    within |= {"ZINF": 0.15, "AZ": 0.15, "MXTRL": 0.15, "Q235": 0.15}
    for name, goal in within.items():
        error = groups[name].mean_abs_error
        assert error is not None and error <= goal, name
    assert all(group.skill is None or group.skill > 0 for group in groups.values())
    assert all(len(values) == 4 for values in constants().values())  # three, and the rows that fitted them


def test_no_row_is_dropped(rows: list[dict[str, str]]) -> None:
    predictions = [predict(row) for row in rows]
    groups = score(predictions)
    assert sum(group.rows for group in groups.values()) == len(rows) == 73
    for row in predictions:
        assert row.predicted is not None or row.reason


def test_what_was_measured_is_not_looked_at(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert predict(row | {"value": "12345"}).predicted == predict(row).predicted


def test_rows_of_any_kind_are_answered(rows: list[dict[str, str]]) -> None:
    """Emptied or spoilt cells make a row inexpressible, at the worst."""
    for row in rows[::5]:
        for column in row.keys() - {"id"}:
            for value in ("", "0", "many"):
                found = predict(row | {column: value})
                assert found.predicted is None or math.isfinite(found.predicted)


def test_scores_by_hand() -> None:
    rows = [Prediction(f"A-{n}", "m", m, p) for n, (m, p) in enumerate([(100.0, 110.0), (200.0, 190.0), (100.0, None)])]
    group = score(rows)["A"]
    assert (group.rows, group.expressible) == (3, 2)
    assert group.mean_abs_error == pytest.approx(0.075) and group.max_abs_error == pytest.approx(0.1)
    assert group.bias == pytest.approx(0.025)
    # The other's value as a guess is off by 100 % and by 50 %.
    assert group.skill == pytest.approx(1 - 0.075 / 0.75)


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    with TABLE.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in found[0] if name != "gpus"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)
    with pytest.raises(UserError, match="the column gpus is missing"):
        read_rows(path)


def test_the_command_prints_all_groups(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.plan import plan_validation

    plan_validation(TABLE, True)
    found = json.loads(capsys.readouterr().out)
    keys = {"rows", "expressible", "mean_abs_error", "max_abs_error", "bias", "skill"}
    assert all(group.keys() == keys for group in found["groups"].values()) and "KORMEM" in found["groups"]
