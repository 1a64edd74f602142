"""The Python stacks of ranks that are in trouble: from themselves where they answer, else from outside."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from launch.processes import is_stopped
from training.heartbeat import STACKS, read_stacks

ANSWER_SECONDS = 2.0  # that the ranks may take to write their stacks
LOOK_SECONDS = 0.1
OUTSIDE_SECONDS = 10.0  # that py-spy may take


def record_stacks(
    to: Path, beats: Path, ranks: Iterable[int], running: Mapping[int, int], listening: Iterable[int]
) -> None:
    """Write `to`/rank-N.txt for each of `ranks`.

    `beats` is the folder of the heartbeats, `running` has the process ids of those that have not ended, and
    `listening` those that answer to the signal, which would kill any other.
    """
    told = _ask(beats, {rank: pid for rank, pid in running.items() if rank in set(listening)})
    told |= _from_outside({rank: pid for rank, pid in running.items() if rank not in told})
    for rank in ranks:
        text = told.get(rank) or read_stacks(beats, rank) or "It had ended, and left no stacks.\n"
        (to / f"rank-{rank}.txt").write_text(text, encoding="utf-8")


def _ask(beats: Path, pids: Mapping[int, int]) -> dict[int, str]:
    """What each rank writes when it is asked; those that do not answer in time are left out."""
    before = {rank: len(read_stacks(beats, rank)) for rank in pids}
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACKS)
    deadline = time.monotonic() + ANSWER_SECONDS
    answers, earlier = dict.fromkeys(pids, ""), None
    while not (all(answers.values()) and answers == earlier) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        earlier, answers = answers, {rank: read_stacks(beats, rank)[before[rank] :] for rank in pids}
    return {rank: answer for rank, answer in answers.items() if answer}


def _from_outside(pids: Mapping[int, int]) -> dict[int, str]:
    """What py-spy sees of each process, which may be stopped, or its reason why it sees nothing."""
    spy = Path(sys.executable).with_name("py-spy")
    if not spy.exists():
        return dict.fromkeys(pids, f"It did not answer, and could not be looked into: {spy} is missing.\n")
    watching = {rank: _spy(spy, pid) for rank, pid in pids.items()}
    return {rank: f"It did not answer; py-spy says:\n{_output(process)}" for rank, process in watching.items()}


def _spy(spy: Path, pid: int) -> subprocess.Popen[str]:
    # It stops a process to read it consistently, and cannot stop one that was stopped.
    already = ["--nonblocking"] if is_stopped(pid) else []
    command = [str(spy), "dump", *already, "--pid", str(pid)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _output(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=OUTSIDE_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] + f"nothing more within {OUTSIDE_SECONDS:g} s\n"
