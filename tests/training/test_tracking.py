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

import psutil
import pytest

from tests.training.fake_run import FACTS, make_load, make_recipe, make_record, make_samples
from training.energy import Counter, EnergyMeter
from training.errors import UserError
from training.tracking import (
    DROPPED,
    TimeLeft,
    Tracker,
    clean,
    duration,
    fact,
    read_json,
    read_lines,
    summarise,
)

RECIPE = make_recipe(steps=40, evaluation={"every": 20})


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be logged in at wandb; the tests never are."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


def train(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.step(make_record(step))
        if step % 20 == 0:
            tracker.evaluation(step, {"loss/validation/caption": 5 - step / 40})


def written(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_window_is_summarised_by_the_stated_rule() -> None:
    slow = {"step": 1, "tokens": 10, "lr": 0.1, "loss": 4.0, "step_seconds": 3.0, "tokens_per_second": 10.0}
    fast = {"step": 2, "tokens": 20, "lr": 0.2, "loss": 2.0, "step_seconds": 1.0, "tokens_per_second": 30.0}
    slow |= {"memory/host_bytes": 9, "loss/poem": 6.0, "flops_utilization": None, "energy/source": "rapl"}
    fast |= {"memory/host_bytes": 7, "loss/caption": 1.0, "flops_utilization": None, "energy/source": "rapl"}
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
        "energy/source": "rapl",
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
        train(tracker, 1, 40)

    run = tmp_path / "crashed"
    with pytest.raises(KeyboardInterrupt), Tracker(run, RECIPE, FACTS) as tracker:
        train(tracker, 1, 23)
        checkpoint = json.loads(json.dumps(tracker.state()))  # as the checkpoint's manifest holds it
        train(tracker, 24, 37)
        raise KeyboardInterrupt
    with (run / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 38, "lo')

    with Tracker(run, RECIPE, FACTS, 23, checkpoint) as tracker:
        assert tracker.state() == checkpoint
        train(tracker, 24, 40)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_run_from_step_0_starts_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        with Tracker(tmp_path, RECIPE, FACTS) as tracker:
            tracker.evaluation(0, {"loss/validation/caption": 9.0})
            train(tracker, 1, 20)
    assert [line["step"] for line in written(tmp_path)] == [0, 1, 10, 20, 20]


def test_going_back_drops_the_lines_of_the_steps_that_were_given_up(tmp_path: Path) -> None:
    recipe = make_recipe(steps=40, evaluation={"every": 20}, tracking={"wandb": "disabled", "log_every": 4})
    with Tracker(tmp_path / "run", recipe, FACTS) as tracker:
        train(tracker, 1, 22)
        state = json.loads(json.dumps(tracker.state()))
        train(tracker, 23, 30)
        tracker.go_back(22, state)
        tracker.event(22, "rolled back", "for a reason")
        train(tracker, 23, 40)
    with Tracker(tmp_path / "whole", recipe, FACTS) as tracker:
        train(tracker, 1, 40)
    event = {"step": 22, "event": "rolled back", "text": "for a reason"}
    assert [line for line in written(tmp_path / "run") if line != event] == written(tmp_path / "whole")
    assert written(tmp_path / "run").index(event) == 7  # after the lines of the steps 1, 4, …, 20 and an evaluation


def test_a_run_that_was_saved_before_its_first_step_keeps_what_came_before(tmp_path: Path) -> None:
    with Tracker(tmp_path, RECIPE, FACTS) as tracker:
        tracker.evaluation(0, {"loss/validation/caption": 9.0})
        state = tracker.state()
    with Tracker(tmp_path, RECIPE, FACTS, 0, state) as tracker:
        train(tracker, 1, 2)
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
        train(tracker, 1, 20)
        tracker.event(20, "saved", "checkpoints/[step-20]")
    shown = capfd.readouterr().out
    assert "parameters/total   45,600,123" in shown
    assert shown.count(f"dropped: {DROPPED}\n") == 1 and shown.index("dropped: ") < shown.index("step 1/40")
    assert re.search(r"\nstep 10/40  loss 8\.\d{3}  2,182 tokens/s  1\d\.\d% dropped  \d s left\n", shown)
    assert "step 20: validation loss caption 4.500\n" in shown
    assert shown.endswith("step 20: saved: checkpoints/[step-20]\n") and "\x1b" not in shown


def test_of_a_dense_model_nothing_is_dropped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, make_recipe(model="m6-base"), {}):
        assert "dropped" not in capfd.readouterr().out


def test_on_a_terminal_there_is_one_live_line_which_an_error_ends(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.training.test_tracking import *\n"
        "with Tracker(Path(sys.argv[1]), RECIPE, FACTS) as tracker:\n"
        "    train(tracker, 1, 30); raise SystemExit(3)\n"
    )
    keyboard, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(keyboard, 65536):
                shown += piece
        except OSError:  # how Linux says that the other side was closed
            pass
    os.close(keyboard)
    text = shown.decode()
    assert process.returncode == 3
    assert "step 20: validation loss" in text and "step 20/40" not in text
    assert "30/40" in text and "left" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("where", ["recipe", "environment"])
def test_disabled_wandb_is_not_even_imported(tmp_path: Path, where: str) -> None:
    mode = "disabled" if where == "recipe" else "online"
    program = (
        "import sys; from pathlib import Path; from tests.training.fake_run import *\n"
        f"recipe = make_recipe(tracking={{'wandb': '{mode}'}})\n"
        "with Tracker(Path(sys.argv[1]), recipe, FACTS) as tracker:\n"
        "    tracker.step(make_record(1)); tracker.samples(1, make_samples()); tracker.close({})\n"
        "assert 'wandb' not in sys.modules and 'torch' not in sys.modules\n"
    )
    environment = os.environ | ({"WANDB_MODE": "disabled"} if where == "environment" else {})
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    assert not (tmp_path / "wandb").exists()


def test_a_resumed_run_continues_its_page_and_leaves_no_service(tmp_path: Path) -> None:
    recipe = make_recipe(steps=40, tracking={"wandb": "offline", "log_every": 5})
    with Tracker(tmp_path / "quick", recipe, FACTS) as tracker:
        train(tracker, 1, 20)
        tracker.routing(20, make_load())
        tracker.samples(20, make_samples())
        tracker.event(20, "saved")
        state = tracker.state()
        tracker.close({"loss": 2.0})
    with Tracker(tmp_path / "quick", recipe, FACTS, 20, state) as tracker:
        train(tracker, 21, 40)
    pages = list((tmp_path / "quick/wandb").glob(f"offline-run-*-{state['wandb']}/*.wandb"))
    assert pages and not list((tmp_path / "home").rglob("artifacts"))
    staged = [file for file in (tmp_path / "quick/wandb/data").rglob("*") if file.is_file()]
    assert {sample.image for sample in make_samples() if sample.image} <= {file.read_bytes() for file in staged}
    assert b"loss/validation/caption" in b"".join(page.read_bytes() for page in pages)
    assert not [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]


def test_without_an_account_the_page_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")  # wins over the recipe
    with Tracker(tmp_path, RECIPE, FACTS) as tracker:
        train(tracker, 1, 10)
        tracker.close({})
    warned = [line for line in capfd.readouterr().out.splitlines() if line.startswith("wandb: ")]
    assert len(warned) == 1
    assert warned[0].startswith("wandb: not logged in") and warned[0].endswith("; the page is kept offline")
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_an_unknown_wandb_mode_is_refused_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE='ofline': must be online, offline, disabled"):
        Tracker(tmp_path, RECIPE, FACTS)
    assert written(tmp_path) == [{"step": 7}]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, RECIPE, FACTS) as tracker:
        room, tracker._metrics = tracker._metrics, SimpleNamespace(write=full, flush=full, close=full)
        train(tracker, 1, 20)
        tracker._metrics = room
        train(tracker, 21, 40)
    said = [line for line in capfd.readouterr().out.splitlines() if "No space left" in line]
    assert said == ["metrics cannot be written (No space left on device): training goes on, make room"]
    assert written(tmp_path)[-1]["step"] == 40


def test_a_page_that_breaks_is_left_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(steps=40, tracking={"wandb": "offline"})
    with Tracker(tmp_path, recipe, FACTS) as tracker:
        broken = [make_samples()[0]._replace(image=b"no picture")]
        tracker.samples(1, broken)
        train(tracker, 1, 40)
    warned = [line for line in capfd.readouterr().out.splitlines() if line.startswith("wandb: ")]
    assert len(warned) == 1 and warned[0].endswith("; going on without it")
    assert written(tmp_path)[-1]["step"] == 40
    assert not [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]


def make_zone(powercap: Path, zone: str, name: str, microjoules: int) -> Path:
    folder = powercap / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_rapl_counts_each_domain_once_and_through_a_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    package = make_zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000)
    memory = make_zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    core = make_zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = make_zone(tmp_path, "intel-rapl:1", "psys", 0)
    twin = make_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    meter = EnergyMeter(tmp_path)
    assert meter.source == "rapl" and meter.joules() == 0
    for counter in (core, platform, twin):
        counter.write_text("500000000\n")
    memory.write_text("2000000\n")
    package.write_text("50000000\n")  # 900 J -> wrap at 1,000 J -> 50 J
    assert meter.joules() == pytest.approx(2 + 150)
    memory.write_text("3000000\n")
    assert meter.joules() == pytest.approx(3 + 150)
    package.unlink()
    assert meter.joules() is None and meter.source == "unavailable"


def test_a_counter_that_is_reset_counts_from_zero() -> None:
    readings = iter([500.0, 510.0, 4.0])
    counter = Counter(lambda: next(readings))
    assert counter.joules() == 10
    assert counter.joules() == 14


def test_no_counter_is_no_energy_rather_than_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    meter = EnergyMeter(tmp_path)
    assert meter.source == "unavailable" and meter.joules() is None
