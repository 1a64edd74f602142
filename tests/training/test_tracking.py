import errno
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.training.fake_run import FACTS, learn, make_recipe, make_record, rest_of, written
from training.records import clean, read_json, read_lines, summarise
from training.screen import TimeLeft, duration, fact
from training.tracking import DROPPED, Tracker

pytestmark = pytest.mark.usefixtures("no_account")

RECIPE = make_recipe(steps=40, evaluation={"every": 20})


def test_the_window_is_summarised_by_the_stated_rule() -> None:
    slow = {"step": 1, "tokens": 10, "lr": 0.1, "loss": 4.0, "step_seconds": 3.0, "tokens_per_second": 10.0}
    fast = {"step": 2, "tokens": 20, "lr": 0.2, "loss": 2.0, "step_seconds": 1.0, "tokens_per_second": 30.0}
    slow |= {"memory/host_bytes": 9, "loss/poem": 6.0, "flops_utilization": None, "energy/source": "modelled"}
    fast |= {"memory/host_bytes": 7, "loss/caption": 1.0, "flops_utilization": None, "energy/source": "modelled"}
    assert summarise([slow, fast]) == {
        "step": 2,
        "tokens": 20,
        "lr": 0.2,
        "loss": 3.0,
        "step_seconds": 2.0,
        "tokens_per_second": 15.0,  # 60 tokens in 4 seconds
        "memory/host_bytes": 9,
        "loss/poem": 6.0,
        "loss/caption": 1.0,
        "flops_utilization": None,
        "energy/source": "modelled",
    }


def test_what_is_not_finite_is_null_and_not_averaged_away(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", RECIPE, FACTS) as tracker:
        for step in range(1, 11):
            tracker.step(make_record(step) | {"loss": math.nan if step == 5 else 2.0, "grad_norm": math.inf})
    line = written(tmp_path / "run")[-1]
    assert line["loss"] is None and line["grad_norm"] is None
    assert clean({"a": -math.inf, "b": 1.5, "c": "text"}) == {"a": None, "b": 1.5, "c": "text"}


def test_the_first_each_tenth_and_the_last_step_are_written(tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", make_recipe(steps=25)
    with Tracker(run, recipe, FACTS) as tracker:
        for step in range(1, 26):
            tracker.step(make_record(step))
            assert written(run)[-1]["step"] == (1 if step < 10 else 25 if step == 25 else step // 10 * 10)
        tracker.event(25, "saved", "checkpoints/步-25")
        tracker.close({"loss": 2.0, "energy": math.nan})
    assert [line["step"] for line in written(run)] == [1, 10, 20, 25, 25]
    assert written(run)[-1] == {"step": 25, "event": "saved", "text": "checkpoints/步-25"}
    about = read_json(run / "run.json", None)
    assert about["facts"] == FACTS and about["summary"] == {"loss": 2.0, "energy": None}


def test_a_crashed_and_resumed_run_writes_the_same_lines(tmp_path: Path) -> None:
    with Tracker(tmp_path / "whole", RECIPE, FACTS) as tracker:
        learn(tracker, 1, 40)

    run = tmp_path / "crashed"
    with pytest.raises(KeyboardInterrupt), Tracker(run, RECIPE, FACTS) as tracker:
        learn(tracker, 1, 23)
        checkpoint = json.loads(json.dumps(tracker.state()))  # as the checkpoint's manifest holds it
        learn(tracker, 24, 37)
        raise KeyboardInterrupt
    with (run / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 38, "lo')

    with Tracker(run, RECIPE, FACTS, 23, checkpoint) as tracker:
        assert tracker.state() == checkpoint
        learn(tracker, 24, 40)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_run_from_step_0_starts_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        with Tracker(tmp_path, RECIPE, FACTS) as tracker:
            tracker.evaluation(0, {"loss/validation/caption": 9.0})
            learn(tracker, 1, 20)
    assert [line["step"] for line in written(tmp_path)] == [0, 1, 10, 20, 20]


def test_going_back_drops_the_lines_of_the_steps_that_were_given_up(tmp_path: Path) -> None:
    recipe = make_recipe(steps=40, evaluation={"every": 20}, tracking={"wandb": "disabled", "log_every": 4})
    with Tracker(tmp_path / "run", recipe, FACTS) as tracker:
        learn(tracker, 1, 22)
        state = json.loads(json.dumps(tracker.state()))
        learn(tracker, 23, 30)
        tracker.go_back(22, state)
        tracker.event(22, "rolled back", "for a reason")
        learn(tracker, 23, 40)
    with Tracker(tmp_path / "whole", recipe, FACTS) as tracker:
        learn(tracker, 1, 40)
    event = {"step": 22, "event": "rolled back", "text": "for a reason"}
    assert [line for line in written(tmp_path / "run") if line != event] == written(tmp_path / "whole")
    assert written(tmp_path / "run").index(event) == 7  # after the lines of the steps 1, 4, …, 20 and an evaluation


def test_a_run_that_was_saved_before_its_first_step_keeps_what_came_before(tmp_path: Path) -> None:
    with Tracker(tmp_path, RECIPE, FACTS) as tracker:
        tracker.evaluation(0, {"loss/validation/caption": 9.0})
        state = tracker.state()
    with Tracker(tmp_path, RECIPE, FACTS, 0, state) as tracker:
        learn(tracker, 1, 2)
    assert [line["step"] for line in written(tmp_path)] == [0, 1]


def test_lines_that_no_tracker_wrote_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n[]\n\xff\xfe{}\n{"loss": 1}\n\n{"step": 2}\n')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_a_caption_with_a_line_separator_is_one_line(tmp_path: Path) -> None:
    for start in (0, 5):
        with Tracker(tmp_path, RECIPE, FACTS, start) as tracker:
            tracker.event(5, "note", "一\u2028二\n三")
    assert [line["text"] for line in read_lines(tmp_path / "metrics.jsonl")] == ["一\u2028二\n三"] * 2


def test_time_left_passes_over_outliers_and_adds_the_evaluations_to_come() -> None:
    left, now = TimeLeft(steps=100, evaluate_every=10), 0.0
    assert left.seconds(0) is None
    for step in range(1, 41):
        now += 30.0 if step == 33 else 2.0  # one step waited for a save
        left.step(now, 2.0)
        if step % 10 == 0:
            left.evaluated()
            now += 5.0
    assert left.seconds(40) == pytest.approx(60 * 2.0 + 6 * 5.0)
    assert left.seconds(100) == 0


def test_time_left_when_every_step_is_evaluated() -> None:
    left = TimeLeft(steps=10, evaluate_every=1)
    for step in range(1, 6):
        left.step(step * 3.0, 1.0)
        left.evaluated()
    assert left.seconds(5) == pytest.approx(5 * 3.0)


def test_durations() -> None:
    shown = [duration(seconds) for seconds in (59.4, 59.6, 3_599, 11_100, 187_200)]
    assert shown == ["59 s", "1 min 00 s", "59 min 59 s", "3 h 05 min", "2 d 4 h"]


def test_facts_have_their_units() -> None:
    assert fact("matmul_peak_flops/rank", 93_123_123_123.4) == "93.1 GFLOP/s"
    assert [fact("host_bytes", size) for size in (0, 999, 999_999, 1_234_567)] == ["0 B", "999 B", "1 MB", "1.23 MB"]
    assert [fact("rows", 1234), fact("device", "cpu"), fact("shared", True)] == ["1,234", "cpu", "True"]


def test_without_a_terminal_there_is_a_plain_line_a_logged_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, RECIPE, FACTS) as tracker:
        learn(tracker, 1, 20)
        tracker.event(20, "saved", "checkpoints/[step-20]")
    shown = capfd.readouterr().out
    assert "parameters/total   45,600,123" in shown
    assert shown.count(f"dropped: {DROPPED}\n") == 1 and shown.index("dropped: ") < shown.index("step 1/40")
    assert re.search(r"\nstep 10/40  loss 8\.\d{3}  2,182 tokens/s  1\d\.\d% dropped  \d s left\n", shown)
    lacking = "the corpus has nothing in its validation split for denoise, image_denoise, poem, review"
    assert f"step 20: validation loss caption 4.500; {lacking}\n" in shown
    assert shown.endswith("step 20: saved: checkpoints/[step-20]\n") and "\x1b" not in shown


def test_what_was_evaluated_is_told_and_what_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(steps=40, tasks={"caption": 1.0, "poem": 1.0})
    with Tracker(tmp_path, recipe, FACTS) as tracker:
        tracker.evaluation(10, {"loss/validation/caption": 4.5, "loss/validation/poem": 5.0})
        tracker.evaluation(20, {})
    shown = capfd.readouterr().out
    assert "step 10: validation loss caption 4.500, poem 5.000\n" in shown
    assert "step 20: the corpus has nothing in its validation split for caption, poem\n" in shown


def test_of_a_dense_model_nothing_is_dropped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, make_recipe(model="m6-base"), {}):
        assert "dropped" not in capfd.readouterr().out


def test_on_a_terminal_there_is_one_live_line_which_an_error_ends(tmp_path: Path) -> None:
    program = (
        "import sys; from tests.training.fake_run import *\n"
        "RECIPE = make_recipe(steps=40, evaluation={'every': 20})\n"
        "with Tracker(Path(sys.argv[1]), RECIPE, FACTS) as tracker:\n"
        "    learn(tracker, 1, 30); raise SystemExit(3)\n"
    )
    keyboard, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = rest_of(keyboard)
    os.close(keyboard)
    text = shown.decode()
    assert process.returncode == 3
    assert "step 20: validation loss" in text and "step 20/40" not in text
    assert "30/40" in text and "left" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, RECIPE, FACTS) as tracker:
        room, tracker._metrics = tracker._metrics, SimpleNamespace(write=full, flush=full, close=full)
        learn(tracker, 1, 20)
        tracker._metrics = room
        learn(tracker, 21, 40)
    said = [line for line in capfd.readouterr().out.splitlines() if "No space left" in line]
    assert said == ["metrics cannot be written (No space left on device): training goes on, make room"]
    assert written(tmp_path)[-1]["step"] == 40
