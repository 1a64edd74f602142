"""A run's pages where curves are followed: on wandb, and in TensorBoard's files.

Both are given the same few figures by the same names, in sections: `loss`, `validation`, `experts`, `speed`, `memory`,
`energy`, `optimizer`, `progress`, `save`; the load of all experts as one picture; the plan beside what came; and events
as marks. No failure of a page reaches the training: it is said once, and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from training.charts import Point, thinned
from training.errors import UserError
from training.heat import heat_map
from training.recipe import Recipe
from training.records import Record, Sample, clean

WANDB_MODES = ("online", "offline", "disabled")
WANDB_SECONDS = 60  # that wandb may take to start, and to finish
SECTIONS = {  # of a record's keys that are in none
    "loss": "loss", "step_seconds": "speed", "tokens_per_second": "speed", "flops_utilization": "speed",
    "lr": "optimizer", "grad_norm": "optimizer", "skipped_steps": "optimizer",
    "tokens": "progress", "position": "progress",
}  # fmt: skip
RENAMED = {"loss/validation/": "validation/", "moe/": "experts/"}
LISTED = 500  # events, the last ones, of the table on a page
NO_FILES = "there are no files for TensorBoard"
SAMPLE_COLUMNS = ("task", "prompt", "reference", "output", "right")


def page_name(key: str) -> str | None:
    """What a record's key is called on a page; None if it is left out there, as what a picture shows better."""
    if key.startswith("moe/") and key.count("/") > 1:  # by modality: in the picture of all experts' load
        return None
    for start, name in RENAMED.items():
        if key.startswith(start):
            return name + key.removeprefix(start)
    return f"{SECTIONS[key]}/{key}" if key in SECTIONS else key if "/" in key else None


def page_values(record: Record) -> dict[str, float]:
    """A record's numbers by their names on a page."""
    named = ((page_name(key), value) for key, value in record.items())
    return {name: value for name, value in named if name and isinstance(value, int | float)}


class Event(NamedTuple):
    step: int
    kind: str
    text: str


class Page(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def plan(self, step: int, name: str, actual: list[Point], planned: float) -> None:
        """The plan's figure beside the run's own so far: (step, value) pairs."""

    def picture(self, step: int, name: str, png: bytes) -> None: ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None: ...

    def event(self, events: Sequence[Event], values: Mapping[str, float]) -> None:
        """The last one has happened, after the others, and was measured. It may be of a step some steps ago."""

    def table(self, step: int, events: Sequence[Event]) -> None:
        """All events so far."""

    def go_back(self, step: int) -> None:
        """What was logged after a step is given up."""

    def summary(self, values: Record) -> None: ...

    def finish(self, failed: bool) -> None: ...


class Pages:
    """All pages of a run, each left alone by what happens to another."""

    def __init__(
        self, recipe: Recipe, plan: Mapping[str, Any], options: Record, say: Callable[[str], None], start_step: int
    ):
        """`plan`: estimates by a record's keys. `options`: of `wandb.init`, with the run's folder as `dir`.

        Raises UserError for a mode that wandb does not have.
        """
        self._plan, self._say = plan, say
        self._pages: dict[str, Page] = {}
        self.known([])
        mode = wandb_mode(recipe)
        if mode == "online" and not self._open("wandb", lambda: WandbPage(mode, options), "the page is kept offline"):
            mode = "offline"
        if mode == "offline":
            self._open("wandb", lambda: WandbPage(mode, options), "there is no page")
        if recipe.tracking.tensorboard:
            self._open("tensorboard", lambda: TensorboardPage(options["dir"] / "tensorboard", start_step), NO_FILES)

    def known(self, lines: Sequence[Record]) -> None:
        """What the run's metrics.jsonl holds already."""
        self._events = [Event(line["step"], line["event"], line["text"]) for line in lines if "event" in line]
        self._curves: dict[str, list[Point]] = {}  # of what is planned, too
        for line in lines:
            self._follow(line)

    def record(self, record: Record) -> None:
        """A line of metrics.jsonl, but for events."""
        self._all(lambda page: page.log(record["step"], page_values(record)))
        self._follow(record)

    def _follow(self, record: Record) -> None:
        for key in self._plan:
            if record.get(key) is not None:
                self._curves.setdefault(key, []).append((record["step"], record[key]))

    def evaluated(self, step: int) -> None:
        """Draw the plan beside what came, and list what happened."""
        self._all(lambda page: page.table(step, self._events[-LISTED:]))
        for key, curve in self._curves.items():
            name, planned = f"plan/{key.replace('/', '_')}", self._plan[key]["value"]
            self._all(partial(_draw_plan, step, name, curve, planned))

    def routing(self, step: int, wanted: Sequence[Sequence[Sequence[int]]]) -> None:
        """Assignments by layer, modality and expert."""
        self._all(lambda page: page.picture(step, "experts/load", heat_map(wanted)))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._all(lambda page: page.samples(step, samples))

    def event(self, line: Record) -> None:
        """A line of metrics.jsonl about something that happened."""
        self._events.append(Event(line["step"], line["event"], line["text"]))
        self._all(lambda page: page.event(self._events, page_values(line)))

    def go_back(self, step: int, lines: Sequence[Record]) -> None:
        """Lines after a step were given up; `lines` are left."""
        self.known(lines)
        self._all(lambda page: page.go_back(step))

    def summary(self, values: Record) -> None:
        self._all(lambda page: page.summary(clean(values)))

    def finish(self, failed: bool) -> None:
        self._all(lambda page: page.finish(failed))
        self._pages = {}

    def _open(self, name: str, make: Callable[[], Page], otherwise: str) -> bool:
        try:
            self._pages[name] = make()
        except Exception as error:
            self._warn(name, error, otherwise)
        return name in self._pages

    def _all(self, action: Callable[[Page], object]) -> None:
        for name, page in list(self._pages.items()):
            try:
                action(page)
            except Exception as error:
                del self._pages[name]
                self._warn(name, error, "going on without it")
                with contextlib.suppress(Exception):  # said already
                    page.finish(failed=True)

    def _warn(self, name: str, error: Exception, outcome: str) -> None:
        self._say(f"{name}: {' '.join(str(error).split())}; {outcome}")


def wandb_mode(recipe: Recipe) -> str:
    """What wandb is to do: the environment's WANDB_MODE, else the recipe's word."""
    mode = os.environ.get("WANDB_MODE") or recipe.tracking.wandb
    if mode not in WANDB_MODES:
        raise UserError(f"WANDB_MODE={mode!r}: must be {', '.join(WANDB_MODES)}; or unset it")
    return mode


def _draw_plan(step: int, name: str, curve: list[Point], planned: float, page: Page) -> None:
    page.plan(step, name, curve, planned)


class WandbPage:
    """Of a run that was resumed, the same page goes on: `id` is among the options."""

    def __init__(self, mode: Any, options: Record):
        # Pictures of tables are staged in the home folder if not told otherwise; the run's folder shall have all.
        os.environ.setdefault("WANDB_DATA_DIR", str(options["dir"].resolve() / "wandb" / "data"))
        if mode == "offline":
            # Its crash reports would be the one thing that looks for a network.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if mode == "online" and not wandb.login(prompt=False):  # init would ask at the terminal, and wait
            raise RuntimeError("not logged in (`wandb login`, or tracking.wandb=offline)")
        settings = wandb.Settings(silent=True, console="off", init_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS)
        self._wandb = wandb
        self._run: Any = wandb.init(mode=mode, allow_val_change=True, resume="allow", settings=settings, **options)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        # What a crashed run had sent beyond its checkpoint is on the page already, and the same to the bit. Steps
        # are wandb's own, not a metric, so that the pieces of a run that was resumed offline are disjoint.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def plan(self, step: int, name: str, actual: list[Point], planned: float) -> None:
        steps, values = zip(*thinned(actual), strict=True)
        title = name.removeprefix("plan/").replace("_", " ")
        lines = [list(values), [planned] * len(steps)]
        chart = self._wandb.plot.line_series(list(steps), lines, ["actual", "planned"], title, "step")
        self.log(step, {name: chart})

    def picture(self, step: int, name: str, png: bytes) -> None:
        self.log(step, {name: self._wandb.Image(_opened(png))})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        table = self._wandb.Table(columns=["picture", *SAMPLE_COLUMNS])
        for sample in samples:
            picture = self._wandb.Image(_opened(sample.image)) if sample.image else None
            table.add_data(picture, *(getattr(sample, column) for column in SAMPLE_COLUMNS))
        self.log(step, {"samples": table})

    def event(self, events: Sequence[Event], values: Mapping[str, float]) -> None:
        # Steps of wandb only grow: a mark may be late, the table is right.
        self._run.log({event_name(events): times(events), **values}, step=max(events[-1].step, self._run.step))

    def table(self, step: int, events: Sequence[Event]) -> None:
        table = self._wandb.Table(columns=list(Event._fields), data=list(map(list, events)))
        self._run.log({"events/all": table}, step=max(step, self._run.step))

    def go_back(self, step: int) -> None:
        """wandb keeps what it was sent, and takes up again where the run gets beyond it."""

    def summary(self, values: Record) -> None:
        self._run.summary.update(values)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        self._wandb.teardown(int(failed))


class TensorboardPage:
    """Files that `tensorboard --logdir runs` shows. What a run writes again, resumed or gone back, is shown once."""

    def __init__(self, folder: Path, start_step: int):
        self._folder, self._start, self._opened = folder, start_step, 0
        self._planned: dict[str, int] = {}  # the last step of each curve
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        # A file is named by its second: two within one are told apart.
        self._opened += 1
        own = f".{start_step}.{self._opened}"
        self._writer = SummaryWriter(str(self._folder), flush_secs=10, purge_step=start_step + 1, filename_suffix=own)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def plan(self, step: int, name: str, actual: list[Point], planned: float) -> None:
        if name not in self._planned:
            self._planned[name] = self._start
            both = [f"{curve}/(actual|planned)" for curve in self._planned]
            self._writer.add_custom_scalars({"plan": {tags: ["Multiline", [tags]] for tags in both}})
        for at, value in actual:
            if at > self._planned[name]:
                self._writer.add_scalar(f"{name}/actual", value, at)
                self._writer.add_scalar(f"{name}/planned", planned, at)
        self._planned[name] = step

    def picture(self, step: int, name: str, png: bytes) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(_opened(png).convert("RGB")), step, dataformats="HWC")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples, 1):
            told = "\n\n".join(f"**{column}** {getattr(sample, column)}" for column in SAMPLE_COLUMNS)
            self._writer.add_text(f"samples/{number}", told, step)
            if sample.image:
                self.picture(step, f"samples/{number}", sample.image)

    def event(self, events: Sequence[Event], values: Mapping[str, float]) -> None:
        step, kind, text = events[-1]
        self.log(step, {event_name(events): times(events), **values})
        self._writer.add_text("events", f"**{kind}** {text}", step)

    def table(self, step: int, events: Sequence[Event]) -> None:
        """Each is told as it happens."""

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._open(step)
        self._planned = {name: min(last, step) for name, last in self._planned.items()}

    def summary(self, values: Record) -> None:
        self._writer.add_text("summary", "\n\n".join(f"**{key}** {value}" for key, value in values.items()))

    def finish(self, failed: bool) -> None:
        self._writer.close()


def event_name(events: Sequence[Event]) -> str:
    """Of the mark of what happened last."""
    return f"events/{events[-1].kind.replace(' ', '_')}"


def times(events: Sequence[Event]) -> int:
    """How often what happened last has happened."""
    return sum(event.kind == events[-1].kind for event in events)


def _opened(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))
