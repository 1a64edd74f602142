"""What a rank's heartbeat says, and how a stop request is agreed on."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from training import heartbeat
from training.heartbeat import KNOWN_AFTER, STACKS, Heartbeat, read_beat, read_stacks
from training.stopping import StopRequest, StopRequested


@pytest.fixture(autouse=True)
def _pytests_faulthandler() -> Iterator[None]:
    """A heartbeat takes it over; afterwards it is pytest's again."""
    yield
    faulthandler.enable(sys.__stderr__)


def said(folder: Path) -> heartbeat.Beat:
    found = read_beat(folder, 0)
    assert found is not None
    return found[0]


def test_it_tells_phase_step_and_what_is_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.0)
    own = Heartbeat()
    own.enter("starting")  # nobody listens yet
    assert read_beat(tmp_path, 0) is None
    own.open(tmp_path, 0)
    assert (said(tmp_path).phase, said(tmp_path).pid) == ("starting", os.getpid())
    own.begin(5)
    for step in range(6, 6 + KNOWN_AFTER):
        assert said(tmp_path).usual_seconds is None
        time.sleep(0.02)
        own.beat(step)
    beat = said(tmp_path)
    assert (beat.phase, beat.step, beat.first_step) == ("training", 5 + KNOWN_AFTER, 5)
    assert beat.usual_seconds is not None and 0.02 <= beat.usual_seconds < 1
    with own.during("evaluating"):
        assert (said(tmp_path).phase, said(tmp_path).usual_seconds) == ("evaluating", None)
    assert said(tmp_path).phase == "training"
    own.error = "ValueError: seven"
    own.end(1)
    assert (said(tmp_path).phase, said(tmp_path).code, said(tmp_path).error) == ("ended", 1, "ValueError: seven")


def test_the_optimizers_share_of_a_step_is_usual_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many micro-batches a step has, and also where an evaluation comes right after it."""
    now = 0.0
    monkeypatch.setattr(heartbeat, "time", types.SimpleNamespace(monotonic=lambda: now, time=lambda: now))
    own = Heartbeat()
    own.open(tmp_path, 0)
    own.begin(0)
    for step in range(KNOWN_AFTER):
        for _ in range(150):  # after each of its micro-batches but the last, which the optimizer's step follows
            assert said(tmp_path).usual_seconds is None
            now += 1
            own.beat(step)
        now += 60
        with own.during("evaluating"):
            now += 500
        own.beat(step + 1)
    own.enter("training")
    assert said(tmp_path).usual_seconds == 60


def test_who_waits_for_a_long_write_gets_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.0)
    own = Heartbeat()
    own.open(tmp_path, 0)
    own.begin(0)
    before = read_beat(tmp_path, 0)
    time.sleep(0.02)
    own.get_on()  # in the background, while the rank itself may hang
    assert read_beat(tmp_path, 0) == before
    with own.during("saving"):
        before = read_beat(tmp_path, 0)
        time.sleep(0.02)
        own.get_on()
        assert read_beat(tmp_path, 0) != before


def test_beats_are_written_no_oftener_than_needed_and_are_cheap(tmp_path: Path) -> None:
    own = Heartbeat()
    own.open(tmp_path, 0)
    own.begin(0)
    before, start = read_beat(tmp_path, 0), time.perf_counter()
    for step in range(1000):
        own.beat(step)
    seconds = time.perf_counter() - start
    assert seconds < 0.1 and read_beat(tmp_path, 0) == before


def test_a_full_disk_stops_neither_the_rank_nor_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Heartbeat()
    own.open(tmp_path, 0)
    beat, written = read_beat(tmp_path, 0) or (None, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeat, "write_json", full)
    time.sleep(0.02)
    own.begin(3)
    assert read_beat(tmp_path, 0) == (beat, read_beat(tmp_path, 0)[1]) and read_beat(tmp_path, 0)[1] > written


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_what_is_no_beat_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "0.json").write_text(text)
    assert read_beat(tmp_path, 0) is None


BUSY = """
import sys
from pathlib import Path
from training.heartbeat import Heartbeat
own = Heartbeat()
own.open(Path(sys.argv[1]), 0)
def busy_in_c():
    sum(range(10**12))
busy_in_c()
"""


def test_stacks_can_be_had_while_c_code_runs(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(tmp_path)])
    try:
        deadline = time.monotonic() + 30
        while read_beat(tmp_path, 0) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # until it is in C
        process.send_signal(STACKS)
        while "busy_in_c" not in read_stacks(tmp_path, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "busy_in_c" in read_stacks(tmp_path, 0)
        assert process.poll() is None
        process.send_signal(signal.SIGSEGV)
        process.wait(timeout=30)
        assert "Segmentation fault" in read_stacks(tmp_path, 0)
    finally:
        process.kill()


def leave_together() -> int:
    """Checks until the ranks agree, where only rank 1 is asked, before its third check."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    request = StopRequest()
    request.begin()
    checks = 0
    while True:
        if dist.get_rank() and checks == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            request.check()
        except StopRequested:
            return checks
        checks += 1


def test_one_rank_that_is_asked_makes_all_leave_at_the_same_check() -> None:
    assert run_ranks(2, leave_together) == [2, 2]


LISTENS = """
import signal, sys, time
import torch.distributed as dist
from training import stopping
stopping.ONE_REQUEST_SECONDS = 0.5
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background
request = stopping.StopRequest()
if sys.argv[1] == "running":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.begin()
try:
    print("ready", flush=True)
    time.sleep(20)
except stopping.StopRequested:
    sys.exit(75)
"""


@pytest.mark.parametrize(
    ("state", "number", "pauses", "code"),
    [
        ("starting", signal.SIGTERM, [0.0], 75),
        ("running", signal.SIGINT, [0.1, 1.0, 0.0], -signal.SIGINT),
        ("running", signal.SIGTERM, [0.1, 1.0, 1.0], -signal.SIGKILL),
    ],
)
def test_a_request_ends_a_start_at_once_and_a_second_interrupt_anything(
    state: str, number: signal.Signals, pauses: list[float], code: int
) -> None:
    process = subprocess.Popen([sys.executable, "-c", LISTENS, state], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for pause in pauses:
        assert process.poll() is None
        process.send_signal(number)
        time.sleep(pause)
    if code == -signal.SIGKILL:
        assert process.poll() is None  # it is still saving
        process.kill()
    assert process.wait(timeout=30) == code
