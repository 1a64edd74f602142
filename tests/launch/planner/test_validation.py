"""The planner against published measurements: the table that docs/planner.md shows, and rows of any kind."""

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.plan import plan_validation
from launch.planner import published
from launch.planner.compute import add_flops
from launch.planner.headline import text
from launch.planner.plan import MEMORY, POWER, TIME, TIME_OF_EXPERTS, TIME_OF_OFFLOAD
from launch.planner.terms import Terms
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
    """On these rows all; docs/planner.md tells which are not on rows left out."""
    groups = score([predict(row) for row in rows])
    within = {"MLM21": 0.1, "MLM20": 0.1, "KOR": 0.1, "MCH100": 0.1, "TT": 0.1, "BSA": 0.1, "KORMEM": 0.1, "MLP": 0.1}
    within |= {"BSV": 0.1, "ZINF": 0.15, "AZ": 0.15, "MXTRL": 0.15, "Q235": 0.15, "DSMOE": 0.15, "BR": 0.15}
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
        other = "0" if row["metric"] == "fits" else "12345"
        assert predict(row | {"value": other}).predicted == predict(row).predicted


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


def test_rows_of_one_name_are_all_scored() -> None:
    group = score([Prediction("A-1", "m", 100.0, 110.0), Prediction("A-1", "m", 100.0, 150.0)])["A"]
    assert (group.rows, group.expressible) == (2, 2)
    assert group.mean_abs_error == pytest.approx(0.3) and group.max_abs_error == pytest.approx(0.5)


def test_skill_compares_rows_in_one_unit() -> None:
    values = [(1.0, 1.1, 1.0), (2000.0, 1900.0, 1e-3)]  # seconds, milliseconds
    group = score([Prediction(f"A-{n}", "iter_time", m, p, "", scale) for n, (m, p, scale) in enumerate(values)])["A"]
    assert group.skill == pytest.approx(1 - 0.075 / 0.75)


def named(rows: list[dict[str, str]], name: str) -> dict[str, str]:
    return next(row for row in rows if row["id"] == name)


def test_a_job_that_does_not_fit_is_right_or_wrong(rows: list[dict[str, str]]) -> None:
    row = named(rows, "M6-1")
    found = [predict(row | {"value": value}) for value in ("1", "0")]
    assert [one.predicted for one in found] == [1, 1]
    assert [one.error for one in found] == [0, 1]
    assert score(found)["M6"].mean_abs_error == 0.5


@pytest.mark.parametrize("value", ["0", "nan", "inf", "-5", "", "many", "1e999"])
def test_a_value_that_cannot_be_is_a_reason(rows: list[dict[str, str]], value: str) -> None:
    for name in ("BSA-1t", "MLP-3", "ZCAP-Data_parallel"):
        found = predict(named(rows, name) | {"value": value})
        assert found.predicted is None and found.error is None and "value" in found.reason
        json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize("column", ["layers", "hidden", "seq", "global_batch_tokens", "vocab", "heads"])
def test_sizes_that_overflow_are_a_reason(rows: list[dict[str, str]], column: str) -> None:
    for row in rows:
        found = predict(row | {column: "1e300"})
        assert found.predicted is None or math.isfinite(found.predicted)
        assert found.predicted is None or found.predicted > 0


@pytest.mark.parametrize(
    ("name", "unit", "factor"),
    [
        ("BR-1", "ktok/s/GPU", 1e3), ("MLP-3", "kW", 1e3), ("MLP-1", "MWh", 1e3), ("BSA-1t", "ms", 1e-3),
        ("BSA-1m", "MB", 1e-3), ("MCH100-1", "PFLOP/s", 1e3),
    ],
)  # fmt: skip
def test_units_are_converted(rows: list[dict[str, str]], name: str, unit: str, factor: float) -> None:
    row = named(rows, name)
    plain, other = predict(row), predict(row | {"unit": unit, "value": str(float(row["value"]) / factor)})
    assert plain.error is not None and other.error == pytest.approx(plain.error)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("BR-1", {"unit": "kW"}, "the unit kW is not one of tokens_per_s_per_gpu: tok/s/GPU, "),
        ("MLP-3", {"unit": ""}, "the unit (none) is not one of node_power_avg_ac: W, "),
        ("ZCAP-Data_parallel", {"unit": "1e12 params"}, "the unit 1e12 params is not one of max_params_billion"),
        ("DSMOE-1", {"metric": "samples_per_s_per_gpu"}, "there is no model of samples_per_s_per_gpu"),
        ("MLP-1", {"metric": "energy_per_step"}, "there is no model of energy_per_step"),
        ("KORMEM-GPT-22B-act_mS", {"metric": "act_mem_per_gpu_some"}, "there is no model of act_mem_per_gpu_some"),
        ("MLM20-A1", {"global_batch_tokens": ""}, "the batch of a step is not stated"),
        ("BSA-1t", {"global_batch_tokens": "0"}, "the batch of a step is not stated"),
        ("DSMOE-1", {"top_k": ""}, "of its experts, top_k is not stated"),
        ("MCH100-1", {"precision": "fp32"}, "precision=fp32: no rate was fitted"),
        ("MCH100-1", {"precision": "tf32"}, "precision=tf32: no rate was fitted"),
        ("BSA-1t", {"dp": "8"}, "tp x pp x dp is 768, of 384 devices"),
        ("BSA-1t", {"dp": "", "pp": "13"}, "tp x pp x dp is 312, of 384 devices"),
        ("DSMOE-1", {"ep": "256"}, "ep is 256, of 128 devices of a stage"),
        ("BSA-1t", {"gpu": "TPU v4"}, "the device TPU v4 is not known"),
    ],
)
def test_nothing_is_guessed(rows: list[dict[str, str]], name: str, changes: dict[str, str], reason: str) -> None:
    found = predict(named(rows, name) | changes)
    assert found.predicted is None and found.reason.startswith(reason)


def test_flops_of_hardware_are_those_that_are_computed(rows: list[dict[str, str]]) -> None:
    """Fewer without recomputation, and in a wider feed-forward layer more than a formula for four times says."""
    row = named(rows, "MLM21-05")
    rate = predict(row).predicted
    assert rate
    for changes in ({"recompute": "none"}, {"ffn": "65536", "params_total": "6.5e10", "params_active": "6.5e10"}):
        changed = row | changes
        seconds = predict(changed | {"metric": "iter_time", "unit": "s"}).predicted
        job, terms = published.job(changed), Terms()
        flops = add_flops(terms, job).value
        assert seconds and predict(changed).predicted == pytest.approx(flops / seconds / 512 / 1e12)


@pytest.mark.parametrize(
    ("name", "size", "bandwidth"),
    [
        ("A100-SXM4-80GB", 80, 2.0e12), ("A100 80GB", 80, 2.0e12), ("NVIDIA A100-SXM4-40GB", 40, 1.56e12),
        ("a100-80gb", 80, 2.0e12), ("V100-16GB", 16, 0.9e12), ("Tesla V100-SXM2-32GB", 32, 0.9e12),
        ("H100 80GB HBM3", 80, 3.35e12), ("NVIDIA H100-96GB", 96, 2.4e12),
    ],
)  # fmt: skip
def test_a_device_has_the_memory_that_its_name_states(
    rows: list[dict[str, str]], name: str, size: int, bandwidth: float
) -> None:
    found = published.machine(named(rows, "BSA-1t") | {"gpu": name})
    assert (found.device_bytes, found.device_bandwidth) == (size * 2**30, bandwidth)


def test_a_device_is_the_same_in_any_spelling(rows: list[dict[str, str]]) -> None:
    for row in rows:
        if row["gpu"]:
            assert predict(row | {"gpu": f"NVIDIA {row['gpu'].lower()}"}) == predict(row)


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


def test_reasons_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TABLE.open(encoding="utf-8") as file:
        found = [row | {"gpu": gpu} for row, gpu in zip(csv.DictReader(file), ("[/b]", "TPU [v4]"), strict=False)]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    plan_validation(path, False)
    shown = capsys.readouterr().out
    assert "the device [/b] is not known" in shown and "the device TPU [v4] is not known" in shown


def test_bands_cover_the_published_rows(rows: list[dict[str, str]]) -> None:
    for row in rows:
        found = predict(row)
        if found.predicted is None or found.metric == "fits":
            continue
        band = max(TIME, TIME_OF_EXPERTS if row["experts"] else 0, TIME_OF_OFFLOAD if row["offload"] != "none" else 0)
        if "mem" in found.metric:
            band = MEMORY
        elif "energy" in found.metric:
            band += POWER
        assert found.measured
        ratio = found.predicted / found.measured
        assert max(ratio, 1 / ratio) <= 1 + band, row["id"]


def test_the_command_prints_all_groups(capsys: pytest.CaptureFixture[str]) -> None:
    plan_validation(TABLE, True)
    found = json.loads(capsys.readouterr().out)
    keys = {"rows", "expressible", "mean_abs_error", "max_abs_error", "bias", "skill"}
    assert all(group.keys() == keys for group in found["groups"].values()) and "KORMEM" in found["groups"]
