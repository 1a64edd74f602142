"""`m6 train --supervise`: what it notices, what it leaves behind, when it starts again and how it ends.

Real processes with real heartbeats; only the training itself is left out, but for the last test.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import supervisor
from launch.processes import Ranks
from training.errors import UserError
from training.heartbeat import Beat
from training.records import write_json

ROOT = Path(__file__).resolve().parents[2]

# The supervisor in a process of its own, with its patience of minutes cut to seconds.
PROGRAM = """
import signal, subprocess, sys
from pathlib import Path
from launch import processes, supervisor
from launch.nodes import one_machine

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background

processes.ONE_REQUEST_SECONDS = 0.5
supervisor.SILENT_SECONDS, supervisor.FIRST_STEPS_SECONDS, supervisor.LONGEST_DELAY = 2.0, 3.0, 0.1
folder, ending = Path(sys.argv[1]), sys.argv[2]

def start(resume):
    command = [sys.executable, "-m", "tests.launch.stub_run", str(folder), ending, *(["--resume"] if resume else [])]
    return subprocess.Popen(command, start_new_session=True)

sys.exit(supervisor.Supervisor(start, folder, one_machine(2), supervisor.Supervision(restarts=2, grace=2)).run(False))
"""


def start(folder: Path, ending: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    command = [sys.executable, "-c", PROGRAM, str(folder), ending]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def supervise(folder: Path, ending: str) -> tuple[int, list[str]]:
    process = start(folder, ending)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors.splitlines()


def attempts(folder: Path) -> list[str]:
    return (folder / "attempts").read_text().splitlines()


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


def stacks(folder: Path) -> list[str]:
    [incident] = (folder / "incidents").iterdir()
    return [(incident / f"rank-{rank}.txt").read_text() for rank in range(2)]


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)
    return found


def test_a_killed_rank_is_named_its_peers_stack_kept_and_the_run_goes_on(tmp_path: Path) -> None:
    code, lines = supervise(tmp_path, "crash")
    assert code == 0
    assert attempts(tmp_path) == ["crash", "crash --resume"]
    assert lines[0].startswith("m6: rank 1 was killed by SIGKILL, at step ")
    assert lines[1] == "m6: starting again in 0.1 s" and lines[2].startswith("m6: goes on at step ")
    failed, recovered = events(tmp_path)
    assert (failed["event"], failed["what"], failed["ranks"]) == ("failed", "rank 1 was killed by SIGKILL", [1])
    assert recovered["event"] == "recovered" and 0 < recovered["downtime_seconds"] < 10
    peer, killed = stacks(tmp_path)
    assert "stub_run.py" in peer and "had ended" in killed


def test_a_failed_rank_is_told_with_its_error(tmp_path: Path) -> None:
    code, lines = supervise(tmp_path, "error")
    assert code == 0
    assert lines[0].startswith("m6: rank 1 failed (ValueError: seven), at step ")


def test_a_hang_is_noticed_and_every_stack_recorded(tmp_path: Path) -> None:
    code, lines = supervise(tmp_path, "hang")
    assert code == 0
    assert lines[0].startswith("m6: rank 0, 1 without a sign of life for 2 s, at step ")
    assert all("stuck_in_a_collective" in stack for stack in stacks(tmp_path))


def test_a_stopped_rank_is_named_and_looked_into_from_outside(tmp_path: Path) -> None:
    code, lines = supervise(tmp_path, "stop")
    assert code == 0
    assert lines[0].startswith("m6: rank 1 stopped for 2 s, at step ")
    assert "It did not answer; py-spy says:" in stacks(tmp_path)[1] and "misbehave (" in stacks(tmp_path)[1]


def beat(phase: str, usual: float | None) -> Beat:
    return Beat(1, "host", 0.0, 0.0, phase, 9, 0, usual)


@pytest.mark.parametrize(
    ("beat", "stopped", "seconds"),
    [
        (None, False, supervisor.LONG_WAIT_SECONDS),
        *((beat(p, None), False, supervisor.LONG_WAIT_SECONDS) for p in ("starting", "loading", "saving", "ending")),
        (beat("training", None), False, supervisor.FIRST_STEPS_SECONDS),
        (beat("training", 1.0), False, supervisor.SILENT_SECONDS),
        (beat("training", 100.0), False, 200.0),
        (beat("evaluating", 100.0), False, 200.0),
        (beat("ended", None), False, supervisor.SILENT_SECONDS),
        (beat("saving", None), True, supervisor.SILENT_SECONDS),
    ],
)
def test_a_rank_may_be_silent_for_as_long_as_what_it_does_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beat: Beat | None, stopped: bool, seconds: float
) -> None:
    launcher = subprocess.Popen(["true"], start_new_session=True)
    attempt = supervisor.Attempt(Ranks(launcher, range(1)), tmp_path, 60)
    monkeypatch.setattr(supervisor, "is_stopped", lambda pid: stopped)
    attempt.ranks.pids[0] = 1
    if beat:
        attempt.beats[0] = beat
    assert attempt._limit(0) == seconds
    launcher.wait()


def test_a_file_of_an_earlier_start_tells_nothing_though_the_process_id_is_the_same(tmp_path: Path) -> None:
    """As in a container that was started again."""
    launcher = subprocess.Popen(["true"], start_new_session=True)
    write_json(tmp_path / "0.json", asdict(replace(beat("ended", None), code=0)))
    attempt = supervisor.Attempt(Ranks(launcher, range(1)), tmp_path, 60)
    attempt.ranks.pids[0] = 1
    attempt._read()
    assert attempt.beats == {}
    write_json(tmp_path / "0.json", asdict(replace(beat("ended", None), code=1)))
    attempt._read()
    assert attempt.beats[0].code == 1 and attempt._codes == {0: 1}
    launcher.wait()


def test_a_run_that_comes_no_further_is_given_up(tmp_path: Path) -> None:
    code, lines = supervise(tmp_path, "always")
    assert code == 1
    assert attempts(tmp_path) == ["always", *["always --resume"] * 2]
    assert lines[-1].startswith("m6: given up: 3 failures without a step more than before; see ")
    assert events(tmp_path)[-1]["event"] == "given up"


def test_a_failure_before_the_run_has_begun_starts_it_afresh(tmp_path: Path) -> None:
    code, lines = supervise(tmp_path, "early")
    assert code == 1
    assert attempts(tmp_path) == ["early"] * 3
    assert lines[0].startswith("m6: rank ") and "failed (code 1), as it started; stacks in " in lines[0]


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path: Path) -> None:
    code, lines = supervise(tmp_path, "mistake")
    assert (code, lines, attempts(tmp_path)) == (2, [], ["mistake"])
    assert not (tmp_path / "incidents").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_leave_reaches_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "wait")
    wait_for(lambda: len(list(tmp_path.glob(".ranks/*.json"))) == 2)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 75


def test_a_request_comes_through_while_the_ranks_start(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    wait_for(lambda: (tmp_path / "attempts").exists())
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert errors in ("", "m6: stopped on request: the ranks ended before they could save; --resume goes on from the "
                          "newest checkpoint\n")  # fmt: skip


@pytest.mark.parametrize(
    ("number", "pause", "code", "said"),
    [
        (signal.SIGTERM, 0.3, 75, "did not leave within 2 s and were killed"),  # a batch system repeats itself
        (signal.SIGINT, 0.3, 75, "did not leave within 2 s and were killed"),  # as does who passes a Ctrl-C on
        (signal.SIGINT, 0.8, 130, "ended at once"),
    ],
)
def test_ranks_that_do_not_leave_are_killed(
    tmp_path: Path, number: signal.Signals, pause: float, code: int, said: str
) -> None:
    process = start(tmp_path, "deaf")
    beats = wait_for(lambda: (found := list(tmp_path.glob(".ranks/*.json"))) and len(found) == 2 and found)
    pids = [json.loads(beat.read_text())["pid"] for beat in beats]
    for _ in range(2):
        process.send_signal(number)
        time.sleep(pause)
    assert said in process.communicate(timeout=60)[1] and process.returncode == code
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_where_ranks_cannot_be_watched_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under an old kernel, or in a container that forbids it."""

    def refused(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)
    rank = "import subprocess, sys; subprocess.run(['sleep', '60'], env={'RANK': '0'})"
    launcher = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True)
    refusal = pytest.raises(UserError, match=r"cannot be watched \(pidfd_open: Function not implemented\)")
    with refusal, Ranks(launcher, range(1)) as ranks:
        wait_for(lambda: ranks.wait(0.1))
    assert launcher.poll() == -signal.SIGKILL
    [pid] = ranks.pids  # killed, if not gone this very moment
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")
