"""A run's pages, as their own files say: wandb's and TensorBoard's, both read back."""

import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from wandb.proto.wandb_internal_pb2 import Record

from tests.training.fake_run import FACTS, TASKS, learn, make_load, make_recipe, make_record, make_samples, written
from training.checkpoint import Outcome
from training.dashboards import page_name
from training.errors import UserError
from training.tracking import Tracker

pytestmark = pytest.mark.usefixtures("no_account")

RECIPE = make_recipe(steps=40, evaluation={"every": 20})
PLAN = {
    "step_seconds": {"value": 1.25, "low": 1.0, "high": 1.5},
    "memory/host_bytes": {"value": 3e9, "low": 2e9, "high": 4e9},
}


SAVE = Outcome(35, "", "", 0.5, 2.0, 1.0, 10**6)  # told five steps late
SHOWN = {
    "loss/loss", *(f"loss/{task}" for task in TASKS), "validation/caption", "experts/load", "experts/load_cv",
    "experts/drop_rate", "speed/step_seconds", "speed/tokens_per_second", "speed/flops_utilization",
    "memory/device_bytes", "memory/host_bytes", "optimizer/lr", "optimizer/grad_norm", "progress/tokens",
    "progress/position", "samples",
    "plan/step_seconds", "plan/memory_host_bytes", "events/saved", "events/all",
    "save/stall_seconds", "save/write_seconds", "save/verify_seconds",
}  # fmt: skip


def history(page: Path) -> Iterator[dict[str, str]]:
    """What was logged on a page of wandb, as JSON by key: protobuf's records in a log of LevelDB's kind."""
    record = b""
    for kind, piece in _pieces(page.read_bytes()):
        record = piece if kind in (FULL, FIRST) else record + piece
        if kind in (FULL, LAST):
            items = Record.FromString(record).history.item
            if items:
                yield {".".join(item.nested_key) or item.key: item.value_json for item in items}


FULL, FIRST, LAST, BLOCK = 1, 2, 4, 32768


def _pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 7  # after the file's header
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        yield kind, data[place + 7 : place + 7 + size]
        place += 7 + size


def few(told: list[dict[str, str]]) -> set[str]:
    """The keys on a page that are ours."""
    names = (key.split(".")[0].removesuffix("_table") for values in told for key in values)
    return {name for name in names if not name.startswith("_")}


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard shows of its files: name, step, value. A new file takes back what was after its start."""
    found: list[tuple[str, int, float]] = []
    for path in sorted(folder.rglob("*tfevents*"), key=lambda path: path.stat().st_mtime):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + size])
            if event.session_log.status == SessionLog.START:
                found = [one for one in found if one[1] < event.step]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            place += size + 16
    return found


def test_a_key_has_one_name_on_every_page_and_few_are_shown() -> None:
    names = {key: page_name(key) for key in make_record(1)}
    assert names["loss"] == "loss/loss" and names["loss/caption"] == "loss/caption"
    assert page_name("loss/validation/caption") == "validation/caption"
    assert names["moe/load_cv"] == "experts/load_cv" and names["moe/load_cv/image"] is None
    assert names["step"] is None and names["memory/host_bytes"] == "memory/host_bytes"
    shown = Counter(name for name in names.values() if name)
    assert set(shown.values()) == {1}


def test_tensorboards_files_hold_the_same_curves_the_plan_the_load_and_the_events(tmp_path: Path) -> None:
    recipe = make_recipe(steps=40, tracking={"wandb": "disabled", "tensorboard": True, "log_every": 5})
    with Tracker(tmp_path, recipe, FACTS, plan=PLAN) as tracker:
        learn(tracker, 1, 20)
        tracker.routing(20, make_load())
        tracker.samples(20, make_samples())
        tracker.event(20, "saved")
        state = tracker.state()
    with Tracker(tmp_path, recipe, FACTS, 20, state, PLAN) as tracker:
        learn(tracker, 21, 35)
        tracker.go_back(30, tracker.state() | {"window": []})
        learn(tracker, 31, 40)
        tracker.event(40, "skipped step")
    found = scalars(tmp_path / "tensorboard")
    logged = {line["step"]: line["loss"] for line in written(tmp_path) if "loss" in line}
    assert {step: value for name, step, value in found if name == "loss/loss"} == pytest.approx(logged)
    assert {"events/saved", "events/skipped_step", "experts/load", "validation/caption"} <= {name for name, *_ in found}
    for curve, value in (("planned", 1.25), ("actual", 1.1)):
        shown = {step: value for name, step, value in found if name == f"plan/step_seconds/{curve}"}
        assert shown == pytest.approx(dict.fromkeys(logged, value))
    assert {name for name, *_ in found if not name.startswith(("samples", "events", "plan", "custom_scalars"))} <= SHOWN


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
    with Tracker(tmp_path / "quick", recipe, FACTS, plan=PLAN) as tracker:
        learn(tracker, 1, 20)
        tracker.routing(20, make_load())
        tracker.samples(20, make_samples())
        tracker.event(20, "saved")
        state = tracker.state()
        tracker.close({"loss": 2.0})
    with Tracker(tmp_path / "quick", recipe, FACTS, 20, state, PLAN) as tracker:
        learn(tracker, 21, 40)
        tracker.saved(SAVE)
    pages = list((tmp_path / "quick/wandb").glob(f"offline-run-*-{state['wandb']}*/*.wandb"))
    assert pages and not list((tmp_path / "home").rglob("artifacts"))
    staged = [file for file in (tmp_path / "quick/wandb/data").rglob("*") if file.is_file()]
    assert {sample.image for sample in make_samples() if sample.image} <= {file.read_bytes() for file in staged}
    told = [said for page in sorted(pages) for said in history(page)]
    assert [values["_step"] for values in told if "loss/loss" in values] == ["1", *map(str, range(5, 41, 5))]
    assert few(told) <= SHOWN and {"validation/caption", "experts/load", "events/saved", "plan/step_seconds"} <= few(
        told
    )
    assert [values["events/saved"] for values in told if "events/saved" in values] == ["1", "2"]
    assert not [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]


def test_without_an_account_the_page_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")  # wins over the recipe
    with Tracker(tmp_path, RECIPE, FACTS) as tracker:
        learn(tracker, 1, 10)
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


def test_a_page_that_breaks_is_left_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(steps=40, tracking={"wandb": "offline"})
    with Tracker(tmp_path, recipe, FACTS) as tracker:
        broken = [make_samples()[0]._replace(image=b"no picture")]
        tracker.samples(1, broken)
        learn(tracker, 1, 40)
    warned = [line for line in capfd.readouterr().out.splitlines() if line.startswith("wandb: ")]
    assert len(warned) == 1 and warned[0].endswith("; going on without it")
    assert written(tmp_path)[-1]["step"] == 40
    assert not [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
