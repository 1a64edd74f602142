"""What a run tells while it trains: the live line, `metrics.jsonl`, wandb, and what the report is made of.

Only rank 0 has a tracker. Files in the run's folder: `metrics.jsonl` (a logged step, an evaluation or an
event a line), `run.json` (facts, wandb's id, the closing summary), `routing.json` and `samples.json` (the
latest of each).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from training.errors import UserError
from training.files import replace
from training.recipe import Recipe

if TYPE_CHECKING:  # a report needs no torch
    from training.checkpoint import Outcome

Record = dict[str, Any]

LAST = ("step", "position", "tokens", "lr", "skipped_steps")  # states and running totals
RATES = ("tokens_per_second", "flops_utilization")  # per second: a long step weighs more
WANDB_MODES = ("online", "offline", "disabled")
WANDB_SECONDS = 60  # that wandb may take to start, and to finish
UNITS = {"flops": "FLOP/s", "bytes": "B"}  # of facts whose key has the word
DROPPED = (
    "share of the tokens' assignments to experts that are passed over because the expert's capacity is used up; "
    "the token then goes on by the residual path"
)


class Sample(NamedTuple):
    """What the model wrote for one validation row; `reference` is empty where no answer is the right one."""

    image: bytes | None  # PNG
    task: str
    prompt: str
    reference: str
    output: str

    @property
    def right(self) -> bool:
        return bool(self.reference.strip()) and self.output.strip() == self.reference.strip()


class Tracker:
    """Everything that a run says. As a context manager it leaves terminal and wandb in order after an error.

    A step's `record` is flat: `step` (1-based: steps done), `position`, `tokens` (so far), `loss`,
    `loss/<task>`, `lr`, `grad_norm`, `step_seconds`, `tokens_per_second`, `flops_utilization`, `moe/…`,
    `memory/…`, `energy/…`; values are numbers, strings or None. The first step, each
    `recipe.tracking.log_every`-th and the last are written, and stand for all steps since the one written
    before: see `summarise`. What is not finite is written as null.
    """

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        facts: Record,
        start_step: int = 0,
        state: Record | None = None,
    ):
        """`facts` (flat) are shown and kept; `state` is an earlier tracker's `state()`, from the checkpoint.

        Lines of `metrics.jsonl` after `start_step`, which a crashed run left, are dropped; all, in a new run.
        """
        mode = wandb_mode(recipe)
        run.mkdir(parents=True, exist_ok=True)
        self._run, self._recipe, self._full = run, recipe, False
        self._window: list[Record] = list(state["window"]) if state else []
        self._time_left = TimeLeft(recipe.steps, recipe.evaluation.every)
        keep_lines(run / "metrics.jsonl", start_step if start_step or state else -1)
        self._metrics = (run / "metrics.jsonl").open("a", encoding="utf-8")
        known = {"wandb": secrets.token_hex(4)} | read_json(run / "run.json", {}) | (state or {})
        self._about = {"facts": facts, "wandb": known["wandb"]}
        write_json(run / "run.json", self._about)
        self._screen = Screen(recipe.steps, start_step)
        self._screen.facts(facts)
        if recipe.model_shape().experts:
            self._screen.say(f"dropped: {DROPPED}")
        config = recipe.model_dump(mode="json") | {"facts": facts}
        options = {
            "project": recipe.tracking.project,
            "name": run.name,
            "dir": run,
            "id": self._about["wandb"],
        }
        self._page = WandbPage(mode, {"config": config, **options}, self._screen.say)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop(failed=kind is not None)

    def state(self) -> Record:
        """What a checkpoint carries, so that a resumed run writes the same lines and continues its page."""
        return {"wandb": self._about["wandb"], "window": list(self._window)}

    def step(self, record: Record) -> None:
        """Show a finished step; write the window that it closes, if it closes one."""
        step = record["step"]
        self._window.append(record)
        self._time_left.step(time.monotonic(), record["step_seconds"])
        left = self._time_left.seconds(step)
        self._screen.step(step, record, left)
        if step == 1 or step % self._recipe.tracking.log_every == 0 or step == self._recipe.steps:
            summary = summarise(self._window)
            self._window = []
            self._write(summary)
            self._screen.log(step, summary, left)

    def routing(self, step: int, load: dict[str, list[list[list[int]]]]) -> None:
        """Keep where the tokens went: `wanted` and `kept` assignments, [layers][image, text][experts]."""
        self._keep("routing.json", {"step": step, **load})

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Record validation losses, as `loss/validation/<task>`, on a line of their own."""
        self._time_left.evaluated()
        self._write({"step": step, **losses})
        shown = (f"{key.removeprefix('loss/validation/')} {value:.3f}" for key, value in losses.items())
        self._screen.say(f"step {step}: validation loss {', '.join(shown)}")

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Keep what the model writes now, in place of what it wrote before; wandb keeps all."""
        rows = [sample._asdict() | {"image": _as_text(sample.image)} for sample in samples]
        self._keep("samples.json", {"step": step, "samples": rows})
        self._page.samples(step, samples)

    def event(self, step: int, kind: str, text: str = "") -> None:
        """Record that something happened: "saved", "resumed", "skipped step"."""
        self._write({"step": step, "event": kind, "text": text})
        self._screen.say(f"step {step}: {kind}{f': {text}' if text else ''}")

    def go_back(self, step: int, state: Record) -> None:
        """Go on after an earlier step, whose checkpoint has `state`: the lines of the steps after it are dropped.

        wandb keeps what it was sent, and takes up again where the run gets beyond it.
        """
        self._metrics.close()
        keep_lines(self._run / "metrics.jsonl", step)
        self._metrics = (self._run / "metrics.jsonl").open("a", encoding="utf-8")
        self._window = list(state["window"])

    def saved(self, outcome: Outcome) -> None:
        """Record what became of a save: its stall and its time are metrics, a failure is an event."""
        times = {
            "save/stall_seconds": outcome.stall_seconds,
            "save/write_seconds": outcome.write_seconds,
            "save/verify_seconds": outcome.verify_seconds,
        }
        remark = f"; {outcome.warning}" if outcome.warning else ""
        text = outcome.error or (
            f"checkpoint of {outcome.bytes / 1e6:,.0f} MB, written in {outcome.write_seconds:.1f} s and verified in "
            f"{outcome.verify_seconds:.1f} s; training stood still for {outcome.stall_seconds:.2f} s{remark}"
        )
        self._write({"step": outcome.step, "event": "not saved" if outcome.error else "saved", "text": text, **times})
        self._screen.say(f"step {outcome.step}: {'NOT SAVED: ' if outcome.error else 'saved, '}{text}")

    def close(self, summary: Record) -> None:
        """Keep the run's closing figures, end the live line, finish wandb and its service."""
        self._about["summary"] = clean(summary)
        self._keep("run.json", self._about)
        self._page.summary(summary)
        self._stop(failed=False)

    def _write(self, line: Record) -> None:
        with self._while_there_is_room():
            self._metrics.write(json.dumps(clean(line), ensure_ascii=False, allow_nan=False) + "\n")
            self._metrics.flush()  # what a full disk has refused stays in the buffer for the next time
        self._page.log(line["step"], line)

    def _keep(self, name: str, value: Any) -> None:
        with self._while_there_is_room():
            write_json(self._run / name, value)

    @contextlib.contextmanager
    def _while_there_is_room(self) -> Iterator[None]:
        """Training does not end because the disk is full: that is told once, and again after it was better."""
        try:
            yield
            self._full = False
        except OSError as error:
            if not self._full:
                self._screen.say(f"metrics cannot be written ({error.strerror}): training goes on, make room")
            self._full = True

    def _stop(self, failed: bool) -> None:
        self._screen.stop()
        self._page.finish(failed)
        with self._while_there_is_room():
            self._metrics.close()


def summarise(window: list[Record]) -> Record:
    """One record for several steps.

    States and running totals (`step`, `position`, `tokens`, `lr`) and text are the last step's; `memory/…` is
    the peak; rates (`tokens_per_second`, `flops_utilization`) are means weighted by `step_seconds`; all else
    (losses, gradient norm, seconds, MoE and energy figures) is the plain mean over the steps that have it,
    or None.
    """
    keys = dict.fromkeys(key for record in window for key in record)
    return {key: _summarise_key(key, window) for key in keys}


def _summarise_key(key: str, window: list[Record]) -> Any:
    having = [record for record in window if record.get(key) is not None]
    if not having:
        return None
    values = [record[key] for record in having]
    if key in LAST or isinstance(values[-1], str):
        return values[-1]
    if key.startswith("memory/"):
        return max(values)
    weights = [record["step_seconds"] for record in having] if key in RATES else None
    if not all(math.isfinite(value) for value in values):
        return math.nan  # a mean of the rest would hide what happened
    return statistics.fmean(values, weights)


def clean(values: Record) -> Record:
    """The same, with None for numbers that JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def keep_lines(path: Path, step: int) -> None:
    """Drop from a metrics file the lines after `step` and a line that a crash tore."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    if path.exists():
        replace(path, text)


def read_lines(path: Path) -> list[Record]:
    """The lines of a metrics file; a torn one is passed over, and a missing file has none."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for one in text.split("\n"):  # splitlines would also split at separators that a caption may hold
        try:
            line = json.loads(one)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def read_json(path: Path, default: Any) -> Any:
    """A JSON file's value, or `default` if there is none that can be read (a power cut leaves empty files)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def write_json(path: Path, value: Any) -> None:
    """Write a file that is never seen half written."""
    replace(path, json.dumps(value, ensure_ascii=False, indent=None))


def _as_text(image: bytes | None) -> str | None:
    return None if image is None else base64.b64encode(image).decode("ascii")


class TimeLeft:
    """Seconds to the end: steps at a robust mean of recent ones, and the evaluations to come at theirs."""

    def __init__(self, steps: int, evaluate_every: int):
        self._steps, self._every = steps, evaluate_every
        self._seconds: deque[float] = deque(maxlen=100)
        self._evaluations: deque[float] = deque(maxlen=5)
        self._last: float | None = None
        self._evaluated = False

    def evaluated(self) -> None:
        """An evaluation was run since the last step."""
        self._evaluated = True

    def step(self, now: float, step_seconds: float) -> None:
        """A step of `step_seconds` ended at `now`, on a clock of the caller's."""
        if self._last is not None:
            passed = now - self._last
            self._seconds.append(step_seconds if self._evaluated else passed)
            if self._evaluated:
                self._evaluations.append(max(0.0, passed - step_seconds))
        self._last, self._evaluated = now, False

    def seconds(self, step: int) -> float | None:
        """Seconds left after `step`; None before two steps were seen."""
        if not self._seconds:
            return None
        ordered = sorted(self._seconds)
        quarter = len(ordered) // 4
        left = statistics.fmean(ordered[quarter : len(ordered) - quarter]) * (self._steps - step)
        if self._evaluations:
            left += statistics.fmean(self._evaluations) * (self._steps // self._every - step // self._every)
        return left


class Screen:
    """One live line on a terminal; elsewhere (a log file, a CI job) a plain line a logged step."""

    def __init__(self, steps: int, start_step: int):
        self._steps = steps
        self._console = Console()
        self._live: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
            )
            self._live = Progress(*columns, console=self._console, refresh_per_second=4)
            self._live.add_task("", total=steps, completed=start_step, numbers="")

    def facts(self, facts: Record) -> None:
        width = max(map(len, facts), default=0)
        for key, value in facts.items():
            self.say(f"{key:<{width}}  {fact(key, value)}")
        if self._live:
            self._live.start()

    def step(self, step: int, record: Record, left: float | None) -> None:
        if self._live:
            task = self._live.task_ids[0]
            self._live.update(task, completed=step, numbers=numbers(record, left))

    def log(self, step: int, summary: Record, left: float | None) -> None:
        if not self._live:
            self.say(f"step {step}/{self._steps}  {numbers(summary, left)}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        if self._live:
            self._live.stop()


def fact(key: str, value: Any) -> str:
    """A fact's value as a person reads it: 1234 -> 1,234; a rate or a size with its unit, 93.1 GFLOP/s, 1.2 GB."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    unit = next((unit for word, unit in UNITS.items() if word in key), "")
    return scaled(value, unit) if unit else f"{value:,}"


def scaled(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: 1_234_567 B -> 1.23 MB."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def numbers(record: Record, left: float | None) -> str:
    """The line's figures: loss, speed, assignments dropped for want of capacity, time left."""
    parts = [f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
    if record.get("moe/drop_rate") is not None:
        parts.append(f"{record['moe/drop_rate']:.1%} dropped")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: 42 s, 12 min 30 s, 3 h 05 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def wandb_mode(recipe: Recipe) -> str:
    """What wandb is to do: the environment's WANDB_MODE, else the recipe's word."""
    mode = os.environ.get("WANDB_MODE") or recipe.tracking.wandb
    if mode not in WANDB_MODES:
        raise UserError(f"WANDB_MODE={mode!r}: must be {', '.join(WANDB_MODES)}; or unset it")
    return mode


class WandbPage:
    """The run's page on wandb, which is not even imported when `mode` is "disabled".

    No failure of wandb reaches the training: it is said once, and the run goes on, offline or without a page.
    """

    def __init__(self, mode: str, options: Record, say: Callable[[str], None]):
        """`options`: of `wandb.init`."""
        self._say = say
        self._wandb: Any = None  # the run, while there is one
        if mode == "online" and not self._start(mode, options, "the page is kept offline"):
            mode = "offline"
        if mode == "offline":
            self._start(mode, options, "there is no page")

    def _start(self, mode: str, options: Record, otherwise: str) -> bool:
        try:
            self._wandb = _start_wandb(mode, options)
        except Exception as error:
            self._warn(error, otherwise)
        return self._wandb is not None

    def log(self, step: int, values: Record) -> None:
        shown = {k: v for k, v in values.items() if isinstance(v, int | float) or k == "event"}
        self._attempt(lambda page: _log(page, step, shown))

    def samples(self, step: int, samples: list[Sample]) -> None:
        self._attempt(lambda page: _log(page, step, {"samples": _sample_table(samples)}))

    def summary(self, values: Record) -> None:
        self._attempt(lambda page: page.summary.update(clean(values)))

    def finish(self, failed: bool) -> None:
        self._attempt(lambda page: _finish_wandb(page, int(failed)))
        self._wandb = None

    def _attempt(self, action: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            page, self._wandb = self._wandb, None
            self._warn(error, "going on without it")
            with contextlib.suppress(Exception):  # said already
                _finish_wandb(page, 1)

    def _warn(self, error: Exception, outcome: str) -> None:
        self._say(f"wandb: {' '.join(str(error).split())}; {outcome}")


def _start_wandb(mode: Any, options: Record) -> Any:
    # Pictures of tables are staged in the home folder if not told otherwise; the run's folder shall have all.
    os.environ.setdefault("WANDB_DATA_DIR", str(options["dir"].resolve() / "wandb" / "data"))
    if mode == "offline":
        # Its crash reports would be the one thing that looks for a network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    if mode == "online" and not wandb.login(prompt=False):  # init would ask at the terminal, and wait
        raise RuntimeError("not logged in (`wandb login`, or tracking.wandb=offline)")
    settings = wandb.Settings(silent=True, console="off", init_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS)
    return wandb.init(mode=mode, allow_val_change=True, resume="allow", settings=settings, **options)


def _log(page: Any, step: int, values: Record) -> None:
    # What a crashed run had sent beyond its checkpoint is on the page already, and the same to the bit. Steps
    # are wandb's own, not a metric, so that the pieces of a run that was resumed offline are disjoint.
    if step >= page.step or "event" in values:
        page.log(values, step=max(step, page.step))


def _finish_wandb(page: Any, exit_code: int) -> None:
    import wandb

    page.finish(exit_code=exit_code)
    wandb.teardown(exit_code)


def _sample_table(samples: list[Sample]) -> Any:
    import wandb
    from PIL import Image

    table = wandb.Table(columns=["picture", "task", "prompt", "reference", "output", "right"])
    for sample in samples:
        picture = wandb.Image(Image.open(io.BytesIO(sample.image))) if sample.image else None
        table.add_data(picture, sample.task, sample.prompt, sample.reference, sample.output, sample.right)
    return table
