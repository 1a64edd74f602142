"""`m6 watch`: what it says of a run's folder, and that it lives on a terminal and leaves on Ctrl-C."""

import functools
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from dataclasses import replace as changed
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.watch import Watcher, bar, fitted, seconds_left, state, view, watch
from tests.training.fake_run import make_load, make_recipe, make_run, make_samples, rest_of
from training.errors import LEFT, MISTAKE, UserError
from training.files import replace
from training.heartbeat import Beat, pid_namespace
from training.records import write_json
from training.run import PLAN, RANKS

METRICS = {"step_seconds": {"value": 2.2, "low": 2.0, "high": 2.4}}


def beat(**changes: object) -> Beat:
    values = {"pid": 7, "host": "node1", "started": 0.0, "time": 0.0, "phase": "training", "step": 400, "first_step": 0}
    return Beat(**values | {"usual_seconds": 1.0} | changes)


def tell(run: Path, *beats: Beat, ago: float = 0.0) -> None:
    for rank, one in enumerate(beats):
        (run / RANKS).mkdir(exist_ok=True)
        path = run / RANKS / f"{rank}.json"
        write_json(path, asdict(one))
        os.utime(path, (time.time() - ago,) * 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = make_recipe(steps=400, tracking={"wandb": "disabled", "log_every": 5})
    return make_run(tmp_path_factory.mktemp("made") / "quick", recipe, make_load(), make_samples())


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / made.name)


def shown(run: Path, width: int = 120, height: int = 0) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(view(Watcher(run).look(), width, height))
    return captured.get()


def test_it_shows_where_the_run_is_beside_its_plan_its_experts_and_what_happened(run: Path) -> None:
    write_json(run / PLAN, {"cluster": "here", "stages": [{"watts": 100.0, "metrics": METRICS}]})
    incidents = [{"event": "failed", "step": 390, "what": "rank 1 died"}, {"event": "given up", "step": None}]
    (run / "incidents.jsonl").write_text("\n".join(map(json.dumps, incidents)) + "\n{to")
    tell(run, beat(), beat())
    text = shown(run)
    assert "quick  training, 2 ranks" in text and "step 400 of 400" in text
    [step] = re.findall(r"step +([\d.]+) s +2\.2 s +([\d.]+)", text)
    assert float(step[1]) == pytest.approx(float(step[0]) / 2.2, abs=0.01)
    assert "loss: training (line), validation (points)" in text
    assert "the 6 most uneven of 8" in text and text.count("x even") == 6
    happened = [r"390  failed +rank 1 died", r"390  given up *", r"400  saved +checkpoints/step-400"]
    assert re.search(r"\n +".join(happened), text)


@pytest.mark.parametrize("width", [80, 92, 100, 120, 160, 200])
@pytest.mark.parametrize("planned", [False, True])
def test_the_chart_is_whole_beside_figures_with_and_without_a_plan(run: Path, width: int, planned: bool) -> None:
    if planned:
        write_json(run / PLAN, {"stages": [{"watts": 1.0, "metrics": METRICS}]})
    lines = shown(run, width).splitlines()
    top, bottom = (next(n for n, line in enumerate(lines) if corner in line) for corner in "┌└")
    assert lines[top].rstrip().endswith("┐") and lines[bottom].rstrip().endswith("┘") and bottom - top > 6
    left = lines[top].index("┌")
    assert all(line[left] in "│┤└┌" for line in lines[top : bottom + 1]) and "…" not in lines[top]


@pytest.mark.parametrize("width, height", [(40, 24), (60, 40), (80, 24), (80, 50), (120, 24), (120, 30), (200, 60)])
def test_it_fits_the_terminal_and_shows_the_last_event(run: Path, width: int, height: int) -> None:
    lines = shown(run, width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= height
    assert any("400  saved" in line for line in lines)


@pytest.mark.parametrize(
    "beats, ago, told",
    [
        ([], 0, "no sign of its ranks"),
        ([beat(), beat(phase="saving")], 5, "saving/training, 2 ranks"),
        ([beat(phase="evaluating")], 5, "evaluating, 1 rank"),
        ([beat()], 600, "rank 0 on node1 has been silent for 10 min 00 s (training): killed, hanging, or"),
        ([beat(usual_seconds=400.0)], 600, "training, 1 rank"),
        ([beat(phase="ended", code=0)], 600, "done"),
        ([beat(phase="ended", code=LEFT)], 600, "stopped on request, and saved"),
        ([beat(phase="ended", code=MISTAKE, error="data=x: no such folder")], 600, "ended: data=x: no such folder"),
        ([beat(phase="ended", code=1), beat(phase="ended", code=0)], 600, "ended with code 1"),
        ([beat(), beat(phase="ended", code=1, error="Error: out\nof \x1b[2Jmemory")], 5, "ended: Error: out of [2Jmem"),
        ([beat(usual_seconds=None)], 500, "training, 1 rank"),
        ([beat(phase="starting")], 1000, "starting, 1 rank"),
        ([beat(phase="ended", code=0), beat(phase="saving")], 5, "ended/saving, 2 ranks"),
        ([beat(), beat(), beat(phase="training", host="of an earlier start")], 5, "training, 2 ranks"),
    ],
)
def test_its_state_is_what_its_ranks_tell(run: Path, beats: list[Beat], ago: float, told: str) -> None:
    tell(run, *beats, ago=ago)
    assert state(Watcher(run).look()).plain.startswith(told)


def test_a_rank_that_was_killed_here_is_told_at_once(run: Path) -> None:
    """Not after minutes of silence; a process that has taken its number since is another."""
    here = psutil.Process()
    alive = beat(
        host=socket.gethostname(), pid=here.pid, started=here.create_time() + 1, usual_seconds=400.0,
        namespace=pid_namespace(),
    )  # fmt: skip
    with subprocess.Popen(["true"]) as process:
        process.wait()
    for changes, told in (
        ({}, "training"),
        ({"started": here.create_time() - 99}, "rank 0 was killed; m6 train --resume goes on where no supervisor does"),
        ({"pid": process.pid}, "rank 0 was killed"),
        ({"pid": process.pid, "host": "node1"}, "training"),
        ({"pid": process.pid, "namespace": 1}, "training"),  # of another container on this host
        ({"pid": process.pid, "phase": "ended", "code": 0}, "done"),
    ):
        tell(run, changed(alive, **changes), ago=10)
        assert state(Watcher(run).look()).plain.startswith(told)
    tell(run, changed(alive, pid=process.pid), ago=1)
    assert state(Watcher(run).look()).plain.startswith("training")


def test_time_left_is_told_while_it_trains(run: Path) -> None:
    tell(run, beat(step=400))
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("steps: 400", "steps: 500"))
    assert seconds_left(Watcher(run).look()) == pytest.approx(100 * 1.1, rel=0.1)
    tell(run, beat(phase="ended", code=LEFT))
    assert seconds_left(Watcher(run).look()) == 0


def test_a_run_that_has_only_begun_is_shown(tmp_path: Path) -> None:
    tell(tmp_path, beat(phase="starting", step=0))
    assert "starting, 1 rank" in shown(tmp_path)


def test_what_is_written_while_it_watches_is_read_on(run: Path) -> None:
    watcher, metrics = Watcher(run), run / "metrics.jsonl"
    before = len(watcher.look().lines)
    with metrics.open("a") as file:
        file.write('{"step": 401, "event": "note", "text": "一"}\n{"step": 402, "ev')
    assert [line["step"] for line in watcher.look().lines[before:]] == [401]
    with metrics.open("a") as file:
        file.write('ent": "note", "text": ""}\n')
    assert [line["step"] for line in watcher.look().lines[before:]] == [401, 402]
    replace(metrics, '{"step": 7, "event": "rolled back", "text": ""}\n')  # as a run that goes back does
    assert [line["step"] for line in watcher.look().lines] == [7]


def test_only_changes_of_a_heartbeat_count_whatever_its_clock_says(run: Path) -> None:
    tell(run, beat(), ago=3600)  # a file server whose clock is an hour behind
    watcher = Watcher(run)
    assert "silent" in state(watcher.look()).plain
    tell(run, beat(), ago=3590)
    assert state(watcher.look()).plain == "training, 1 rank"


@given(st.lists(st.floats(0, 9), min_size=1, max_size=64), st.integers(8, 64))
def test_bars_that_do_not_fit_are_means_of_neighbours(load: list[float], most: int) -> None:
    bars = fitted(load, most)
    assert len(bars) <= most and min(load) - 1e-9 <= min(bars) <= max(bars) <= max(load) + 1e-9
    assert bars == load or len(load) > most


def test_bars_grow_with_the_load() -> None:
    bars = [bar(load) for load in (0.0, 0.25, 0.6, 1.0, 1.7, 4.0, 90.0)]
    assert bars == sorted(bars) and bars[0] == "▁" and bars[-1] == "█" and bar(1.0) in "▄▅"


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        watch(str(tmp_path / "nowhere"), once=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')  # an image tokenizer's
    with pytest.raises(UserError, match="m6 train has not trained there yet"):
        watch(str(tmp_path), once=True)


@pytest.mark.timeout(60)
def test_on_a_terminal_it_lives_until_ctrl_c(run: Path) -> None:
    keyboard, terminal = pty.openpty()
    program = "from launch.cli import main; main()"
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    command = [sys.executable, "-P", "-c", program, "watch", str(run)]
    # Whoever runs the tests in the background has SIGINT ignored, which children take over.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment, preexec_fn=heard) as process:
        os.close(terminal)
        seen = b""
        for phase in ("training", "saving"):
            tell(run, beat(step=123, phase=phase))
            while phase.encode() not in seen:
                seen += os.read(keyboard, 65536)
        process.send_signal(signal.SIGINT)
        seen += rest_of(keyboard)
    os.close(keyboard)
    assert process.returncode == 0 and b"Traceback" not in seen
