"""`m6 rehearse`: what is refused, and one whole rehearsal by the command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.rehearse import Job, check_room, recipe_of, rehearse_rank
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.hidden=64", "model.ffn=128", "model.experts=8", "model.layers=4", "text_positions=32"]


def job(model: str = "m6-tiny", world: int = 8, rank: int = 0, layers: int | None = None, *changes: str) -> Job:
    return Job(recipe_of(None, model, world, changes, False), world, rank, layers)


def refused(work: Job) -> str:
    with pytest.raises(UserError) as error:
        rehearse_rank(work, as_json=False)
    return str(error.value)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


def test_a_rank_outside_the_job_is_refused() -> None:
    assert refused(job(rank=8)) == "--rank 8: a job of 8 rank(s) has 0 to 7"


def test_layers_that_the_model_has_not_are_refused() -> None:
    assert refused(job(layers=5)) == "--layers 5: the model has 4; give at most that many"
    assert "give at least 2" in refused(job(layers=1))


def test_expert_parallelism_that_does_not_divide_is_refused() -> None:
    message = refused(job("m6-tiny", 8, 0, None, "ds.expert_parallel.autoep_size=3"))
    assert "autoep_size=3 does not divide the 8 rank(s)" in message


def test_a_policy_that_is_wrong_or_is_not_of_so_many_layers_is_refused() -> None:
    wrong = refused(job("m6-tiny", 8, 0, None, "ds.m6.offload.parameters.device=99"))
    assert wrong.endswith("the model has the layers 0 to 3")
    beyond = refused(job("m6-tiny", 8, 0, 2, "ds.m6.offload.parameters.cpu=3"))
    assert beyond.endswith("the model has the layers 0 to 0 (--layers builds 1 of 4)")
    budget = ("ds.m6.offload.optimizer.device=auto", "ds.m6.offload.device_bytes=1e9")
    assert "m6.offload.device_bytes with --layers" in refused(job("m6-tiny", 8, 0, 2, *budget))


def test_nothing_to_rehearse_is_refused() -> None:
    with pytest.raises(UserError, match="give --model"):
        recipe_of(None, None, 2, [], False)
    with pytest.raises(UserError, match="--delinked: the recipe has no"):
        recipe_of(None, "m6-tiny", 2, [], True)


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available, total = 23 * 10**9, 24 * 10**9

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    ten_trillion = job("m6-10t", 512, 5, None, "ds_config=ds_configs/cpu-offload.json", "ds.bf16.enabled=true")
    with pytest.raises(UserError) as error:
        check_room(ten_trillion, gpus=0)
    needs = r"rank 5 of 512 with 48 layers needs 35\d GB of memory, of which 23 GB are free; --layers 2 would fit"
    assert re.fullmatch(needs, str(error.value))
    check_room(Job(ten_trillion.recipe, 512, 5, 2), gpus=0)
    Memory.available = 10**9
    with pytest.raises(UserError, match="of which 1 GB are free; not even --layers 2 would fit"):
        check_room(ten_trillion, gpus=0)


def test_the_command_tells_json(tmp_path: Path) -> None:
    arguments = ["rehearse", "--model", "m6-tiny", "--world", "4", "--layers", "2", "--json", *SMALL]
    command = [sys.executable, "-c", "from launch.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["layers"] == {"model": 4, "built": 2, "extrapolated": True}
    assert [one["layers"] for one in told["built"]] == [1, 2]
    assert set(told["memory"]) >= {"device_bytes", "host_bytes", "nvme_bytes"}
    assert told["step"]["seconds"] > 0
    assert told["collectives"]["all_to_all"]["bytes"] == 2 * told["built"][1]["collectives"]["all_to_all"]["bytes"]
    assert told["memory"]["host_bytes"] > told["built"][1]["memory"]["host_bytes"]
    assert "1 of 4 layers: building" in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_that_takes_all_memory_is_ended_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What counts as all is lowered to what is taken already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.rehearse.LEFT_SHARE", 1.0)
    message = refused(job("m6-tiny", 8, 0, 4, *SMALL, f"ds_config={ROOT}/ds_configs/cpu.json"))
    assert message == "rank 0 with 4 layers was ended: it has taken all memory but a trace; try --layers 3"
