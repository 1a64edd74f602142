"""`m6 watch RUN`: a run on the terminal while it trains, on this machine or over ssh, from the files in its folder."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotext
import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.supervisor import patience
from training.charts import Point, thinned
from training.errors import LEFT, UserError
from training.heartbeat import Beat, pid_namespace, read_beat
from training.heat import colour, relative_load
from training.records import MODALITIES, Record, parse_lines, read_json, read_lines
from training.report import VALIDATION, is_delinked, planned_steps
from training.run import FOLDER, INCIDENTS, RANKS, home_of, read_plan
from training.screen import duration, scaled

LOOK_SECONDS = 2.0
GONE_SECONDS = 5.0  # after a process' end in which its last words may still come
CLOCK_SECONDS = 60.0  # that a process may seem to be younger than what it says: clocks are set
RECENT = 20  # logged lines that stand for now
ROWS, EVENTS = 6, 6  # of experts and of events
HEADING_ROWS, CHART_ROWS, LEAST_BELOW = 4, 14, 4
LEAST_CHART, GAP, BESIDE_BARS = 44, 2, 32  # characters
GREY = (150, 150, 150)  # seen on dark terminals and on light ones
FIGURES = {  # what is shown beside its plan: title, unit, and by how much it is divided
    "step_seconds": ("step", "s", 1.0),
    "tokens_per_second": ("tokens a second", "", 1.0),
    "flops_utilization": ("of peak FLOP/s", "%", 0.01),
    "memory/device_bytes": ("device memory", "GB", 1e9),
    "memory/host_bytes": ("host memory", "GB", 1e9),
    "energy/watts": ("power", "W", 1.0),
    "energy/joules_per_step": ("energy a step", "J", 1.0),
    "energy/joules_per_token": ("energy a token", "J", 1.0),
    "moe/drop_rate": ("assignments dropped", "%", 0.01),
    "moe/load_cv": ("load variation", "", 1.0),
}


@dataclass(frozen=True)
class Seen:
    """All that is known of a run at one moment."""

    folder: Path
    lines: list[Record]
    beats: dict[int, tuple[Beat, float]]  # and how many seconds ago
    planned_steps: int
    plan: Record
    routing: Record
    incidents: list[Record]

    @functools.cached_property
    def steps(self) -> list[Record]:
        return [line for line in self.lines if "loss" in line]

    @property
    def step(self) -> int:
        return max([line["step"] for line in self.lines] + [beat.step for beat, _ in self.beats.values()], default=0)


def watch(run: str, once: bool) -> None:
    """Show a run until Ctrl-C, or `once`; and once where there is no terminal. Raises UserError."""
    folder = home_of(run)
    if not folder.is_dir():
        raise UserError(f"{run}: no such run; see the folders under {FOLDER}/")
    if not any((folder / name).exists() for name in ("run.json", RANKS)):
        raise UserError(f"{folder}: m6 train has not trained there yet")
    console, watcher = Console(), Watcher(folder)
    if once or not console.is_terminal:
        console.print(view(watcher.look(), console.width, 0))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view(watcher.look(), console.width, console.height), refresh=True)
            time.sleep(LOOK_SECONDS)


class Watcher:
    """Looks at a run's folder again and again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metrics = Growing(folder / "metrics.jsonl")
        self._beats: dict[int, tuple[int, float]] = {}  # when each was written, and first seen, by our own clock

    def look(self) -> Seen:
        folder, lines = self.folder, self._metrics.lines()
        delinked = is_delinked(lines)
        return Seen(
            folder, lines, dict(self._listen()), planned_steps(folder, delinked), read_plan(folder, delinked),
            read_json(folder / "routing.json", {}), read_lines(folder / f"{INCIDENTS}.jsonl"),
        )  # fmt: skip

    def _listen(self) -> Iterator[tuple[int, tuple[Beat, float]]]:
        """The ranks that there are: files of more are an earlier start's."""
        ranks = read_json(self.folder / "run.json", {}).get("facts", {}).get("ranks", math.inf)
        for path in (self.folder / RANKS).glob("*.json"):
            rank = int(path.stem) if path.stem.isdigit() else math.inf
            if rank < ranks and (found := read_beat(self.folder / RANKS, int(rank))):
                yield int(rank), (found[0], self._age(int(rank), found[1]))

    def _age(self, rank: int, written: int) -> float:
        """Seconds since a beat was heard. Other machines' clocks may differ: after the first look changes count."""
        now, known = time.monotonic(), self._beats.get(rank)
        if known is None:
            self._beats[rank] = written, now - max(0.0, time.time() - written / 1e9)
        elif known[0] != written:
            self._beats[rank] = written, now
        return now - self._beats[rank][1]


class Growing:
    """A metrics file, of which only what is new is read; a run that goes back writes another in its place."""

    def __init__(self, path: Path):
        self._path, self._file, self._read = path, -1, 0
        self._lines: list[Record] = []

    def lines(self) -> list[Record]:
        """Those that are whole."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            number = os.fstat(file.fileno()).st_ino
            if number != self._file or os.fstat(file.fileno()).st_size < self._read:
                self._file, self._read, self._lines = number, 0, []
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        self._lines += parse_lines(whole.decode("utf-8", errors="replace"))
        return self._lines


def view(seen: Seen, width: int, height: int) -> RenderableType:
    """What fits; `height` 0 for all that there is."""
    figures = figure_table(seen)
    beside = width - Console(width=width).measure(figures).maximum - GAP
    wide = beside >= LEAST_CHART
    chart = losses(seen, beside if wide else width)
    above = HEADING_ROWS + (CHART_ROWS if wide else figures.row_count + 1 + CHART_ROWS)
    parts: list[RenderableType | None] = [figures, chart]
    if wide and chart:
        row = Table.grid(padding=(0, GAP))
        row.add_row(figures, chart)
        parts = [row]
    elif height and height < above + LEAST_BELOW:
        above -= CHART_ROWS
        parts = [figures]
    rows, events = room(height - above if height else 0)
    below = [expert_rows(seen, width, rows), event_lines(seen, events)]
    return Group(heading(seen, width), *(part for part in (*parts, *below) if part))


def room(left: int) -> tuple[int, int]:
    """Lines for experts and for events, of those that are left; 0: as many as are wanted."""
    if not left:
        return ROWS, EVENTS
    events = max(1, min(EVENTS, left // 2 - 2))
    return max(0, min(ROWS, left - events - 4)), events


def heading(seen: Seen, width: int) -> RenderableType:
    planned = seen.planned_steps
    line = Text.assemble((seen.folder.resolve().name, "bold"), "  ", state(seen))
    progress = f"step {seen.step:,}" + (f" of {planned:,}" if planned else "")
    left = seconds_left(seen)
    told = progress + (f"  {duration(left)} left" if left else "")
    bar = ProgressBar(total=max(planned, 1), completed=seen.step, width=max(10, min(60, width - len(told) - 4)))
    row = Table.grid(padding=(0, 2))
    row.add_row(bar, told)
    return Group(line, row, "")


def state(seen: Seen) -> Text:
    """What the run is doing, as far as its ranks tell."""
    if not seen.beats:
        return Text("no sign of its ranks", style="yellow")
    beats = [beat for beat, _ in seen.beats.values()]
    ended = [beat for beat in beats if beat.phase == "ended"]
    if len(ended) == len(beats) or any(beat.code not in (0, LEFT) for beat in ended):  # it takes the others with it
        return _ended(ended)
    if killed := [rank for rank, (beat, age) in seen.beats.items() if age > GONE_SECONDS and is_gone(beat)]:
        return Text(f"rank {killed[0]} was killed; m6 train --resume goes on where no supervisor does", style="red")
    at_work = [(age / patience(beat), age, rank) for rank, (beat, age) in seen.beats.items() if beat.phase != "ended"]
    over, age, rank = max(at_work)
    if over > 1:
        beat = seen.beats[rank][0]
        told = f"rank {rank} on {beat.host} has been silent for {duration(age)} ({beat.phase})"
        return Text(f"{told}: killed, hanging, or its files are late", style="red")
    phases = "/".join(sorted({beat.phase for beat in beats}))
    return Text(f"{phases}, {len(beats)} rank{'s' if len(beats) > 1 else ''}", style="green")


def is_gone(beat: Beat) -> bool:
    """Whether a rank that has not said that it ended is no process any more; of other machines nobody knows."""
    if beat.phase == "ended" or (beat.host, beat.namespace) != (socket.gethostname(), pid_namespace()):
        return False
    try:
        process = psutil.Process(beat.pid)
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > beat.started + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


def _ended(beats: Sequence[Beat]) -> Text:
    errors = [beat.error for beat in beats if beat.error]
    codes = {beat.code for beat in beats}
    if errors:
        return Text(f"ended: {plain(errors[0])}", style="red")
    if codes == {0}:
        return Text("done", style="green")
    if codes == {LEFT}:
        return Text("stopped on request, and saved; m6 train --resume goes on", style="yellow")
    return Text(f"ended with code {max(code or 0 for code in codes)}", style="red")


def seconds_left(seen: Seen) -> float:
    recent = [line["step_seconds"] for line in seen.steps[-RECENT:]]
    over = not seen.beats or any(beat.phase == "ended" for beat, _ in seen.beats.values())
    return 0.0 if over or not recent else max(0, seen.planned_steps - seen.step) * statistics.median(recent)


def figure_table(seen: Seen) -> Table:
    """The last logged figures, beside what was planned."""
    plan = seen.plan.get("metrics", {})
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("", "now", *(("plan", "of it") if plan else ())):
        table.add_column(heading, justify="right" if heading else "left", header_style="dim", no_wrap=True)
    last = seen.steps[-1] if seen.steps else {}
    if last.get("loss") is not None:
        table.add_row("loss", f"{last['loss']:.3f}")
    if last:
        table.add_row("tokens so far", scaled(last["tokens"], "").strip())
    for key, (title, unit, divisor) in FIGURES.items():
        if last.get(key):
            told = [title, _number(last[key] / divisor, unit)]
            if key in plan:
                value = plan[key]["value"]
                told += [_number(value / divisor, unit), f"{last[key] / value:.2f}"]
            table.add_row(*told)
    if joules := last.get("energy/joules"):
        table.add_row("energy in all", f"{joules / 3.6e6:.3g} kWh")
    if last.get("energy/source"):
        table.add_row("energy is", last["energy/source"])
    return table


def _number(value: float, unit: str) -> str:
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{shown} {unit}".strip()


def losses(seen: Seen, width: int) -> RenderableType | None:
    """Training loss, and the tasks' mean validation loss, over steps."""
    training = _known(thinned([(line["step"], line["loss"]) for line in seen.steps]))
    validation = _known([(line["step"], _mean_validation(line)) for line in seen.lines])
    if not training and not validation:
        return None
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, CHART_ROWS)
    plotext.title("loss: training (line), validation (points)" if validation else "loss")
    if training:
        plotext.plot(*training, marker="braille", color="cyan")
    if validation:
        plotext.scatter(*validation, marker="dot", color="orange")
    return Text.from_ansi(plotext.build())


def _known(points: list[Point]) -> list[tuple[float, ...]]:
    """Steps and values; empty if there are none."""
    return list(zip(*((x, y) for x, y in points if y is not None), strict=True))


def _mean_validation(line: Record) -> float | None:
    values = [value for key, value in line.items() if key.startswith(VALIDATION)]
    return statistics.fmean(values) if values and None not in values else None


def expert_rows(seen: Seen, width: int, rows: int) -> RenderableType | None:
    """The load of the most uneven layers' experts, a bar an expert: red over the even load, blue under it."""
    loads = [
        (load, f"layer {layer} {name}")
        for layer, counts in enumerate(seen.routing.get("wanted", []), 1)
        for name, of_modality in zip(MODALITIES, counts, strict=True)
        if (load := relative_load(of_modality))
    ]
    if not loads or not rows:
        return None
    uneven = sorted(range(len(loads)), key=lambda row: -statistics.pstdev(loads[row][0]))[:rows]
    table = Table.grid(padding=(0, 2))
    for load, name in (loads[row] for row in sorted(uneven)):
        bars = fitted(load, max(8, width - BESIDE_BARS))
        across = max(1, min(4, (width - BESIDE_BARS) // len(bars)))
        styles = (f"rgb({','.join(map(str, colour(each, GREY)))})" for each in bars)
        cells = Text.assemble(*((bar(each) * across, style) for each, style in zip(bars, styles, strict=True)))
        table.add_row(name, cells, f"{max(load):.1f} x even")
    of = f" (the {rows} most uneven of {len(loads)})" if len(loads) > rows else ""
    return Group("", Text(f"load of experts{of}, at step {seen.routing['step']:,}", style="dim"), table)


def fitted(load: list[float], most: int) -> list[float]:
    """Means of neighbours, where there are more than fit."""
    each = -(-len(load) // most)
    return [statistics.fmean(load[start : start + each]) for start in range(0, len(load), each)]


def bar(load: float) -> str:
    """In the middle where the load is even; full at four times that, lowest at a quarter."""
    return "▁▂▃▄▅▆▇█"[max(0, min(7, round(3.5 + 1.75 * math.log2(max(load, 0.01)))))]


def event_lines(seen: Seen, most: int) -> RenderableType | None:
    """What happened last, as the run and its supervisor tell."""
    told = [(line["step"], line["event"], line.get("text", "")) for line in seen.lines if "event" in line]
    step = 0
    for line in seen.incidents:
        step = max(step, line["step"] or 0)  # one that was over before a step is no older than the one before
        told.append((step, line.get("event", ""), line.get("what") or ""))
    shown = sorted(told, key=lambda row: row[0])[-most:]
    rows = [
        Text(f"{step:>8,}  {plain(event):<12}  {plain(text)}", no_wrap=True, overflow="ellipsis")
        for step, event, text in shown
    ]
    return Group("", Text("    step  event", style="dim"), *rows) if rows else None


def plain(text: str) -> str:
    """On one line, without what a terminal would take for orders."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())
