"""What a run's folder tells: lines of `metrics.jsonl`, the values of JSON files, what the model wrote. No torch."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from training.files import replace

Record = dict[str, Any]

MODALITIES = ("image", "text")  # the order in which routing is counted
LAST = ("step", "position", "tokens", "lr", "skipped_steps", "energy/joules")  # states and running totals
RATES = ("tokens_per_second", "flops_utilization")  # per second: a long step weighs more


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


def summarise(window: list[Record]) -> Record:
    """One record for several steps.

    States and running totals (LAST) and text are the last step's; `memory/…` is
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
    return parse_lines(path.read_text(encoding="utf-8", errors="replace") if path.exists() else "")


def parse_lines(text: str) -> list[Record]:
    """Those of a metrics file's text."""
    lines = []
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
