"""What `m6 doctor` finds of a CPU by small trainings, and the cluster file that it writes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import measured_cluster, small_jobs
from launch.measured_cluster import described, write_cluster
from launch.nodes import Place
from launch.planner.cluster import Cluster, Reached, load_cluster
from launch.small_jobs import JOBS, planned, reached, with_reached
from tests.made_machine import MACHINE
from tests.ranks import run_ranks
from training.errors import UserError

SHARES = {
    "products": 0.9,
    "passes": 0.2,
    "weights": 0.3,
    "states": 0.5,
    "gathers": 0.7,
    "layer_seconds": 0.008,
    "expert_seconds": 3e-4,
}


FACTORS = (1.1, 1.5, 0.7, 1.4, 0.8, 1.3, 0.7)


def made_cluster() -> Cluster:
    return Cluster.model_validate(described(MACHINE, ranks=2))


def test_the_shares_that_made_the_steps_are_found() -> None:
    """By the jobs' seconds alone: none of the seven hides behind another."""
    shares = {name: value * factor for (name, value), factor in zip(SHARES.items(), FACTORS, strict=True)}
    cluster = made_cluster()
    real = with_reached(cluster, Reached(precision="bf16", **shares))
    steps = {name: planned(name, real) for name in JOBS}
    found = with_reached(cluster, reached(cluster, steps))
    for name, step in steps.items():
        assert tuple(planned(name, found)) == pytest.approx(tuple(step), rel=0.05)
    assert found.device.reached
    for name, share in shares.items():
        assert getattr(found.device.reached, name) == pytest.approx(share, rel=0.35), name


def one_job() -> dict[str, small_jobs.Step]:
    """On a rank: a step of the smallest job."""
    import torch.distributed as dist

    from training.start import init_distributed

    init_distributed()
    small_jobs.JOBS = {"layers": JOBS["layers"]}
    return small_jobs.measured(dist.get_rank(), dist.get_world_size())


def test_small_jobs_are_trained_by_the_real_engine() -> None:
    for found in run_ranks(2, one_job):
        assert found.keys() == {"layers"} and 0 < found["layers"].optimizer < found["layers"].whole < 60


def test_the_file_holds_what_small_jobs_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = with_reached(made_cluster(), Reached(precision="bf16", **SHARES))
    steps = {name: planned(name, real) for name in JOBS}
    asked: list[Any] = []

    def measure(nodes: Any, small_jobs: bool) -> dict[str, Any]:
        asked.append(small_jobs)
        return {"here": MACHINE | {"small_jobs": steps}}

    monkeypatch.setattr(measured_cluster, "measure", measure)
    monkeypatch.setattr(measured_cluster, "count_gpus", lambda: 0)
    write_cluster(Place(2), target := tmp_path / "here.yaml")
    cluster = load_cluster(str(target))
    assert asked == [True] and cluster.device.reached and cluster.device.reached.precision == "bf16"
    assert planned("tokens", cluster).whole == pytest.approx(steps["tokens"].whole, rel=0.03)
    assert not any("reached" in remark for remark in cluster.assumed)
    told = capsys.readouterr().out
    assert all(name in told for name in JOBS) and "use it by m6 plan" in told
    with pytest.raises(UserError, match="exists"):
        write_cluster(Place(2), target)


def test_a_file_without_it_is_told_in_the_plan() -> None:
    [remark] = [remark for remark in made_cluster().assumed if "reached" in remark]
    assert "m6 doctor --write-cluster" in remark


def test_a_gpu_has_no_such_thing(tmp_path: Path) -> None:
    values = yaml.safe_load(Path("launch/clusters/h100-80g-x512.yaml").read_text())
    values["device"]["reached"] = SHARES | {"precision": "bf16"}
    (tmp_path / "gpu.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match="reached: is of a CPU alone") as told:
        load_cluster(str(tmp_path / "gpu.yaml"))
    assert "\n" not in str(told.value)
