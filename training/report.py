"""The run's report: one HTML page that needs nothing else, made from what the tracker wrote."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from training.charts import Figure, Mark, Series, bins, compact, nats, strip
from training.energy import UNAVAILABLE
from training.errors import UserError
from training.evaluation import read_evaluation
from training.heat import relative_load
from training.pages import render
from training.recipe import read_mapping
from training.records import MODALITIES, Record, Sample, read_json, read_lines
from training.run import RECIPE, read_plan
from training.screen import duration, fact
from training.tracking import DROPPED

VALIDATION = "loss/validation/"
QUIET = ("begun", "saved", "resumed", "stopped", "delinked")  # events that are no trouble
ROUTING = {  # what is charted of it: title, and what that means
    "moe/drop_rate": ("assignments dropped", DROPPED),
    "moe/load_cv": ("load variation (CV)", "standard deviation of the experts' load over its mean; 0 where it is even"),
}


class Tile(NamedTuple):
    label: str
    value: str
    note: str


class Quarter(NamedTuple):
    """Mean validation loss of a task in the first quarter of the run's steps and in the last."""

    task: str
    first: float | None  # None: not evaluated then
    last: float | None

    @property
    def change(self) -> float | None:
        """As a fraction of the first; negative is better."""
        return self.last / self.first - 1 if self.first and self.last is not None else None


class Quarters(NamedTuple):
    rows: list[Quarter]
    standing: str  # where an unfinished run stands; empty for a finished one

    def late(self, row: Quarter) -> str:
        return nats(row.last, "not yet" if self.standing else "–")


class LayerLoad(NamedTuple):
    layer: int
    experts: str  # what the cells are
    heat: Markup
    cv: float | None  # standard deviation over mean of the load that the experts were wanted for
    dropped: float | None


def write_report(run: Path) -> Path:
    """Write `report/index.html` of a run's folder and return its path. Parts that the run lacks are left out.

    What `m6 eval` left there is laid out, too. Raises UserError where there is nothing to report.
    """
    lines = read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise UserError(f"{run}: no steps in metrics.jsonl, so there is nothing to report; train first")
    facts = read_json(run / "run.json", {}).get("facts", {})
    recipe = run / RECIPE
    page = render(
        "report.html.jinja",
        name=run.resolve().name,
        facts=[(label(key), fact(key, value)) for key, value in facts.items()],
        tiles=tiles(steps, facts),
        quarters=quarters(lines, planned_steps(run, is_delinked(lines))),
        evaluation=read_evaluation(run),
        learning=learning_figures(steps, lines),
        costs=cost_figures(steps),
        experts=expert_figures(steps),
        load=expert_load(read_json(run / "routing.json", None)),
        dropped=DROPPED,
        samples=samples_by_task(read_json(run / "samples.json", {})),
        machine=machine_figures(steps, planned_figures(run, lines)),
        events=[line for line in lines if "event" in line],
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
    )
    path = run / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def label(key: str) -> str:
    """A flat key as a person would write it: rows/caption -> rows, caption."""
    return key.replace("_", " ").replace("/", ", ")


def planned_steps(run: Path, delinked: bool) -> int:
    """The steps that the run's recipe asks for, or asks for once layers are delinked; 0 if it cannot be read."""
    try:
        recipe = read_mapping(run / RECIPE)
    except UserError:
        return 0
    later = recipe.get("delink", {}).get("then", {}).get("steps") if delinked else None
    steps = later or recipe.get("steps")
    return steps if isinstance(steps, int) else 0


def is_delinked(lines: list[Record]) -> bool:
    """Whether the layers of a run, which shared their weights, have their own by now."""
    return any(line.get("event") == "delinked" for line in lines)


def quarters(lines: list[Record], planned: int) -> Quarters:
    """Each task's validation loss early and late in the `planned` steps. `lines`: of metrics.jsonl."""
    done = max((line["step"] for line in lines), default=0)
    end = max(done, planned)
    tasks = sorted({key for line in lines for key in line if key.startswith(VALIDATION)})

    def mean(key: str, within: Callable[[int], bool]) -> float | None:
        values = [line[key] for line in lines if line.get(key) is not None and within(line["step"])]
        return statistics.fmean(values) if values else None

    rows = [
        Quarter(
            key.removeprefix(VALIDATION),
            mean(key, lambda step: step <= end / 4),
            mean(key, lambda step: step > end * 3 / 4),
        )
        for key in tasks
    ]
    standing = f"step {done:,} of {end:,}; the last quarter begins with step {end * 3 // 4 + 1:,}"
    return Quarters(rows, standing if done < end else "")


def tiles(steps: list[Record], facts: Record) -> list[Tile]:
    """The figures at the head of the page."""
    last, seconds = steps[-1], sum(line["step_seconds"] * count for line, count in spans(steps, "step"))
    speed = compact(last["tokens"] / seconds) if seconds else "–"
    head = [
        Tile(
            "Loss",
            f"{last['loss']:.3f}" if last["loss"] is not None else "not finite",
            f"step {last['step']:,}",
        ),
        Tile("Tokens seen", compact(last["tokens"]), f"{last['position']:,} rows"),
        Tile("Time in steps", duration(seconds), f"{last['step']:,} steps"),
        Tile("Tokens a second", speed, utilization(steps)),
        energy(steps),
    ]
    if "parameters/total" in facts:
        active, trained = (facts.get(f"parameters/{name}") for name in ("active", "trained"))
        note = f"{compact(active)} active a token" if active else ""
        if trained and trained < facts["parameters/total"]:
            note = f"{compact(trained)} trained ({trained / facts['parameters/total']:.1%})"
        head.insert(0, Tile("Parameters", compact(facts["parameters/total"]), note))
    return head


def spans(steps: list[Record], key: str) -> list[tuple[Record, int]]:
    """Each logged line with how much of `key`, a running total, it stands for."""
    starts = [0, *(line[key] for line in steps)]
    return [(line, line[key] - start) for line, start in zip(steps, starts, strict=False)]


def utilization(steps: list[Record]) -> str:
    """Mean over the time in steps."""
    measured = [line for line in steps if line.get("flops_utilization") is not None]
    if not measured:
        return "utilisation not measured"
    weights = [line["step_seconds"] for line in measured]
    mean = statistics.fmean([line["flops_utilization"] for line in measured], weights)
    return f"{mean:.1%} of peak FLOP/s"


def energy(steps: list[Record]) -> Tile:
    """All that the run took, evaluations and saves with it; and what a token takes in steps alone."""
    last = steps[-1]
    joules, source = last.get("energy/joules"), last.get("energy/source", UNAVAILABLE)
    if joules is None:
        return Tile("Energy", "–", "no counter to read" if source == UNAVAILABLE else "not measured from the start")
    total = f"{joules / 3.6e6:.3g} kWh" if joules >= 3.6e5 else f"{joules / 3.6e3:.3g} Wh"
    each = last.get("energy/joules_per_token")
    return Tile("Energy", total, f"{each:.3g} J a token, {source}" if each is not None else source)


class Reached(NamedTuple):
    """Where the training loss first was at a level: steps, tokens, seconds in steps, joules if they are known."""

    step: int
    tokens: int
    seconds: float
    joules: float | None
    source: str


def reach(steps: list[Record], loss: float) -> Reached | None:
    """`steps`: logged lines, each the mean of the steps since the one before. None if the loss was never so low."""
    seconds = 0.0
    for line, count in spans(steps, "step"):
        seconds += line["step_seconds"] * count
        if line["loss"] is not None and line["loss"] <= loss:
            known = line.get("energy/joules"), line.get("energy/source", UNAVAILABLE)
            return Reached(line["step"], line["tokens"], seconds, *known)
    return None


def cost_figures(steps: list[Record]) -> list[Figure]:
    """Loss over what it took: energy, where that is known."""
    points = [(line["energy/joules"] / 3.6e6, line["loss"]) for line in steps if line.get("energy/joules") is not None]
    if len(points) < 2 or all(loss is None for _, loss in points):
        return []
    return [Figure("loss over kWh", [Series("training", "training", points)], note=steps[-1]["energy/source"])]


def learning_figures(steps: list[Record], lines: list[Record]) -> list[Figure]:
    """The training loss, and a figure a task with its training and validation loss."""
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("loss/"))
    tasks = dict.fromkeys(key.removeprefix(VALIDATION).removeprefix("loss/") for key in keys)
    wanted = [("all tasks", [curve(steps, "loss", "training")])]
    happened = marks(lines)
    for task in tasks:
        training = curve(steps, f"loss/{task}", "training")
        evaluated = [line for line in lines if VALIDATION + task in line]
        wanted.append((task, [training, curve(evaluated, VALIDATION + task, "validation", dots=True)]))
    first, rest = figures(wanted[:1]), figures(wanted[1:])
    return [*(replace(figure, marks=happened) for figure in first), *rest]


def marks(lines: list[Record]) -> list[Mark]:
    """What happened, where it did; saves and the like are no trouble."""
    return [
        Mark(line["step"], f"step {line['step']:,}: {line['event']}", line["event"] not in QUIET)
        for line in lines
        if "event" in line
    ]


def expert_figures(steps: list[Record]) -> list[Figure]:
    wanted = []
    for key, (title, _) in ROUTING.items():
        modalities = [curve(steps, f"{key}/{name}", name) for name in MODALITIES]
        wanted.append((title, [curve(steps, key, "all"), *modalities]))
    notes = dict(ROUTING.values())
    return [replace(figure, note=notes[figure.title]) for figure in figures(wanted, from_zero=True)]


def planned_figures(run: Path, lines: list[Record]) -> Record:
    """What the planner foretold, by a record's keys; empty if it was not asked."""
    return read_plan(run, is_delinked(lines)).get("metrics", {})


def machine_figures(steps: list[Record], plan: Record) -> list[Figure]:
    titles = {
        "step_seconds": "seconds a step",
        "tokens_per_second": "tokens a second",
        "flops_utilization": "share of peak FLOP/s",
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "memory/device_bytes": "device memory, GB",
        "memory/host_bytes": "host memory, GB",
        "energy/joules_per_step": "joules a step",
        "energy/joules_per_token": "joules a token",
    }
    wanted = []
    for key, title in titles.items():
        if not any(line.get(key) for line in steps):
            continue  # such as a device's memory, on a CPU
        unit = 1e9 if key.startswith("memory/") else 1.0
        series = [curve(steps, key, "training", unit=unit)]
        if key in plan:
            level = plan[key]["value"] / unit
            series.append(Series("planned", "planned", [(line["step"], level) for line in (steps[0], steps[-1])]))
        wanted.append((title, series))
    return figures(wanted, from_zero=True)


def curve(lines: list[Record], key: str, name: str, dots: bool = False, unit: float = 1.0) -> Series:
    values = [line.get(key) for line in lines]
    points = [(line["step"], None if y is None else y / unit) for line, y in zip(lines, values, strict=True)]
    return Series(name, name, points, dots)


def figures(wanted: list[tuple[str, list[Series]]], from_zero: bool = False) -> list[Figure]:
    """Figures of the series that have values; a title with none has no figure."""
    known = [(title, [one for one in series if one.last is not None]) for title, series in wanted]
    return [Figure(title, series, from_zero) for title, series in known if series]


def expert_load(routing: Record | None) -> dict[str, list[LayerLoad]]:
    """Rows of the heat map by modality; a modality that no token had is left out."""
    if routing is None:
        return {}
    maps = {}
    for number, name in enumerate(MODALITIES):
        layers = [
            layer_load(layer + 1, wanted[number], kept[number])
            for layer, (wanted, kept) in enumerate(zip(routing["wanted"], routing["kept"], strict=True))
        ]
        if any(layer.cv is not None for layer in layers):
            maps[name] = layers
    return maps


def layer_load(layer: int, wanted: list[int], kept: list[int]) -> LayerLoad:
    """`wanted`, `kept`: assignments by expert. Many experts share cells, which then show their mean."""
    cells = bins(len(wanted))
    shared = f", {len(cells[0])} or so a cell" if len(cells) < len(wanted) else ""
    experts = f"{len(wanted):,} experts{shared}"
    relative = relative_load(wanted)
    if relative is None:
        return LayerLoad(layer, experts, strip([1.0], ["no tokens"]), None, None)
    names = [
        f"layer {layer}, {cell_name(cell)}: {load:.2f} × the even load, "
        f"{sum(wanted[e] - kept[e] for e in cell):,} of {sum(wanted[e] for e in cell):,} dropped"
        for cell, load in zip(cells, relative, strict=True)
    ]
    cv = statistics.pstdev(wanted) / statistics.fmean(wanted)
    return LayerLoad(layer, experts, strip(relative, names), cv, 1 - sum(kept) / sum(wanted))


def cell_name(cell: range) -> str:
    return f"expert {cell.start + 1}" if len(cell) == 1 else f"experts {cell.start + 1} to {cell.stop}"


def samples_by_task(kept: Record) -> Record:
    """`step` and `tasks`: by task, (sample, picture's data URI or empty) pairs."""
    rows = kept.get("samples", [])
    pairs = [
        (Sample(**row | {"image": None}), f"data:image/png;base64,{row['image']}" if row["image"] else "")
        for row in rows
    ]
    pairs.sort(key=lambda pair: pair[0].task)
    tasks = {task: list(group) for task, group in groupby(pairs, key=lambda pair: pair[0].task)}
    return {"step": kept.get("step"), "tasks": tasks}
