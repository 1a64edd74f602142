"""What the runs of a study gave: figures of each, differences that are paired by seed, tables, plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any, Literal

from markupsafe import Markup

from model.config import ModelConfig
from training.charts import HEIGHT, WIDTH, Figure, Series

VALIDATION = "loss/validation/"
LAST = 3 / 4  # of the steps, after which training loss and load are averaged
# Student's t, by degrees of freedom from 1 on: the half width of a 95 % interval in standard errors.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COLOURS = ("#55524d", "#c2460a", "#0f8a7e", "#a2559b", "#6d8fbf", "#b08900", "#1a7f43")
LINE = 15  # px a line of a plot's legend


@dataclass(frozen=True)
class Panel:
    """One chart of a study: means over the seeds of some of its runs."""

    title: str
    x: Literal["step", "updates"]
    y: Literal["loss", "difference", "load_cv", "drop_rate"]  # `difference`: of the loss to the first run's
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """A run, by the lines of its metrics.jsonl; its layers shared one set of weights in the first `shared` steps."""

    lines: Sequence[dict[str, Any]]
    shape: ModelConfig
    shared: int = 0

    @cached_property
    def logged(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss" in line]

    @property
    def steps(self) -> int:
        return self.logged[-1]["step"]

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Validation loss of each task, nats a target, by step."""
        return {
            line["step"]: {key.removeprefix(VALIDATION): line[key] for key in line if key.startswith(VALIDATION)}
            for line in self.lines
            if any(key.startswith(VALIDATION) for key in line)
        }

    @property
    def tasks(self) -> dict[str, float]:
        return self.evaluations[self.steps]

    @property
    def loss(self) -> float:
        """The mean of the tasks' validation losses."""
        return fmean(self.tasks.values())

    @property
    def training_loss(self) -> float:
        return self.late("loss")

    def late(self, key: str) -> float:
        """The mean of a figure of the last steps; nan of a model that does not have it."""
        values = [line[key] for line in self.logged if line["step"] > LAST * self.steps and key in line]
        return fmean(values) if values else math.nan

    def seconds(self, step: int) -> float:
        """Of `step` steps, by the median of a step before and after delinking: other work makes some of them slow."""
        before = min(step, self.shared)
        return before * self._median(0, self.shared) + (step - before) * self._median(self.shared, self.steps)

    def _median(self, first: int, last: int) -> float:
        times = [line["step_seconds"] for line in self.logged if first < line["step"] <= last]
        return median(times) if times else 0.0

    @property
    def tokens(self) -> int:
        return self.logged[-1]["tokens"]

    @property
    def flops(self) -> float:
        """Forward and backward through the layers, a token, by the assignments that were kept."""
        kept = self.tokens * self.shape.layers * (self.shape.k if self.shape.experts else 1)
        steps = [b["step"] - a["step"] for a, b in zip([{"step": 0}, *self.logged], self.logged, strict=False)]
        dropped = sum(n * line.get("moe/drop_rate", 0) for n, line in zip(steps, self.logged, strict=True)) / self.steps
        return self.shape.training_flops(self.tokens, 0, round(kept * (1 - dropped))) / self.tokens

    def updates(self, step: int) -> float:
        """Parameters that the optimizer had in hand, summed over `step` steps: what its time and traffic go by."""
        whole = self.shape.parameter_counts().total
        one_layer = ModelConfig(**(vars(self.shape) | {"share_layers": True})).parameter_counts().total
        before = min(step, self.shared)
        return before * one_layer + (step - before) * whole


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The mean of first minus second, and half its 95 % interval by Student's t; nan of a single pair.

    Raises ValueError if lengths differ, or there are none or too many.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not 1 <= len(differences) <= len(T_95) + 1:
        raise ValueError(f"{len(differences)} pairs: from 1 to {len(T_95) + 1} can be compared")
    if len(differences) == 1:
        return differences[0], math.nan
    return fmean(differences), T_95[len(differences) - 2] * stdev(differences) / math.sqrt(len(differences))


def tables(results: Mapping[str, Sequence[Result]], comparisons: Sequence[tuple[str, str]]) -> str:
    """Figures of each run, mean and standard deviation over the seeds, and paired differences of losses; markdown."""
    return f"{_figures(results)}\n\n{_differences(results, comparisons)}"


def _figures(results: Mapping[str, Sequence[Result]]) -> str:
    columns = ("validation", "training", "step, s", "steps, s", "MFLOPs a token", "G updates", "cv", "dropped")
    lines = [_row("run", *columns), _row(*["---"] * (len(columns) + 1))]
    for name, runs in results.items():
        cells = [
            _spread([run.loss for run in runs]),
            _spread([run.training_loss for run in runs]),
            f"{median(run.seconds(run.steps) / run.steps for run in runs):.3f}",
            f"{median(run.seconds(run.steps) for run in runs):.0f}",
            f"{fmean(run.flops for run in runs) / 1e6:.2f}",
            f"{fmean(run.updates(run.steps) for run in runs) / 1e9:.2f}",
            _or_none([run.late("moe/load_cv") for run in runs], ".2f"),
            _or_none([run.late("moe/drop_rate") for run in runs], ".1%"),
        ]
        lines.append(_row(name, *cells))
    return "\n".join(lines)


def _differences(results: Mapping[str, Sequence[Result]], comparisons: Sequence[tuple[str, str]]) -> str:
    tasks = list(next(iter(results.values()))[0].tasks)
    lines = [_row("difference", "validation", "training", *tasks), _row(*["---"] * (len(tasks) + 3))]
    for first, second in comparisons:
        a, b = results[first], results[second]
        pairs = [paired([run.loss for run in a], [run.loss for run in b])]
        pairs.append(paired([run.training_loss for run in a], [run.training_loss for run in b]))
        pairs += [paired([run.tasks[task] for run in a], [run.tasks[task] for run in b]) for task in tasks]
        lines.append(_row(f"{first} − {second}", *(_plus_minus(mean, half, "+.3f") for mean, half in pairs)))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    return _plus_minus(fmean(values), stdev(values) if len(values) > 1 else math.nan, ".3f")


def _plus_minus(mean: float, half: float, form: str) -> str:
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} ± {half:.3f}"


def _or_none(values: Sequence[float], form: str) -> str:
    return "" if math.isnan(values[0]) else f"{fmean(values):{form}}"


def drawn(panels: Sequence[Panel], results: Mapping[str, Sequence[Result]]) -> str:
    """The panels side by side, as one SVG file."""
    height = HEIGHT + LINE * (2 + max(len(panel.runs) for panel in panels))
    parts = [_panel(number, panel, results) for number, panel in enumerate(panels)]
    rules = [f".c{number}{{stroke:{colour}}}text.c{number}{{fill:{colour}}}" for number, colour in enumerate(COLOURS)]
    style = (
        "text{font:11px sans-serif;fill:#6a6761;stroke:none}text.title{fill:#1d1c1a;font-weight:600}"
        ".y{text-anchor:end}.x{text-anchor:middle}.x.end{text-anchor:end}.tick{stroke:#e4e1db;fill:none}"
        ".line{fill:none;stroke-width:1.6}"
    )
    size = f'viewBox="0 0 {WIDTH * len(panels)} {height}" width="{WIDTH * len(panels)}" height="{height}"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    inside = "".join(parts)
    text = f"<style>{style}{''.join(rules)}</style>{ground}{inside}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{text}</svg>\n'


def _panel(number: int, panel: Panel, results: Mapping[str, Sequence[Result]]) -> Markup:
    series = [
        Series(name, f"c{place % len(COLOURS)}", _points(panel, results[name], results[panel.runs[0]]))
        for place, name in enumerate(panel.runs)
    ]
    legend = Markup("").join(
        Markup('<text class="{}" x="12" y="{}">{}</text>').format(one.style, HEIGHT + LINE * (place + 2), one.label)
        for place, one in enumerate(series)
    )
    return Markup(
        '<g transform="translate({})"><text class="title" x="12" y="12">{}</text>'
        '<svg y="{}" width="{}" height="{}">{}</svg>{}</g>'
    ).format(WIDTH * number, panel.title, LINE, WIDTH, HEIGHT, Figure(panel.title, series).svg, legend)


def _points(panel: Panel, runs: Sequence[Result], first: Sequence[Result]) -> list[tuple[float, float | None]]:
    """Means over the seeds, from the first evaluation after the start on."""
    if panel.y in ("load_cv", "drop_rate"):
        steps = [line["step"] for line in runs[0].logged]
        values = [
            fmean(line[f"moe/{panel.y}"] for line in lines) for lines in zip(*(run.logged for run in runs), strict=True)
        ]
        return list(zip(steps, values, strict=True))
    points: list[tuple[float, float | None]] = []
    for step in list(runs[0].evaluations)[1:]:
        loss = fmean(_loss(run, step) for run in runs)
        beside = fmean(_loss(run, step) for run in first) if panel.y == "difference" else 0.0
        points.append((step if panel.x == "step" else fmean(run.updates(step) for run in runs), loss - beside))
    return points


def _loss(run: Result, step: int) -> float:
    return fmean(run.evaluations[step].values())
