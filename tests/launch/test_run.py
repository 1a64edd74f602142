"""`m6 train`: what the ranks are given, and how they end."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.nodes import Place, one_machine
from launch.run import TrainingRun, gpu_numbers, launch, launcher_command, rank_environment
from training.errors import UserError
from training.machine import usable_cores

ROOT = Path(__file__).resolve().parents[2]

# `m6 train` from its command on, with the stand-in for the training program.
PROGRAM = """
import os, signal, subprocess, sys
from pathlib import Path
from launch.nodes import one_machine
from launch.run import TrainingRun, attend, explain, launcher_command, rank_environment

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
ranks, folder, ending = int(sys.argv[1]), sys.argv[2], sys.argv[3]
run = TrainingRun(Path("r.yaml"), ("a.b=1", folder, ending), "n")
command = launcher_command(["tests.launch.rank_program", *run.arguments()], one_machine(ranks), [])
environment = rank_environment(os.environ, ranks, on_gpu=False)
launcher = subprocess.Popen(command, env=environment, start_new_session=True)
sys.exit(explain(*attend(launcher, range(ranks), Path(folder, "beats"))))
"""


def start(ranks: int, folder: Path, ending: str, before: Callable[[], Any] | None = None) -> subprocess.Popen:
    settings = {"OMP_NUM_THREADS", "GLIBC_TUNABLES", "DS_ACCELERATOR", "M6_DEBUG"}
    environment = {key: value for key, value in os.environ.items() if key not in settings}
    command = [sys.executable, "-c", PROGRAM, str(ranks), str(folder), ending]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before
    )


def facts_of(folder: Path, ranks: int) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "ending", "code"), [(1, "mistake", 2), (2, "done", 0)])
def test_ranks_get_what_they_need_and_their_code_comes_back(ranks, ending, code, tmp_path):
    process = start(ranks, tmp_path, ending)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert (output, errors) == ("", "")  # none of the launcher's own chatter; ranks tell their mistakes
    for rank, facts in enumerate(facts_of(tmp_path, ranks)):
        assert facts["arguments"] == ["--recipe", "r.yaml", "--name", "n", "a.b=1"]
        environment = facts["environment"]
        assert environment["RANK"] == str(rank) and environment["WORLD_SIZE"] == str(ranks)
        assert environment["DS_ACCELERATOR"] == "cpu" and environment["PYTHONUNBUFFERED"] == "1"
        assert environment["OMP_NUM_THREADS"] == str(max(1, usable_cores() // ranks))
        assert "glibc.malloc.trim_threshold=" in environment["GLIBC_TUNABLES"]


def test_killed_rank_is_named_and_the_others_end(tmp_path):
    process = start(2, tmp_path, "killed")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1] == "m6: rank 1 was killed by SIGKILL; most likely memory ran out"
    assert not any(psutil.pid_exists(facts["pid"]) for facts in facts_of(tmp_path, 2))


def test_a_rank_that_fails_after_another_ended_well_is_the_one_named(tmp_path):
    process = start(2, tmp_path, "fails")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "m6: rank 1 failed (code 7); its own message is above\n"


def test_hang_up_is_ignored_where_it_was(tmp_path):
    """As `nohup` wants it."""
    process = start(1, tmp_path, "soon", before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    deadline = time.monotonic() + 60
    while not (tmp_path / "0.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", "")


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGINT, False), (signal.SIGUSR1, False), (signal.SIGTERM, True), (signal.SIGUSR1, True)],
)
def test_a_request_lets_the_ranks_save_and_ends_everything(tmp_path, number, to_all):
    """`to_all`: also the launcher and the ranks, as systemd and some batch systems have it."""
    process = start(2, tmp_path, "wait")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # until the ranks listen
    launcher_and_ranks = psutil.Process(process.pid).children(recursive=True) if to_all else []
    for each in (psutil.Process(process.pid), *launcher_and_ranks):
        each.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (75, "", "")  # the ranks tell it
    assert len(list(tmp_path.glob("*.saved"))) == 2
    pids = [facts["pid"] for facts in facts_of(tmp_path, 2)]
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_command_of_two_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,6")
    resumed = TrainingRun(Path("r.yaml"), data=Path("d"), resume=True, allow_change=("k",))
    command = launcher_command(["training.train", *resumed.arguments()], one_machine(2), gpu_numbers(3))
    [machines] = [word.partition("=")[2] for word in command if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(machines)) == {"127.0.0.1": [3, 5]}
    assert command[command.index("--module") + 1 :] == [
        *("training.train", "--recipe", "r.yaml", "--name", "run", "--data", "d", "--resume", "--allow-change", "k")
    ]


def test_gpus_named_otherwise_than_by_number_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3c")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=GPU-8f3c"):
        gpu_numbers(1)


def test_what_the_user_set_is_kept():
    base = {"OMP_NUM_THREADS": "7", "GLIBC_TUNABLES": "glibc.malloc.check=1", "PATH": "/bin"}
    environment = rank_environment(base, 2, on_gpu=True)
    assert environment | base == environment | {"PATH": "/bin"}
    assert environment["PATH"].split(":") == [str(Path(sys.executable).parent), "/bin"]
    assert "DS_ACCELERATOR" not in environment


def test_threads_that_come_and_go_leave_no_memory_behind(tmp_path):
    """As a save's do. Of 30 threads that held 48 MB each, one after the other, one's worth may stay."""
    program = (
        "import psutil, threading\n"
        "def use():\n    blocks = [bytearray(b'x' * 2**20) for _ in range(48)]\n"
        "def turn():\n    thread = threading.Thread(target=use); thread.start(); thread.join()\n"
        "turn(); before = psutil.Process().memory_info().rss\n"
        "held = [threading.Event() for _ in range(30)]\n"
        "waiting = [threading.Thread(target=lambda event=event: (use(), event.wait())) for event in held]\n"
        "for thread in waiting: thread.start()\n"
        "for event, thread in zip(held, waiting): event.set(); thread.join()\n"
        "print(psutil.Process().memory_info().rss - before)\n"
    )
    grown = subprocess.run(
        [sys.executable, "-c", program], env=rank_environment(os.environ, 2, on_gpu=False), capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    assert int(grown.stdout) < 200e6


def test_wrong_recipe_is_told_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        launch(TrainingRun(tmp_path / "nowhere.yaml"), Place(2))


def test_drawing_without_codes_is_told_before_anything_starts(tmp_path):
    run = TrainingRun(Path("launch/recipes/quickstart.yaml"), ("tasks.draw=1",), "drawing", tmp_path)
    with pytest.raises(UserError, match=r"tasks\.draw: needs pictures as codes: image_tokenizer=FOLDER"):
        launch(run, Place(2), dry_run=True)
