"""What a run tells while it trains: the live line, `metrics.jsonl`, wandb, and what the report is made of.

Only rank 0 has a tracker. Files in the run's folder: `metrics.jsonl` (a logged step, an evaluation or an
event a line), `run.json` (facts, wandb's id, the closing summary), `routing.json` and `samples.json` (the
latest of each).
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.dashboards import Pages, wandb_mode
from training.recipe import Recipe
from training.records import Record, Sample, clean, keep_lines, read_json, read_lines, summarise, write_json
from training.screen import Screen, TimeLeft

if TYPE_CHECKING:  # a report needs no torch
    from training.checkpoint import Outcome

DROPPED = (
    "share of the tokens' assignments to experts that are passed over because the expert's capacity is used up; "
    "the token then goes on by the residual path"
)


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
        plan: Record | None = None,
    ):
        """`facts` (flat) are shown and kept; `state` is an earlier tracker's `state()`, from the checkpoint.

        `plan`: estimates (`value`, `low`, `high`) by a record's keys, which pages show beside what came.

        Lines of `metrics.jsonl` after `start_step`, which a crashed run left, are dropped; all, in a new run.
        """
        wandb_mode(recipe)  # refused before anything is touched
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
        self._pages = Pages(recipe, plan or {}, {"config": config, **options}, self._screen.say, start_step)
        self._pages.known(read_lines(run / "metrics.jsonl"))

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

    def evaluating(self) -> None:
        """Say so on the terminal: it may take as long as many steps."""
        self._screen.doing("evaluating")

    def routing(self, step: int, load: dict[str, list[list[list[int]]]]) -> None:
        """Keep where the tokens went: `wanted` and `kept` assignments, [layers][image, text][experts]."""
        self._keep("routing.json", {"step": step, **load})
        self._pages.routing(step, load["wanted"])

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Record validation losses, as `loss/validation/<task>`, on a line of their own."""
        self._time_left.evaluated()
        self._write({"step": step, **losses})
        shown = {key.removeprefix("loss/validation/"): f"{value:.3f}" for key, value in losses.items()}
        told = [f"validation loss {', '.join(f'{task} {loss}' for task, loss in shown.items())}"] if shown else []
        if lacking := ", ".join(sorted(self._recipe.tasks.keys() - shown.keys())):
            told.append(f"the corpus has nothing in its validation split for {lacking}")
        self._screen.say(f"step {step}: {'; '.join(told)}")
        self._pages.evaluated(step)

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Keep what the model writes now, in place of what it wrote before; wandb keeps all."""
        rows = [sample._asdict() | {"image": _as_text(sample.image)} for sample in samples]
        self._keep("samples.json", {"step": step, "samples": rows})
        self._pages.samples(step, samples)

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
        self._pages.go_back(step, read_lines(self._run / "metrics.jsonl"))

    def has_told(self, kind: str) -> bool:
        """Whether an event of this kind is among the run's lines."""
        return any(line.get("event") == kind for line in read_lines(self._run / "metrics.jsonl"))

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
        self._pages.evaluated(summary.get("steps", 0))
        self._pages.summary(summary)
        self._stop(failed=False)

    def _write(self, line: Record) -> None:
        with self._while_there_is_room():
            self._metrics.write(json.dumps(clean(line), ensure_ascii=False, allow_nan=False) + "\n")
            self._metrics.flush()  # what a full disk has refused stays in the buffer for the next time
        (self._pages.event if "event" in line else self._pages.record)(line)

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
        self._pages.finish(failed)
        with self._while_there_is_room():
            self._metrics.close()


def _as_text(image: bytes | None) -> str | None:
    return None if image is None else base64.b64encode(image).decode("ascii")
