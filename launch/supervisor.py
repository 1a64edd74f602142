"""`m6 train --supervise`: a run that fails or hangs is ended, and goes on from its newest checkpoint by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.nodes import SSH_PORT, Nodes
from launch.processes import Ranks, hearing, insists, is_stopped
from launch.stacks import record_stacks
from training.errors import LEFT, LOST_PEER, MISTAKE
from training.extensions import clear_orphaned_locks, extension_root
from training.heartbeat import Beat, read_beat
from training.run import INCIDENTS, RANKS, RECIPE

LOOK_SECONDS = 0.5
# A rank is taken to hang when it has been silent for so long, or so many times what is usual, whichever is longer;
# where nothing is usual yet, or a wait may be long (compiling, a whole checkpoint), for the last.
SILENT_SECONDS, SILENT_TIMES = 45.0, 2.0
FIRST_STEPS_SECONDS = 600.0
LONG_WAIT_SECONDS = 1800.0
PAUSED_SECONDS = 10.0  # between two looks: not the ranks were asleep, or not they alone
LONGEST_DELAY = 60.0  # seconds before a restart


def patience(beat: Beat | None) -> float:
    """Seconds that a rank may be silent after a beat."""
    if beat is None or beat.phase not in ("training", "evaluating", "ended"):
        return LONG_WAIT_SECONDS
    if beat.phase == "ended":
        return SILENT_SECONDS
    if beat.usual_seconds is None:
        return FIRST_STEPS_SECONDS
    return max(SILENT_SECONDS, SILENT_TIMES * beat.usual_seconds)


@dataclass(frozen=True)
class Supervision:
    restarts: int = 10  # one after the other without a step more than before, then it is given up
    grace: float = 60.0  # seconds that the ranks have to save and leave on request

    def options(self) -> list[str]:
        """Those of `m6 train` that say the same."""
        return ["--supervise", "--restarts", str(self.restarts), "--grace", f"{self.grace:g}"]


@dataclass(frozen=True)
class End:
    """How an attempt ended: with an exit code that is final, or None where another attempt is worthwhile."""

    code: int | None
    what: str = ""
    ranks: tuple[int, ...] = ()  # at which it was seen
    since: float = 0.0  # on the monotonic clock


class Attempt:
    """The ranks of one start, as processes and by what their heartbeats say."""

    def __init__(self, ranks: Ranks, beats: Path, grace: float):
        self.ranks, self.grace = ranks, grace
        self.started = time.time()
        self._folder = beats
        self.beats: dict[int, Beat] = {}
        self._codes: dict[int, int | None] = {}  # of ranks that have ended, or are about to
        self._old = {rank: beat[1] for rank in ranks.numbers if (beat := read_beat(beats, rank))}
        self._marks: dict[int, int | None] = {}  # when each file was written
        self._since: dict[int, float] = {}  # how long we know no newer one
        self._looked = time.monotonic()
        self._asked_at: float | None = None
        self._told: set[int] = set()

    @property
    def step(self) -> int:
        """The most steps that a rank has done."""
        return max((beat.step for beat in self.beats.values()), default=0)

    @property
    def has_stepped(self) -> bool:
        return any(beat.step > beat.first_step for beat in self.beats.values())

    def look(self, requests: Sequence[int]) -> End | None:
        """Wait a moment, and tell whether the attempt has come to its end. `requests`: signals that ask us to leave."""
        ended = self.ranks.wait(LOOK_SECONDS)
        self._read()
        for rank, code in ended.items():
            said = self.beats[rank].code if rank in self.beats else None
            self._codes[rank] = code if said is None else said
        if insists(requests):
            return End(128 + requests[-1], "ended at once")
        if requests:
            return self._leave()
        return self._failure() or self._launcher_end() or self._hang()

    def _read(self) -> None:
        """A file that another process wrote, in an earlier attempt, counts as none; process ids may come again."""
        now = time.monotonic()
        paused, self._looked = now - self._looked > PAUSED_SECONDS, now
        for rank in self.ranks.numbers:
            beat, mark = read_beat(self._folder, rank) or (None, None)
            if beat and beat.pid == self.ranks.pids.get(rank) and mark != self._old.get(rank):
                self.beats[rank] = beat
                if beat.code not in (None, 0, LEFT):
                    self._codes.setdefault(rank, beat.code)  # its end may have to wait for a save
            else:
                mark = None
            if paused or rank not in self._since or mark != self._marks[rank]:
                self._marks[rank], self._since[rank] = mark, now

    def _leave(self) -> End | None:
        """Ask every rank once, and wait until all have left or their time is over."""
        now = time.monotonic()
        self._asked_at = self._asked_at or now
        if len(self.ranks.pids) == len(self.ranks.numbers):
            self.ranks.launcher.kill()  # whoever was asked with us: it would give its ranks half a minute
        for rank, pid in self.ranks.running().items():
            if rank not in self._told:
                self._told.add(rank)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        codes = set(self._codes.values())
        if not self.ranks.running() and self.ranks.launcher.poll() is not None:
            if codes == {0}:
                return End(0)
            if MISTAKE in codes:
                return End(MISTAKE)
            return End(LEFT, "" if LEFT in codes else "the ranks ended before they could save")
        if now - self._asked_at > self.grace:
            return End(LEFT, f"the ranks did not leave within {self.grace:g} s and were killed")
        return None

    def _failure(self) -> End | None:
        failed = {rank: code for rank, code in self._codes.items() if code not in (0, LEFT)}
        if MISTAKE in failed.values():
            return End(MISTAKE)
        # Who lost another one has only seen the failure.
        first = [rank for rank, code in failed.items() if code != LOST_PEER] or list(failed)
        if not first:
            return None
        what = "; ".join(self._describe(rank, failed[rank]) for rank in first)
        return End(None, what, tuple(first), time.monotonic())

    def _describe(self, rank: int, code: int | None) -> str:
        if code is None:
            return f"rank {rank} went away"
        if code < 0:
            return f"rank {rank} was killed by {signal.Signals(-code).name}"
        if code == LOST_PEER:
            return f"rank {rank} lost touch with the others"
        error = self.beats[rank].error if rank in self.beats else ""
        return f"rank {rank} failed ({error or f'code {code}'})"

    def _launcher_end(self) -> End | None:
        code = self.ranks.launcher.poll()
        if code is None:
            return None
        if len(self._codes) == len(self.ranks.numbers):
            return End(LEFT if LEFT in self._codes.values() else 0)  # any other is a failure
        if not self._codes and code in (MISTAKE, LEFT):  # too early a rank's end to be seen
            return End(code)
        return End(None, f"the launcher ended (code {code})", (), time.monotonic())

    def _hang(self) -> End | None:
        now = time.monotonic()
        silent = {
            rank: now - since
            for rank, since in self._since.items()
            if rank not in self._codes and now - since > self._limit(rank)
        }
        if not silent:
            return None
        said = {self.beats[rank].code if rank in self.beats else None for rank in silent}
        if said <= {0, LEFT} and len(silent) + len(self._codes) == len(self.ranks.numbers):
            return End(LEFT if LEFT in said else 0)  # they only could not end
        stopped = [rank for rank in silent if self._is_stopped(rank)]
        ranks = stopped or list(silent)
        state = "stopped" if stopped else "without a sign of life"
        names = ", ".join(map(str, ranks))
        seconds = max(silent[rank] for rank in ranks)
        return End(None, f"rank {names} {state} for {seconds:.0f} s", tuple(ranks), now - seconds)

    def _limit(self, rank: int) -> float:
        """Seconds that the rank may be silent."""
        return SILENT_SECONDS if self._is_stopped(rank) else patience(self.beats.get(rank))

    def _is_stopped(self, rank: int) -> bool:
        return rank in self.ranks.pids and is_stopped(self.ranks.pids[rank])


class Supervisor:
    """Starts a run again until it is done, asked to leave, given up, or has a mistake that only a person mends."""

    def __init__(self, start: Callable[[bool], subprocess.Popen], folder: Path, nodes: Nodes, settings: Supervision):
        """`start(resume)` starts this machine's launcher of the run in `folder`, as the leader of a process group.

        On several machines each has a supervisor, for its own ranks: a failure on one is seen by all.
        """
        self.start, self.folder, self.nodes, self.settings = start, folder, nodes, settings
        self._failed_at: float | None = None  # when the run was last seen to stand still, until it has gone on

    def run(self, resume: bool) -> int:
        """The exit code to end with: 0 done, MISTAKE, LEFT, 1 given up, or 128 + the number of a second signal."""
        failures, early, furthest = 0, 0, 0
        with hearing(lambda _: None) as requests:
            while True:
                end, attempt = self._attempt(resume, requests)
                if end.code is not None:
                    return self._finish(end)
                failures = 1 if attempt.step > furthest else failures + 1
                early = 0 if attempt.has_stepped else early + 1
                furthest = max(attempt.step, furthest)
                if failures > self.settings.restarts:
                    return self._give_up(failures)
                # What fails as it starts may want something that others hold; what has run starts again at once.
                if not self._pause(min(2.0 ** max(early - 1, 0), LONGEST_DELAY), requests):
                    return self._finish(End(LEFT, "nothing was running"))
                resume = (self.folder / RECIPE).exists()  # it may have ended before it had begun

    def _attempt(self, resume: bool, requests: Sequence[int]) -> tuple[End, Attempt]:
        with Ranks(self.start(resume), self.nodes.ranks) as ranks:
            attempt = Attempt(ranks, self.folder / RANKS, self.settings.grace)
            try:
                while (end := attempt.look(requests)) is None:
                    if self._failed_at is not None and attempt.has_stepped:
                        self._tell_recovered(attempt.step)
                if end.code is None:
                    self._tell_failure(end, attempt)
            finally:
                ranks.kill()
        if (
            len(self.nodes.slots) == 1
        ):  # or the next attempt would wait for them for ever; elsewhere others may hold them
            clear_orphaned_locks(extension_root(), attempt.started)
        return end, attempt

    def _pause(self, seconds: float, requests: Sequence[int]) -> bool:
        """Let time pass; False if we are asked to leave meanwhile."""
        _say(f"starting again in {seconds:g} s")
        until = time.monotonic() + seconds
        while not requests and time.monotonic() < until:
            time.sleep(LOOK_SECONDS / 5)
        return not requests

    def _tell_failure(self, end: End, attempt: Attempt) -> None:
        if self._failed_at is None:
            self._failed_at = end.since
        name = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder = self.folder / INCIDENTS / name
        phases = {beat.phase for beat in attempt.beats.values()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            running = attempt.ranks.running()
            record_stacks(folder, self.folder / RANKS, self.nodes.ranks, running, attempt.beats)
            where = f"stacks in {folder}"
        except OSError as error:
            where = f"no stacks ({error})"
        phase = "/".join(sorted(phases)) or "starting"
        place = "as it started" if phases <= {"starting", "loading"} else f"at step {attempt.step} ({phase})"
        silent = f"; {', '.join(names)} not reached at port {SSH_PORT}" if (names := self.nodes.silent()) else ""
        _say(f"{end.what}, {place}{silent}; {where}")
        facts = {"what": end.what, "ranks": end.ranks, "unreachable": names, "phase": phase}
        self._record("failed", attempt.step, **facts, stacks=f"{INCIDENTS}/{name}")

    def _tell_recovered(self, step: int) -> None:
        assert self._failed_at is not None
        seconds, self._failed_at = time.monotonic() - self._failed_at, None
        _say(f"goes on at step {step}, {seconds:.0f} s after it stood still")
        self._record("recovered", step, downtime_seconds=round(seconds, 3))

    def _give_up(self, failures: int) -> int:
        if self.settings.restarts:
            _say(f"given up: {failures} failures without a step more than before; see {self.folder / INCIDENTS}")
        self._record("given up", None, failures=failures)
        return 1

    def _finish(self, end: End) -> int:
        """Say what the ranks could not."""
        assert end.code is not None
        if end.what:
            _say(f"stopped on request: {end.what}; --resume goes on from the newest checkpoint")
        return end.code

    def _record(self, event: str, step: int | None, **facts: Any) -> None:
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "machine": self.nodes.names[self.nodes.here], "event": event, "step": step, **facts}
        with contextlib.suppress(OSError), (self.folder / f"{INCIDENTS}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever started us over ssh may be gone
        print(f"m6: {text}", file=sys.stderr, flush=True)
