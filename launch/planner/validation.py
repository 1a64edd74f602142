"""Published measurements against predictions: each row from its configuration alone, scored by group.

A group is the prefix of a row's id, up to the first dash. Skill is 1 - mean error / that of guessing the median of the
group's other rows of the same metric: what a constant would know.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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
ALTERNATING_OVER_DIRECT = 1.015  # power before and behind a node's supplies, on the same runs (MLPerf Training 4.0)


@dataclass(frozen=True)
class Prediction:
    """A row, what was measured, and what is predicted (None: `reason` says why not), in the row's unit.

    `scale`: that unit, in the one in which rows of the metric are compared.
    """

    id: str
    metric: str
    measured: float | None
    predicted: float | None
    reason: str = ""
    scale: float = 1.0

    @property
    def group(self) -> str:
        return self.id.partition("-")[0]

    @property
    def error(self) -> float | None:
        if self.predicted is None or self.measured is None:
            return None
        return _error(self.metric, self.predicted, self.measured)


def _error(metric: str, guess: float, measured: float) -> float:
    """As a share of what was measured; of a yes or no, 0 if it is right and 1 if not."""
    return float(guess != measured) if metric in YES_OR_NO else guess / measured - 1


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
    measured = None
    try:
        measured = _measured(row)
        predicted, scale = _predicted(row)
    except Inexpressible as lack:
        return Prediction(row["id"], row["metric"], measured, None, str(lack))
    except (ArithmeticError, ValueError):
        return Prediction(row["id"], row["metric"], measured, None, "its numbers describe no job")
    return Prediction(row["id"], row["metric"], measured, predicted, "", scale)


def _measured(row: Row) -> float:
    """Raises Inexpressible."""
    value, metric = published.number(row, "value"), row["metric"]
    if value is None:
        raise Inexpressible("its value is not stated")
    if metric in YES_OR_NO and value not in (0, 1):
        raise Inexpressible(f"value={row['value']}: {metric} is 1 or 0")
    if metric not in YES_OR_NO and not value:
        raise Inexpressible("value=0: an error would be a share of nothing")
    return value


def _predicted(row: Row) -> tuple[float, float]:
    """In the row's unit; and that unit. Raises Inexpressible, ArithmeticError, ValueError."""
    metric, unit = row["metric"], row["unit"].partition(" (")[0]
    if metric not in METRICS:
        raise Inexpressible(f"there is no model of {metric}")
    found, units = METRICS[metric].model(row), METRICS[metric].units
    if unit not in units:
        raise Inexpressible(f"the unit {row['unit'] or '(none)'} is not one of {metric}: {', '.join(units)}")
    if not math.isfinite(found) or (found <= 0 and metric not in YES_OR_NO):
        raise ArithmeticError(found)
    return found / units[unit], units[unit]


def _step(row: Row) -> tuple[Job, Terms, float]:
    """A row's job, the terms of its step, and the step's seconds. Raises Inexpressible."""
    job, terms = published.job(row), Terms()
    published.check_batch(row)
    return job, terms, add_step(terms, job, published.machine(row)).value


def _iteration(row: Row) -> float:
    return _step(row)[2]


def _hardware_flops(row: Row) -> float:
    job, terms, seconds = _step(row)
    shape, flops = job.shape, terms["flops.hardware"].value
    if job.layout.recompute == "full" and shape.ffn == 4 * shape.hidden and not shape.experts:
        # As published: 96 B s L h^2 (1 + s/6h + V/16Lh), arXiv 2104.04473.
        flops = 96.0 * job.tokens * shape.layers * shape.hidden**2
        flops *= 1 + shape.seq / (6 * shape.hidden) + shape.vocab / (16 * shape.layers * shape.hidden)
    return flops / seconds / job.layout.devices


def _model_flops(row: Row) -> float:
    job, terms, seconds = _step(row)
    masked = 3 * job.tokens * 2 * job.shape.layers * job.shape.seq * job.shape.attended
    flops = terms["flops.model"].value - (masked if published.counts_half(row) else 0)
    return flops / seconds / job.layout.devices


def _tokens(row: Row) -> float:
    job, _, seconds = _step(row)
    return job.tokens / seconds / job.layout.devices


def _all_tokens(row: Row) -> float:
    return _tokens(row) * published.machine(row).devices


def _utilisation(row: Row) -> float:
    """Of the peak in 16 bits, as is published also of jobs in fewer."""
    return _model_flops(row) / published.machine(row).peak("bf16")


def _samples(row: Row) -> float:
    job, _, seconds = _step(row)
    return job.layout.rows / seconds


def _peak_memory(row: Row) -> float:
    job, terms = published.job(row), Terms()
    return add_device(terms, job, add_states(terms, job)).value


def _states_memory(row: Row) -> float:
    """Of a stage of layers, as published."""
    job = published.job(row)
    layout, shape = job.layout, job.shape
    each = layout.weight_bytes + layout.gradient_bytes + layout.state_bytes
    return (shape.layers * shape.common + shape.all_experts) * each / (layout.tp * layout.pp)


def _activation_memory(row: Row) -> float:
    mode = row["metric"].removeprefix(ACTIVATIONS).replace("no_recompute", "none")
    return add_activations(Terms(), published.job(row), mode).value


def _capacity(row: Row) -> float:
    """The most parameters that a machine trains, by the states of its ZeRO stage and tier."""
    return published.capacity(row, CONTEXT_BYTES, FRAGMENTED)


def _fits(row: Row) -> float:
    """1 if a job fits its devices; without a stated batch, whether its states do; where nothing tells where they are,
    whether devices and their hosts hold them together.
    """
    total, machine = published.number(row, "params_total"), published.machine(row)
    if row["offload"] == "none" and published.number(row, "global_batch_tokens"):
        return float(_peak_memory(row) <= machine.device_bytes)
    if not total:
        raise Inexpressible("the number of parameters is not stated")
    if row["zero"] or row["pp"]:
        return float(total <= _capacity(row))
    here = total / machine.nodes
    room = machine.device_bytes * machine.devices_per_node - here * published.WEIGHTS - CONTEXT_BYTES
    offloaded = machine.host_bytes - here * (published.STATES - published.WEIGHTS)
    return float(room > 0 and offloaded > 0)


def _node_power(row: Row) -> float:
    """Of a node whose devices multiply all the time, as in a benchmark."""
    return add_power(Terms(), published.machine(row), 1.0, 1.0).value / _supply(row)


def _supply(row: Row) -> float:
    """Power at the nodes' supplies over that where the row measured it: at them, or behind them if it says so."""
    return ALTERNATING_OVER_DIRECT if "DC side" in row["notes"] else 1.0


def _joules_per_token(row: Row) -> float:
    """Of the nodes, without switches and cooling."""
    job, terms, seconds = _step(row)
    machine = published.machine(row)
    busy = job.layout.micro_batches * terms["step.device_work"].value
    watts = add_power(terms, machine, busy, seconds).value * machine.nodes
    if "TDP x" in row["notes"]:  # no meter: the devices' rated power
        watts = machine.device_watts * machine.devices
    return watts / _supply(row) * seconds / job.tokens


def _energy(row: Row) -> float:
    row = published.completed(row)
    return _joules_per_token(row) * published.trained_tokens(row)


def _training_seconds(row: Row) -> float:
    row = published.completed(row)
    job, _, seconds = _step(row)
    return published.trained_tokens(row) / job.tokens * seconds


def _device_seconds(row: Row) -> float:
    return _training_seconds(row) * published.machine(published.completed(row)).devices


def _not_a_measure(row: Row) -> float:
    raise Inexpressible("a ratio without its two runs")


@dataclass(frozen=True)
class Metric:
    """How a metric is predicted, and the units that it is published in: their sizes in the one of the prediction."""

    model: Callable[[Row], float]
    units: Mapping[str, float]


def _units(plain: str, prefixes: str) -> dict[str, float]:
    """A unit by itself and with prefixes, such as `kWh`."""
    sizes = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    return {plain: 1.0} | {f"{prefix}{plain}": sizes[prefix] for prefix in prefixes}


SECONDS = _units("s", "m") | {"min": 60.0, "h": 3600.0, "days": 86400.0}
FLOPS, WATTS = _units("FLOP/s", "GTP"), _units("W", "kM")
FLOPS |= {"TFLOPs": 1e12, "TFLOPS": 1e12, "TFLOP/s/GPU": 1e12}
TOKENS = _units("tok/s/GPU", "kM") | {"tokens/s/GPU": 1.0}
BYTES = _units("B", "kMGT") | {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
JOULES = _units("J", "kMGT") | {unit: 3600 * size for unit, size in _units("Wh", "kMG").items()}
DEVICE_HOURS = dict.fromkeys(("GPU-h", *(f"{kind} GPU-h" for kind in published.KINDS), "A100-80 GPU-h"), 3600.0)

ACTIVATIONS = "act_mem_per_gpu_"
YES_OR_NO = ("fits",)
METRICS = {
    **dict.fromkeys(("iter_time", "step_time"), Metric(_iteration, SECONDS)),
    "hw_tflops_per_gpu": Metric(_hardware_flops, FLOPS),
    "model_tflops_per_gpu": Metric(_model_flops, FLOPS),
    "mfu": Metric(_utilisation, {"%": 0.01, "share": 1.0}),
    "tokens_per_s_per_gpu": Metric(_tokens, TOKENS),
    "tokens_per_s": Metric(_all_tokens, _units("tok/s", "kM")),
    "samples_per_s": Metric(_samples, _units("sample/s", "k")),
    "peak_mem_per_gpu": Metric(_peak_memory, BYTES),
    "param+opt_mem_per_gpu": Metric(_states_memory, BYTES),
    **{
        f"{ACTIVATIONS}{mode}": Metric(_activation_memory, BYTES)
        for mode in ("no_recompute", "selective", "full", "seqpar", "seqpar+selective", "seqpar+full")
    },
    "max_params_billion": Metric(_capacity, {"1e9 params": 1e9}),
    "max_params_trillion": Metric(_capacity, {"1e12 params": 1e12}),
    "fits": Metric(_fits, {"bool": 1.0}),
    **dict.fromkeys(("node_power_avg", "node_power_avg_ac"), Metric(_node_power, WATTS)),
    **dict.fromkeys(("energy", "energy_train"), Metric(_energy, JOULES)),
    "energy_per_token": Metric(_joules_per_token, _units("J", "m") | _units("J/token", "m")),
    "energy_vs_gpt3": Metric(_not_a_measure, {}),
    "gpu_hours": Metric(_device_seconds, DEVICE_HOURS),
    **dict.fromkeys(("train_days", "train_time", "time_to_train"), Metric(_training_seconds, SECONDS)),
}


def score(predictions: Sequence[Prediction]) -> dict[str, Score]:
    """By group, in the order of the rows."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.group, []).append(prediction)
    return {name: _score(rows) for name, rows in groups.items()}


def _score(rows: list[Prediction]) -> Score:
    errors = [row.error for row in rows if row.error is not None]
    if not errors:
        return Score(len(rows), 0, None, None, None, None)
    sizes = [abs(error) for error in errors]
    return Score(
        len(rows), len(errors), statistics.fmean(sizes), max(sizes), statistics.fmean(errors), _skill(rows)
    )  # fmt: skip


def _skill(rows: list[Prediction]) -> float | None:
    """1 - mean error / that of the median of the group's other rows of the same metric; None without others."""
    known = [
        (row, row.measured * row.scale, row.error) for row in rows if row.measured is not None and row.error is not None
    ]
    errors, guesses = [], []
    for row, measured, error in known:
        others = [value for other, value, _ in known if other is not row and other.metric == row.metric]
        if others:
            errors.append(abs(error))
            guesses.append(abs(_error(row.metric, statistics.median(others), measured)))
    baseline = sum(guesses)
    return 1 - sum(errors) / baseline if baseline > 0 else None


def constants() -> dict[str, dict[str, float | str]]:
    """What was fitted to published rows, by family of devices, and to which."""
    return {
        name: {"matmul": f.matmul, "memory": f.memory, "network": f.network, "rows": f.fitted_by}
        for name, f in FAMILIES.items()
        if name != "CPU"
    }
