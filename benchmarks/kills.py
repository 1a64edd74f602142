"""What a supervised run makes of SIGKILLs: the same bits at its end, and how long each of them costs.

    python -m benchmarks.kills [--kills 100] [--seed 1] [--signal KILL] [key=value …]

Two ranks train a small model under `m6 train --supervise`, and one of them is killed again and again (`--signal
STOP`: held up, which only its silence shows): one time in four at any moment of its start, else within a few steps, and
of these one in three as a checkpoint is being written.
An uninterrupted run of the same recipe is the measure: the files of its last checkpoint, its losses and evaluations by
step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from tests.data_sample import build_sample
from training.extensions import prepare_extensions
from training.heartbeat import read_beat
from training.records import Record, read_lines
from training.run import CHECKPOINTS, INCIDENTS, RANKS

ROOT = Path(__file__).resolve().parents[1]
RANK_COUNT, SAVE_EVERY, STEPS_A_KILL = 2, 4, 10
MOST_STEPS = 8  # before a kill
LOOK_SECONDS = 0.05
SAVE_SECONDS = 2.0  # that a kill may wait for a checkpoint being written
ENVIRONMENT = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
SMALL = [
    "model.layers=2", "model.hidden=64", "model.ffn=128", "model.experts=8", "model.text_vocab=540",
    "global_batch=8", "ds.train_micro_batch_size_per_gpu=4", "text_positions=64", f"save_every={SAVE_EVERY}",
    "evaluation.every=20", "evaluation.rows=8", "evaluation.samples=2", "schedule.warmup=2", "tracking.log_every=1",
    "tracking.wandb=disabled",
]  # fmt: skip


@dataclass
class Kill:
    """One kill, and what was seen after it unless the next one came first (seconds after it)."""

    at: float  # wall time
    phase: str
    saving: bool  # a checkpoint was being written
    step: int  # the last one that was logged
    killed: set[int]  # process ids of the ranks of that time
    new_processes: float | None = None
    next_step: float | None = None
    resumed: int = 0  # from which step
    lost_steps: int | None = None


@dataclass
class Result:
    """All kills, the supervisor's exit code, and in what the two runs differ."""

    kills: list[Kill] = field(default_factory=list)
    code: int = 0
    differences: list[str] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)  # seconds from a kill to its line in incidents.jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as a larger model")
    arguments = parser.parse_args()
    prepare_extensions()
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place).resolve()
        (folder / "data").mkdir()
        build_sample(folder / "data")
        number = signal.Signals[f"SIG{arguments.signal}"]
        result = measure(folder, folder / "data", arguments.kills, arguments.seed, number, arguments.overrides)
    print("\n".join(rows(result)))
    sys.exit(bool(result.code or result.differences or len(result.kills) < arguments.kills))


def measure(
    folder: Path,
    data: Path,
    kills: int,
    seed: int,
    number: signal.Signals = signal.SIGKILL,
    overrides: Sequence[str] = (),
) -> Result:
    """Train twice in `folder`, once without and once with kills by the signal `number`, and compare."""
    changes = [*overrides, f"steps={STEPS_A_KILL * kills}"]
    usual = train_whole(folder, data, changes)
    with (folder / "supervisor.log").open("w") as log:
        supervised = command(data, "killed", "--supervise", "--restarts", "50", *changes)
        process = subprocess.Popen(supervised, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=log)
    run, chance, result = folder / "runs" / "killed", random.Random(seed), Result()
    try:
        while len(result.kills) < kills and (kill := strike(process, run, chance, number, result.kills, usual)):
            result.kills.append(kill)
        while process.poll() is None:
            observe(process, run, result.kills[-1])
            time.sleep(LOOK_SECONDS)
    finally:
        process.terminate()
    result.code = process.wait()
    result.differences = differences(folder / "runs" / "whole", run)
    result.noticed = notices(run, result.kills)
    return result


def train_whole(folder: Path, data: Path, changes: list[str]) -> float:
    """Train without kills; the seconds from the start to the first step."""
    started = time.time()
    whole = command(data, "whole", *changes)
    process = subprocess.Popen(whole, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not last_step(folder / "runs" / "whole") and process.poll() is None:
        time.sleep(LOOK_SECONDS)
    seconds = time.time() - started
    if process.wait():
        raise RuntimeError("the run without kills failed; its own message is above")
    return seconds


def command(data: Path, name: str, *arguments: str) -> list[str]:
    recipe = str(ROOT / "launch" / "recipes" / "quickstart.yaml")
    program = [sys.executable, "-P", "-c", "from launch.cli import main; main()"]
    return [*program, "train", "--recipe", recipe, "--name", name, "--data", str(data), *SMALL, *arguments]


def strike(
    process: subprocess.Popen,
    run: Path,
    chance: random.Random,
    number: signal.Signals,
    before: list[Kill],
    usual: float,
) -> Kill | None:
    """Kill one rank at a random moment; None if the run ends first. `usual`: seconds that a start takes."""
    victim, in_start, in_save = chance.randrange(RANK_COUNT), chance.random() < 1 / 4, chance.random() < 1 / 3
    moment, steps = time.time() + chance.uniform(0, usual), chance.randrange(MOST_STEPS)
    last = before[-1] if before else Kill(time.time(), "none", False, 0, set())
    while process.poll() is None:
        observe(process, run, last)
        pids = rank_pids(process)
        due = time.time() > moment if in_start else last.next_step is not None and last_step(run) > last.resumed + steps
        if due and len(pids) == RANK_COUNT and not last.killed & set(pids.values()):
            if not in_start and in_save:
                await_save(run)
            return strike_now(run, pids, victim, number)
        time.sleep(LOOK_SECONDS)
    return None


def await_save(run: Path) -> None:
    """Wait until a checkpoint is being written, though not for ever."""
    until = time.time() + SAVE_SECONDS
    while not is_saving(run) and time.time() < until:
        time.sleep(0.002)


def is_saving(run: Path) -> bool:
    return any((run / CHECKPOINTS).glob(".step-*.partial"))


def strike_now(run: Path, pids: dict[int, int], victim: int, number: signal.Signals) -> Kill:
    beat = read_beat(run / RANKS, victim)
    phase = beat[0].phase if beat and beat[0].pid == pids[victim] else "starting"
    kill = Kill(time.time(), phase, is_saving(run), last_step(run), set(pids.values()))
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pids[victim]).send_signal(number)
    return kill


def observe(process: subprocess.Popen, run: Path, kill: Kill) -> None:
    """See what has come about since a kill."""
    if kill.next_step is not None:
        return
    new = [pid for pid in rank_pids(process).values() if pid not in kill.killed]
    if new and kill.new_processes is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            kill.new_processes = min(psutil.Process(pid).create_time() for pid in new) - kill.at
    beat = read_beat(run / RANKS, 0)
    if beat and beat[0].pid in new and beat[0].phase not in ("starting", "loading"):
        kill.resumed = beat[0].first_step
        kill.lost_steps = kill.step - kill.resumed
        if last_step(run) > kill.resumed:
            kill.next_step = time.time() - kill.at


def rank_pids(process: subprocess.Popen) -> dict[int, int]:
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        launchers = psutil.Process(process.pid).children()
        for rank in [rank for launcher in launchers for rank in launcher.children()]:
            with contextlib.suppress(psutil.Error, KeyError):
                found[int(rank.environ()["RANK"])] = rank.pid
    return found


def notices(run: Path, kills: list[Kill]) -> list[float]:
    lines = [line for line in read_lines(run / f"{INCIDENTS}.jsonl") if line["event"] == "failed"]
    times = [datetime.fromisoformat(line["time"]).timestamp() for line in lines]
    return [min(later) - kill.at for kill in kills if (later := [time for time in times if time > kill.at])]


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line), default=0)


def differences(whole: Path, killed: Path) -> list[str]:
    """In what two runs differ, of what must be equal to the bit."""

    def last_files(run: Path) -> object:
        newest = max((run / CHECKPOINTS).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        return newest.name, json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["files"]

    def losses(run: Path) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line}

    def evaluations(run: Path) -> list[Record]:
        return [line for line in read_lines(run / "metrics.jsonl") if any(key.startswith("loss/val") for key in line)]

    looks = {"last checkpoint": last_files, "losses": losses, "evaluations": evaluations}
    return [name for name, look in looks.items() if look(whole) != look(killed)]


def rows(result: Result) -> list[str]:
    """The findings, a line each."""
    kills, phases = result.kills, Counter(kill.phase for kill in result.kills)
    lost, lost_saving = (steps_lost(kills, saving) for saving in (False, True))
    return [
        f"kills: {len(kills)} ({', '.join(f'{count} {phase}' for phase, count in phases.most_common())}; "
        f"{sum(kill.saving for kill in kills)} while a checkpoint was being written)",
        f"end state: {'differs in ' + ', '.join(result.differences) if result.differences else 'equal to the bit'}"
        f" (exit code {result.code})",
        f"kill to its line in incidents.jsonl: {spread(result.noticed)}",
        f"kill to new processes: {spread([k.new_processes for k in kills if k.new_processes is not None])}",
        f"kill to next step: {spread([k.next_step for k in kills if k.next_step is not None])}",
        f"steps lost: at most {lost}, and {lost_saving} where a checkpoint was being written; one every {SAVE_EVERY}",
    ]


def steps_lost(kills: list[Kill], saving: bool) -> int:
    """At the most, by kills while a checkpoint was being written, or by the others."""
    return max((kill.lost_steps for kill in kills if kill.saving == saving and kill.lost_steps is not None), default=0)


def spread(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return f"{len(seconds)} seen"
    percentiles = statistics.quantiles(seconds, n=20, method="inclusive")
    return f"p50 {percentiles[9]:.1f} s, p95 {percentiles[18]:.1f} s, most {max(seconds):.1f} s ({len(seconds)} seen)"


if __name__ == "__main__":
    main()
