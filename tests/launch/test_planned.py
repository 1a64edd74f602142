"""This machine as a cluster file, and a run's plan kept in its folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.measured_cluster import described
from launch.nodes import Place
from launch.planned import ROWS, fill_of, foretold, write_plan
from launch.planner.cluster import load_cluster
from launch.planner.plan import make_plan
from launch.planner.workload import Fill, load_work
from launch.run import Plan as Checked
from launch.run import TrainingRun, keep_plan, launch
from tests.made_machine import MACHINE
from training.data.corpus import Corpus
from training.ds_config import resolve
from training.errors import UserError
from training.recipe import Recipe
from training.run import PLAN, read_plan

MODEL = {"preset": "m6-tiny", "layers": 2, "hidden": 64, "ffn": 128, "experts": 8, "text_vocab": 540}


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(described(MACHINE, ranks=2)))
    return str(path)


def recipe(corpus: Corpus, **changes: object) -> Recipe:
    values = {
        "model": MODEL, "data": str(corpus.folder.parent), "steps": 10, "global_batch": 16, "text_positions": 64,
        "tasks": {"caption": 1, "poem": 1}, "ds": {"train_micro_batch_size_per_gpu": 4},
    }  # fmt: skip
    return Recipe(**values | changes)


def test_a_machine_of_ranks_is_a_cluster_whose_devices_share_its_memory(cluster: str) -> None:
    found = load_cluster(cluster)
    hardware = found.hardware
    assert (found.devices, found.gpus_per_node, hardware.is_cpu) == (2, 0, True)
    assert hardware.devices * hardware.device_bytes == hardware.host_bytes == 24e9
    assert hardware.host_bandwidth == hardware.devices * hardware.device_bandwidth
    assert hardware.peak("bf16") == 180e9 and hardware.process_bytes == 450e6


def test_a_cpus_memory_is_counted_once_and_what_is_short_is_told(cluster: str) -> None:
    plan = make_plan(load_work("m6-t-1.4b", load_cluster(cluster), "ds_configs/cpu.json", None, [], False))
    need = 2 * plan.terms["memory.device_bytes"].value + plan.terms["memory.host_bytes_per_node"].value
    assert not plan.fits and f"{need / 1e9:,.1f} GB a node are needed, 24.0 GB are there" in plan.limits[0]


def test_rows_that_are_not_full_take_less_time_and_the_same_memory(cluster: str) -> None:
    full, sparse = (
        make_plan(load_work("m6-tiny", load_cluster(cluster), "ds_configs/cpu.json", None, [], False, Fill(filled)))
        for filled in (1.0, 0.4)
    )
    assert sparse.terms["step.seconds"].value < 0.8 * full.terms["step.seconds"].value
    assert sparse.terms["memory.device_bytes"].value == full.terms["memory.device_bytes"].value
    assert sparse.work.usual.tokens == pytest.approx(0.4 * full.work.usual.tokens)
    scores = [plan.terms["flops.scores"].value * plan.work.usual.tokens for plan in (full, sparse)]
    assert scores[0] == pytest.approx(scores[1])  # attention alone sees what is empty


def test_the_share_that_rows_fill_is_that_of_their_tokens(sample_corpus: Corpus) -> None:
    from training.data.batches import Collator
    from training.data.order import training_order

    wanted = recipe(sample_corpus)
    order, model = training_order(sample_corpus, wanted), wanted.model_shape()
    batch = Collator(sample_corpus, model)([order.row(place) for place in range(ROWS)], 64)
    tokens = int((batch["length_B"] + model.image_patches * batch["has_image_B"]).sum())
    found = fill_of(wanted, ranks=2, micro_batch=4)
    assert found.held == pytest.approx(tokens / (ROWS * (model.image_patches + 64)))
    assert found.targets == pytest.approx(int((batch["labels_BT"] >= 0).sum()) / tokens)
    own = batch["length_B"] + model.image_patches * batch["has_image_B"]
    shares = own.view(-1, 2, 4).sum(2).float()
    assert found.uneven == pytest.approx(float(shares.amax(1).mean() / shares.mean())) and found.uneven > 1


def test_a_plan_is_kept_by_the_names_that_a_run_has_for_its_own_figures(
    sample_corpus: Corpus, cluster: str, tmp_path: Path
) -> None:
    write_plan(tmp_path / "run", recipe(sample_corpus), cluster, world=2)
    kept = json.loads((tmp_path / "run" / PLAN).read_text())
    [stage] = kept["stages"]
    metrics = read_plan(tmp_path / "run", delinked=False)["metrics"]
    assert kept["cluster"] == cluster and metrics == stage["metrics"] and 0 < stage["filled"] < 1
    for estimate in metrics.values():
        assert 0 < estimate["low"] <= estimate["value"] <= estimate["high"]
    step, tokens = metrics["step_seconds"]["value"], metrics["tokens_per_second"]["value"]
    model = recipe(sample_corpus).model_shape()
    assert step * tokens == pytest.approx(stage["filled"] * 16 * (model.image_patches + 64))
    assert metrics["energy/joules_per_token"]["value"] == pytest.approx(stage["watts"] / tokens)


def test_a_run_that_delinks_is_planned_in_both_its_stages(sample_corpus: Corpus, cluster: str, tmp_path: Path) -> None:
    shared = recipe(sample_corpus, model=MODEL | {"share_layers": True}, delink={"after": 5})
    write_plan(tmp_path, shared, cluster, world=2)
    before, after = (read_plan(tmp_path, delinked)["metrics"]["memory/host_bytes"] for delinked in (False, True))
    assert after["value"] > before["value"]


def test_a_plan_for_another_number_of_ranks_is_refused(sample_corpus: Corpus, cluster: str) -> None:
    with pytest.raises(UserError, match=r"here\.yaml: has 2 devices, and this run 4 ranks; plan for as many"):
        foretold(recipe(sample_corpus), cluster, world=4)


def test_a_plan_of_another_run_or_of_other_ranks_goes(sample_corpus: Corpus, cluster: str, tmp_path: Path) -> None:
    small = recipe(sample_corpus)
    checked = Checked(small, tmp_path, Path(small.data), resolve(small, 2, 0, tmp_path), Path("cpu.json"))
    plain = TrainingRun(Path("r.yaml"))
    asked, resumed = replace(plain, cluster=cluster), replace(plain, resume=True)
    turns = ((asked, 2, True), (resumed, 2, True), (resumed, 1, False), (asked, 2, True), (plain, 2, False))
    for run, world, kept in turns:
        keep_plan(checked, run, world)
        assert (tmp_path / PLAN).exists() == kept


def test_a_dry_run_checks_the_cluster_and_tells_the_plan(
    sample_corpus: Corpus,
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(yaml.safe_dump(recipe(sample_corpus).model_dump(mode="json")))
    launch(TrainingRun(Path("r.yaml"), cluster=cluster), Place(2), dry_run=True)
    shown = capsys.readouterr().out
    assert " s a step (" in shown and f"--cluster {cluster}" in shown
    with pytest.raises(UserError, match="has 2 devices, and this run 1 ranks"):
        launch(TrainingRun(Path("r.yaml"), cluster=cluster), Place(1), dry_run=True)
    assert not list(tmp_path.glob("runs/*"))
