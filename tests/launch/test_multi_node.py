"""Training on several machines, which are network namespaces of this one; `benchmarks.launching` has more ways."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import launching
from benchmarks.machines import Machines, machines
from tests.marks import MACHINES
from training import checkpoint_files, heartbeat
from training.data.corpus import Corpus
from training.run import RANKS

pytestmark = pytest.mark.timeout(600)
ENDLESS = ("steps=100000", "save_every=100000")

# `m6` with a supervisor whose patience of minutes is cut to seconds.
IMPATIENT = """
from launch import supervisor
supervisor.SILENT_SECONDS = 6.0
from launch.cli import main
main()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with machines(2, tmp_path_factory.mktemp("machines")) as made:
        yield made


@pytest.fixture(scope="module")
def alone(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run on one machine with two ranks."""
    folder = tmp_path_factory.mktemp("alone")
    launching.finish(launching.Start([train(sample_corpus, "steps=4")], {}).processes(folder))
    return launching.losses(folder)


def train(corpus: Corpus, *arguments: str) -> list[str]:
    return launching.training(corpus.folder.parent, *arguments)


def wait_for(what: Callable[[], Any], processes: Sequence[subprocess.Popen[str]], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about in time"
        assert all(process.poll() is None for process in processes), [one.communicate()[1] for one in processes]
        time.sleep(0.1)


def end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """The ranks, too, which are in sessions of their own."""
    for process in processes:
        if process.poll() is None:
            for member in (*psutil.Process(process.pid).children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


@MACHINES
def test_two_machines_train_as_one_and_leave_when_the_first_is_asked(
    two: Machines, alone: list[float], sample_corpus: Corpus, tmp_path: Path
) -> None:
    started = launching.by_pdsh(tmp_path, train(sample_corpus, *ENDLESS), two).processes(tmp_path)
    try:
        wait_for(lambda: len(launching.losses(tmp_path)) >= 4, started)
        started[0].send_signal(signal.SIGTERM)
        said = started[0].communicate(timeout=60)[1]
    finally:
        end(started)
    assert started[0].returncode == 75, said
    assert launching.losses(tmp_path)[:4] == alone
    [step] = checkpoint_files.steps(tmp_path / "runs" / "run" / "checkpoints")
    assert f"stopped on request at step {step}, saved; go on with --resume" in said


@MACHINES
def test_a_machine_that_was_never_there_is_named_and_the_others_are_let_go(
    two: Machines, sample_corpus: Corpus, tmp_path: Path
) -> None:
    start = launching.by_pdsh(tmp_path, train(sample_corpus, *ENDLESS), two)
    launching.hostfile([two.addresses[0], "10.77.0.9"], tmp_path)
    started = start.processes(tmp_path)
    said = started[0].communicate(timeout=120)[1]
    assert started[0].returncode == 255 and "m6: 10.77.0.9: ended with code 255" in said
    assert not any("--node-rank" in (one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))


def known(folder: Path) -> bool:
    """Whether both ranks' heartbeats say what is usual: before that, they have minutes for a step."""
    beats = [heartbeat.read_beat(folder / "runs" / "run" / RANKS, rank) for rank in range(2)]
    return all(beat and beat[0].usual_seconds is not None for beat in beats)


def impatient(start: launching.Start) -> launching.Start:
    words = [[IMPATIENT if word.startswith("from launch") else word for word in own] for own in start.words]
    return launching.Start(words, start.environment)


@MACHINES
def test_a_machine_that_is_cut_off_ends_the_run_and_is_named(
    two: Machines, sample_corpus: Corpus, tmp_path: Path
) -> None:
    started = impatient(launching.by_hand(tmp_path, train(sample_corpus, *ENDLESS), two)).processes(tmp_path)
    try:
        wait_for(lambda: known(tmp_path), started)
        two.cut_off(1)
        errors = [process.communicate(timeout=60)[1] for process in started]
    finally:
        two.plug_in(1)
        end(started)
    assert [process.returncode for process in started] == [1, 1]
    for number, said in enumerate(errors):
        other = two.addresses[1 - number]
        assert (
            f"m6: rank {number} without a sign of life for " in said and f"; {other} not reached at port 22; " in said
        )


@MACHINES
def test_a_supervised_run_goes_on_once_the_machine_is_back(
    two: Machines, sample_corpus: Corpus, tmp_path: Path
) -> None:
    words = train(sample_corpus, "steps=100000", "save_every=2", "--supervise")
    started = impatient(launching.by_hand(tmp_path, words, two)).processes(tmp_path)
    run = tmp_path / "runs" / "run"
    try:
        wait_for(lambda: checkpoint_files.steps(run / "checkpoints") and known(tmp_path), started)
        two.cut_off(1)
        wait_for(lambda: events(run).count("failed") == 2, started)
        two.plug_in(1)
        wait_for(lambda: events(run).count("recovered") == 2, started, 180)
        for process in started:
            process.send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in started]
    finally:
        two.plug_in(1)
        end(started)
    assert [process.returncode for process in started] == [75, 75], errors


def events(run: Path) -> list[str]:
    path = run / "incidents.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []


def test_under_slurm_it_trains_the_same_saves_when_told_and_goes_on_when_requeued(
    alone: list[float], sample_corpus: Corpus, tmp_path: Path
) -> None:
    started = launching.by_slurm(tmp_path, train(sample_corpus, *ENDLESS)).processes(tmp_path)
    try:
        wait_for(lambda: len(launching.losses(tmp_path)) >= 4, started)
        for process in psutil.Process(started[0].pid).children(recursive=True):
            if "--node-rank" in process.cmdline() and "train" in process.cmdline():
                process.send_signal(signal.SIGUSR1)
        errors = started[0].communicate(timeout=60)[1]
    finally:
        end(started)
    assert (started[0].returncode, (tmp_path / "asked").read_text()) == (75, "requeue 7\n"), errors
    [step] = checkpoint_files.steps(tmp_path / "runs" / "run" / "checkpoints")
    launching.finish(launching.by_slurm(tmp_path, train(sample_corpus, f"steps={step + 1}")).processes(tmp_path))
    assert launching.losses(tmp_path)[:4] == alone and len(launching.losses(tmp_path)) == step + 1
