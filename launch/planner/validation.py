"""Published measurements against predictions: each row from its configuration alone, scored by group.

A group is the prefix of a row's id, up to the first dash. Skill is 1 - mean error / that of guessing the median of the
group's other rows: what a constant would know.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.planner import published
from launch.planner.hardware import FAMILIES
from launch.planner.job import Job
from launch.planner.memory import CONTEXT_BYTES, FRAGMENTED, add_activations, add_device, add_states
from launch.planner.outcome import add_power
from launch.planner.published import Inexpressible, Row
from launch.planner.step import add_step
from launch.planner.terms import Terms
from training.errors import UserError

COLUMNS = ("id", "gpu", "gpus", "metric", "value", "unit", "notes", *published.COLUMNS)
SCALES = {
    "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "GB": 1e9, "GiB": 2.0**30, "TFLOP/s": 1e12, "J": 1.0, "kWh": 3.6e6,
    "MWh": 3.6e9,
}  # fmt: skip

ALTERNATING_OVER_DIRECT = 1.015  # power before and behind a node's supplies, on the same runs (MLPerf Training 4.0)


@dataclass(frozen=True)
class Prediction:
    """A row, what was measured, and what is predicted (None: `reason` says why not), in the row's unit."""

    id: str
    metric: str
    measured: float | None
    predicted: float | None
    reason: str = ""

    @property
    def group(self) -> str:
        return self.id.partition("-")[0]

    @property
    def error(self) -> float | None:
        """As a share of what was measured."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Score:
    """Of a group; errors as fractions, None where no row could be predicted or, of skill, guessed."""

    rows: int
    expressible: int
    mean_abs_error: float | None
    max_abs_error: float | None
    bias: float | None
    skill: float | None


def read_rows(path: Path) -> list[Row]:
    """Raises UserError where the file or a column is missing."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows: list[Row] = [{name: (value or "").strip() for name, value in row.items() if name} for row in reader]
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"--validate {path}: cannot be read ({error}): give a table like benchmarks/calibration.csv"
        ) from None
    if missing := [name for name in COLUMNS if name not in columns]:
        raise UserError(f"--validate {path}: the column {missing[0]} is missing: see benchmarks/calibration.csv")
    return rows


def predict(row: Row) -> Prediction:
    """Never raises for a row that cannot be predicted: it says why."""
    try:
        measured = float(row["value"])
    except ValueError:
        return Prediction(row["id"], row["metric"], None, None, f"value={row['value']!r} is no number")
    try:
        return Prediction(row["id"], row["metric"], measured, _predicted(row))
    except Inexpressible as lack:
        return Prediction(row["id"], row["metric"], measured, None, str(lack))
    except (ArithmeticError, ValueError):
        return Prediction(row["id"], row["metric"], measured, None, "its numbers describe no job")


def _predicted(row: Row) -> float:
    metric = row["metric"]
    for beginning, model in MODELS.items():
        if metric.startswith(beginning):
            return model(row)
    raise Inexpressible(f"there is no model of {metric}")


def _scale(row: Row) -> float:
    if row["unit"] not in SCALES:
        raise Inexpressible(f"the unit {row['unit']!r} is not known")
    return SCALES[row["unit"]]


def _step(row: Row) -> tuple[Job, Terms, float]:
    """A row's job, the terms of its step, and the step's seconds."""
    job, terms = published.job(row), Terms()
    return job, terms, add_step(terms, job, published.machine(row)).value


def _iteration(row: Row) -> float:
    return _step(row)[2] / _scale(row)


def _hardware_flops(row: Row) -> float:
    """As published: 96 B s L h^2 (1 + s/6h + V/16Lh), arXiv 2104.04473, with full recomputation."""
    job, _, seconds = _step(row)
    shape = job.shape
    flops = 96.0 * job.tokens * shape.layers * shape.hidden**2
    flops *= 1 + shape.seq / (6 * shape.hidden) + shape.vocab / (16 * shape.layers * shape.hidden)
    return flops / seconds / job.layout.devices / _scale(row)


def _model_flops(row: Row) -> float:
    job, terms, seconds = _step(row)
    return terms["flops.model"].value / seconds / job.layout.devices / _scale(row)


def _tokens(row: Row) -> float:
    job, _, seconds = _step(row)
    return job.tokens / seconds / job.layout.devices


def _samples(row: Row) -> float:
    job, _, seconds = _step(row)
    return job.layout.rows / seconds


def _peak_memory(row: Row) -> float:
    job, terms = published.job(row), Terms()
    return add_device(terms, job, add_states(terms, job)).value / _scale(row)


def _states_memory(row: Row) -> float:
    """Of a stage of layers, as published."""
    job = published.job(row)
    layout, shape = job.layout, job.shape
    each = layout.weight_bytes + layout.gradient_bytes + layout.state_bytes
    return (shape.layers * shape.common + shape.all_experts) * each / (layout.tp * layout.pp) / _scale(row)


def _activation_memory(row: Row) -> float:
    mode = row["metric"].removeprefix("act_mem_per_gpu").strip("_").replace("no_recompute", "none")
    return add_activations(Terms(), published.job(row), mode or "none").value / _scale(row)


def _capacity(row: Row) -> float:
    """The most parameters that a machine trains, by the states of its ZeRO stage and tier."""
    scale = {"max_params_billion": 1e9, "max_params_trillion": 1e12}.get(row["metric"])
    if scale is None:
        raise Inexpressible(f"there is no model of {row['metric']}")
    return published.capacity(row, CONTEXT_BYTES, FRAGMENTED) / scale


def _fits(row: Row) -> float:
    """1 if the row's states fit its devices and their hosts together."""
    total = published.number(row, "params_total")
    if not total:
        raise Inexpressible("the number of parameters is not stated")
    machine = published.machine(row)
    here = total / machine.nodes
    room = machine.device_bytes * machine.devices_per_node - here * published.WEIGHTS - CONTEXT_BYTES
    offloaded = machine.host_bytes - here * (published.STATES - published.WEIGHTS)
    return float(room > 0 and offloaded > 0)


def _node_power(row: Row) -> float:
    """Of a node whose devices multiply all the time, as in a benchmark."""
    return add_power(Terms(), published.machine(row), 1.0, 1.0).value


def _joules_per_token(row: Row) -> float:
    """At the nodes' supplies, or behind them where the row says so; without switches, cooling and losses."""
    job, terms, seconds = _step(row)
    machine = published.machine(row)
    busy = job.layout.micro_batches * terms["step.device_work"].value
    watts = add_power(terms, machine, busy, seconds).value * machine.nodes
    supply = ALTERNATING_OVER_DIRECT if "DC side" in row["notes"] else 1.0
    return watts / supply * seconds / job.tokens


def _energy(row: Row) -> float:
    return _joules_per_token(row) * published.trained_tokens(row) / _scale(row)


def _training_seconds(row: Row) -> float:
    job, _, seconds = _step(row)
    return published.trained_tokens(row) / job.tokens * seconds


def _device_hours(row: Row) -> float:
    return _training_seconds(row) / 3600 * published.machine(row).devices


def _not_a_measure(row: Row) -> float:
    raise Inexpressible("a ratio without its two runs")


# By the beginning of the metric's name; the first that fits.
MODELS: dict[str, Callable[[Row], float]] = {
    "iter_time": _iteration, "step_time": _iteration, "hw_tflops_per_gpu": _hardware_flops,
    "model_tflops_per_gpu": _model_flops, "tokens_per_s_per_gpu": _tokens, "samples_per_s": _samples,
    "peak_mem_per_gpu": _peak_memory, "param+opt_mem_per_gpu": _states_memory, "act_mem_per_gpu": _activation_memory,
    "max_params": _capacity, "fits": _fits, "node_power_avg": _node_power, "energy_vs": _not_a_measure,
    "energy_per_token": _joules_per_token, "energy": _energy, "gpu_hours": _device_hours,
    "train_days": lambda row: _training_seconds(row) / 86400,
    "time_to_train": lambda row: _training_seconds(row) / _scale(row),
    "train_time": lambda row: _training_seconds(row) / _scale(row),
}  # fmt: skip


def score(predictions: Sequence[Prediction]) -> dict[str, Score]:
    """By group, in the order of the rows."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.group, []).append(prediction)
    return {name: _score(rows) for name, rows in groups.items()}


def _score(rows: list[Prediction]) -> Score:
    errors = {row.id: row.error for row in rows if row.error is not None}
    if not errors:
        return Score(len(rows), 0, None, None, None, None)
    values = list(errors.values())
    mean = statistics.fmean(map(abs, values))
    return Score(
        len(rows), len(values), mean, max(map(abs, values)), statistics.fmean(values), _skill(rows)
    )  # fmt: skip


def _skill(rows: list[Prediction]) -> float | None:
    """1 - mean error / that of the median of the group's other rows of the same metric; None without others."""
    known = [(row, row.measured, row.error) for row in rows if row.measured and row.error is not None]
    errors, guesses = [], []
    for row, measured, error in known:
        others = [value for other, value, _ in known if other is not row and other.metric == row.metric]
        if others:
            errors.append(abs(error))
            guesses.append(abs(statistics.median(others) / measured - 1))
    baseline = sum(guesses)
    return 1 - sum(errors) / baseline if baseline > 0 else None


def constants() -> dict[str, dict[str, float | str]]:
    """What was fitted to published rows, by family of devices, and to which."""
    return {
        name: {"matmul": f.matmul, "memory": f.memory, "network": f.network, "rows": f.fitted_by}
        for name, f in FAMILIES.items()
        if name != "CPU"
    }
